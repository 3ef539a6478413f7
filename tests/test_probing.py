"""Recorded weights, and depth attention with sources masked out, by hooks."""

import pytest
import reference
import torch
from helpers import BLOCK, FAMILIES, FULL, attnres_of, both_types, tiny_base, tiny_base_config, trained
from peft import LoraConfig, get_peft_model
from test_heads import HEADS
from transformers import Trainer

from modeling_attnres import ATTN_RES_MODULES, AttnResConfig, DepthAttention
from modeling_attnres.callback import DepthAttentionCallback
from modeling_attnres.probing import depth_attentions, depth_sources, masked_sources, recorded_weights


# Of five layers
FULL_SOURCES = ["embedding", *(f"layer {i} {kind}" for i in range(5) for kind in ("attention", "MLP"))]
BLOCK_SOURCES = ["embedding", "layers 0-1", "layers 2-3", "layer 4"]
NAMES = [*FULL_SOURCES[2:], "output"]


def all_but_one_in_each_row(model):
    mask = torch.ones(len(depth_attentions(model)), len(depth_sources(model)), dtype=torch.bool)
    mask[torch.arange(len(mask)), torch.arange(len(mask)) % 2] = False
    return mask


@both_types
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_next"])
def test_recorded_weights_are_the_formula_s(family, attn_res, tokens):
    model = trained(tiny_base(family), **attn_res)
    assert list(depth_attentions(model)) == NAMES
    assert depth_sources(model) == (BLOCK_SOURCES if attn_res is BLOCK else FULL_SOURCES)
    calls = []
    for module in depth_attentions(model).values():
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
    with recorded_weights(model) as weights:
        logits = model(**tokens).logits
    assert len(calls) == len(NAMES)
    for name, (module, sources) in zip(NAMES, calls):
        (recorded,) = weights[name]
        assert recorded.dtype == torch.float32
        expected, _ = reference.attention_weights(*reference.parameters(module), sources)
        torch.testing.assert_close(recorded.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(logits, model(**tokens).logits), "recording changes nothing"


@both_types
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_masked_source_is_as_if_it_did_not_exist(scale, attn_res, tokens):
    model = trained(tiny_base("llama"), attn_res_scale=scale, **attn_res)
    mask = all_but_one_in_each_row(model)
    sources, outputs = [], []
    for module in depth_attentions(model).values():
        module.register_forward_pre_hook(lambda module, args: sources.append(args))
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    with masked_sources(model, mask):
        model(**tokens)
    for module, args, output, row in zip(depth_attentions(model).values(), sources, outputs, mask, strict=True):
        expected = reference.depth_attention(*reference.parameters(module), args, scale, kept=row[: len(args)])
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_in_generate_weights_come_for_each_pass_and_masks_hold(tokens):
    model = trained(tiny_base("llama"), **BLOCK)
    options = {"max_new_tokens": 4, "do_sample": False}
    with recorded_weights(model) as weights:
        output = model.generate(**tokens, **options)
    assert [tuple(w.shape[:2]) for w in weights["output"]] == [(3, 17), (3, 1), (3, 1), (3, 1)]
    with masked_sources(model, all_but_one_in_each_row(model)):
        masked = model.generate(**tokens, **options)
        logits = model(masked[:, :-1], attention_mask=torch.cat([tokens["attention_mask"], torch.ones(3, 3)], 1)).logits
    assert torch.equal(logits[:, -4:].argmax(-1), masked[:, -4:]) and not torch.equal(masked, output)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_recorded_too(head, tokens):
    config = AttnResConfig.from_base_config(tiny_base_config("llama", num_labels=3), **BLOCK)
    model = HEADS[head].from_config(config)
    with recorded_weights(model) as weights:
        model(**tokens)
    assert list(weights) == NAMES and all(len(recorded) == 1 for recorded in weights.values())


@torch.no_grad()
def test_with_peft_the_trained_copies_are_recorded(tokens):
    model = attnres_of(tiny_base("llama"), **BLOCK)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=ATTN_RES_MODULES))
    for name, parameter in model.named_parameters():
        if name.endswith("mlp_res.modules_to_save.default.query"):
            parameter.normal_()
    with recorded_weights(model) as weights:
        model(**tokens)
    assert weights["layer 2 MLP"][0].std() > 0.01 and weights["layer 2 attention"][0].std() < 1e-6


def test_a_layer_with_parallel_sublayers_has_one_read(tokens):
    model = trained(tiny_base("cohere"), **FULL)
    with recorded_weights(model) as weights:
        model(**tokens)
    assert list(weights) == [*(f"layer {i} attention" for i in range(1, 5)), "output"]
    assert [w.shape[-1] for (w,) in weights.values()] == [3, 5, 7, 9, 11]


MASKS = {
    "torch.float32": torch.ones(10, 4),
    r"shape \(10, 3\).*\(10, 4\)": torch.ones(10, 3, dtype=torch.bool),
    "'layer 1 MLP' none of its 2": torch.arange(10)[:, None].expand(10, 4) != 2,
}


@pytest.mark.parametrize("message, mask", MASKS.items(), ids=["dtype", "shape", "no source left"])
def test_masks_that_do_not_fit_are_refused(message, mask, tokens):
    model = trained(tiny_base("llama"), **BLOCK)
    with pytest.raises(ValueError, match=message), masked_sources(model, mask):
        model(**tokens)


def test_a_model_without_depth_attention_is_refused():
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM.*no depth attention"), recorded_weights(base):
        pass
    with pytest.raises(ValueError, match="LlamaForCausalLM.*no depth attention"):
        DepthAttentionCallback(Trainer(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_names_for_all_their_depth_attentions(family):
    model = attnres_of(tiny_base(family), **FULL)
    assert len(depth_attentions(model)) == sum(isinstance(m, DepthAttention) for m in model.modules())
