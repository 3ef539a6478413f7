"""Two processes over gloo, started as users start them, against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import attnres_of, randomise_depth_attention, tiny_base
from distributed import load, rows, step_losses, trainer_losses
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its heads are even in number, so two processes take half of them each."""
    folder = str(tmp_path_factory.mktemp("distributed") / "checkpoint")
    base = tiny_base("llama", vocab_size=100)
    randomise_depth_attention(attnres_of(base, attn_res_block_size=2)).save_pretrained(folder)
    return folder


def torchrun(mode, checkpoint, output):
    script = Path(__file__).with_name("distributed.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run([*command, mode, checkpoint, str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_ddp_by_trainer(checkpoint, tmp_path):
    """With gradient checkpointing."""
    expected = trainer_losses(checkpoint, str(tmp_path / "one"), batch_size=4)
    torchrun("DDP", checkpoint, tmp_path)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected, abs=1e-4)


def test_fsdp2(checkpoint, tmp_path):
    """With gradient checkpointing, saved in shards and loaded back into one process."""
    model = load(checkpoint).train()
    expected = step_losses(model, rows().split(4))
    torchrun("FSDP2", checkpoint, tmp_path / "sharded")
    assert json.loads((tmp_path / "sharded" / "losses.json").read_text()) == pytest.approx(expected, abs=1e-4)

    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "whole.pt")
    loaded = load(checkpoint)
    loaded.load_state_dict(torch.load(tmp_path / "whole.pt"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows()).logits, model.eval()(rows()).logits, rtol=0, atol=1e-3)


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
        assert offloaded.model.output_res.query.device.type == "meta"
        assert torch.equal(offloaded(rows()).logits, expected)


def test_device_map(checkpoint, tmp_path):
    """Some layers here, the others on disk."""
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(5)} | {"model.output_res": "disk"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=parts, offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(model(rows()).logits, load(checkpoint)(rows()).logits)
