"""Bad input to the model: at zero queries what the base does, be it numbers or an error; with trained ones no worse."""

import pytest
import reference
import torch
from helpers import BLOCK, FAMILIES, FULL, TINY, attnres_of, both_types, tiny_base, trained
from torch.autograd.functional import vjp

from modeling_attnres.depth_attention import depth_attention, streaming_depth_attention


both_operators = pytest.mark.parametrize("operator", [depth_attention, streaming_depth_attention])


def ids(*shape):
    return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(3))


def mask_without(*rows):
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[list(rows)] = 0
    return mask


def embeddings(*shape, dtype=torch.float32, **values):
    tensor = torch.randn(*shape, TINY["hidden_size"], generator=torch.Generator().manual_seed(4)).to(dtype)
    for value in values.values():
        tensor[1, 4, 5] = value
    return tensor


INPUTS = {
    "one token": {"input_ids": ids(1, 1)},
    "no sample": {"input_ids": ids(0, 9)},
    "no token": {"input_ids": ids(2, 0)},
    "nothing at all": {"input_ids": ids(0, 0)},
    "no sample, with labels": {"input_ids": ids(0, 9), "labels": ids(0, 9)},
    "one token, with labels": {"input_ids": ids(1, 1), "labels": ids(1, 1)},
    "only ignored labels": {"input_ids": ids(2, 9), "labels": torch.full((2, 9), -100)},
    "a token beyond the vocabulary": {"input_ids": torch.tensor([[1, TINY["vocab_size"]]])},
    "a negative token": {"input_ids": torch.tensor([[1, -1]])},
    "a label beyond the vocabulary": {"input_ids": ids(2, 9), "labels": torch.full((2, 9), TINY["vocab_size"])},
    "labels of another length": {"input_ids": ids(2, 9), "labels": ids(2, 8)},
    "tokens as floats": {"input_ids": ids(2, 9).float()},
    "tokens as booleans": {"input_ids": ids(2, 9).bool()},
    "tokens as int32": {"input_ids": ids(2, 9).int()},
    "tokens without a batch": {"input_ids": ids(9)},
    "tokens with a dimension too many": {"input_ids": ids(2, 9, 1)},
    "embeddings in float64": {"inputs_embeds": embeddings(2, 9, dtype=torch.float64)},
    "embeddings in bfloat16": {"inputs_embeds": embeddings(2, 9, dtype=torch.bfloat16)},
    "embeddings as integers": {"inputs_embeds": embeddings(2, 9, dtype=torch.long)},
    "embeddings of another width": {"inputs_embeds": embeddings(2, 9)[..., :-1]},
    "no embeddings": {"inputs_embeds": embeddings(0, 9)},
    "a NaN": {"inputs_embeds": embeddings(3, 9, value=float("nan"))},
    "infinity": {"inputs_embeds": embeddings(3, 9, value=float("inf"))},
    "a number whose square overflows": {"inputs_embeds": embeddings(3, 9, value=1e30)},
    "numbers whose squares vanish": {"inputs_embeds": embeddings(3, 9) * 1e-30},
    "zeros": {"inputs_embeds": torch.zeros(3, 9, TINY["hidden_size"])},
    "a masked row": {"input_ids": ids(3, 9), "attention_mask": mask_without(1)},
    "masked rows alone": {"input_ids": ids(3, 9), "attention_mask": mask_without(0, 1, 2)},
    "a mask of another length": {"input_ids": ids(3, 9), "attention_mask": mask_without()[:, :5]},
    "a mask as booleans": {"input_ids": ids(3, 9), "attention_mask": mask_without(1).bool()},
    "a mask as floats": {"input_ids": ids(3, 9), "attention_mask": mask_without(1).float()},
    "a mask of another batch": {"input_ids": ids(3, 9), "attention_mask": mask_without(1)[:2]},
    "positions of another length": {"input_ids": ids(3, 9), "position_ids": torch.arange(5)[None]},
    "positions beyond the longest": {"input_ids": ids(3, 9), "position_ids": torch.arange(9)[None] + 10**6},
    "neither tokens nor embeddings": {},
    "tokens and embeddings": {"input_ids": ids(3, 9), "inputs_embeds": embeddings(3, 9)},
}


