"""Each family: with zero queries the model equals its base, with other queries it follows the paper."""

import pytest
import torch
from helpers import (
    BLOCK,
    FAMILIES,
    FULL,
    MIXTURES,
    OTHERS,
    VALUE_READ,
    attnres_of,
    both_types,
    run_python,
    tiny_base,
    trained,
)
from reference import reference_hidden_states
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_attnres.conversion import retrofit, verify


each_family = pytest.mark.parametrize("family", FAMILIES)
each_mixture = pytest.mark.parametrize("family", MIXTURES)
# Values are a part of another projection, or some layers have no attention
WITHOUT_V_PROJ = {"phi3", "deepseek_v3", "kimi_linear", "qwen3_next", "recurrent_gemma"}


def logits_in_two_passes(model, tokens):
    """Through the cache."""
    start = model(tokens["input_ids"][:, :12], attention_mask=tokens["attention_mask"][:, :12], use_cache=True)
    options = {"attention_mask": tokens["attention_mask"], "past_key_values": start.past_key_values}
    return torch.cat([start.logits, model(tokens["input_ids"][:, 12:], **options).logits], dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@both_types
@torch.no_grad()
def test_retrofit_computes_what_its_base_computes(family, attn_res, tokens):
    """Logits and loss of a left-padded batch, in one pass and in two through the cache, and greedy generation."""
    base = tiny_base(family)
    model = attnres_of(base, **attn_res)
    real = tokens["attention_mask"].bool()
    expected, actual = (each(**tokens, labels=tokens["input_ids"]) for each in (base, model))
    tolerance = {"rtol": 0, "atol": 1e-5 * expected.logits[real].abs().max().item()}
    assert expected.logits[real].std() > 0.01
    torch.testing.assert_close(actual.logits[real], expected.logits[real], **tolerance)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    if "past_key_values" in expected or "cache" in expected:
        expected, actual = (logits_in_two_passes(each, tokens)[real] for each in (base, model))
        torch.testing.assert_close(actual, expected, **tolerance)

    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(**tokens, **options), base.generate(**tokens, **options))


@each_family
def test_hidden_states_and_attentions_are_the_base_s(family, tokens):
    base = tiny_base(family, attn_implementation="eager")
    model = attnres_of(base, **BLOCK)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": family != "recurrent_gemma"}
    expected, actual = base(**tokens, **options), model(**tokens, **options)
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=2e-5)
    if options["output_attentions"]:
        assert len(expected.attentions) > 0
        torch.testing.assert_close(actual.attentions, expected.attentions, rtol=0, atol=1e-5)


# A token that rounding sends to another expert would hide the rounding itself
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
@both_types
@torch.no_grad()
def test_bfloat16_departs_no_further_than_the_base_itself(family, attn_res):
    input_ids = torch.randint(1, 99, (8, 64), generator=torch.Generator().manual_seed(0))
    base = tiny_base(family)
    exact = base(input_ids).logits
    base.bfloat16()
    expected = base(input_ids).logits
    actual = attnres_of(base, **attn_res)(input_ids).logits
    assert (actual - expected).float().abs().mean() <= (expected - exact).abs().mean()


@each_family
@pytest.mark.parametrize(
    "attn_res",
    [{"attn_res_block_size": 1}, BLOCK, FULL, VALUE_READ],
    ids=["block 1", "block 2", "full", "value read"],
)
@pytest.mark.parametrize("scale", ["sum", "mean"])
@torch.no_grad()
def test_trained_queries_are_wired_as_in_the_paper(family, attn_res, scale, tokens):
    base = tiny_base(family, attn_implementation="eager")
    if attn_res == VALUE_READ and family in WITHOUT_V_PROJ:
        with pytest.raises(ValueError, match=f"`attn_res_value_read` is True, but layer . of '{family}' has no"):
            attnres_of(base, **attn_res)
        return
    if family not in MIXTURES:
        # Experts do not run in float64
        base.double()
    temperature = 1.0 if scale == "sum" else 2.5
    model = trained(base, **attn_res, attn_res_scale=scale, attn_res_temperature=temperature)
    model.set_attn_implementation("eager")
    expected = reference_hidden_states(base, model, tokens["input_ids"])
    actual = model.model(tokens["input_ids"], use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5 if family in MIXTURES else 1e-5)
    # A comparison that the queries could not change would show nothing
    assert (expected - base.model(tokens["input_ids"]).last_hidden_state).abs().max() > 0.01


