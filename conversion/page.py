# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspections as one HTML page, which shows the weights at the token that the reader picks."""

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
    require_one_shape(inspections)
    checkpoints = []
    for inspection in inspections:
        counts = inspection.counts.tolist()
        # Weight times number of sources, in thousandths
        factors = (inspection.weights * inspection.counts[:, None, None] * 1000).nan_to_num(0).round().int()
        changes = inspection.loss_changes
        checkpoints.append(
            {
                "name": inspection.name,
                "loss": inspection.loss,
                "tokens": inspection.tokens,
                "factors": [rows[:, :count].tolist() for rows, count in zip(factors, counts)],
                "changes": None if changes is None else [row[:count].tolist() for row, count in zip(changes, counts)],
            }
        )
    data = {"sublayers": inspections[0].sublayers, "sources": inspections[0].sources, "checkpoints": checkpoints}
    # No text can end the element that it stands in
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("__DATA__", content)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
