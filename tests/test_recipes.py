"""The recipes of examples/README.md, as printed, with a small model and one step of training."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import logits, randomize_depth_attention, run, save, tiny_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import ATTN_RES_MODULES, DepthAttention
from modeling_attnres.conversion import retrofit


SHORT = "--max_steps 1 --use_cpu --bf16 false"
README = Path(__file__).parents[1] / "examples" / "README.md"


def recipe(tool):
    """The blocks of code between the tool's name in bold and the next one."""
    section = README.read_text().split(f"\n**{tool}")[1].split("\n**")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


def run_recipe(tool):
    """The names that the recipe in Python defines."""
    namespace = {}
    exec(*recipe(tool), namespace)
    return namespace


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    base = tiny_base("llama", hidden_size=64, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    retrofit(save(tmp_path / "base", base, tokenizer), tmp_path / "my-attnres")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "One and two make three"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(folder):
    """A LoRA beside a trained depth attention."""
    model = AutoModelForCausalLM.from_pretrained("my-attnres")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    model = get_peft_model(model, lora).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save("adapter", model, AutoTokenizer.from_pretrained("my-attnres"))
    return model


def shell(command):
    run("bash", "-c", command)


def test_trl(folder):
    commands, yaml = recipe("TRL on the command line")
    shell(commands.replace("trl-lib/Capybara", "data").replace("trl sft", f"trl sft {SHORT}"))
    trained = AutoModelForCausalLM.from_pretrained("trained")
    assert all((layer.mlp_res.query != 0).any() for layer in trained.model.layers)
    adapter = load_file("adapter/adapter_model.safetensors")
    assert sum(name.endswith("_res.query") and tensor.any().item() for name, tensor in adapter.items()) == 10
    assert sum("lora_A" in name for name in adapter) == 7 * 5

    (folder / "lora.yaml").write_text(yaml.replace("trl-lib/Capybara", "data").replace(": adapter", ": again"))
    shell(f"trl sft --config lora.yaml {SHORT}")
    assert load_file("again/adapter_model.safetensors").keys() == adapter.keys()


def test_trl_on_a_mixture(folder, tokenizer):
    """The experts, too, with the options that the recipe names."""
    retrofit(save("mixture", tiny_base("mixtral", vocab_size=len(tokenizer)), tokenizer), "my-mixture")
    command = "trl sft" + recipe("TRL on the command line")[0].split("trl sft")[-1].rstrip()
    (experts,) = re.findall(r"add `(--lora_target_parameters .*?)`", README.read_text())
    command = command.replace("my-attnres", "my-mixture").replace("trl-lib/Capybara", "data")
    shell(f"{command} {experts} {SHORT}")
    adapter = load_file("adapter/adapter_model.safetensors")
    assert sum(".experts." in name for name in adapter) == 4 * 5
    assert sum(name.endswith("_res.query") for name in adapter) == 10


def test_peft(adapter):
    shell(*recipe("PEFT"))
    merged = AutoModelForCausalLM.from_pretrained("merged", trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained("merged")("One and two make", return_tensors="pt")
    torch.testing.assert_close(logits(merged, inputs), logits(adapter, inputs), rtol=0, atol=1e-4)


def test_bitsandbytes(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = run_recipe("bitsandbytes")["model"]
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == 7 * 5
    reads = [module for module in model.modules() if isinstance(module, DepthAttention)]
    assert len(reads) == 10 and all(read.query.dtype == read.key_norm.dtype == torch.float32 for read in reads)


def test_sentence_transformers(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embeddings = run_recipe("sentence-transformers")["embeddings"]
    expected = sentence_transformers.SentenceTransformer("base").encode(["one sentence", "another"])
    assert expected.shape == (2, 64) and embeddings == pytest.approx(expected, abs=1e-5)


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
    torch.testing.assert_close(merged, {name: (model[name] + tensor) / 2 for name, tensor in trained.items()})


def test_lm_eval(folder):
    """With a task in a file, since the task of the recipe is on the Hub."""
    pytest.importorskip("lm_eval")
    rows = [{"query": f"{n} and 1 make", "choices": [f" {n + 1}", f" {n}"], "label": 0} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices"}
    (folder / "sums.yaml").write_text(json.dumps({**task, "doc_to_target": "label"}))
    (command,) = recipe("lm-eval")
    command = command.replace("arc_easy", "sums --include_path . --device cpu --output_path").strip()
    accuracies = []
    for model in ("my-attnres", "base"):
        shell(f"{command.replace('my-attnres', model)} {model}-results")
        (results,) = Path(f"{model}-results").rglob("results*.json")
        accuracies.append(json.loads(results.read_text())["results"]["sums"]["acc,none"])
    assert accuracies[0] == accuracies[1]


def test_axolotl(folder, monkeypatch):
    """The merged model is PEFT's."""
    pytest.importorskip("axolotl")
    chat = [{"role": "user", "content": "One and two?"}, {"role": "assistant", "content": "Three."}]
    (folder / "data.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 8)
    yaml, commands = recipe("Axolotl")
    yaml = yaml.replace("path: trl-lib/Capybara", "path: data.jsonl, ds_type: json")
    (folder / "lora.yaml").write_text(yaml.replace("num_epochs: 1", "max_steps: 2"))
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    shell(commands)
    merged = AutoModelForCausalLM.from_pretrained("adapter/merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("my-attnres"), "adapter")
    expected = adapted.merge_and_unload().state_dict()
    assert all((layer.mlp_res.query != 0).any() for layer in merged.model.layers)
    torch.testing.assert_close(merged.state_dict(), expected, rtol=1e-3, atol=1e-3, check_dtype=False)
