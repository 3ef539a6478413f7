# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspections as one HTML page, on which one picks a token."""

import json
from pathlib import Path

from .inspect_checkpoint import Inspection, require_one_shape


def write_page(inspections: list[Inspection], path: str | Path) -> Path:
    r"""
    Writes one or more inspections, of one shape, as a page that needs no server, no network and no other file.

    Args:
        inspections (`list[Inspection]`): as [`inspect_checkpoint`] gives them.
        path (`str` or `Path`): the file to write.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: the inspections are not of one shape.
    """
    from modeling_attnres.inspected import MARKER

    require_one_shape(inspections)
    checkpoints = []
    for inspection in inspections:
        counts = (~inspection.mean_weights.isnan()).sum(-1).tolist()
        thousandths = (inspection.weights * 1000).nan_to_num(0).round().int()
        changes = inspection.loss_changes
        checkpoints.append(
            {
                "name": inspection.name,
                "loss": inspection.loss,
                "tokens": inspection.tokens,
                "weights": [rows[:, :count].tolist() for rows, count in zip(thousandths, counts)],
                "changes": None if changes is None else [row[:count].tolist() for row, count in zip(changes, counts)],
            }
        )
    data = {"sublayers": inspections[0].sublayers, "sources": inspections[0].sources, "checkpoints": checkpoints}
    # No text can end the element that it stands in
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # The text last: it may hold any of these words
    for word, value in (("__MARKER__", MARKER), ("__DIGEST__", inspections[-1].digest), ("__DATA__", content)):
        page = page.replace(word, value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
