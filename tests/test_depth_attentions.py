"""Recorded depth attentions, and depth attention with sources masked out."""

import pickle
import sys
import threading

import pytest
import torch
from accelerate.utils import convert_to_fp32
from conftest import FAMILIES, attnres_of, randomise_depth_attention, tiny_base
from test_heads import HEADS, base_with_head
from torch.utils._pytree import tree_flatten, tree_unflatten

from modeling_attnres import AttnResConfig, DepthAttention
from modeling_attnres.fused_depth_attention import fused_depth_attention


FUSED = fused_depth_attention.__module__
BLOCK, FULL = {"attn_res_block_size": 2}, {"attn_res_type": "full"}
both_types = pytest.mark.parametrize("attn_res", [BLOCK, FULL], ids=["block", "full"])
both_scales = pytest.mark.parametrize("scale", ["sum", "mean"])
# Of five layers: what the rows and the columns are
NAMES = [f"layer {i} {kind}" for i in range(5) for kind in ("attention", "MLP")][1:] + ["output"]
BLOCK_SOURCES = ["embedding", "layers 0-1", "layers 2-3", "layer 4"]
FULL_SOURCES = ["embedding"] + [f"layer {i} {kind}" for i in range(5) for kind in ("attention", "MLP")]


@pytest.fixture
def base():
    return tiny_base("llama")


def trained(base, **attn_res):
    return randomise_depth_attention(attnres_of(base, **attn_res))


def depth_attentions_in_order(model):
    """The modules, as they are called."""
    layers = [module for layer in model.model.layers for module in (layer.self_attention_res, layer.mlp_res)]
    return [*layers[1:], model.model.output_res]


def sources_and_outputs(model, **inputs):
    """What each depth attention was given and gave."""
    calls = []
    keep = lambda module, sources, output: calls.append((sources, output))  # noqa: E731
    hooks = [module.register_forward_hook(keep) for module in depth_attentions_in_order(model)]
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return output, calls


def formula(module, sources, mask=None):
    """The weights in float64, from the definition, with -inf as the logit of what is masked."""
    values = torch.stack(sources, -2).double()
    keys = values / (values.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.key_norm.double()
    logits = keys @ module.query.double() / module.config.attn_res_temperature
    if mask is not None:
        logits = logits.masked_fill(~mask[: len(sources)], -torch.inf)
    return logits.softmax(-1), values


@both_types
def test_names_say_what_rows_and_columns_are(base, attn_res):
    model = attnres_of(base, **attn_res)
    assert model.config.depth_attention_names == NAMES
    assert model.config.depth_source_names == (BLOCK_SOURCES if attn_res is BLOCK else FULL_SOURCES)
    weights = model(torch.ones(1, 3, dtype=torch.long), output_depth_attentions=True).depth_attentions
    assert [w.shape[-1] for w in weights] == model.config.depth_attention_sources


@both_types
@both_scales
@pytest.mark.parametrize("streaming_size", [0, 2**16], ids=["streaming", "stacked"])
@torch.no_grad()
def test_recorded_weights_times_sources_are_what_the_sublayer_received(
    base, attn_res, scale, streaming_size, tokens, monkeypatch
):
    monkeypatch.setattr(sys.modules[DepthAttention.__module__], "STREAMING_SIZE", streaming_size)
    model = trained(base, attn_res_scale=scale, attn_res_temperature=0.5, **attn_res)
    received = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    output, calls = sources_and_outputs(model, **tokens, output_depth_attentions=True)
    assert torch.equal(output.logits, model(**tokens).logits)
    assert len(output.depth_attentions) == len(NAMES)
    for weights, (sources, _), hidden_states in zip(output.depth_attentions, calls, received[1:]):
        assert weights.shape == (3, 17, len(sources)) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 17))
        factor = len(sources) if scale == "sum" else 1
        total = factor * (weights.unsqueeze(-1) * torch.stack(sources, -2)).sum(-2)
        torch.testing.assert_close(total, hidden_states, rtol=1e-5, atol=1e-5)


@both_types
@torch.no_grad()
def test_recorded_weights_are_the_formula_s(base, attn_res, tokens):
    model = trained(base, **attn_res)
    output, calls = sources_and_outputs(model, **tokens, output_depth_attentions=True)
    for module, weights, (sources, _) in zip(depth_attentions_in_order(model), output.depth_attentions, calls):
        torch.testing.assert_close(weights.double(), formula(module, sources)[0], rtol=0, atol=1e-6)


