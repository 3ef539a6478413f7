# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Which weights a picture or page of `attnres inspect` shows: it holds their digest."""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePath

import torch
from safetensors import safe_open

from .configuration_attnres import ATTN_RES_FIELDS, AttnResConfig


# The two that a model card shows
HEAT_MAP, PAGE = "weights.png", "page.html"
# Keyword of a PNG file's text, name of a page's `meta`
MARKER = "attnres-weights"


def weights_digest(config: AttnResConfig, shards: Iterable[Path]) -> str:
    r"""
    A digest of what a checkpoint computes with, the same in whatever float format and however many files.

    Args:
        config ([`AttnResConfig`]): its configuration.
        shards (`Iterable[Path]`): its safetensors files.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr([getattr(config, name) for name in ATTN_RES_FIELDS]).encode())
    # By the names that transformers saves: a base's own may lack `model.`, or hold a tied head twice
    files = {
        name.removeprefix("model."): (file, name)
        for path in shards
        for file in [safe_open(path, "pt")]
        for name in file.keys()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    for name in sorted(files):
        tensor = files[name][0].get_tensor(files[name][1])
        digest.update(f"{name} {list(tensor.shape)}".encode())
        # A large one is never there in float32 as a whole
        for part in tensor.flatten().split(2**24):
            part = part.float() if part.dtype in (torch.bfloat16, torch.float16, torch.float64) else part
            digest.update(part.view(torch.uint8).numpy())
    return digest.hexdigest()


def sort_pictures(
    folder: Path, paths: Iterable[str], config: AttnResConfig, shards: Iterable[Path]
) -> tuple[list[str], list[str]]:
    r"""
    Looks among a folder's files for pictures and pages of `attnres inspect`, with a warning about those to leave out.
    Any other picture or page is none of ours, unless it has the name of one that the card would show.

    Args:
        folder (`Path`): the folder.
        paths (`Iterable[str]`): files in it.
        config ([`AttnResConfig`]), shards (`Iterable[Path]`): of the checkpoint that is to be shown.

    Returns:
        `tuple[list[str], list[str]]`: those that show this checkpoint, and those that show another or an unknown one.
    """
    shown = {path: _shown(folder / path) for path in paths if PurePath(path).suffix.lower() in (".png", ".html")}
    ours = {path: digest for path, digest in shown.items() if digest or PurePath(path).name in (HEAT_MAP, PAGE)}
    digest = weights_digest(config, shards) if any(ours.values()) else ""
    fitting = [path for path in ours if ours[path] == digest != ""]
    others = [path for path in ours if path not in fitting]
    if others:
        warnings.warn(
            f"{', '.join(others)} in {folder} left out: made by `attnres inspect` of other weights, or not by it. To "
            "show what is uploaded: `attnres inspect CHECKPOINT --output CHECKPOINT/inspection --html "
            "CHECKPOINT/inspection/page.html`, then `attnres push CHECKPOINT NAME`.",
            stacklevel=3,
        )
    return fitting, others


def _shown(path: Path) -> str:
    found = re.search(rf'{MARKER}(?:\0|" content=")([0-9a-f]{{64}})'.encode(), path.read_bytes())
    return found[1].decode() if found else ""
