"""Each family: with zero queries the model is its base, with any others it is what the paper says."""

from pathlib import Path

import families
import pytest
import torch
from conftest import FAMILIES, MIXTURES, attnres_of, randomise_depth_attention, tiny_base
from reference import reference_logits
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_attnres.configuration_attnres import SUPPORTED_BASE_MODEL_TYPES
from modeling_attnres.conversion import retrofit, verify


SHAPES = [{"attn_res_block_size": size} for size in (1, 2, 3)] + [{"attn_res_type": "full"}]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_mixture = pytest.mark.parametrize("family", MIXTURES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["1", "2", "3", "full"])


def test_each_supported_family_is_tested():
    assert {family for family in SUPPORTED_BASE_MODEL_TYPES if family in CONFIG_MAPPING} == FAMILIES.keys()
    assert list(families.DESCRIPTIONS) == list(SUPPORTED_BASE_MODEL_TYPES)
    assert families.table() in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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

    embeddings = {"inputs_embeds": model.get_input_embeddings()(tokens["input_ids"])}
    mask = {"attention_mask": tokens["attention_mask"]}
    expected = base.generate(**embeddings, **mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**embeddings, **mask, max_new_tokens=5, do_sample=False), expected)


# A token that rounding sends to another expert would drown the rounding itself
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
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
    if family not in MIXTURES:
        # Experts take no float64, and float32 leaves more of its rounding where queries are not zero
        base.double()
    temperature = 1.0 if scale == "sum" else 2.5
    model = randomise_depth_attention(attnres_of(base, **shape, attn_res_scale=scale, attn_res_temperature=temperature))
    expected = reference_logits(base, model, tokens["input_ids"])
    tolerance = 5e-5 if family in MIXTURES else 1e-5
    torch.testing.assert_close(model(tokens["input_ids"]).logits, expected, rtol=0, atol=tolerance)
    # The queries matter: a comparison that they could not change would show nothing
    assert (expected - base(tokens["input_ids"]).logits).abs().max() > 0.01


@each_mixture
@torch.no_grad()
def test_router_logits_and_losses_are_the_base_s(family, tokens):
    base = tiny_base(family)
    model = attnres_of(base, attn_res_block_size=2)
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    for kwargs in ({}, {"output_router_logits": True}):
        try:
            expected = base(**tokens, labels=labels, **kwargs)
        except AttributeError as error:
            pytest.skip(f"the base of this version of transformers fails itself: {error}")
        actual = model(**tokens, labels=labels, **kwargs)
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)
    if "router_logits" in expected:
        torch.testing.assert_close(actual.router_logits, expected.router_logits, rtol=1e-5, atol=1e-5)
    if "aux_loss" in expected:
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss, rtol=0, atol=1e-5)


@each_family
@torch.no_grad()
def test_attentions_are_the_base_s(family, tokens):
    base = tiny_base(family, attn_implementation="eager")
    model = attnres_of(base, attn_res_block_size=2)
    model.set_attn_implementation("eager")
    expected = base(**tokens, output_attentions=True).attentions
    actual = model(**tokens, output_attentions=True).attentions
    assert len(actual) == len(expected) > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "granite", "llama", "qwen3_next", "seed_oss"])
@torch.no_grad()
def test_fields_that_the_base_ignores_are_ignored(family, tokens):
    """Checkpoints that were made over to another family bring such fields along."""
    for fields in ({"sliding_window": 3}, {"attention_chunk_size": 3}):
        base = tiny_base(family, **fields)
        expected = base(**tokens, use_cache=False).logits
        actual = attnres_of(base, attn_res_block_size=2)(**tokens, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@each_family
def test_every_parameter_learns(family, tokens):
    """One step of training: gradients are the base's, and each query has one."""
    base = tiny_base(family)
    model = attnres_of(base, attn_res_block_size=2)
    gradients = []
    for each in (base, model):
        each(**tokens, labels=tokens["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, gradient in gradients[1].items():
        if name.endswith(".query"):
            assert gradient.norm() > 0, name
        elif not name.endswith(".key_norm") and gradients[0][name] is not None:
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-3, atol=1e-5, msg=name)


@each_family
def test_checkpoints_keep_the_base_s_layout(family, tmp_path, tokens):
    """Loaded from the base's files and saved again, tensors have the names and shapes of the base's files."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "base")
    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    assert verify(tmp_path / "base", output).passed

    # Another family in between: how weights lie on disk is looked up anew for each
    other = tiny_base("mixtral" if family != "mixtral" else "qwen3_moe")
    attnres_of(other).save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(output)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "saved")
    saved, expected = (
        load_file(tmp_path / "saved" / "model.safetensors"),
        load_file(tmp_path / "base/model.safetensors"),
    )
    assert {name for name in saved if not name.endswith((".query", ".key_norm"))} == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    attn_res = {name for name in model.state_dict() if name.endswith((".query", ".key_norm"))}
    assert attn_res == saved.keys() - expected.keys()

    # What was trained is there again
    randomise_depth_attention(model).save_pretrained(tmp_path / "trained")
    trained, info = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(trained.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    # A model that was never loaded knows its layout too
    attnres_of(base).save_pretrained(tmp_path / "fresh")
    assert load_file(tmp_path / "fresh" / "model.safetensors").keys() == saved.keys()
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")
        torch.testing.assert_close(reloaded(**tokens).logits, base(**tokens).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_starcoder2_drops_out_embeddings():
    model = attnres_of(tiny_base("starcoder2", embedding_dropout=0.5)).train()
    given = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(torch.arange(1, 80)[None])
    assert 0.4 < (given[0] == 0).float().mean() < 0.6


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
    _, _, *sources = model.model.layers[0](
        model.model.embed_tokens(tokens["input_ids"]),
        attention_mask=None,
        position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.arange(17)[None]),
    )
    # `+ 0.5` of a share, give or take: both sublayers' outputs have zeros in them, the embedding has none
    assert [round((source == 0).float().mean().item(), 1) for source in sources] == [0.5, 0.5]