@both_types
@torch.no_grad()
def test_with_the_fused_operator_weights_are_fla_s(base, attn_res, tokens, monkeypatch):
    """fla's reference in the place of its kernel, which needs a GPU: it gives its own weights too."""
    from fla.ops.attnres import naive_attnres

    theirs = []

    def kernel(query, sources, key_norm, rms_eps):
        output, weights = naive_attnres(query, sources, key_norm, rms_eps=rms_eps, return_weights=True)
        theirs.append(weights)
        return output

    monkeypatch.setattr(f"{FUSED}.fused_kernel", lambda: kernel)
    monkeypatch.setattr(f"{DepthAttention.__module__}.choose_implementation", lambda *_: fused_depth_attention)
    model = trained(base, **attn_res)
    output = model(**tokens, output_depth_attentions=True)
    assert len(theirs) == len(output.depth_attentions) == len(NAMES)
    for ours, weights in zip(output.depth_attentions, theirs):
        torch.testing.assert_close(ours, weights.movedim(0, -1), rtol=0, atol=1e-5)


@both_types
@torch.no_grad()
def test_uniform_at_zero_queries(base, attn_res, tokens):
    for weights in attnres_of(base, **attn_res)(**tokens, output_depth_attentions=True).depth_attentions:
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[-1]))


@torch.no_grad()
def test_nothing_is_computed_where_nobody_asks(base, tokens):
    model = trained(base, **BLOCK)
    calls = []
    for module in depth_attentions_in_order(model):
        module.weights.register_forward_hook(lambda *_: calls.append(1))
    assert "depth_attentions" not in model(**tokens) and not calls
    model.config.output_depth_attentions = True
    assert len(model(**tokens).depth_attentions) == len(model.model(**tokens).depth_attentions) == 10
    assert len(calls) == 20
    assert "depth_attentions" not in model(**tokens, output_depth_attentions=False) and len(calls) == 20


@torch.no_grad()
def test_beside_the_other_outputs_and_as_a_tuple(base, tokens):
    model = trained(base, **BLOCK)
    everything = {"output_hidden_states": True, "output_depth_attentions": True, "labels": tokens["input_ids"]}
    output = model(**tokens, **everything)
    assert len(output.hidden_states) == 6 and len(output.depth_attentions) == 10 and output.loss > 0
    as_tuple = model(**tokens, **everything, return_dict=False)
    assert len(as_tuple) == len(output.to_tuple())
    torch.testing.assert_close(as_tuple[-1], output.depth_attentions)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_every_head_gives_them(head, tokens):
    config = AttnResConfig.from_base_config(base_with_head(head).config, **BLOCK)
    model = randomise_depth_attention(HEADS[head].from_config(config).eval())
    expected = model.model(**tokens, output_depth_attentions=True).depth_attentions
    torch.testing.assert_close(model(**tokens, output_depth_attentions=True).depth_attentions, expected)


@pytest.mark.parametrize("name", [*HEADS, *FAMILIES])
@torch.no_grad()
def test_what_is_wrapped_around_a_model_keeps_them(name):
    """DDP takes outputs apart and puts them together, mixed precision converts them; some users save them."""
    base = base_with_head(name) if name in HEADS else tiny_base(name)
    model = HEADS[name].from_config(AttnResConfig.from_base_config(base.config)) if name in HEADS else attnres_of(base)
    for module in (model, model.model):
        output = module(torch.arange(1, 9)[None], output_depth_attentions=True)
        leaves, structure = tree_flatten(output)
        converted = convert_to_fp32(output)
        for other in (tree_unflatten(leaves, structure), converted, pickle.loads(pickle.dumps(output))):
            assert type(other) is type(output)
            torch.testing.assert_close(other["depth_attentions"], output.depth_attentions)


