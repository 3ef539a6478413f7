# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card: what base, what licence, how to load it, how it was made."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .configuration_attnres import AttnResConfig


# Where the card does not know yet what the repository will be called
PLACEHOLDER = "path/to/this/checkpoint"
_LICENCE = ("license", "license_name", "license_link")


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    return ModelCard(text, ignore_metadata_errors=True).data.to_dict()


def model_card(
    config: AttnResConfig,
    base_model: str | None,
    metadata: Mapping[str, Any],
    state: str,
    made: str,
    name: str = PLACEHOLDER,
) -> str:
    r"""
    Writes the card of an AttnRes checkpoint.

    Args:
        config ([`AttnResConfig`]): its configuration.
        base_model (`str`, *optional*): Hub id or folder name of its base.
        metadata (`Mapping[str, Any]`): that of the base's card, whose licence holds for this checkpoint too.
        state (`str`): what its weights are.
        made (`str`): how it was made.
        name (`str`, *optional*): its Hub id.

    Returns:
        `str`: the card's Markdown, with its metadata.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["attnres"],
        **{key: metadata[key] for key in _LICENCE if key in metadata},
    )
    sources = (
        f"blocks of {config.attn_res_block_size} decoder layers"
        if config.attn_res_type == "block"
        else "each sublayer's output"
    )
    base = base_model or f"A {config.base_model_type} model"
    linked = f"[{base}](https://huggingface.co/{base})" if base_model and "/" in base_model else base
    return f"""---
{data.to_yaml()}
---

# {base} with Attention Residuals

{linked} with [Attention Residuals](https://arxiv.org/abs/2603.15031) in place of its residual connections: each
sublayer attends over depth. Sources: {sources}; scale: `{config.attn_res_scale}`.

{state}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

## How it was made

{made}

torch {torch.__version__}, transformers {transformers.__version__}.
"""


def with_section(card: str, heading: str, content: str) -> str:
    """The card with this section at its end, in place of an older one of the same heading."""
    card = re.sub(rf"\n## {re.escape(heading)}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    return f"{card.rstrip()}\n\n## {heading}\n\n{content}\n"
