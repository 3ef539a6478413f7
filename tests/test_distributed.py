"""Two processes over gloo, started as users start them, against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import merge_fsdp_weights
from conftest import attnres_of, randomize_depth_attention, tiny_base
from distributed import load, logits_after_a_step, losses, rows, train
from safetensors.torch import load_file
from train_base import train_tokenizer
from transformers import AutoModelForCausalLM


SCRIPT = Path(__file__).with_name("distributed.py")
LAUNCH = Path(__file__).parents[1] / "examples" / "launch"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its heads are even in number, so two processes take half of them each."""
    folder = str(tmp_path_factory.mktemp("distributed") / "checkpoint")
    base = tiny_base("llama", vocab_size=100)
    randomize_depth_attention(attnres_of(base, attn_res_block_size=2)).save_pretrained(folder)
    return folder


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def torchrun(mode, checkpoint, output):
    run("torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT, mode, checkpoint, output)


def accelerate_launch(config, *command, precision="no"):
    """With the files that users start from. They say bfloat16, which is too coarse to compare runs in."""
    options = ("--num_processes", 2, "--mixed_precision", precision, "--main_process_port", 0)
    return run("accelerate.commands.launch", "--config_file", LAUNCH / config, *options, *command)


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory):
    return train(checkpoint, str(tmp_path_factory.mktemp("one")), batch_size=4, use_cpu=True)


def losses_of(folder):
    return json.loads((folder / "losses.json").read_text())


def resume_after_two_steps(command, folder):
    """As if the run in `folder` had been killed at step 3: what goes on from its checkpoint is the same run."""
    expected = losses_of(folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "losses.json").unlink()
    accelerate_launch(*command)
    assert losses_of(folder) == pytest.approx(expected, abs=1e-6)


def test_ddp(checkpoint, one_process, tmp_path):
    """With gradient checkpointing."""
    torchrun("DDP", checkpoint, tmp_path)
    assert losses_of(tmp_path) == pytest.approx(losses(one_process), abs=1e-4)


def test_fsdp2(checkpoint, one_process, tmp_path):
    """With gradient checkpointing, killed and resumed, saved in shards and loaded back into one process."""
    in_shards = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
    command = ("fsdp2.yaml", *in_shards, SCRIPT, "FSDP2", checkpoint, tmp_path)
    accelerate_launch(*command)
    assert losses_of(tmp_path) == pytest.approx(losses(one_process), abs=1e-4)
    resume_after_two_steps(command, tmp_path)

    shards = tmp_path / "checkpoint-4" / "pytorch_model_fsdp_0"
    assert len(list(shards.glob("*.distcp"))) == 2
    merge_fsdp_weights(str(shards), str(tmp_path / "whole"))
    loaded = load(checkpoint)
    loaded.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    with torch.no_grad():
        expected = one_process.model.eval()(rows()).logits
        torch.testing.assert_close(loaded(rows()).logits, expected, rtol=0, atol=1e-3)


def test_zero3(checkpoint, one_process, tmp_path):
    """With gradient checkpointing, killed and resumed, from parameters that are cut up as they are loaded."""
    pytest.importorskip("deepspeed")
    command = ("zero3.yaml", SCRIPT, "ZeRO-3", checkpoint, tmp_path)
    accelerate_launch(*command)
    assert losses_of(tmp_path) == pytest.approx(losses(one_process), abs=1e-4)
    resume_after_two_steps(command, tmp_path)
    with torch.no_grad():
        expected = one_process.model.eval()(rows()).logits
        torch.testing.assert_close(load(str(tmp_path))(rows()).logits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"])
def test_the_example_on_several_devices(config, precision, tolerance, real_text, tmp_path):
    """In float32 and in the files' own precision: it learns, its model loads as any other, and it resumes."""
    if config == "zero3.yaml":
        pytest.importorskip("deepspeed")
    tokenizer = train_tokenizer([__file__], vocab_size=300)
    model = attnres_of(tiny_base("llama", vocab_size=len(tokenizer)))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "attnres")
    (tmp_path / "text.txt").write_text(real_text)
    example = LAUNCH.with_name("continue_training.py")
    command = (SCRIPT, example, "--model", tmp_path / "attnres", "--output_dir", tmp_path / "trained")
    command += ("--data", tmp_path / "text.txt", "--max_steps", 2, "--learning_rate", 1e-2, "--max_length", 32)
    command += ("--save_steps", 1, "--logging_steps", 1, "--report_to", "tensorboard", "--bf16", precision == "bf16")
    accelerate_launch(config, *command, precision=precision)
    tokens = tokenizer(real_text, return_tensors="pt")["input_ids"][:, : 16 * 32].view(16, 32)
    with torch.no_grad():
        before, after = (m(tokens, labels=tokens).loss.item() for m in (model, load(str(tmp_path / "trained"))))
    assert after < before - 0.1
    assert list(tmp_path.rglob("events.out.tfevents.*"))

    shutil.rmtree(tmp_path / "trained" / "checkpoint-2")
    accelerate_launch(config, *command, "--resume", "true", precision=precision)
    with torch.no_grad():
        resumed = load(str(tmp_path / "trained"))(tokens, labels=tokens).loss.item()
    assert resumed == pytest.approx(after, abs=tolerance)


def test_tensor_parallel(checkpoint, tmp_path):
    model = load(checkpoint)
    expected = model(rows(), labels=rows())
    expected.loss.backward()
    torchrun("TP", checkpoint, tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    assert result["rows of q_proj"] == 16
    torch.testing.assert_close(result["logits"], expected.logits.detach(), rtol=0, atol=1e-5)
    assert len(result["gradients"]) == 10
    for name, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["after a step"], logits_after_a_step(model), rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded(where, checkpoint, tmp_path):
    """accelerate's hooks bring each module's parameters in before its forward."""
    with torch.no_grad():
        expected = load(checkpoint)(rows()).logits
        offloaded = load(checkpoint)
        if where == "cpu":
            cpu_offload(offloaded, execution_device="cpu")
        else:
            disk_offload(offloaded, tmp_path, execution_device="cpu")
        assert offloaded.model.layers[-1].output_res.query.device.type == "meta"
        assert torch.equal(offloaded(rows()).logits, expected)


def test_device_map(checkpoint, tmp_path):
    """As many layers here as there is room for, none of them split, the others on disk."""
    room = {"max_memory": {"cpu": 130_000}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", **room)
    assert {model.hf_device_map[f"model.layers.{i}"] for i in range(5)} == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(rows()).logits, load(checkpoint)(rows()).logits)
