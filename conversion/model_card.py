# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card of a retrofit, and of a checkpoint or an adapter that is trained from one."""

import math
import os
import shlex
import warnings
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import modeling_attnres
from modeling_attnres import AttnResConfig
from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS

from .reading import ADAPTER_CONFIG, CARD, Checkpoint, find_checkpoint, read_adapter, read_attnres, refused


# The card in a folder does not know the name of its repository yet; `push` does
PLACEHOLDER = "path/to/this/checkpoint"
_HEADING = "## Attention Residuals"
# The name of each Auto class's task on the Hub
_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def card(folder: str | Path, base: str | Path | None = None) -> Path:
    r"""
    Completes the model card of a trained AttnRes checkpoint or of a PEFT adapter for one, or writes it, and returns its
    path. The text that is there is kept. Base, license, tags and a section about the depth attention are added.

    Args:
        folder (`str` or `Path`): folder of the checkpoint or adapter.
        base (`str` or `Path`, *optional*): the model that was trained. The default is in the adapter or in the card.

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: no AttnRes checkpoint and no adapter for one, an unknown base, or a card with broken metadata.
    """
    path, is_adapter = Path(folder) / CARD, (Path(folder) / ADAPTER_CONFIG).is_file()
    checkpoint = read_adapter(folder, base)[1] if is_adapter else read_attnres(folder)
    card = _load(path)
    base = base or (checkpoint.name if is_adapter else card.data.base_model)
    if not isinstance(base, (str, Path)):
        raise ValueError(f"{path} does not name the model that was trained: give it as the base (`base`, --base).")
    of_base = _load(find_checkpoint(base, only=CARD) / CARD, ignore_metadata_errors=True).data
    if not os.path.isdir(base):
        of_base.base_model = base
    _complete(card, checkpoint.attnres_config, checkpoint.architecture, of_base, is_adapter)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: remove it.")
    partial = path.with_name(f".{CARD}.partial")
    card.save(partial)
    return partial.replace(path)


def _load(path: Path, **options: bool) -> ModelCard:
    with refused(f"The metadata of {path} cannot be read"):
        return ModelCard.load(path, **options) if path.is_file() else ModelCard("---\n\n---\n")


def model_card(source: Checkpoint, config: AttnResConfig, architecture: str) -> str:
    """The card of a retrofit. All of it stays true when the retrofit is trained."""
    hub_id = None if os.path.isdir(source.name) else source.name
    name = hub_id or os.path.basename(os.path.abspath(source.name))
    command = ["attnres", "retrofit", name, "OUTPUT"]
    for field in ATTN_RES_FIELDS[1:]:
        option, value = f"--{field.removeprefix('attn_res_').replace('_', '-')}", getattr(config, field)
        command += [option] * value if isinstance(value, bool) else [option, str(value)]
    if hub_id is not None:
        # The Hub cache names a folder by its commit
        command += ["--revision", source.folder.name]
    exact = "computed" if config.attn_res_scale == "sum" else "did not compute"
    card = ModelCard(f"""---

---

# {name} with Attention Residuals

Base: {f"[{name}](https://huggingface.co/{name})" if hub_id else name}. Made by

`{shlex.join(command)}`

At that time its weights were those of the base, its queries were zero, and it {exact} what the base computes. Trained
queries are not zero any more (`attnres inspect`). torch {torch.__version__}, transformers {transformers.__version__}.
""")
    try:
        of_base = _load(source.folder / CARD, ignore_metadata_errors=True).data
    except ValueError as error:
        warnings.warn(f"{error} The new card has no license.", stacklevel=3)
        of_base = ModelCardData()
    of_base.base_model = hub_id
    _complete(card, config, architecture, of_base)
    return str(card)


def sources_in_words(config: AttnResConfig) -> str:
    count = math.ceil(config.num_hidden_layers / config.attn_res_block_size)
    block = f"block ({count} blocks of {config.attn_res_block_size} decoder layers)"
    sources = "full (each sublayer's output)" if config.attn_res_type == "full" else block
    return f"{sources}, separate read for the values" if config.attn_res_value_read else sources


def _complete(
    card: ModelCard, config: AttnResConfig, architecture: str, of_base: ModelCardData, is_adapter: bool = False
) -> None:
    """Adds what is missing: base, license and tags, and a section about the depth attention."""
    data, auto_class = card.data, getattr(modeling_attnres, architecture)._auto_class
    # Training tools write the path of a local base
    is_path = os.path.isabs(str(data.base_model)) or os.path.isdir(str(data.base_model))
    data.base_model = of_base.base_model or (None if is_path else data.base_model)
    if data.license is None:
        vars(data).update({key: of_base.get(key) for key in ("license", "license_name", "license_link")})
    data.library_name = data.library_name or ("peft" if is_adapter else "transformers")
    data.pipeline_tag = data.pipeline_tag or _TASKS.get(auto_class)
    data.tags = sorted({*map(str, data.tags or []), "attnres"})
    if _HEADING in card.text:
        return
    package, loader = "transformers", auto_class
    if is_adapter:
        package, loader = "peft", f"AutoPeft{auto_class.removeprefix('Auto')}"
    card.text += f"""
{_HEADING}

In place of residual connections, each sublayer attends over depth ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031)).
Type: {sources_in_words(config)}; scale: `{config.attn_res_scale}`.

```python
from {package} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}", trust_remote_code=True)
```
"""
