"""What test_distributed.py runs in each of two processes.

torchrun --nproc-per-node 2 tests/distributed.py MODE CHECKPOINT OUTPUT
accelerate launch --config_file CONFIG --num_processes 2 tests/distributed.py MODE CHECKPOINT OUTPUT
accelerate launch --config_file CONFIG --num_processes 2 tests/distributed.py SCRIPT ARGUMENTS
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.training_args
from accelerate.state import DistributedType, PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_attnres import attn_res_parameter_groups


def load(checkpoint: str, **kwargs):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **kwargs)


def rows() -> torch.Tensor:
    return torch.randint(1, 99, (16, 12), generator=torch.Generator().manual_seed(0))


def train(checkpoint: str, output: str, batch_size: int, **fields) -> Trainer:
    """
    Four steps on four rows each, with rates and weight decay of their own for queries and matrices; from the last
    checkpoint in `output`, if there is one.
    """
    args = TrainingArguments(
        output,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **fields},
    )
    rates = {"learning_rate": 1e-2, "attn_res_learning_rate": 3e-3, "weight_decay": 0.1}
    data = [{"input_ids": row, "labels": row} for row in rows()]
    trainer = Trainer(load(checkpoint), args, train_dataset=data, optimizer_cls_and_kwargs=(lambda: adamw, rates))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    return trainer


def adamw(model: torch.nn.Module, **rates: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(attn_res_parameter_groups(model, **rates))


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def write_losses(trainer: Trainer, output: str) -> None:
    if dist.get_rank() == 0:
        Path(output, "losses.json").write_text(json.dumps(losses(trainer)))


def ddp(checkpoint: str, output: str) -> None:
    fields = {"gradient_checkpointing": True, "ddp_backend": "gloo", "use_cpu": True}
    write_losses(train(checkpoint, output, batch_size=2, **fields), output)


def fsdp2(checkpoint: str, output: str) -> None:
    fields = {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}
    write_losses(train(checkpoint, output, batch_size=2, **fields), output)


def zero3(checkpoint: str, output: str) -> None:
    fields = {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}
    trainer = train(checkpoint, output, batch_size=2, **fields)
    trainer.save_model()
    write_losses(trainer, output)


def take_cpus_for_gpus() -> None:
    """The launch files are for GPUs: accelerate shards among nothing else, and Trainer looks for bfloat16 on one."""
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"}.isdisjoint(os.environ):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def logits_after_a_step(model) -> torch.Tensor:
    """Of AdamW as it is by default on a GPU, for all parameters of a group at once."""
    torch.optim.AdamW(attn_res_parameter_groups(model, 1e-3, 1e-2), foreach=True).step()
    with torch.no_grad():
        return model(rows()).logits


def tensor_parallel(checkpoint: str, output: str) -> None:
    dist.init_process_group("gloo")
    model = load(checkpoint, tp_plan="auto")
    result = model(rows(), labels=rows())
    result.loss.backward()
    if dist.get_rank() == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("query")}
        rows_here = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    after_a_step = logits_after_a_step(model)
    if dist.get_rank() == 0:
        logits = {"logits": result.logits.detach(), "after a step": after_a_step}
        torch.save({**logits, "gradients": gradients, "rows of q_proj": rows_here}, output)


if __name__ == "__main__":
    # `accelerate launch` always says how
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        take_cpus_for_gpus()
    if sys.argv[1].endswith(".py"):
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        mode, checkpoint, output = sys.argv[1:]
        {"DDP": ddp, "FSDP2": fsdp2, "TP": tensor_parallel, "ZeRO-3": zero3}[mode](checkpoint, output)
    dist.destroy_process_group()
    # Threads of gloo's can outlive the group, and then torch aborts while Python takes itself down, one run in fourteen
    # (pytorch/pytorch#179291): all is done and written by here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
