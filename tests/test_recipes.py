"""The recipes of examples/README.md, as printed, with a small model and one step of training."""

import re
from pathlib import Path

import pytest
import torch
from helpers import randomize_depth_attention, run, tiny_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_attnres import DepthAttention
from modeling_attnres.conversion import retrofit


README = Path(__file__).parents[1] / "examples" / "README.md"


def recipe(tool):
    """The blocks of code between the tool's name in bold and the next one."""
    section = README.read_text().split(f"\n**{tool}")[1].split("\n**")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch):
    base = tiny_base("llama", hidden_size=64, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for saved in (base, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    retrofit(tmp_path / "base", tmp_path / "my-attnres")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(command):
    run("bash", "-c", command)


def test_trl(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"text": "One and two make three"}\n' * 4)
    commands, yaml = recipe("TRL on the command line")
    short = "--max_steps 1 --use_cpu --bf16 false"
    shell(commands.replace("trl-lib/Capybara", "data").replace("trl sft", f"trl sft {short}"))
    trained = AutoModelForCausalLM.from_pretrained("trained")
    assert all((layer.mlp_res.query != 0).any() for layer in trained.model.layers)
    adapter = load_file("adapter/adapter_model.safetensors")
    assert sum(name.endswith("_res.query") and tensor.any().item() for name, tensor in adapter.items()) == 10
    assert sum("lora_A" in name for name in adapter) == 7 * 5

    (folder / "lora.yaml").write_text(yaml.replace("trl-lib/Capybara", "data").replace(": adapter", ": again"))
    shell(f"trl sft --config lora.yaml {short}")
    assert load_file("again/adapter_model.safetensors").keys() == adapter.keys()


def test_bitsandbytes(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    namespace = {}
    exec(*recipe("bitsandbytes"), namespace)
    model = namespace["model"]
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == 7 * 5
    reads = [module for module in model.modules() if isinstance(module, DepthAttention)]
    assert len(reads) == 10 and all(read.query.dtype == read.key_norm.dtype == torch.float32 for read in reads)


def test_sentence_transformers(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    namespace = {}
    exec(*recipe("sentence-transformers"), namespace)
    expected = sentence_transformers.SentenceTransformer("base").encode(["one sentence", "another"])
    assert expected.shape == (2, 64) and namespace["embeddings"] == pytest.approx(expected, abs=1e-5)


def test_mergekit(folder):
    pytest.importorskip("mergekit")
    randomize_depth_attention(AutoModelForCausalLM.from_pretrained("my-attnres")).save_pretrained("trained")
    yaml, command = recipe("mergekit")
    (folder / "merge.yaml").write_text(yaml)
    shell(command)
    model, trained, merged = (
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).state_dict()
        for name in ("my-attnres", "trained", "merged")
    )
    assert merged.keys() == trained.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (model[name] + trained[name]) / 2)
