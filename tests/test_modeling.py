"""AttnRes models behave as Hugging Face causal language models: against the base at zero queries, or against itself
with trained ones where the two ways have to agree."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import (
    BLOCK,
    FAMILIES,
    TINY,
    attnres_of,
    both_types,
    each_type,
    run_python,
    tiny_base,
    tiny_base_config,
    trained,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.conversion import retrofit


each_implementation = pytest.mark.parametrize("implementation", ["eager", "streaming"])


@pytest.fixture
def base():
    return tiny_base("llama")


@both_types
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_base_checkpoint_loads_as_it_is(family, attn_res, tmp_path, tokens):
    """A layer has two depth attentions, but the first has one, and the last has a third."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path)
    model, info = AttnResForCausalLM.from_pretrained(tmp_path, **attn_res, output_loading_info=True)
    assert model.config.base_model_type == family
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    names = {"4.output_res", *(f"{i}.mlp_res" for i in range(5)), *(f"{i}.self_attention_res" for i in range(1, 5))}
    missing = {f"model.layers.{name}.{part}" for name in names for part in ("query", "key_norm")}
    assert set(info["missing_keys"]) == missing
    torch.testing.assert_close(model(**tokens).logits, base(**tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_a_loaded_base_becomes_an_attnres_model_with_the_same_weights(family, tmp_path, tokens):
    tiny_base(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    weight, expected = base.get_input_embeddings().weight, base(**tokens, output_hidden_states=True)
    model = AttnResForCausalLM.from_base(base, attn_res_block_size=2)
    assert model.get_input_embeddings().weight is weight and not model.training
    actual = model(**tokens, output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=2e-5)
    assert model.config._attn_implementation == "eager" and model.model.layers[0].self_attn.config is model.config

    model.save_pretrained(tmp_path / "attnres")
    retrofit(tmp_path / "base", tmp_path / "retrofit", attn_res_block_size=2)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("attnres", "retrofit"))
    for field in ("base_model_type", "attn_res_block_size", "attn_res_temperature"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="LlamaModel.*causal language model"):
        AttnResForCausalLM.from_base(tiny_base("llama").model)


def test_a_sharded_or_offloaded_base_is_refused(tmp_path):
    """Its hooks are made for the base's layers."""
    tiny_base("llama").save_pretrained(tmp_path)
    parts = ("embed_tokens", "rotary_emb", "norm", *(f"layers.{i}" for i in range(5)))
    device_map = {"lm_head": "cpu", **{f"model.{part}": "cpu" for part in parts}, "model.layers.3": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
    sharded = tiny_base("llama")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded.model.layers[0], mesh=init_device_mesh("cpu", (1,)))
        for base in (offloaded, sharded):
            with pytest.raises(ValueError, match="is sharded or offloaded.*convert the base first"):
                AttnResForCausalLM.from_base(base)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_initialization_is_the_base_s_and_queries_are_zero(family):
    """From scratch: same seed, same weights; the AttnRes tensors draw no random numbers."""
    start, config = {"query": torch.zeros(32), "key_norm": torch.ones(32)}, tiny_base_config(family)
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(3)
    for name, tensor in AutoModelForCausalLM.from_config(AttnResConfig.from_base_config(config)).state_dict().items():
        assert torch.equal(tensor, start.get(name.split(".")[-1], expected.get(name))), name


def test_fewer_layers(base, tokens, tmp_path):
    """As in the base, whether they are dropped before or after loading. The last block is then short."""
    model = attnres_of(base, attn_res_block_size=4)
    model.save_pretrained(tmp_path / "whole")
    for each in (base, model):
        each.model.layers = each.model.layers[:2]
        each.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "short")
    for folder in ("whole", "short"):
        short = AutoModelForCausalLM.from_pretrained(tmp_path / folder, num_hidden_layers=2)
        assert len(short.model.layers) == 2
        torch.testing.assert_close(short(**tokens).logits, base(**tokens).logits, rtol=0, atol=1e-5)


def test_tools_that_look_at_every_attribute(base, tokens):
    model = attnres_of(base, **BLOCK)
    members, expected = (dict(inspect.getmembers(each)) for each in (model, base))
    assert members.keys() >= expected.keys()
    model.config.use_cache = False
    traced = torch.jit.trace(model, tokens["input_ids"], strict=False, check_trace=False)
    actual, expected = traced(tokens["input_ids"])["logits"], base(tokens["input_ids"]).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_missing_weights_are_initialized_as_in_the_base(base, tmp_path):
    """Loaded with a part missing: base tensors get the base's initialization, AttnRes tensors theirs."""
    model = trained(base, **BLOCK)
    kept = {n: t for n, t in model.state_dict().items() if "layers.2." not in n and n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, info = AttnResForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    layer = loaded.model.layers[2]
    assert info["missing_keys"] and 0.01 < layer.self_attn.q_proj.weight.std() < 0.03
    assert (layer.input_layernorm.weight == 1).all()
    assert (layer.mlp_res.query == 0).all() and (layer.mlp_res.key_norm == 1).all()
    assert (loaded.model.layers[1].mlp_res.query != 0).any()


@each_type
def test_save_and_load(base, attn_res, tmp_path, tokens):
    model = trained(base, **attn_res)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AttnResForCausalLM) and loaded.model.embed_tokens.weight is loaded.lm_head.weight
    expected = model(**tokens).logits
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**tokens).logits, expected, rtol=0, atol=1e-5)
    headless = AutoModel.from_pretrained(tmp_path)(**tokens)[0]
    torch.testing.assert_close(headless, model.model(**tokens)[0], rtol=0, atol=1e-5)


