# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card: what base, what licence, how to load it, how it was made, what was found."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .configuration_attnres import AttnResConfig
from .inspected import HEAT_MAP, PAGE


# Where the card does not know yet what the repository will be called
PLACEHOLDER = "path/to/this/checkpoint"
LOAD, MADE, VERIFICATION, DEPTH_ATTENTION = "How to load it", "How it was made", "Verification", "Depth attention"
# What the Hub calls the task of each Auto class
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
TITLE = "# {} with Attention Residuals"
_LICENCE = ("license", "license_name", "license_link")


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    return ModelCard(text, ignore_metadata_errors=True).data.to_dict()


def hub_snapshot(path: str | Path) -> tuple[str, str] | None:
    """Hub id and commit of what lies in the Hub cache. Any other folder has none, even if its name reads like one."""
    path = Path(os.path.abspath(path)).as_posix()
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)", path)
    return (found[1].replace("--", "/"), found[2]) if found else None


def leads_out_of(folder: str | Path, path: str | Path) -> bool:
    """Whether a path in a folder is a link to elsewhere: a stranger's can lead to any file of this machine."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    # The Hub cache links each file of a snapshot to its content
    blobs = [ancestor.parent / "blobs" for ancestor in root.parents if ancestor.name == "snapshots"]
    return not any(own in target.parents for own in (root, *blobs))


def lies_in(folder: str | Path, name: str) -> bool:
    """Whether there is a file of that name, and it is this folder's own."""
    path = os.path.join(folder, name)
    return os.path.isfile(path) and not leads_out_of(folder, path)


def local_licence(metadata: Mapping[str, Any], folder: str | Path) -> str | None:
    """The file in a folder that the `license_link` of the card there names."""
    link = metadata.get("license_link")
    # By any other name it could take the place of something else
    if not isinstance(link, str) or not re.fullmatch(r"[\w-]*licen[cs]e[\w.-]*", link, re.IGNORECASE):
        return None
    return link if lies_in(folder, link) else None


def carried_licence(metadata: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """
    What the metadata of a card in this folder say of the licence. A link to a file leads to the Hub, if the folder is
    from there, and nowhere if the file is not there.
    """
    kept = {key: metadata[key] for key in _LICENCE if key in metadata}
    link, snapshot = kept.get("license_link"), hub_snapshot(folder)
    if isinstance(link, str) and "://" not in link:
        if snapshot:
            kept["license_link"] = f"https://huggingface.co/{snapshot[0]}/blob/{snapshot[1]}/{quote(link, safe='/#')}"
        elif local_licence(metadata, folder) is None:
            del kept["license_link"]
    return kept


def model_card(
    config: AttnResConfig,
    auto_class: str,
    base_model: str | list[str] | None,
    licence: Mapping[str, Any],
    state: str,
    made: str,
    name: str = PLACEHOLDER,
    base_name: str = "",
) -> str:
    r"""
    Writes the card of an AttnRes checkpoint.

    Args:
        config ([`AttnResConfig`]): its configuration.
        auto_class (`str`): the Auto class that loads it, for instance `"AutoModelForCausalLM"`.
        base_model (`str` or `list[str]`, *optional*): Hub id of its base, or of several.
        licence (`Mapping[str, Any]`): the metadata on it, as [`carried_licence`] gives them.
        state (`str`): what its weights are.
        made (`str`): how it was made.
        name (`str`, *optional*): its Hub id.
        base_name (`str`, *optional*): what to call a base that has no Hub id.

    Returns:
        `str`: the card's Markdown, with its metadata.
    """
    bases = [str(base) for base in (base_model if isinstance(base_model, list) else [base_model or ""]) if base]
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        library_name="transformers",
        pipeline_tag=_TASKS.get(auto_class),
        tags=["attnres"],
        **licence,
    )
    sources = (
        f"blocks of {config.attn_res_block_size} decoder layers"
        if config.attn_res_type == "block"
        else "each sublayer's output"
    )
    base = ", ".join(bases) or base_name or f"A {config.base_model_type} model"
    linked = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in bases) or base
    return f"""---
{data.to_yaml()}
---

{TITLE.format(base)}

{linked} with [Attention Residuals](https://arxiv.org/abs/2603.15031) in place of its residual connections: each
sublayer attends over depth. Sources: {sources}; scale: `{config.attn_res_scale}`.

{state}

## {LOAD}

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

{_end(LOAD)}

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
    """The card with the heat map and the page that are among these pictures of the repository, and no others."""
    paths = [PurePath(path) for path in paths]
    heat_map = next((quote(path.as_posix()) for path in paths if path.name == HEAT_MAP), None)
    page = next((quote(path.as_posix()) for path in paths if path.name == PAGE), None)
    shown = [f"![Mean weight of each source in each sublayer]({heat_map})"] if heat_map else []
    if page:
        shown.append(f"[Token by token]({page}): a page to download and open in a browser.")
    return with_section(card, DEPTH_ATTENTION, "\n\n".join(shown))


def for_hub(card: str, name: str) -> str:
    """The card of the repository of this id: the section on loading, which was written here, loads the model by it."""

    def named(found: re.Match) -> str:
        return re.sub(r'(?<=\.from_pretrained\()"[^"]*"(?=, trust_remote_code=True\))', lambda _: f'"{name}"', found[0])

    return re.sub(_pattern(LOAD), named, card, flags=re.DOTALL)