@both_types
@torch.no_grad()
def test_generate_gives_them_for_each_step(base, attn_res):
    model = trained(base, **attn_res)
    prompt = torch.tensor([[1, 5, 3, 8]])
    options = {"max_new_tokens": 5, "do_sample": False, "output_depth_attentions": True}
    output = model.generate(prompt, **options, return_dict_in_generate=True, output_attentions=True)
    assert len(output.depth_attentions) == len(output.attentions) == 5
    # With the cache, the steps together are the weights of one pass over all of it
    expected = model(output.sequences[:, :-1], output_depth_attentions=True).depth_attentions
    for actual, at_once in zip(zip(*output.depth_attentions), expected):
        torch.testing.assert_close(torch.cat(actual, dim=1), at_once, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(prompt, **options), output.sequences)
    beams = model.generate(prompt, **options, num_beams=3, return_dict_in_generate=True)
    assert beams.depth_attentions[1][0].shape[:2] == (3, 1)
    assert not model._forward_hooks and not model.model._forward_hooks


@torch.no_grad()
def test_generate_follows_the_configuration(base):
    model = trained(base, **BLOCK)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    prompt = torch.tensor([[1, 5, 3, 8]])
    expected = model.generate(prompt, **options, output_depth_attentions=True).depth_attentions
    model.config.output_depth_attentions = True
    torch.testing.assert_close(model.generate(prompt, **options).depth_attentions, expected)
    assert "depth_attentions" not in model.generate(prompt, **options, output_depth_attentions=False)


@torch.no_grad()
def test_assisted_generation(base):
    """The base drafts, which knows neither argument: masked it is the target's own tokens, weights are refused."""
    model = trained(base, **BLOCK)
    prompt = torch.tensor([[1, 5, 3, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "depth_attention_mask": random_mask(model)}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options, output_depth_attentions=False, assistant_model=base), expected)
    for how in ({"assistant_model": base}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(prompt, **options, **how), expected)
        with pytest.raises(ValueError, match="`output_depth_attentions` is True, but .* in assisted generation"):
            model.generate(prompt, **options, **how, output_depth_attentions=True)


