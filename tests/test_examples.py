"""The examples run as a user runs them, with little to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from text import token_blocks
from train_base import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def texts(folder, real_text):
    files = [folder / f"{number}.txt" for number in range(12)]
    for file in files:
        file.write_text(real_text)
    return files


def test_blocks_of_any_number_of_texts(tmp_path):
    tokenizer = train_tokenizer([__file__], vocab_size=300)
    files = [tmp_path / f"{number}.txt" for number in range(20)]
    for number, file in enumerate(files):
        file.write_text(f"{number} " * 40)

    def words(blocks):
        return set(tokenizer.decode(sum((row["input_ids"].tolist() for row in blocks), [])).split())

    train, held_out = token_blocks(files, tokenizer, 8)
    assert {"9", "19"} <= words(held_out) and not {"9", "19"} & words(train)
    # Of one file the end is held out
    train, held_out = token_blocks(files[:1], tokenizer, 8)
    assert len(held_out) == -(-(len(train) + len(held_out)) // 10)
    tokenizer.eos_token = None
    assert words(token_blocks(files[:2], tokenizer, 8)[1]) == {"1"}
    with pytest.raises(ValueError, match="1 text files do not make two blocks of 400 tokens.*give more text"):
        token_blocks(files[:1], tokenizer, 400)


def test_quickstart(smollm2_folder, real_text, tmp_path):
    files = texts(tmp_path, real_text)
    (tmp_path / "base").symlink_to(smollm2_folder)
    output = run("quickstart.py", "--folder", tmp_path, "--steps", 2, "--files", *files)
    assert "The base's answer is the same" in output
    before, after = (float(word) for word in output.split("held-out text: ")[1].split()[:3:2])
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert model.config.model_type == "attnres"
    assert all((layer.mlp_res.query != 0).any() for layer in model.model.layers)


def test_a_base_from_scratch_retrofitted_trained_on_and_generating(real_text, tmp_path):
    from attnres_conversion import retrofit

    files = texts(tmp_path, real_text)
    small = ("--hidden-size", 64, "--layers", 3, "--vocab-size", 400)
    output = run("train_base.py", tmp_path / "base", "--files", *files, "--steps", 8, *small)
    assert "million parameters" in output
    before, after = (float(word) for word in output.split("held-out text: ")[1].split()[:3:2])
    assert after < before - 0.2

    retrofit(tmp_path / "base", tmp_path / "attnres")
    arguments = ("--files", *files, "--steps", 2)
    output = run("continue_training.py", tmp_path / "attnres", tmp_path / "trained", *arguments)
    continued = float(output.split("held-out text: ")[1].split()[0])
    assert abs(continued - after) < 2e-3, "a retrofit starts where its base left off"
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["model_type"] == "attnres"

    for alone, trained in (("--attnres-alone", 6 * 2 * 64), ("--rank=2", None)):
        output = run("finetune_lora.py", tmp_path / "attnres", tmp_path / "adapter", *arguments, alone)
        assert trained is None or f"trainable params: {trained} " in output
        started = float(output.split("held-out text: ")[1].split()[0])
        assert started == pytest.approx(continued, abs=1e-3)
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "attnres"), tmp_path / "adapter"
        )
        assert (adapted.merge_and_unload().model.output_res.query != 0).any()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "trained")("import", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = AutoTokenizer.from_pretrained(tmp_path / "trained").decode(tokens)
    assert run("generate.py", tmp_path / "trained", "import", "--max-new-tokens", 5).strip() == expected.strip()


def test_from_scratch_and_with_tensorboard(real_text, tmp_path):
    files = texts(tmp_path, real_text)
    small = ("--layers", 2, "--hidden-size", 64, "--vocab-size", 400)
    run("train_base.py", tmp_path / "scratch", "--files", *files, "--steps", 2, *small, "--attnres", "full")
    config = json.loads((tmp_path / "scratch" / "config.json").read_text())
    assert (config["attn_res_type"], config["attn_res_scale"]) == ("full", "mean")
    arguments = ("--files", *files, "--steps", 4, "--save-steps", 2, "--report-to", "tensorboard")
    run("continue_training.py", tmp_path / "scratch", tmp_path / "trained", *arguments)
    assert (tmp_path / "trained" / "checkpoint-2" / "model.safetensors").is_file()
    events = b"".join(path.read_bytes() for path in (tmp_path / "trained" / "runs").glob("events.out.tfevents.*"))
    assert b"train/loss" in events and b"train/depth_attention_entropy/layer_1_MLP" in events


def test_benchmark(tmp_path):
    output = run(
        "benchmark.py", "--size", "tiny", "--sequence", 16, "--rounds", 1, "--output", tmp_path / "figures.json"
    )
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    names = ["base", "8 blocks", "8 blocks, einsum as published", "8 blocks, fla, naive"]
    rows = [(row["measurement"], row["variant"]) for row in results]
    assert rows == [(measurement, name) for measurement in ("prefill", "decode", "training step") for name in names]
    assert all(len(row["seconds"]) == 1 and row["peak_bytes"] > 0 for row in results)
    assert all(row["variant"] in output for row in results)
    run("plot_benchmark.py", tmp_path / "figures.json", tmp_path / "figures.json", tmp_path / "plot" / "figure.png")
    assert (tmp_path / "plot" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_of_the_benchmark_compute_the_same():
    import torch
    from benchmark import CUDA_PEERS, PEERS, SIZES, attnres_of
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(**SIZES["tiny"], vocab_size=99)).eval()
    tokens = torch.arange(20)[None]
    logits = []
    for operator in (None, *PEERS.values(), CUDA_PEERS["plain PyTorch"]):
        torch.manual_seed(0)
        logits.append(attnres_of(base, "2", operator)(tokens).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-5)
