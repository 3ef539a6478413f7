# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A model card for what is saved or pushed while this package is imported: the code that travels opens no file."""

import os
import shutil
from contextlib import suppress
from functools import wraps
from math import inf
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .configuration_attnres import ATTN_RES_FIELDS, AttnResConfig
from .model_card import (
    DEPTH_ATTENTION,
    MADE,
    PLACEHOLDER,
    VERIFICATION,
    card_metadata,
    for_hub,
    model_card,
    section,
    with_pictures,
    with_section,
)
from .modeling_attnres import AttnResPreTrainedModel


# Of what `push_to_hub` of transformers writes where there is no card
TEMPLATE_TITLE = "# Model Card for Model ID"
SAVED = "Saved by transformers from a loaded model."
# Where `attnres inspect` is asked to put them
PICTURES = ("inspection/weights.png", "inspection/page.html")

_from_pretrained = AttnResPreTrainedModel.from_pretrained.__func__
_save_pretrained = AttnResPreTrainedModel.save_pretrained


@classmethod
@wraps(_from_pretrained)
def from_pretrained(cls, *args, **kwargs):
    loaded = _from_pretrained(cls, *args, **kwargs)
    # A model that is made of a configuration alone has the configuration's `name_or_path`, and nothing else from there
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model._source = model.name_or_path
    return loaded


@wraps(_save_pretrained)
def save_pretrained(self, save_directory: str, is_main_process: bool = True, *args, **kwargs):
    # What the base is and its licence are known from the card beside the weights alone. Read first: the folder may be
    # the one it was loaded from, and pushing writes a template there
    self._card = self.model_card() if is_main_process else None
    _save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
    path = Path(save_directory) / "README.md"
    if self._card is not None and self._source and path.parent.is_dir() and not path.exists():
        path.write_text(self._card, encoding="utf-8")


def _upload_modified_files(self, working_dir: str, repo_id: str, *args, **kwargs):
    """What `push_to_hub` calls. The template that transformers gives a new repository names no base and no licence."""
    path = Path(working_dir) / "README.md"
    card = path.read_text(encoding="utf-8")
    is_new = TEMPLATE_TITLE in card and self._card is not None
    if is_new:
        tags = card_metadata(card).get("tags") or []
        own = ModelCard(for_hub(self._card, repo_id))
        own.data.tags = list(dict.fromkeys([*own.data.tags, *tags]))
        card = str(own)
    if is_new or section(card, DEPTH_ATTENTION) is not None:
        # Those of the earlier weights would stay there otherwise
        card = with_pictures(card, _pictures(Path(self._source), Path(working_dir)))
    path.write_text(card, encoding="utf-8")
    return super(AttnResPreTrainedModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _pictures(source: Path, folder: Path) -> list[str]:
    """Heat map and page from the source's folder, copied, if the weights in the other are still the source's."""
    written = max((file.stat().st_mtime for file in source.glob("*.safetensors")), default=inf)
    # One that is older than the weights shows others
    found = [path for path in PICTURES if (source / path).is_file() and (source / path).stat().st_mtime >= written]
    if not found or source.samefile(folder) or not _same_model(source, folder):
        return []
    for path in found:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return found


def _same_model(source: Path, folder: Path) -> bool:
    """Whether a folder has the source's depth attention, and each tensor is the source's, in whatever float format."""
    theirs, ours = (
        {name: file for path in place.glob("*.safetensors") for file in [safe_open(path, "pt")] for name in file.keys()}
        for place in (source, folder)
    )
    return (
        _attn_res_fields(source) == _attn_res_fields(folder)
        and ours.keys() == theirs.keys()
        and all(
            torch.equal(file.get_tensor(name).float(), theirs[name].get_tensor(name).float())
            for name, file in ours.items()
        )
    )


def _attn_res_fields(source: str | Path) -> dict[str, Any]:
    config = AttnResConfig.from_pretrained(source)
    return {name: getattr(config, name) for name in ATTN_RES_FIELDS}


def card_of_model(self, name: str = PLACEHOLDER) -> str:
    r"""
    The model card. Base, licence, how it was made and verified are what the card of the checkpoint says from which this
    was loaded.

    Args:
        name (`str`, *optional*): the Hub id under which the model is to be found.

    Returns:
        `str`: Markdown, with metadata.
    """
    base_model, metadata, made, verification, source = None, {}, "", None, self._source
    # It was loaded from nowhere, from what is not there any more, or from what has no card that can be read
    with suppress(Exception):
        is_base = PreTrainedConfig.get_config_dict(source)[0].get("model_type") != self.config.model_type
        if is_base:
            base_model = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
        card = Path(cached_file(source, "README.md")).read_text(encoding="utf-8")
        metadata = card_metadata(card)
        if not is_base:
            base_model = metadata.get("base_model")
            # Of a model with another depth attention none of it is true
            if _attn_res_fields(source) == {name: getattr(self.config, name) for name in ATTN_RES_FIELDS}:
                made, verification = section(card, MADE) or "", section(card, VERIFICATION)
    # Of several times that it was saved, the last
    made = f"{made.partition(SAVED)[0].strip()}\n\n{SAVED}".strip()
    state = "`attnres inspect` shows how far its queries have come from zero, where they started."
    card = model_card(self.config, base_model, metadata, state, made, name)
    return with_section(card, VERIFICATION, verification) if verification else card


AttnResPreTrainedModel._source = ""
AttnResPreTrainedModel.from_pretrained = from_pretrained
AttnResPreTrainedModel.save_pretrained = save_pretrained
AttnResPreTrainedModel._upload_modified_files = _upload_modified_files
AttnResPreTrainedModel.model_card = card_of_model