@each_family
@both_types
def test_gradients_are_the_base_s_and_each_query_has_one(family, attn_res, tokens):
    base = tiny_base(family)
    model = attnres_of(base, **attn_res)
    for each in (base, model):
        each(**tokens, labels=tokens["input_ids"]).loss.backward()
    for name, parameter in base.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if name.endswith(".query"))


@each_mixture
@torch.no_grad()
def test_router_logits_and_losses_are_the_base_s(family, tokens):
    base = tiny_base(family)
    model = attnres_of(base, **BLOCK)
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


@each_mixture
@torch.no_grad()
def test_implementations_of_the_experts_are_those_of_the_base(family, tokens):
    base = tiny_base(family)
    model = attnres_of(base, **BLOCK)
    assert model.config._experts_implementation == base.config._experts_implementation
    for implementation in ("eager", "batched_mm") if base._can_set_experts_implementation() else ():
        for each in (base, model):
            each.set_experts_implementation(implementation)
        torch.testing.assert_close(model(**tokens).logits, base(**tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_mixtures_compile_without_a_graph_break(family, tokens):
    model = trained(tiny_base(family), **BLOCK)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = (each(tokens["input_ids"][2:], use_cache=False).logits for each in (compiled, model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@each_family
def test_checkpoints_keep_the_base_s_layout(family, tmp_path):
    """Loaded from the base's files and saved again, tensors have the names and shapes of the base's files."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "base")
    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    assert verify(tmp_path / "base", output).passed

    # Another family in between: how weights lie on disk is looked up anew for each
    attnres_of(tiny_base("mixtral" if family != "mixtral" else "qwen3_moe")).save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(output)
    AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "saved")
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "base"))
    attn_res = {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".query", ".key_norm"))}
    torch.testing.assert_close(saved, {**expected, **attn_res}, rtol=0, atol=0)

    # A model that was never loaded knows its layout too, and its trained values are there again
    model = trained(base)
    model.save_pretrained(tmp_path / "fresh")
    assert load_file(tmp_path / "fresh" / "model.safetensors").keys() == saved.keys()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from transformers import AutoModelForCausalLM
import modeling_attnres

folder, *families = sys.argv[1:]

def load_and_save(i):
    AutoModelForCausalLM.from_pretrained(f"{folder}/{families[i % 3]}").save_pretrained(f"{folder}/{i}")

with ThreadPoolExecutor(4) as pool:
    list(pool.map(load_and_save, range(12)))
"""


def test_models_of_several_bases_load_and_save_in_threads_at_once(tmp_path):
    """
    Mixtures store their experts in different layouts, and each model finds its own. In a process of its own, since
    loading in threads leaves heads untied from then on (transformers 5.24, bases too).
    """
    families = ["mixtral", "qwen3_moe", "olmo2"]
    for family in families:
        trained(tiny_base(family), **BLOCK).save_pretrained(tmp_path / family)
    run_python(IN_THREADS, tmp_path, *families)
    for i in range(12):
        saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in (f"{i}", families[i % 3]))
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)


def test_phi3_changes_to_its_long_rope_as_its_base_does():
    """Its rotary embedding changes at a length, and generation passes it."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    base = tiny_base("phi3", rope_parameters=rope, original_max_position_embeddings=20, sliding_window=None)
    prompt = torch.randint(1, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    models = base, attnres_of(base, **BLOCK)
    expected, actual = (model.generate(prompt, max_new_tokens=12, do_sample=False) for model in models)
    assert torch.equal(actual, expected)
