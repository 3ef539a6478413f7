# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card: base, license, how to load the model, how it was made."""

import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from modeling_attnres import AttnResConfig

from .reading import CARD, hub_snapshot, leads_out_of


# The card in a folder does not know yet how the repository will be called; `push` does
PLACEHOLDER = "path/to/this/checkpoint"
# The name that the Hub gives to the task of each Auto class
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def card_metadata(path: Path) -> dict[str, Any]:
    """
    The metadata at the head of a model card.

    Raises:
        `ValueError`: it cannot be read.
    """
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # noqa: BLE001  the YAML parser's own errors, and others
        raise ValueError(f"The metadata at the head of {path} cannot be read: {error}") from error


def carried_license(folder: Path) -> dict[str, Any]:
    """The license in the metadata of the card in this folder. A link to a file that does not come along is left out."""
    if not (folder / CARD).is_file():
        return {}
    try:
        metadata = card_metadata(folder / CARD)
    except ValueError as error:
        warnings.warn(f"{error} The license was not taken over.", stacklevel=4)
        return {}
    kept = {key: metadata[key] for key in ("license", "license_name", "license_link") if key in metadata}
    link, snapshot = kept.get("license_link"), hub_snapshot(folder)
    if isinstance(link, str) and "://" not in link:
        if snapshot:
            kept["license_link"] = f"https://huggingface.co/{snapshot[0]}/blob/{snapshot[1]}/{quote(link, safe='/#')}"
        elif not (folder / link).is_file() or leads_out_of(folder, folder / link):
            del kept["license_link"]
    return kept


def model_card(
    config: AttnResConfig,
    auto_class: str,
    base: str,
    license: dict[str, Any],
    state: str,
    made: str,
    base_id: str | None = None,
) -> str:
    r"""
    The card of an AttnRes checkpoint.

    Args:
        config ([`AttnResConfig`]): its configuration.
        auto_class (`str`): the Auto class that loads it, for instance `"AutoModelForCausalLM"`.
        base (`str`): name of its base.
        license (`dict[str, Any]`): the metadata on it, as [`carried_license`] gives them.
        state (`str`): how its weights relate to the base's.
        made (`str`): how it was made.
        base_id (`str`, *optional*): Hub id of its base, if it has one.

    Returns:
        `str`: the card's Markdown, with its metadata.
    """
    data = ModelCardData(
        base_model=base_id, library_name="transformers", pipeline_tag=_TASKS[auto_class], tags=["attnres"], **license
    )
    block = f"blocks of {config.attn_res_block_size} decoder layers"
    sources = block if config.attn_res_type == "block" else "each sublayer's output"
    return f"""---
{data.to_yaml()}
---

# {base} with Attention Residuals

{f"[{base}](https://huggingface.co/{base_id})" if base_id else base} with [Attention Residuals](https://arxiv.org/abs/2603.15031)
in place of its residual connections: each sublayer attends over depth. Sources: {sources}; scale:
`{config.attn_res_scale}`. {state}

## How to load it

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
```

## How it was made

{made}

torch {torch.__version__}, transformers {transformers.__version__}.
"""
