# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Verify: does a retrofit compute what its base computes?"""

import warnings
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from .reading import NEW_TENSOR, TOKENIZER_CONFIG, Checkpoint, read_attnres, read_checkpoint, refused
from .revert import trained_queries


# Relative to the largest logit. The rounding of float32 gives 2e-6 on a real model whose residual stream reaches 25,000
TOLERANCE = 1e-5
LENGTHS = (1, 7, 64, 256)
# Tokenizers differ in blanks, digits, accents, other scripts and code
TEXT = (
    "  Two blanks, 1234567 and 3.14; naïve Straße, 深い残差, مرحبا 🙂\n\tdef f(x):\n        return x['key'] != None\n"
)


@dataclass
class Verification:
    """Result of [`verify`]: largest difference of the logits, largest logit of the base, number of trained queries."""

    max_difference: float
    max_logit: float
    trained_queries: int

    @property
    def relative_difference(self) -> float:
        # If all logits are zero, the comparison is meaningless
        return self.max_difference / self.max_logit if self.max_logit else nan

    @property
    def passed(self) -> bool:
        # A NaN does not pass
        return self.relative_difference <= TOLERANCE

    def __str__(self) -> str:
        difference = (
            f"largest difference {self.max_difference:.2e}, largest logit {self.max_logit:.2e} "
            f"({self.relative_difference:.1e} of it, {TOLERANCE:.0e} allowed)"
        )
        trained = f" {self.trained_queries} of its queries are trained." if self.trained_queries else ""
        return f"{'Same' if self.passed else 'Different'}: {difference}.{trained}"


def verify(base: str | Path, attnres: str | Path, *, revision: str | None = None) -> Verification:
    r"""
    Compares an AttnRes checkpoint with its base: first the tensors by name, dtype and shape, and the token ids of a
    text; then the logits (or the decoder's output) in float32 on token sequences of several lengths, one by one and as
    one left-padded batch. One model is in memory at a time.

    Args:
        base (`str` or `Path`): folder or Hub id of the base checkpoint.
        attnres (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        revision (`str`, *optional*): branch, tag or commit of a base on the Hub.

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: one of the two is damaged or of the wrong type, or their tensors or tokenizers differ.
        `ImportError`: the base is quantized, and the package that reads such weights is not installed.
    """
    source, checkpoint = read_checkpoint(base, revision), read_attnres(attnres)
    _compare_tensors(source, checkpoint)
    _compare_tokenizers(source, checkpoint)
    with tqdm(total=4, desc="Comparing", delay=1) as progress:
        expected = _logits(source, progress)
        actual = _logits(checkpoint, progress)
    return Verification(
        # torch's max keeps a NaN, Python's loses it
        max_difference=torch.stack([(a - e).abs().max() for a, e in zip(actual, expected)]).max().item(),
        max_logit=torch.stack([e.abs().max() for e in expected]).max().item(),
        trained_queries=len(trained_queries(checkpoint)),
    )


def _compare_tensors(base: Checkpoint, attnres: Checkpoint) -> None:
    actual, expected = attnres.config.get("base_model_type"), base.config["model_type"]
    if actual != expected:
        raise ValueError(f"{attnres.folder} has a base of type {actual!r}, but {base.folder} is of type {expected!r}.")
    for name in sorted(base.tensors.keys() | attnres.tensors.keys()):
        infos = [checkpoint.tensors.get(name) for checkpoint in (attnres, base)]
        actual, expected = (f"{info['dtype']} {info['shape']}" if info else "missing" for info in infos)
        if actual != expected and not NEW_TENSOR.search(name):
            raise ValueError(f"The tensor {name} is {actual} in {attnres.folder}, but {expected} in {base.folder}.")


def _compare_tokenizers(base: Checkpoint, attnres: Checkpoint) -> None:
    if not all(any(c.folder.glob("token*")) for c in (base, attnres)):
        return
    try:
        # A tokenizer's own code is not run
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  `retrofit` left such a tokenizer as it is
        warnings.warn(f"The tokenizer of {base.folder} cannot be loaded and was not compared: {error}", stacklevel=3)
        return
    expected = tokenizer(TEXT).input_ids
    with refused(f"The tokenizer of {attnres.folder} cannot be loaded"):
        actual = AutoTokenizer.from_pretrained(attnres.folder, trust_remote_code=False)(TEXT).input_ids
    if actual != expected:
        raise ValueError(
            f"The tokenizer of {attnres.folder} makes {actual[:8]}… of {TEXT!r}, but the base's {expected[:8]}…: copy "
            f"the base's tokenizer files, and name its class as `tokenizer_class` in {TOKENIZER_CONFIG}."
        )


def _logits(checkpoint: Checkpoint, progress: tqdm) -> list[torch.Tensor]:
    auto_class = AutoModelForCausalLM if checkpoint.architecture.endswith("ForCausalLM") else AutoModel
    try:
        # Never a pickle, even if one is in the folder
        model, problems = auto_class.from_pretrained(
            checkpoint.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  untrusted files: transformers may fail on them anywhere
        raise ValueError(f"{checkpoint.folder} cannot be loaded: {error}") from error
    if missing := sorted(filter(NEW_TENSOR.search, problems["missing_keys"])):
        raise ValueError(f"{checkpoint.folder} has no tensor {missing[0]!r}.")
    progress.update()
    if getattr(model, "is_quantized", False):
        # Kernels for quantized weights may round their inputs too
        with suppress(NotImplementedError):
            model = model.dequantize()
    if not getattr(model, "is_quantized", False):
        model = model.float()
    generator = torch.Generator().manual_seed(0)
    longest = min(max(LENGTHS), getattr(model.config, "max_position_embeddings", max(LENGTHS)))
    tokens = torch.randint(model.config.vocab_size, (len(LENGTHS), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in LENGTHS])
    with torch.no_grad():
        alone = [model(tokens[i : i + 1, -length:], return_dict=True)[0] for i, length in enumerate(LENGTHS)]
        padded = model(tokens, attention_mask=mask.long(), return_dict=True)[0]
    progress.update()
    # Logits at padding mean nothing
    return [*alone, padded[mask]]
