"""Merging a PEFT adapter into its checkpoint, beside PEFT's own merge."""

import re

import pytest
import torch
from helpers import INPUT_IDS, attnres, edit_json, file_bytes, invoke_attnres, save_base, save_word_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import ATTN_RES_MODULES
from modeling_attnres.conversion import retrofit


def save_adapter(folder, vocab_size=99):
    """A LoRA and a depth attention with random weights, for a retrofit in bfloat16 beside it."""
    retrofit(save_base(folder / "base"), folder / "attnres")
    model = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    model.resize_token_embeddings(vocab_size)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("vocab_size", [99, 120], ids=["same tokens", "added tokens"])
def test_the_merged_checkpoint_is_peft_s(vocab_size, tmp_path):
    adapter = save_adapter(tmp_path, vocab_size)
    save_word_tokenizer(adapter, [f"word{i}" for i in range(vocab_size)])
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto").merge_and_unload()
    (tmp_path / "attnres").rename(tmp_path / "moved")
    result = attnres("merge", adapter, tmp_path / "merged", "--base", tmp_path / "moved")
    assert result.returncode == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(INPUT_IDS).logits, expected(INPUT_IDS).logits)

    of_base = {name: t for shard in (tmp_path / "moved").glob("*.safetensors") for name, t in load_file(shard).items()}
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {name: t.dtype for name, t in of_base.items()}
    changed = {name for name, tensor in saved.items() if not torch.equal(tensor, of_base[name])}
    trained = {name for name in saved if "_res." in name or name.endswith("_proj.weight")}
    assert trained == changed - {"model.embed_tokens.weight"}
    files, moved = file_bytes(tmp_path / "merged"), file_bytes(tmp_path / "moved")
    kept = [name for name in moved if name.endswith(".py") or name in ("LICENSE", "generation_config.json")]
    assert len(kept) == 6 and all(files[name] == moved[name] for name in kept)
    assert "license: apache-2.0" in files["README.md"].decode() and "adapter_config.json" not in files
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("word3").input_ids == [3]


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **fields):
    return lambda folder: edit_json(folder / name, **fields)


def other_adapter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prefix).save_pretrained(folder / "adapter")


def lose_a_tensor(folder):
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove("adapter/adapter_config.json"), "adapter is not a PEFT adapter: it has no adapter_config.json"),
        (remove("adapter/adapter_model.safetensors"), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "attnres").rename(folder / "moved"), "The base of .*adapter was not found.*--base"),
        (edit("attnres/config.json", model_type="llama"), "attnres is not an AttnRes checkpoint"),
        (
            edit("attnres/config.json", quantization_config={"quant_method": "fp8"}),
            "attnres is quantized: use the base before",
        ),
        (edit("attnres/config.json", intermediate_size=64), "adapter cannot be loaded into .*attnres"),
        (other_adapter, "adapter cannot be merged"),
        (
            edit("adapter/adapter_config.json", modules_to_save=None),
            "adapter cannot be loaded into .*no place for its tensor '.*_res",
        ),
        (lose_a_tensor, "adapter cannot be loaded into .*Found missing adapter keys"),
    ],
)
def test_what_cannot_be_merged_is_refused(spoil, message, tmp_path):
    adapter = save_adapter(tmp_path)
    spoil(tmp_path)
    names = set(tmp_path.iterdir())
    result = invoke_attnres("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 1 and re.search(message, result.stderr), result.stderr
    assert set(tmp_path.iterdir()) == names
