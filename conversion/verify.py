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

from .reading import TOKENIZER_CONFIG, Checkpoint, find_checkpoint, read_checkpoint
from .retrofit import new_tensors_of
from .revert import trained_queries


# Of the largest logit. float32 alone leaves 2e-6 on a real model whose residual stream reaches 25,000
TOLERANCE = 1e-5
LENGTHS = (1, 7, 64, 256)
# Tokenizers differ in blanks, digits, accents, other scripts and code
TEXT = (
    "  Two blanks, 1234567 and 3.14; naïve Straße, 深い残差, مرحبا 🙂\n\tdef f(x):\n        return x['key'] != None\n"
)


@dataclass
class Verification:
    """
    The result of [`verify`].

    Attributes:
        max_difference (`float`): largest difference between the logits of base and retrofit.
        max_logit (`float`): largest logit of the base.
        trained_queries (`int`): how many queries are not zero any more.
    """

    max_difference: float
    max_logit: float
    trained_queries: int

    @property
    def relative_difference(self) -> float:
        # A model that puts out nothing but zeros shows nothing
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
    text; then the logits (or, without a language model head, the decoder's output) in float32 on token sequences of
    several lengths, one by one and as one left-padded batch. One model is in memory at a time.

    Args:
        base (`str` or `Path`): folder or Hub id of the base checkpoint.
        attnres (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        revision (`str`, *optional*): branch, tag or commit of a base on the Hub.

    Returns:
        [`Verification`]: with `passed`, `max_difference`, `max_logit` and `trained_queries`.

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: one of the two is not what it should be, or their tensors or tokenizers differ.
        `ImportError`: the base is quantized, and the package that reads such weights is not installed.
    """
    source, checkpoint = read_checkpoint(find_checkpoint(base, revision)), read_checkpoint(find_checkpoint(attnres))
    new = new_tensors_of(checkpoint)
    _compare_tensors(source, checkpoint, new)
    _compare_tokenizers(source, checkpoint)
    with tqdm(total=4, desc="Comparing", delay=1) as progress:
        expected = _logits(source, progress)
        actual = _logits(checkpoint, progress)
    return Verification(
        # torch's max keeps a NaN, Python's loses it
        max_difference=torch.stack([(a - e).abs().max() for a, e in zip(actual, expected)]).max().item(),
        max_logit=torch.stack([e.abs().max() for e in expected]).max().item(),
        trained_queries=len(trained_queries(checkpoint, [name for name in new if name.endswith(".query")])),
    )


def _compare_tensors(base: Checkpoint, attnres: Checkpoint, new: dict[str, list[int]]) -> None:
    base_type, expected_type = base.config["model_type"], attnres.config["base_model_type"]
    if base_type != expected_type:
        raise ValueError(
            f"{attnres.folder} has a base of type {expected_type!r}, but {base.folder} is of type {base_type!r}."
        )

    def described(tensors):
        return {name: (info["dtype"], info["shape"]) for name, info in tensors.items()}

    expected, actual = described(base.tensors), described(attnres.tensors)
    problems = [f"{name} is missing" for name in expected.keys() | new.keys() if name not in actual]
    problems += [f"{name} is not expected" for name in actual if name not in expected and name not in new]
    problems += [
        f"{name} is {actual[name]} and not {expected[name]}"
        for name in expected.keys() & actual.keys()
        if actual[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The tensors of {attnres.folder} do not fit: {'; '.join(sorted(problems)[:5])}{more}.")


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
    actual = AutoTokenizer.from_pretrained(attnres.folder, trust_remote_code=False)(TEXT).input_ids
    if actual != expected:
        raise ValueError(
            f"The tokenizer of {attnres.folder} makes {actual[:8]}… of {TEXT!r}, and the base's {expected[:8]}…: copy "
            f"the base's tokenizer files, and name its class as `tokenizer_class` in {TOKENIZER_CONFIG}."
        )


def _logits(checkpoint: Checkpoint, progress: tqdm) -> list[torch.Tensor]:
    auto_class = AutoModelForCausalLM if checkpoint.architecture.endswith("ForCausalLM") else AutoModel
    try:
        # Never a pickle, even if one is in the folder
        model = auto_class.from_pretrained(
            checkpoint.folder, dtype=torch.float32, use_safetensors=True, return_dict=True
        ).eval()
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  a stranger's files: transformers may fail on them anywhere
        raise ValueError(f"{checkpoint.folder} cannot be loaded: {error}") from error
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
        alone = [model(tokens[i : i + 1, -length:])[0] for i, length in enumerate(LENGTHS)]
        padded = model(tokens, attention_mask=mask.long())[0]
    progress.update()
    # Logits at padding mean nothing
    return [*alone, padded[mask]]
