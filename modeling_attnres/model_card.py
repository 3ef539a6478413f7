# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card: what base, what licence, how to load it, how it was made, what was found."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .configuration_attnres import AttnResConfig


# Where the card does not know yet what the repository will be called
PLACEHOLDER = "path/to/this/checkpoint"
MADE, VERIFICATION, DEPTH_ATTENTION = "How it was made", "Verification", "Depth attention"
_LICENCE = ("license", "license_name", "license_link")


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    return ModelCard(text, ignore_metadata_errors=True).data.to_dict()


def model_card(
    config: AttnResConfig,
    base_model: str | list[str] | None,
    metadata: Mapping[str, Any],
    state: str,
    made: str,
    name: str = PLACEHOLDER,
) -> str:
    r"""
    Writes the card of an AttnRes checkpoint.

    Args:
        config ([`AttnResConfig`]): its configuration.
        base_model (`str` or `list[str]`, *optional*): Hub id or folder name of its base, or of several.
        metadata (`Mapping[str, Any]`): that of the base's card, whose licence holds for this checkpoint too.
        state (`str`): what its weights are.
        made (`str`): how it was made.
        name (`str`, *optional*): its Hub id.

    Returns:
        `str`: the card's Markdown, with its metadata.
    """
    bases = [str(base) for base in (base_model if isinstance(base_model, list) else [base_model or ""]) if base]
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
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
    base = ", ".join(bases) or f"A {config.base_model_type} model"
    linked = ", ".join(f"[{name}](https://huggingface.co/{name})" if "/" in name else name for name in bases) or base
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

## {MADE}

{made}

torch {torch.__version__}, transformers {transformers.__version__}.

{_end(MADE)}
"""


def section(card: str, heading: str) -> str | None:
    """What stands under this heading, in a section that was written here."""
    found = re.search(_pattern(heading), card, re.DOTALL)
    return found and found[1].strip()


def with_section(card: str, heading: str, content: str) -> str:
    """
    The card with this section at its end, in place of an older one that was written here; without, if it is empty. What
    others wrote stays, a section of the same heading too.
    """
    card = re.sub(_pattern(heading), "", card, flags=re.DOTALL).rstrip()
    return f"{card}\n\n## {heading}\n\n{content}\n\n{_end(heading)}\n" if content else f"{card}\n"


def _end(heading: str) -> str:
    return f"<!-- end of {heading!r}, written by modeling_attnres -->"


def _pattern(heading: str) -> str:
    return rf"\n## {re.escape(heading)}\n((?:(?!\n## ).)*?)\n{re.escape(_end(heading))}\n?"


def with_pictures(card: str, paths: Iterable[str]) -> str:
    """The card with the heat map and the page that are among these files of the repository, and no others."""
    paths = [PurePath(path) for path in paths]
    heat_map = next((quote(path.as_posix()) for path in paths if path.name == "weights.png"), None)
    page = next((quote(path.as_posix()) for path in paths if path.suffix == ".html"), None)
    shown = [f"![Mean weight of each source in each sublayer]({heat_map})"] if heat_map else []
    if page:
        shown.append(f"[Token by token]({page}): a page to download and open in a browser.")
    return with_section(card, DEPTH_ATTENTION, "\n\n".join(shown))


def for_hub(card: str, name: str) -> str:
    """The card of the repository of this id: it loads the model by it, and names a base that can have one."""
    card = re.sub(r'(?<=\.from_pretrained\()"[^"]*"(?=, trust_remote_code=True\))', lambda _: f'"{name}"', card)
    # The Hub refuses a card whose `base_model` cannot be an id
    return re.sub(r"^base_model: (?!['\"]?[\w.-]+(/[\w.-]+)?['\"]?$).+\n", "", card, count=1, flags=re.MULTILINE)