@torch.no_grad()
def test_two_threads_on_one_model_do_not_mix_theirs(base):
    model = trained(base, **BLOCK)
    rows = [torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(length)) for length in (7, 23)]
    expected = [model(row, output_depth_attentions=True).depth_attentions for row in rows]
    mixed = []

    def work(row, weights):
        with torch.no_grad():
            for _ in range(20):
                actual = model(row, output_depth_attentions=True).depth_attentions
                if len(actual) != 10 or not all(a.shape == w.shape for a, w in zip(actual, weights)):
                    mixed.append(row.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(rows, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed


@both_types
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recorded_once_with_gradient_checkpointing(base, attn_res, use_reentrant, tokens):
    model = trained(base, **attn_res).train()
    expected = model(**tokens, output_depth_attentions=True).depth_attentions
    loss = sum((weights * weights.log()).sum() for weights in expected)
    gradients = torch.autograd.grad(loss, [model.model.layers[2].mlp_res.query])
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    output = model(**tokens, output_depth_attentions=True, labels=tokens["input_ids"])
    torch.testing.assert_close(output.depth_attentions, expected)
    if not use_reentrant:
        loss = sum((weights * weights.log()).sum() for weights in output.depth_attentions)
        again = torch.autograd.grad(loss, [model.model.layers[2].mlp_res.query], retain_graph=True)
        torch.testing.assert_close(again, gradients)
    output.loss.backward()
    assert len(output.depth_attentions) == 10


@both_types
@torch.no_grad()
def test_recorded_in_a_compiled_decoder(base, attn_res, tokens):
    model = trained(base, **attn_res).model
    expected = model(**tokens, output_depth_attentions=True).depth_attentions
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(**tokens, output_depth_attentions=True).depth_attentions
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_bfloat16_weights_are_float32(base, tokens):
    model = trained(base, **BLOCK)
    expected = model(**tokens, output_depth_attentions=True).depth_attentions
    actual = model.bfloat16()(**tokens, output_depth_attentions=True).depth_attentions
    for ours, theirs in zip(actual, expected):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


def random_mask(model):
    """About half of the sources, and at least the embedding."""
    shape = len(NAMES), len(model.config.depth_source_names)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[:, 0] |= ~mask[:, :2].any(-1)
    return mask


@both_types
@both_scales
@pytest.mark.parametrize("streaming_size", [0, 2**16], ids=["streaming", "stacked"])
@torch.no_grad()
def test_masked_sources_get_no_weight_and_the_others_are_renormalised(
    base, attn_res, scale, streaming_size, tokens, monkeypatch
):
    monkeypatch.setattr(sys.modules[DepthAttention.__module__], "STREAMING_SIZE", streaming_size)
    model = trained(base, attn_res_scale=scale, **attn_res)
    mask = random_mask(model)
    output, calls = sources_and_outputs(model, **tokens, depth_attention_mask=mask, output_depth_attentions=True)
    modules = depth_attentions_in_order(model)
    for module, row, weights, (sources, hidden_states) in zip(modules, mask, output.depth_attentions, calls):
        expected, values = formula(module, sources, row)
        torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
        assert not weights[..., ~row[: len(sources)]].any()
        factor = row[: len(sources)].sum() if scale == "sum" else 1
        total = factor * (expected.unsqueeze(-1) * values).sum(-2)
        torch.testing.assert_close(hidden_states.double(), total, rtol=1e-5, atol=1e-5)


@both_types
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing_and_lists_do_too(base, attn_res, tokens):
    model = trained(base, **attn_res)
    shape = len(NAMES), len(model.config.depth_source_names)
    mask = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(model(**tokens, depth_attention_mask=mask).logits, model(**tokens).logits)
    mask = random_mask(model)
    logits = model(**tokens, depth_attention_mask=mask).logits
    assert (logits - model(**tokens).logits).abs().max() > 1e-2
    assert torch.equal(model(**tokens, depth_attention_mask=mask.tolist()).logits, logits)


@torch.no_grad()
def test_at_zero_queries_a_masked_source_is_subtracted_from_the_base_s_stream(base, tokens):
    """In the base: what its final norm is given, without what its layers 2 and 3 added."""
    model = attnres_of(base, **BLOCK)
    mask = torch.ones(len(NAMES), len(BLOCK_SOURCES), dtype=torch.bool)
    mask[-1, BLOCK_SOURCES.index("layers 2-3")] = False
    stream = base(**tokens, output_hidden_states=True).hidden_states
    given = []
    base.model.norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    base(**tokens)
    expected = base.lm_head(base.model.norm(given[0] - (stream[4] - stream[2])))
    torch.testing.assert_close(model(**tokens, depth_attention_mask=mask).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_in_generate_and_under_checkpointing(base, tokens):
    model = trained(base, **BLOCK)
    mask = random_mask(model)
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "depth_attention_mask": mask}
        cached = model.generate(**tokens, **options)
        assert torch.equal(cached, model.generate(**tokens, **options, use_cache=False))
        assert not torch.equal(cached, model.generate(**tokens, **{**options, "depth_attention_mask": None}))
    with torch.enable_grad():
        expected = model(**tokens, labels=tokens["input_ids"], depth_attention_mask=mask).loss
        model.train().gradient_checkpointing_enable()
        loss = model(**tokens, labels=tokens["input_ids"], depth_attention_mask=mask).loss
        gradients = [torch.autograd.grad(x, [model.model.embed_tokens.weight])[0] for x in (expected, loss)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_wrong_masks_are_refused(base, tokens):
    model = trained(base, **BLOCK)
    ones = torch.ones(len(NAMES), len(BLOCK_SOURCES), dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \(9, 4\).*has to be torch.bool of shape \(10, 4\)"):
        model(**tokens, depth_attention_mask=ones[1:])
    with pytest.raises(ValueError, match="is torch.float32 of shape"):
        model(**tokens, depth_attention_mask=ones.float())
    ones[1, :2] = False
    with pytest.raises(ValueError, match="leaves 'layer 1 attention' none of its 2 sources"):
        model(**tokens, depth_attention_mask=ones)


@pytest.mark.parametrize("family", [f for f in ("mixtral", "granite", "kimi_linear") if f in FAMILIES])
@torch.no_grad()
def test_other_families(family, tokens):
    base = tiny_base(family)
    model = trained(base, **BLOCK)
    output, calls = sources_and_outputs(model, **tokens, output_depth_attentions=True)
    for module, weights, (sources, _) in zip(depth_attentions_in_order(model), output.depth_attentions, calls):
        torch.testing.assert_close(weights.double(), formula(module, sources)[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_saved_parameters_are_what_they_were(base):
    """A module that records has no state."""
    model = attnres_of(base, **BLOCK)
    names = {name for name in model.state_dict() if "_res." in name}
    assert {name.rsplit(".", 1)[1] for name in names} == {"query", "key_norm"} and len(names) == 20
