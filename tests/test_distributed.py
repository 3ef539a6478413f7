"""Two processes over gloo, started as users start them, against one."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from distributed import load, logits_after_a_step, rows
from helpers import BLOCK, EXAMPLES, logged_losses, run, save, tiny_base, trained
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import modeling_attnres
from modeling_attnres.probing import depth_attentions


SCRIPT = Path(__file__).with_name("distributed.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
# Without it, DeepSpeed prints that it found no GPU
CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def work(tokenizer, real_text, tmp_path_factory):
    """A checkpoint with random queries, and a text."""
    folder = tmp_path_factory.mktemp("distributed")
    save(folder / "attnres", trained(tiny_base("llama", vocab_size=len(tokenizer)), **BLOCK), tokenizer)
    (folder / "text.txt").write_text(real_text)
    return folder


def command_line(script, work, output, **options):
    options |= {"max_length": 32, "save_steps": 1, "logging_steps": 1, "report_to": "none"}
    options |= {"model": work / "attnres", "data": work / "text.txt", "output_dir": output}
    return [EXAMPLES / script, *(word for name, value in options.items() for word in (f"--{name}", value))]


def example(work, output, batch_size):
    """Two steps with gradient checkpointing, and with learning rates of their own for queries and matrices."""
    options = {"learning_rate": 1e-2, "attn_res_learning_rate": 3e-3, "weight_decay": 0.1, "resume": "true"}
    options |= {"max_steps": 2, "gradient_checkpointing": "true", "per_device_train_batch_size": batch_size}
    return command_line("continue_training.py", work, output, **options)


def logits(folder):
    with torch.no_grad():
        return load(folder)(rows()).logits


@pytest.fixture(scope="module")
def one_process(work):
    run(sys.executable, *example(work, work / "one", batch_size=4), "--bf16", "false", "--use_cpu", "true")
    return work / "one"


def assert_only_the_first_process_prints(logs):
    """Libraries print in every process: warnings, bars of loading, the operators that DeepSpeed builds."""
    (first,) = logs.glob("*/attempt_0/0/stdout.log")
    assert "'loss'" in first.read_text()
    folder = first.parents[1] / "1"
    lines = (folder / "stdout.log").read_text().splitlines()
    assert not [line for line in lines if not line.startswith("DeepSpeed")]
    # A warning names its file
    errors = (folder / "stderr.log").read_text()
    assert not [name for name in (*modeling_attnres.__path__, str(EXAMPLES), "attn_res") if name in errors]


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 3e-2)])
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "zero3.yaml"])
def test_the_example_on_several_devices(config, precision, tolerance, work, one_process, tmp_path):
    """
    In float32 and in the precision of the launch files: the losses are those of one process, the saved model loads as
    any other, and a run that was killed resumes.
    """
    if config == "zero3.yaml":
        pytest.importorskip("deepspeed", reason="`pip install wheel && pip install --no-build-isolation deepspeed`")
    launch = ("-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "launch" / config)
    launch += ("--num_processes", 2, "--mixed_precision", precision, "--main_process_port", 0)
    launch += ("--tee", 3, "--log_dir", tmp_path / "logs")
    command = (sys.executable, *launch, SCRIPT, *example(work, tmp_path, batch_size=2), "--bf16", precision == "bf16")
    run(*command, env=CPU)
    assert_only_the_first_process_prints(tmp_path / "logs")
    expected = logged_losses(one_process / "checkpoint-2")
    assert logged_losses(tmp_path / "checkpoint-2") == pytest.approx(expected, abs=tolerance)
    assert expected[1] < expected[0] - 0.1
    loss, expected_loss = (load(folder)(rows(), labels=rows()).loss.item() for folder in (tmp_path, one_process))
    assert loss == pytest.approx(expected_loss, abs=5 * tolerance)
    if precision == "no":
        shutil.rmtree(tmp_path / "checkpoint-2")
        (tmp_path / "model.safetensors").unlink()
        run(*command, env=CPU)
        assert logged_losses(tmp_path / "checkpoint-2") == pytest.approx(expected, abs=tolerance)
        torch.testing.assert_close(logits(tmp_path), logits(one_process), rtol=0, atol=2e-3)


def test_a_lora_on_two_processes(work, tmp_path):
    command = command_line("finetune_lora.py", work, tmp_path, max_steps=1, bf16="false")
    run(*TORCHRUN, "--tee", 3, "--log-dir", tmp_path / "logs", SCRIPT, *command, env=CPU)
    assert_only_the_first_process_prints(tmp_path / "logs")


def test_tensor_parallel(work, tmp_path):
    """
    The heads are even in number, so two processes take half of them each. A loaded base is converted and saved as in
    one process.
    """
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    model = load(work / "attnres")
    expected = model(rows(), labels=rows())
    expected.loss.backward()
    run(*TORCHRUN, SCRIPT, tmp_path / "base", work / "attnres", tmp_path / "result.pt")
    torch.testing.assert_close(logits(tmp_path / "from_base"), base(rows()).logits.detach(), rtol=0, atol=1e-5)
    result = torch.load(tmp_path / "result.pt")
    assert result["rows of q_proj"] == 16
    torch.testing.assert_close(result["logits"], expected.logits.detach(), rtol=0, atol=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("query")}
    torch.testing.assert_close(result["gradients"], gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["after a step"], logits_after_a_step(model), rtol=0, atol=1e-3)


def test_fully_shard_of_a_model_in_half_precision(work):
    """FSDP2 takes one dtype in a group, and the depth attention is in float32, so it has groups of its own."""
    model = AutoModelForCausalLM.from_pretrained(work / "attnres", dtype=torch.bfloat16)
    expected = model(rows()).logits
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for module in (*depth_attentions(model).values(), *model.model.layers, model):
            fully_shard(module)
        actual = model(rows()).logits
        actual.sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(actual, expected)
    assert model.model.layers[1].mlp_res.query.grad.dtype == torch.float32


@pytest.mark.parametrize("where", ["cpu", "disk", "device map"])
@torch.no_grad()
def test_offloaded(where, work, tmp_path):
    """accelerate brings the parameters of each module in before its forward."""
    if where == "device map":
        # As many layers in memory as there is room for, none of them split, the others on disk
        room = {"max_memory": {"cpu": 150_000}, "offload_folder": tmp_path}
        model = AutoModelForCausalLM.from_pretrained(work / "attnres", device_map="auto", **room)
        assert {model.hf_device_map[f"model.layers.{i}"] for i in range(5)} == {"cpu", "disk"}
    else:
        model = load(work / "attnres")
        if where == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.layers[-1].output_res.query.is_meta
    assert torch.equal(model(rows()).logits, logits(work / "attnres"))