@torch.no_grad()
def outcome(model, inputs):
    try:
        output = model(**inputs)
    except Exception as error:  # noqa: BLE001  the errors are compared
        return type(error)
    return {name: output[name] for name in ("logits", "loss") if output.get(name) is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_base_does_with_bad_input(family):
    base = tiny_base(family)
    models = [attnres_of(base, **BLOCK), attnres_of(base, **FULL)]
    for case, inputs in INPUTS.items():
        expected = outcome(base, inputs)
        for actual in (outcome(model, inputs) for model in models):
            if isinstance(expected, type):
                assert actual is expected, f"{case}: {actual} in place of {expected}"
            else:
                assert not isinstance(actual, type), f"{case}: {actual}"
                close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
                torch.testing.assert_close(actual, expected, **close, msg=lambda text, case=case: f"{case}: {text}")


@both_types
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("implementation", ["eager", "streaming"])
@torch.no_grad()
def test_a_bad_sample_does_not_reach_the_others(family, value, attn_res, implementation):
    """Trained queries; bit by bit."""
    model = trained(tiny_base(family), **attn_res, attn_res_implementation=implementation)
    good, bad = embeddings(3, 9), embeddings(3, 9, value=value)
    expected, actual = model(inputs_embeds=good).logits, model(inputs_embeds=bad).logits
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not actual[1, 4:].isfinite().all(), "where it is, it shows"


@both_operators
def test_a_bad_token_does_not_reach_the_others_gradients(operator):
    sources = [torch.randn(5, 8) for _ in range(4)]
    spoilt = [source.clone() for source in sources]
    spoilt[2][3, 1] = float("nan")
    query, key_norm, output_grad = torch.randn(8), torch.ones(8), torch.randn(5, 8)
    attend = lambda *sources: operator(query, key_norm, sources, "sum", 1e-6)  # noqa: E731
    expected, actual = (vjp(attend, tuple(each), output_grad)[1] for each in (sources, spoilt))
    others = [0, 1, 2, 4]
    assert all(torch.equal(a[others], e[others]) for a, e in zip(actual, expected))
    assert actual[2][3].isnan().any()


@both_operators
@pytest.mark.parametrize("sources", [1, 2, 17, 193])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_half_precision_overflows_only_where_its_result_does(operator, sources, scale):
    """Full AttnRes at depth 96 has 193 sources. Values near float16's largest, logits beyond it, sums that cancel."""
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(6, 64, generator=generator).half() * 12000 for _ in range(sources)]
    values += [-value for value in values[1:]]
    query = torch.randn(64, generator=generator) * 1e5
    for q in (torch.zeros(64), query):
        actual = operator(q, torch.ones(64), values, scale, 1e-6)
        expected = reference.depth_attention(q, torch.ones(64), values, scale)
        overflows = expected.abs() > torch.finfo(torch.float16).max
        assert torch.equal(actual.isinf(), overflows) and not actual.isnan().any()
        # Rounded once; the sum itself in float32 loses up to its own epsilon of what cancels
        lost = 2e-3 * expected.abs() + 2e-7 * len(values) * torch.stack(values).abs().max()
        assert ((actual.double() - expected).abs() <= lost)[~overflows].all()
    # One source stands out there, times the number of sources
    assert overflows.any() == (scale == "sum") or sources < 17


@both_types
@pytest.mark.parametrize("peak", [4e4, 6e4, 1e5], ids=["near", "at the edge", "beyond"])
@torch.no_grad()
def test_a_residual_stream_near_float16_s_largest_at_depth_96(attn_res, peak):
    """Some activations of a pretrained model are that large. Where the base's stream is finite, so is ours."""
    base = tiny_base("llama", num_hidden_layers=96, tie_word_embeddings=False, mlp_bias=True).half()
    base.model.embed_tokens.weight[:, 7] = peak / 2
    # One channel grows from layer to layer, to `peak`
    for layer in base.model.layers:
        layer.mlp.down_proj.bias[7] = peak / 2 / 96
    model = attnres_of(base, **attn_res)
    expected, actual = (each(ids(2, 9)).logits for each in (base, model))
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert expected.isfinite().all() == (peak < 6.5e4)


@both_types
@torch.no_grad()
def test_a_masked_row_does_not_reach_the_others(attn_res):
    model, tokens = trained(tiny_base("llama"), **attn_res), ids(3, 9)
    logits, alone = (model(tokens, attention_mask=mask).logits for mask in (mask_without(1), mask_without()))
    torch.testing.assert_close(logits[[0, 2]], alone[[0, 2]], rtol=0, atol=1e-5)
    assert logits[1].isfinite().all()
