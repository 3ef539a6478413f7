"""
The error of half precision by depth: the distance from the same model in float64, next to that of the base.

A part of it here; `python tests/test_precision.py` prints the table of the README.
"""

from statistics import median

import pytest
import torch
from helpers import attnres_of, randomize_depth_attention, tiny_base


WIDTH = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}
TYPES = {"block": {}, "full": {"attn_res_type": "full"}}


@torch.no_grad()
def drift(model, dtype, input_ids):
    """Root mean square of the logits' error, as a part of the logits' own."""
    exact = model.double()(input_ids).logits
    # Both models have the weights in the dtype, so the rounding of the weights does not count
    return ((model.to(dtype)(input_ids).logits.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def drifts(layers, dtype, texts=3):
    """Medians over texts: of the base, and of each type with zero and with random queries."""
    base = tiny_base("llama", num_hidden_layers=layers, tie_word_embeddings=False, **WIDTH).to(dtype)
    models = {"base": base}
    for name, attn_res in TYPES.items():
        models[name] = attnres_of(base, **attn_res)
        models[f"{name}, random queries"] = randomize_depth_attention(attnres_of(base, **attn_res), scale=0.1).to(dtype)
    generator = torch.Generator().manual_seed(6)
    texts = [torch.randint(WIDTH["vocab_size"], (1, 64), generator=generator) for _ in range(texts)]
    return {name: median(drift(model.to(dtype), dtype, ids) for ids in texts) for name, model in models.items()}


@pytest.mark.parametrize("layers, dtype", [(16, torch.float16), (96, torch.bfloat16)])
def test_half_precision_drifts_no_further_than_the_base(layers, dtype):
    """
    A retrofit rounds its stream once for each sublayer (which test_depth_attention.py holds, since the sublayers' own
    rounding hides it here); the base rounds what it adds up.
    """
    measured = drifts(layers, dtype, texts=1)
    assert measured["base"] > torch.finfo(dtype).eps / 2, "there is something to measure"
    assert measured["block"] < 1.1 * measured["base"] and measured["full"] < 1.1 * measured["base"], measured
    assert all(value < 8 * measured["base"] for value in measured.values()), measured


def main():
    """Prints the table of README.md."""
    columns = ["base", *(name + queries for name in TYPES for queries in ("", ", random queries"))]
    print("| dtype, layers |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for dtype in (torch.bfloat16, torch.float16):
        for layers in (16, 48, 96):
            measured = drifts(layers, dtype, texts=1)
            values = " | ".join(f"{measured[column]:.1e}" for column in columns)
            print(f"| {str(dtype).removeprefix('torch.')}, {layers} | {values} |", flush=True)


if __name__ == "__main__":
    main()
