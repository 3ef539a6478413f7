"""The program that test_distributed.py runs in each of two processes, on a CPU.

accelerate launch --config_file CONFIG --num_processes 2 tests/distributed.py SCRIPT ARGUMENTS
torchrun --nproc-per-node 2 tests/distributed.py BASE CHECKPOINT OUTPUT    # tensor parallelism
"""

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate.state import DistributedType, PartialState
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResForCausalLM, attn_res_parameter_groups


def load(checkpoint, **kwargs):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **kwargs)


def rows():
    return torch.randint(1, 99, (16, 12), generator=torch.Generator().manual_seed(0))


def logits_after_a_step(model):
    """Of AdamW as it is by default on a GPU, for all parameters of a group at once."""
    torch.optim.AdamW(attn_res_parameter_groups(model, 1e-3, 1e-2), foreach=True).step()
    with torch.no_grad():
        return model(rows()).logits


def tensor_parallel(base, checkpoint, output):
    dist.init_process_group("gloo")
    AttnResForCausalLM.from_base(load(base, tp_plan="auto")).save_pretrained(Path(output).with_name("from_base"))
    model = load(checkpoint, tp_plan="auto")
    actual = model(rows(), labels=rows())
    actual.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("query")}
    result = {"logits": actual.logits.detach(), "gradients": gradients, "after a step": logits_after_a_step(model)}
    result["rows of q_proj"] = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    if dist.get_rank() == 0:
        torch.save(result, output)


def take_cpus_for_gpus():
    """The launch files are for GPUs: accelerate shards only on GPUs, and Trainer asks a GPU for bfloat16."""
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}.isdisjoint(os.environ):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    if sys.argv[1].endswith(".py"):
        take_cpus_for_gpus()
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        tensor_parallel(*sys.argv[1:])
    dist.destroy_process_group()
    # Threads of gloo's can outlive the group, and then torch aborts while Python takes itself down, one run in fourteen
    # (pytorch/pytorch#179291): all is done and written by here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
