# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A model card for what is saved or pushed while this package is imported: the code that travels opens no file."""

import json
import os
import re
import shutil
import warnings
from contextlib import suppress
from functools import wraps
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import cached_file

from .configuration_attnres import ATTN_RES_FIELDS, AttnResConfig
from .inspected import HEAT_MAP, PAGE, sort_pictures
from .model_card import (
    DEPTH_ATTENTION,
    MADE,
    PLACEHOLDER,
    TITLE,
    VERIFICATION,
    card_metadata,
    carried_licence,
    for_hub,
    hub_snapshot,
    lies_in,
    local_licence,
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
PICTURES = (f"inspection/{HEAT_MAP}", f"inspection/{PAGE}")
# By which `from_pretrained` finds a file
_PLACE = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")

_from_pretrained = AttnResPreTrainedModel.from_pretrained.__func__
_save_pretrained = AttnResPreTrainedModel.save_pretrained


class Source(NamedTuple):
    """What a model was loaded from, as it was then: a save reads no other revision, and needs no network."""

    folder: str
    config: dict[str, Any]
    card: str


@classmethod
@wraps(_from_pretrained)
def from_pretrained(cls, *args, **kwargs):
    source = _read_source(*args, **kwargs)
    loaded = _from_pretrained(cls, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model._source = source
    return loaded


def _read_source(pretrained_model_name_or_path=None, *args, config=None, **kwargs) -> Source | None:
    if pretrained_model_name_or_path is None:
        return None
    place = {key: kwargs[key] for key in _PLACE if key in kwargs}
    # Where AutoModel of an older transformers keeps the commit that it reads
    if commit := getattr(config, "_commit_hash", None):
        place["revision"] = commit
    name = str(pretrained_model_name_or_path)
    folder, config_dict, snapshot = os.path.abspath(name), {}, None
    # From places where one of the two is not there, a model can be loaded all the same
    with suppress(Exception):
        path = Path(cached_file(name, "config.json", **place))
        folder, config_dict = os.path.abspath(path.parent), json.loads(path.read_text(encoding="utf-8"))
        snapshot = hub_snapshot(path)
    subfolder = place.pop("subfolder", "")
    # On the Hub the card lies at the root; Trainer leaves one in each of its checkpoints
    for card_folder in [""] if snapshot else dict.fromkeys([subfolder, ""]):
        with suppress(Exception):
            return Source(folder, config_dict, _read_card(name, snapshot, subfolder=card_folder, **place))
    return Source(folder, config_dict, "")


def _read_card(name: str, snapshot: tuple[str, str] | None, **place) -> str:
    if snapshot:
        place["revision"] = snapshot[1]
        known = try_to_load_from_cache(name, "README.md", cache_dir=place.get("cache_dir"), revision=snapshot[1])
        if known is None and not place.get("local_files_only"):
            # Without a network this ends at once, `cached_file` only after five tries
            with suppress(EntryNotFoundError):
                url = hf_hub_url(name, "README.md", revision=snapshot[1])
                get_hf_file_metadata(url, token=place.get("token"))
    path = Path(cached_file(name, "README.md", **place))
    if not lies_in(path.parent, path.name):
        warnings.warn(
            f"{path} is a link out of its folder: what it says of base and licence is not taken over.", stacklevel=5
        )
        return ""
    return path.read_text(encoding="utf-8")


@wraps(_save_pretrained)
def save_pretrained(self, save_directory: str, is_main_process: bool = True, *args, **kwargs):
    _save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
    path = Path(save_directory) / "README.md"
    # What the base is and its licence are known from the card beside the weights that were loaded alone
    if is_main_process and self._source is not None and path.parent.is_dir() and not os.path.lexists(path):
        path.write_text(self.model_card(), encoding="utf-8")
        _copy_licence(self, path.parent)


def _copy_licence(self, folder: Path) -> str | None:
    """Copies the file that the card of this model links to, from beside the weights that were loaded."""
    licence = local_licence(card_metadata(self.model_card()), self._source.folder) if self._source else None
    if licence and not os.path.lexists(folder / licence):
        shutil.copyfile(os.path.join(self._source.folder, licence), folder / licence)
    return licence


def _upload_modified_files(self, working_dir: str, repo_id: str, files_timestamps: dict[str, float], *args, **kwargs):
    """What `push_to_hub` calls. The template that transformers gives a new repository names no base and no licence."""
    path = Path(working_dir) / "README.md"
    card = path.read_text(encoding="utf-8")
    is_new = TEMPLATE_TITLE in card
    if is_new:
        tags = card_metadata(card).get("tags") or []
        own = ModelCard(for_hub(self.model_card(), repo_id))
        own.data.tags = list(dict.fromkeys([*own.data.tags, *tags]))
        card = str(own)
    if is_new or section(card, DEPTH_ATTENTION) is not None:
        # Those of the earlier weights would stay there otherwise
        card = with_pictures(card, _pictures(self, Path(working_dir)))
    path.write_text(card, encoding="utf-8")
    if licence := _copy_licence(self, path.parent):
        # It goes with the card that links to it: a repository that has a card has a licence of its own
        files_timestamps = {**files_timestamps, licence: -inf if is_new else inf}
    return super(AttnResPreTrainedModel, self)._upload_modified_files(
        working_dir, repo_id, files_timestamps, *args, **kwargs
    )


def _pictures(self, folder: Path) -> list[str]:
    """Heat map and page from where the model was loaded, copied, if they show what is pushed."""
    if self._source is None:
        return []
    source = Path(self._source.folder)
    found = [path for path in PICTURES if lies_in(source, path)]
    # `save_pretrained` into the folder sends what it wrote alone
    if not found or source.samefile(folder):
        return []
    fitting, _ = sort_pictures(source, found, self.config, sorted(folder.glob("*.safetensors")))
    for path in fitting:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return fitting


def _attn_res_fields(config: AttnResConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ATTN_RES_FIELDS}


def card_of_model(self, name: str = PLACEHOLDER) -> str:
    r"""
    The model card. Base, licence, how it was made and verified are what the card of the checkpoint said from which this
    was loaded.

    Args:
        name (`str`, *optional*): the Hub id under which the model is to be found.

    Returns:
        `str`: Markdown, with metadata.
    """
    base_model, base_name, licence, made, verification = None, "", {}, "", None
    source = self._source or Source("", {}, "")
    # It may have no card, or none that can be read
    with suppress(Exception):
        if source.config and source.config["model_type"] != self.config.model_type:
            snapshot = hub_snapshot(source.folder)
            base_model = snapshot and snapshot[0]
            base_name = os.path.basename(os.path.abspath(source.folder))
        metadata = card_metadata(source.card) if source.card else {}
        licence = carried_licence(metadata, source.folder)
        if source.config["model_type"] == self.config.model_type:
            base_model = metadata.get("base_model")
            if title := re.search(rf"^{TITLE.format('(.+)')}$", source.card, re.MULTILINE):
                base_name = title[1]
            # Of a model with another depth attention none of it is true
            if _attn_res_fields(AttnResConfig.from_dict(source.config)) == _attn_res_fields(self.config):
                made, verification = section(source.card, MADE) or "", section(source.card, VERIFICATION)
    # Of several times that it was saved, the last
    made = f"{made.partition(SAVED)[0].strip()}\n\n{SAVED}".strip()
    state = "Its queries were zero at first"
    if self._auto_class == "AutoModelForCausalLM":
        state += "; `attnres inspect` shows how far they have come"
    # A class of the user's own may have none
    auto_class = self._auto_class or "AutoModel"
    card = model_card(self.config, auto_class, base_model, licence, f"{state}.", made, name, base_name)
    return with_section(card, VERIFICATION, verification) if verification else card


AttnResPreTrainedModel._source = None
AttnResPreTrainedModel.from_pretrained = from_pretrained
AttnResPreTrainedModel.save_pretrained = save_pretrained
AttnResPreTrainedModel._upload_modified_files = _upload_modified_files
AttnResPreTrainedModel.model_card = card_of_model
