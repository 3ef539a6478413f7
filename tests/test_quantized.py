"""A retrofit of a base that a real quantizer has quantized."""

import pytest
import torch
from helpers import tensor_hashes, there_and_back, tiny_base, train
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_attnres import ATTN_RES_MODULES, AttnResForCausalLM
from modeling_attnres.conversion import retrofit


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": False, "mlp_bias": False}
TOKENS = torch.arange(1, 15)[None]


def int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = {
    "bitsandbytes int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao int8": ("torchao", int8_weight_only),
}


@pytest.fixture(params=QUANTIZERS)
def quantize(request, tmp_path):
    """The arguments of `from_pretrained` that quantize a model, such as the base in the folder `float`."""
    package, config = QUANTIZERS[request.param]
    pytest.importorskip(package)
    tiny_base("llama", **SHAPE, tie_word_embeddings=False).save_pretrained(tmp_path / "float")
    return {"quantization_config": config(), "dtype": torch.float32}


def assert_same_logits(model, base):
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, base(TOKENS).logits, rtol=0, atol=1e-4)


def test_a_retrofit_of_a_quantized_base(quantize, tmp_path):
    AutoModelForCausalLM.from_pretrained(tmp_path / "float", **quantize).save_pretrained(tmp_path / "base")
    output = there_and_back(tmp_path / "base", tmp_path)
    assert tensor_hashes(tmp_path / "base").items() <= tensor_hashes(output).items()

    base, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "base", output))
    assert type(model.model.layers[1].mlp.up_proj) is type(base.model.layers[1].mlp.up_proj)
    dtypes = {p.dtype for n, p in model.named_parameters() if n.endswith(("_res.query", "_res.key_norm"))}
    assert dtypes == {torch.float32}
    assert_same_logits(model, base)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), base.generate(TOKENS, **options))


def test_a_loaded_quantized_base_becomes_an_attnres_model(quantize, tmp_path):
    base, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / "float", **quantize) for _ in range(2))
    weight = base.model.layers[1].mlp.up_proj.weight
    model = AttnResForCausalLM.from_base(base)
    assert model.model.layers[1].mlp.up_proj.weight is weight and model.is_quantized
    # Before a forward pass: on a CPU, bitsandbytes then packs 4-bit weights in a form that it cannot save
    model.save_pretrained(tmp_path / "attnres")
    for actual in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "attnres")):
        assert_same_logits(actual, expected)


@pytest.mark.parametrize("order", ["quantized, then retrofitted", "retrofitted, then quantized"])
def test_lora_of_a_quantized_model(quantize, order, tmp_path):
    """QLoRA and its like: from the quantized base's loss, with gradient checkpointing, to disk and back."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **quantize)
    if order == "quantized, then retrofitted":
        base.save_pretrained(tmp_path / "base")
        checkpoint, quantize = retrofit(tmp_path / "base", tmp_path / "attnres"), {}
    else:
        checkpoint = retrofit(tmp_path / "float", tmp_path / "attnres")

    def load():
        return AutoModelForCausalLM.from_pretrained(checkpoint, **quantize)

    def with_lora(model, modules_to_save):
        model = prepare_model_for_kbit_training(model)
        lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules_to_save, task_type="CAUSAL_LM")
        return get_peft_model(model, lora).train()

    kind = type(base.model.layers[1].mlp.up_proj)
    # Where gradients are wanted bitsandbytes computes otherwise, so the base gets a LoRA too
    base_loss = with_lora(base, None)(TOKENS, labels=TOKENS).loss.item()
    model = with_lora(load(), ATTN_RES_MODULES)
    assert type(model.get_base_model().model.layers[1].mlp.up_proj.base_layer) is kind
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A LoRA of seven projections in five layers; query and key norm of ten depth attentions
    assert [sum(part in name for name in trained) for part in ("lora_A", "lora_B", "_res.")] == [35, 35, 20]
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses = train(model, {"input_ids": TOKENS}, steps=5, learning_rate=1e-2)
    assert losses[0] == pytest.approx(base_loss, abs=1e-4) and losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained.items())

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load()), tmp_path / "adapter")
    with torch.no_grad():
        expected, actual = (m.eval()(TOKENS).logits for m in (model, loaded))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
