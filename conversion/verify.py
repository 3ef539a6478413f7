# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Verify: does a retrofit compute what its base computes?"""

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import TOKENIZER_CONFIG, Checkpoint, download, read_checkpoint
from .retrofit import attn_res_tensors, read_config


if TYPE_CHECKING:
    import torch

# Of the largest logit. float32 alone leaves 2e-6 on a real model whose residual stream reaches 25,000.
TOLERANCE = 1e-5
LENGTHS = (1, 7, 64, 256)
# Where tokenizers part ways: blanks, digits, accents, other scripts, code
TEXT = (
    "  Two blanks, 1234567 and 3.14; naïve Straße, 深い残差, مرحبا 🙂\n\tdef f(x):\n        return x['key'] != None\n"
)


@dataclass
class Verification:
    """
    Largest difference between the logits of base and retrofit, next to the largest logit of the base, whose Hub id and
    commit, or folder's name, it says.
    """

    max_difference: float
    max_logit: float
    base: str
    commit: str | None

    @property
    def relative_difference(self) -> float:
        # A model that puts out nothing but zeros shows nothing
        return self.max_difference / self.max_logit if self.max_logit else nan

    @property
    def passed(self) -> bool:
        # A NaN does not pass
        return self.relative_difference <= TOLERANCE


def verify(base: str | Path, attnres: str | Path, revision: str | None = None) -> Verification:
    r"""
    Compares an AttnRes checkpoint with its base: first the tensors by name, dtype and shape, and what the tokenizers
    make of a text; then the logits (or, if it is no causal language model, the decoder's output) in float32 on token
    sequences of several lengths, one by one and as one left-padded batch. One model is in memory at a time.

    Args:
        base (`str` or `Path`): folder or Hub id of the base checkpoint.
        attnres (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        revision (`str`, *optional*): branch, tag or commit of a base on the Hub.

    Returns:
        [`Verification`]: with `max_difference`, `max_logit`, `passed`, and the base that it is about.

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: one of the two is not what it should be, or their tensors or tokenizers differ.
        `ImportError`: the base is quantised, and what reads such weights is not installed.
    """
    import torch

    from modeling_attnres.model_card import hub_snapshot

    base_checkpoint, checkpoint = (
        read_checkpoint(download(str(base), revision)),
        read_checkpoint(download(str(attnres))),
    )
    _compare_structure(base_checkpoint, checkpoint)
    _compare_tokenizers(base_checkpoint, checkpoint)
    expected = _logits(base_checkpoint)
    actual = _logits(checkpoint)
    name, commit = hub_snapshot(base_checkpoint.folder) or (os.path.basename(os.path.abspath(base)), None)
    return Verification(
        # torch's max keeps a NaN, Python's loses it
        max_difference=torch.stack([(a - e).abs().max() for a, e in zip(actual, expected)]).max().item(),
        max_logit=torch.stack([e.abs().max() for e in expected]).max().item(),
        base=name,
        commit=commit,
    )


def _compare_structure(base: Checkpoint, attnres: Checkpoint) -> None:
    if attnres.config["model_type"] != "attnres":
        raise ValueError(f"{attnres.folder} is not AttnRes: its `model_type` is {attnres.config['model_type']!r}.")
    config = read_config(attnres)
    if config.base_model_type != base.config["model_type"]:
        raise ValueError(
            f"{attnres.folder} has a base of type {config.base_model_type!r}, but {base.folder} is of type "
            f"{base.config['model_type']!r}."
        )
    architecture = (attnres.config.get("architectures") or ["AttnResForCausalLM"])[0]
    added = attn_res_tensors(attnres, config, architecture)

    def described(tensors):
        return {name: (info.dtype, list(info.shape)) for name, info in tensors.items()}

    expected, actual = described(base.tensors), described(attnres.tensors)
    problems = [f"{name} is missing" for name in expected.keys() | added.keys() if name not in actual]
    problems += [f"{name} is not expected" for name in actual if name not in expected and name not in added]
    problems += [
        f"{name} is {actual[name]} and not {expected[name]}"
        for name in expected.keys() & actual.keys()
        if actual[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The tensors of {attnres.folder} do not fit: {'; '.join(sorted(problems)[:5])}{more}.")


def _compare_tokenizers(base: Checkpoint, attnres: Checkpoint) -> None:
    from transformers import AutoTokenizer

    if not all(any(c.folder.glob("token*")) for c in (base, attnres)):
        return
    try:
        # No code that a tokenizer brings is run
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  `retrofit` left such a tokenizer as it is
        warnings.warn(f"The tokenizer of {base.folder} cannot be loaded and was not compared: {error}", stacklevel=3)
        return
    expected = tokenizer(TEXT).input_ids
    actual = AutoTokenizer.from_pretrained(attnres.folder, trust_remote_code=False)(TEXT).input_ids
    if actual != expected:
        raise ValueError(
            f"The tokenizer of {attnres.folder} makes {actual[:8]}… of {TEXT!r}, and the base's {expected[:8]}…: copy "
            f"the base's tokenizer files, and name its class as `tokenizer_class` in {TOKENIZER_CONFIG}."
        )


def _logits(checkpoint: Checkpoint) -> list["torch.Tensor"]:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    import modeling_attnres  # noqa: F401  registers the model type

    architecture = (checkpoint.config.get("architectures") or ["ForCausalLM"])[0]
    auto_class = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
    # Never a pickle, whatever else lies in the folder
    options = {"use_safetensors": True, "return_dict": True}
    try:
        model = auto_class.from_pretrained(checkpoint.folder, dtype=torch.float32, **options).eval()
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  a stranger's files: transformers may stumble over them anywhere
        raise ValueError(f"{checkpoint.folder} cannot be loaded: {error}") from error
    if getattr(model, "is_quantized", False):
        # Kernels for quantised weights may round what they are given too
        with suppress(NotImplementedError):
            model = model.dequantize()
    if not getattr(model, "is_quantized", False):
        model = model.float()
    generator = torch.Generator().manual_seed(0)
    longest = min(max(LENGTHS), model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (len(LENGTHS), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in LENGTHS])
    with torch.no_grad():
        alone = [model(tokens[i : i + 1, -length:])[0] for i, length in enumerate(LENGTHS)]
        padded = model(tokens, attention_mask=mask.long())[0]
    # Logits at padding are of no meaning
    return [*alone, padded[mask]]
