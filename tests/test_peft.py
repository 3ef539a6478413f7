"""PEFT adapters also train, save, load, merge and switch the depth attention."""

from itertools import product

import peft
import pytest
import torch
from helpers import MIXTURES, attnres_of, logits, tiny_base, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save_file

from modeling_attnres import ATTN_RES_MODULES, AttnResConfig, AttnResForCausalLM, with_base_targets


ADAPTERS = {
    "LoRA beside it": lambda: LoraConfig(r=4, target_modules="all-linear", modules_to_save=ATTN_RES_MODULES),
    "AttnRes alone": lambda: LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=ATTN_RES_MODULES),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


@pytest.fixture
def base():
    return tiny_base("llama")


def queries(model):
    return torch.stack([p for name, p in model.named_parameters() if name.endswith("query") and p.requires_grad])


@pytest.mark.parametrize("fields, reads", [({}, 10), ({"attn_res_value_read": True}, 14)], ids=["block", "value read"])
@each_adapter
def test_an_adapter_is_trained_saved_loaded_merged_and_unloaded(adapter, fields, reads, base, tokens, tmp_path):
    model = get_peft_model(attnres_of(base, **fields), adapter()).eval()
    assert (queries(model) == 0).all() and len(queries(model)) == reads
    # PEFT wraps modules, and hidden states are recorded by class and name of a module
    actual, expected = (each(**tokens, output_hidden_states=True) for each in (model, base))
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    train(model, tokens)
    trained = logits(model, tokens)
    assert (queries(model) != 0).any(dim=-1).all()
    assert (trained - logits(base, tokens)).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    of_attn_res = [name for name in saved if not set(ATTN_RES_MODULES).isdisjoint(name.split("."))]
    # Query and key norm of each depth attention, not wrapped as linear layers
    assert len(of_attn_res) == 2 * reads and all(saved[name].shape == (32,) for name in of_attn_res)

    loaded = PeftModel.from_pretrained(attnres_of(base, **fields), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), trained, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, tokens), logits(base, tokens), rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for each in (merged, AttnResForCausalLM.from_pretrained(tmp_path / "merged")):
        assert isinstance(each, AttnResForCausalLM)
        torch.testing.assert_close(logits(each, tokens), trained, rtol=0, atol=1e-5)

    # `unload` removes the LoRA and keeps `modules_to_save` as trained
    unloaded = PeftModel.from_pretrained(attnres_of(base, **fields), tmp_path).unload().state_dict()
    attn_res = {name: tensor for name, tensor in merged.state_dict().items() if "_res." in name}
    torch.testing.assert_close(unloaded, {**base.state_dict(), **attn_res}, rtol=0, atol=0)


@each_adapter
def test_two_adapters_in_one_model(adapter, base, tokens, tmp_path):
    expected = {}
    for name, steps in (("first", 2), ("second", 5)):
        model = get_peft_model(attnres_of(base), adapter())
        train(model, tokens, steps)
        expected[name] = logits(model, tokens)
        model.save_pretrained(tmp_path / name)
    assert (expected["first"] - expected["second"]).abs().max() > 0.1

    model = PeftModel.from_pretrained(attnres_of(base), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model.eval(), tokens), expected[name], rtol=0, atol=1e-5)


def test_attn_res_alone_is_a_light_adapter():
    """In the shape of SmolLM2-135M: 60 depth attentions with two vectors of 576 numbers each."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = AttnResConfig(**shape, num_hidden_layers=30, vocab_size=49152, tie_word_embeddings=True)
    with torch.device("meta"):
        adapted = get_peft_model(AttnResForCausalLM(config), ADAPTERS["AttnRes alone"]())
    trained, total = adapted.get_nb_trainable_parameters()
    assert trained == 60 * 2 * 576 and trained / total < 0.001


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens(config, base, tokens):
    """Prompt and prefix tuning read their sizes from the configuration. The results are those of the base."""
    results = []
    for model in (base, attnres_of(base)):
        torch.manual_seed(0)
        model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
        train(model, tokens)
        results.append((logits(model, tokens), model.generate(**tokens, max_new_tokens=8, do_sample=False)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def trained_shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gemma2"])
@pytest.mark.parametrize("config", [LoraConfig, peft.IA3Config, peft.VeraConfig])
def test_default_targets_are_those_of_the_base(config, family):
    base = tiny_base(family)
    model = attnres_of(base)
    actual = trained_shapes(get_peft_model(model, with_base_targets(model, config(task_type="CAUSAL_LM"))))
    assert actual == trained_shapes(get_peft_model(base, config(task_type="CAUSAL_LM")))


# The directory of the experts in checkpoints and adapters of transformers 4, and their gate, up and down projections
EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_an_adapter_of_transformers_4_has_its_experts(family, tokens, tmp_path):
    base = tiny_base(family)
    block, *projections = EXPERTS[family]
    adapter = {}
    for i, layer in enumerate(base.model.layers):
        if hasattr(layer.mlp, "experts"):
            num_experts, hidden_size, width = layer.mlp.experts.down_proj.shape
            for number, module in product(range(num_experts), projections):
                rows, columns = (hidden_size, width) if module == projections[-1] else (width, hidden_size)
                prefix = f"base_model.model.model.layers.{i}.{block}.experts.{number}.{module}"
                adapter[f"{prefix}.lora_A.weight"] = torch.randn(4, columns)
                adapter[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4)
    LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=projections).save_pretrained(tmp_path)
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    model = attnres_of(base)
    config = with_base_targets(model, peft.PeftConfig.from_pretrained(tmp_path))
    before = logits(base, tokens)
    actual = logits(PeftModel.from_pretrained(model, tmp_path, config=config).eval(), tokens)
    expected = logits(PeftModel.from_pretrained(base, tmp_path).eval(), tokens)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_methods_that_are_refused():
    """FRoD needs the base's weights to select its targets. PEFT has adaption prompts for some model types only."""
    model = attnres_of(tiny_base("llama"))
    with pytest.raises(ValueError, match="Set `target_modules` of the FrodConfig"):
        with_base_targets(model, peft.FrodConfig(task_type="CAUSAL_LM"))
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'attnres'"):
        get_peft_model(model, config)


@pytest.mark.parametrize("family", MIXTURES)
def test_all_linear_includes_the_experts_where_it_does_in_the_base(family, tokens, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    base = tiny_base(family)
    model = attnres_of(base)
    adapted = get_peft_model(model, with_base_targets(model, lora))
    assert lora.target_modules == "all-linear"
    shapes = {name: shape for name, shape in trained_shapes(adapted).items() if "modules_to_save" not in name}
    assert len(queries(adapted)) == 10
    assert shapes == trained_shapes(get_peft_model(tiny_base(family), LoraConfig(target_modules="all-linear")))

    train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(attnres_of(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(adapted, tokens), rtol=0, atol=1e-5)
