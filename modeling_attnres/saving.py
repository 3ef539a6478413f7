# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A model card for what is saved or pushed while this package is imported: the code that travels opens no file."""

from contextlib import suppress
from functools import wraps
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .model_card import PLACEHOLDER, card_metadata, model_card
from .modeling_attnres import AttnResPreTrainedModel


_save_pretrained = AttnResPreTrainedModel.save_pretrained


@wraps(_save_pretrained)
def save_pretrained(self, save_directory: str, *args, **kwargs):
    _save_pretrained(self, save_directory, *args, **kwargs)
    # What the base is and its licence are known from the card beside the weights alone
    card = Path(save_directory) / "README.md"
    if kwargs.get("is_main_process", True) and Path(self.name_or_path, "README.md").is_file() and not card.exists():
        card.write_text(self.model_card(), encoding="utf-8")


def _upload_modified_files(self, working_dir: str, repo_id: str, *args, **kwargs):
    """What `push_to_hub` calls. The card that transformers gives a new repository names no base and no licence."""
    card = Path(working_dir) / "README.md"
    if card_metadata(card.read_text(encoding="utf-8")).get("base_model") is None:
        card.write_text(self.model_card(repo_id), encoding="utf-8")
    return super(AttnResPreTrainedModel, self)._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def card_of_model(self, name: str = PLACEHOLDER) -> str:
    r"""
    The model card. Base and licence are those that the card of the checkpoint names from which this was loaded.

    Args:
        name (`str`, *optional*): the Hub id under which the model is to be found.

    Returns:
        `str`: Markdown, with metadata.
    """
    base_model, metadata, source = None, {}, self.name_or_path
    with suppress(OSError):  # it was loaded from nowhere, from what is not there any more, or from what has no card
        if PreTrainedConfig.get_config_dict(source)[0].get("model_type") != self.config.model_type:
            base_model = Path(source).name if Path(source).is_dir() else source
        metadata = card_metadata(Path(cached_file(source, "README.md")).read_text(encoding="utf-8"))
    if base_model is None:
        base_model = metadata.get("base_model")
    state = "`attnres inspect` shows how far its queries have come from zero, where they started."
    return model_card(self.config, base_model, metadata, state, "Saved by transformers from a loaded model.", name)


AttnResPreTrainedModel.save_pretrained = save_pretrained
AttnResPreTrainedModel._upload_modified_files = _upload_modified_files
AttnResPreTrainedModel.model_card = card_of_model
