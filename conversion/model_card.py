# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card: base, license, how to load the model, how it was made."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from modeling_attnres import AttnResConfig

from .reading import CARD


# The card in a folder does not know the name of its repository yet; `push` does
PLACEHOLDER = "path/to/this/checkpoint"
# The name of each Auto class's task on the Hub
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def license_of(folder: Path) -> dict[str, Any]:
    """The license in the metadata of the card in this folder."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        metadata = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # noqa: BLE001  the YAML parser's own errors, and others
        warnings.warn(f"The metadata of {path} cannot be read: {error} The new card has no license.", stacklevel=4)
        return {}
    return {key: metadata[key] for key in ("license", "license_name", "license_link") if key in metadata}


def model_card(
    config: AttnResConfig, auto_class: str, base: str, base_id: str | None, license: dict[str, Any], command: str
) -> str:
    """The card of a retrofit. All of it stays true when the retrofit is trained."""
    data = ModelCardData(
        base_model=base_id, library_name="transformers", pipeline_tag=_TASKS[auto_class], tags=["attnres"], **license
    )
    sources = "each sublayer's output"
    if config.attn_res_type == "block":
        sources = f"blocks of {config.attn_res_block_size} decoder layers"
    exact = "computed" if config.attn_res_scale == "sum" else "did not compute"
    return f"""---
{data.to_yaml()}
---

# {base} with Attention Residuals

{f"[{base}](https://huggingface.co/{base_id})" if base_id else base} with [Attention Residuals](https://arxiv.org/abs/2603.15031)
in place of its residual connections: each sublayer attends over depth. Sources: {sources}; scale:
`{config.attn_res_scale}`.

## How to load it

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
```

## How it was made

`{command}`

At that time its weights were those of the base, its queries were zero, and it {exact} what the base computes. Trained
queries are not zero any more (`attnres inspect`). torch {torch.__version__}, transformers {transformers.__version__}.
"""
