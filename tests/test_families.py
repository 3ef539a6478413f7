"""Each family: with zero queries the model is its base, with any others it is what the paper says."""

import pytest
import torch
from conftest import FAMILIES, attnres_of, randomise_depth_attention, tiny_base
from reference import reference_logits


SHAPES = [{"attn_res_block_size": size} for size in (1, 2, 3)] + [{"attn_res_type": "full"}]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["1", "2", "3", "full"])


@each_family
@each_shape
@torch.no_grad()
def test_retrofit_computes_what_its_base_computes(family, shape, tokens):
    base = tiny_base(family)
    model = attnres_of(base, **shape)
    real = tokens["attention_mask"].bool()
    expected = base(**tokens).logits[real]
    assert expected.std() > 0.1
    torch.testing.assert_close(model(**tokens).logits[real], expected, rtol=0, atol=1e-5)

    # In two parts through the cache
    cut = 12
    start = model(tokens["input_ids"][:, :cut], attention_mask=tokens["attention_mask"][:, :cut], use_cache=True)
    rest = model(tokens["input_ids"][:, cut:], tokens["attention_mask"], past_key_values=start.past_key_values)
    both = torch.cat([start.logits, rest.logits], dim=1)
    torch.testing.assert_close(both[real], expected, rtol=0, atol=1e-5)


@each_family
@each_shape
def test_greedy_generation_is_the_base_s_token_for_token(family, shape, tokens):
    base = tiny_base(family)
    model = attnres_of(base, **shape)
    expected = base.generate(**tokens, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(**tokens, max_new_tokens=20, do_sample=False), expected)


@each_family
@each_shape
@torch.no_grad()
def test_bfloat16_departs_no_further_than_the_base_itself(family, shape):
    input_ids = torch.randint(1, 99, (8, 64), generator=torch.Generator().manual_seed(0))
    base = tiny_base(family)
    exact = base(input_ids).logits
    base.bfloat16()
    expected = base(input_ids).logits
    actual = attnres_of(base, **shape)(input_ids).logits
    assert (actual - expected).float().abs().mean() <= (expected - exact).abs().mean()


@each_family
@each_shape
@pytest.mark.parametrize("scale", ["sum", "mean"])
@torch.no_grad()
def test_trained_queries_are_wired_as_in_the_paper(family, shape, scale, tokens):
    base = tiny_base(family, attn_implementation="eager")
    model = randomise_depth_attention(attnres_of(base, **shape, attn_res_scale=scale))
    expected = reference_logits(base, model, tokens["input_ids"])
    torch.testing.assert_close(model(tokens["input_ids"]).logits, expected, rtol=0, atol=1e-5)
    # The queries matter: a comparison that they could not change would show nothing
    assert (expected - base(tokens["input_ids"]).logits).abs().max() > 0.01


@torch.no_grad()
def test_phi3_changes_to_its_long_rope_as_its_base_does():
    """Its rotary embedding changes at a length, and generation passes it."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    base = tiny_base("phi3", rope_parameters=rope, original_max_position_embeddings=20, sliding_window=None)
    model = attnres_of(base, attn_res_block_size=2)
    prompt = torch.randint(1, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    # Without a cache: some versions of the base lose tokens when they renew theirs
    expected = base.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_phi3_drops_out_what_its_sublayers_put_out(tokens):
    model = attnres_of(tiny_base("phi3", resid_pdrop=0.5), attn_res_type="full").train()
    sources = model.model.layers[0](
        model.model.embed_tokens(tokens["input_ids"]),
        attention_mask=None,
        position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.arange(17)[None]),
    )
    # `+ 0.5` of a share, give or take: both sublayers' outputs have zeros in them, the embedding has none
    assert [round((source == 0).float().mean().item(), 1) for source in sources[1:]] == [0.5, 0.5]
