# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A model card for what is saved or pushed while this package is imported: the code that travels opens no file."""

from contextlib import suppress
from functools import wraps
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from yaml import YAMLError

from .model_card import PLACEHOLDER, card_metadata, model_card
from .modeling_attnres import AttnResPreTrainedModel


# Of what `push_to_hub` of transformers writes where there is no card
TEMPLATE_TITLE = "# Model Card for Model ID"

_save_pretrained = AttnResPreTrainedModel.save_pretrained


@wraps(_save_pretrained)
def save_pretrained(self, save_directory: str, is_main_process: bool = True, **kwargs):
    # What the base is and its licence are known from the card beside the weights alone. Read first: the folder may be
    # the one it was loaded from, and pushing writes a template there
    card = self.model_card() if is_main_process and self.name_or_path else None
    _save_pretrained(self, save_directory, is_main_process, **kwargs)
    path = Path(save_directory) / "README.md"
    if card is not None and not path.exists():
        path.write_text(card, encoding="utf-8")


def _upload_modified_files(self, working_dir: str, repo_id: str, *args, **kwargs):
    """What `push_to_hub` calls. The template that transformers gives a new repository names no base and no licence."""
    path = Path(working_dir) / "README.md"
    template = path.read_text(encoding="utf-8")
    if TEMPLATE_TITLE in template:
        card = ModelCard(self.model_card(repo_id))
        card.data.tags = list(dict.fromkeys([*card.data.tags, *(card_metadata(template).get("tags") or [])]))
        path.write_text(str(card), encoding="utf-8")
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
    # It was loaded from nowhere, from what is not there any more, or from what has no card that can be read
    with suppress(OSError, ValueError, YAMLError):
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