@each_type
def test_generation_does_not_depend_on_the_cache(base, attn_res, tokens):
    model = trained(base, **attn_res)
    arguments = dict(**tokens, max_new_tokens=12, do_sample=False)
    expected = model.generate(**arguments, use_cache=False)
    assert torch.equal(model.generate(**arguments), expected)
    assert torch.equal(model.generate(**arguments, cache_implementation="static"), expected)
    beams = model.generate(**arguments, num_beams=3)
    assert torch.equal(beams, model.generate(**arguments, num_beams=3, use_cache=False))


def test_arguments_do_what_they_do_in_the_base(base, tokens):
    model = attnres_of(base, **BLOCK)
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    table = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(100)},
        {"labels": labels, "shift_labels": shifted, "num_items_in_batch": 7},
        {"logits_to_keep": torch.tensor([1, 5, 16])},
        {"logits_to_keep": 3},
        {"labels": labels, "output_hidden_states": True},
        {"input_ids": None, "inputs_embeds": base.get_input_embeddings()(tokens["input_ids"])},
    ]
    for arguments in table:
        inputs = {**tokens, **arguments, "use_cache": False, "return_dict": False}
        expected, actual = base(**inputs), model(**inputs)
        assert isinstance(actual, tuple)
        close = {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, row=arguments: f"{[*row]}: {text}")


@both_types
@pytest.mark.parametrize("layers", [1, 5])
def test_hidden_states_are_the_inputs_of_the_layers_and_the_output(attn_res, layers, tokens):
    model = trained(tiny_base("llama", num_hidden_layers=layers), **attn_res)
    inputs = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    output = model.model(**tokens, output_hidden_states=True)
    expected = (*inputs, output.last_hidden_state)
    torch.testing.assert_close(output.hidden_states, expected, rtol=0, atol=0)


@torch.no_grad()
def test_attention_implementations_agree(base, tokens, tmp_path):
    model = trained(base, **BLOCK)
    model.save_pretrained(tmp_path)
    real = tokens["attention_mask"].bool()
    assert model.config._attn_implementation == "sdpa"
    for implementation in ("eager", "flex_attention"):
        other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        assert other.model.layers[0].self_attn.config._attn_implementation == implementation
        actual, expected = (each(**tokens).logits[real] for each in (other, model))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(ImportError, match="(?i)flash"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@each_type
@each_implementation
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(base, attn_res, implementation, use_reentrant, tokens):
    """Of the loss and of the hidden states, which are recorded within a checkpointed layer."""
    model = trained(base, **attn_res, attn_res_implementation=implementation).train()
    calls, gradients = [], []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        output = model(**tokens, labels=tokens["input_ids"], output_hidden_states=True)
        states = sum((state * state.detach().roll(1)).sum() for state in output.hidden_states)
        (output.loss + states).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(calls) == 3, "the layer is run again in the backward pass"
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_embeddings_can_be_resized(base, tokens):
    model = trained(base, **BLOCK)
    logits = model(**tokens).logits
    model.resize_token_embeddings(120, mean_resizing=False)
    resized = model(**tokens).logits
    assert resized.shape[-1] == model.config.vocab_size == model.lm_head.out_features == 120
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(resized[..., :99], logits)


def test_vllm_can_use_the_class():
    """vLLM asks the class, which has no base yet."""
    llama = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["llama"]]
    for flag in ("_supports_attention_backend", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
        assert getattr(AttnResForCausalLM, flag) == getattr(llama, flag) is True
    assert AttnResForCausalLM.is_backend_compatible()


@both_types
def test_float64_retrofit_is_exact_to_float64(base, attn_res, tokens):
    base.double()
    difference = attnres_of(base, **attn_res)(**tokens).logits - base(**tokens).logits
    assert difference.abs().max() < 1e-13


@each_type
@each_implementation
def test_compiles_without_a_graph_break(base, attn_res, implementation, tokens):
    """A forward pass and a training step."""
    model = trained(base, **attn_res, attn_res_implementation=implementation)
    labels = tokens["input_ids"]
    expected = model(**tokens, labels=labels)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(**tokens, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    actual = torch.autograd.grad(output.loss, list(model.parameters()))
    torch.testing.assert_close(actual, gradients, rtol=1e-4, atol=1e-5)


COMPILE = """
import torch
from modeling_attnres import AttnResConfig, AttnResForCausalLM
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
model = AttnResForCausalLM(AttnResConfig(**small))
torch.compile(model, fullgraph=True, backend="aot_eager")(torch.arange(8)[None])
"""


def test_compiles_without_an_eager_forward_pass_before():
    run_python(COMPILE)


@both_types
def test_compiled_decoding_compiles_once(base, attn_res):
    """One graph for the prompt and one for all later tokens, with a static cache."""
    # Models that earlier tests compiled count toward the compiler's limit
    torch._dynamo.reset()
    model = trained(base, **attn_res)
    prompt = torch.tensor([[1, 5, 3, 8]])
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(prompt, **options)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=count)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert len(graphs) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_kept_once_and_not_once_for_each_layer(checkpointing):
    """What a training step keeps beside the base's: per layer the running sum, twice, and two numbers per source."""
    base = tiny_base("llama", num_hidden_layers=12)
    input_ids = torch.ones(4, 64, dtype=torch.long)

    def kept(model):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        tensors = {}
        pack = lambda tensor: tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids, use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    difference = kept(trained(base, attn_res_block_size=1, attn_res_implementation="streaming")) - kept(base)
    source = 4 * 64 * TINY["hidden_size"] * 4
    numbers = sum(2 * (2 * layer + 3) for layer in range(12)) * 4 * 64 * 4
    parameters = 26 * 2 * TINY["hidden_size"] * 4
    assert difference <= 2 * 13 * source + numbers + parameters
