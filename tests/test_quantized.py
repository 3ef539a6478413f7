"""A retrofit of a base that a real quantizer has quantized."""

import pytest
import torch
from helpers import new_shard, tensor_hashes, tiny_base
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_attnres import ATTN_RES_MODULES, AttnResForCausalLM
from modeling_attnres.conversion import retrofit, revert, verify


SHAPE = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": False, "mlp_bias": False}


def int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = {
    "bitsandbytes int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao int8": ("torchao", int8_weight_only),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_retrofit_of_a_quantized_base(name, tmp_path):
    package, config = QUANTIZERS[name]
    pytest.importorskip(package)
    tiny_base("llama", **SHAPE, tie_word_embeddings=False).save_pretrained(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config(), dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")

    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    base_hashes, hashes = tensor_hashes(tmp_path / "base"), tensor_hashes(output)
    assert {tensor: hashes[tensor] for tensor in base_hashes} == base_hashes
    assert {tensor.dtype for tensor in load_file(new_shard(output)).values()} == {torch.float32}

    base, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "base", output))
    assert type(model.model.layers[1].mlp.up_proj) is type(base.model.layers[1].mlp.up_proj)
    dtypes = {p.dtype for n, p in model.named_parameters() if n.endswith(("_res.query", "_res.key_norm"))}
    assert dtypes == {torch.float32}
    tokens = torch.arange(1, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), base.generate(tokens, **options))
    assert verify(tmp_path / "base", output).passed
    revert(output, tmp_path / "reverted")
    assert tensor_hashes(tmp_path / "reverted") == base_hashes


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_loaded_quantized_base_becomes_an_attnres_model(name, tmp_path):
    package, config = QUANTIZERS[name]
    pytest.importorskip(package)
    tiny_base("llama", **SHAPE, tie_word_embeddings=False).save_pretrained(tmp_path / "float")
    base, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config(), dtype=torch.float32)
        for _ in range(2)
    )
    weight = base.model.layers[1].mlp.up_proj.weight
    model = AttnResForCausalLM.from_base(base)
    assert model.model.layers[1].mlp.up_proj.weight is weight and model.is_quantized
    # Before a forward pass: on a CPU, bitsandbytes then packs 4-bit weights in a form that it cannot save
    model.save_pretrained(tmp_path / "attnres")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attnres")
    tokens = torch.arange(1, 15)[None]
    with torch.no_grad():
        for actual in (model, loaded):
            torch.testing.assert_close(actual(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["quantized, then retrofitted", "retrofitted, then quantized"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_lora_of_a_quantized_model(name, order, tmp_path):
    """QLoRA and its like: from the quantized base's loss, with gradient checkpointing, to disk and back."""
    package, config = QUANTIZERS[name]
    pytest.importorskip(package)
    tiny_base("llama", **SHAPE, tie_word_embeddings=False).save_pretrained(tmp_path / "float")
    quantize = {"quantization_config": config(), "dtype": torch.float32}
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
    tokens = torch.arange(1, 15)[None]
    # Where gradients are wanted bitsandbytes computes otherwise, so the base gets a LoRA too
    base_loss = with_lora(base, None)(tokens, labels=tokens).loss.item()
    model = with_lora(load(), ATTN_RES_MODULES)
    assert type(model.get_base_model().model.layers[1].mlp.up_proj.base_layer) is kind
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A LoRA of seven projections in five layers; query and key norm of ten depth attentions
    assert [sum(part in name for name in trained) for part in ("lora_A", "lora_B", "_res.")] == [35, 35, 20]
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(base_loss, abs=1e-4) and losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained.items())

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load()), tmp_path / "adapter")
    with torch.no_grad():
        expected, actual = (m.eval()(tokens).logits for m in (model, loaded))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
