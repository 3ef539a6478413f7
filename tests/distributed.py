"""What test_distributed.py runs in each of two processes.

torchrun --nproc-per-node 2 tests/distributed.py MODE CHECKPOINT OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_attnres import attn_res_parameter_groups


def load(checkpoint: str, **kwargs):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **kwargs)


def rows() -> torch.Tensor:
    return torch.randint(1, 99, (16, 12), generator=torch.Generator().manual_seed(0))


def trainer_losses(checkpoint: str, output: str, batch_size: int, **fields) -> list[float]:
    """Four steps of Trainer on four rows each."""
    args = TrainingArguments(
        output,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    trainer = Trainer(load(checkpoint), args, train_dataset=[{"input_ids": row, "labels": row} for row in rows()])
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def step_losses(model: torch.nn.Module, batches: list[torch.Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW(attn_res_parameter_groups(model, 1e-2))
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def ddp(checkpoint: str, output: str) -> None:
    losses = trainer_losses(checkpoint, output, batch_size=2, gradient_checkpointing=True, ddp_backend="gloo")
    if dist.get_rank() == 0:
        Path(output, "losses.json").write_text(json.dumps(losses))


def fsdp2(checkpoint: str, output: str) -> None:
    """What accelerate's plugin does; the plugin itself takes no CPU."""
    dist.init_process_group("gloo")
    model = load(checkpoint).train()
    model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = step_losses(model, [batch.chunk(2)[dist.get_rank()] for batch in rows().split(4)])
    distributed_checkpoint.save(get_model_state_dict(model), checkpoint_id=output)
    if dist.get_rank() == 0:
        Path(output, "losses.json").write_text(json.dumps(losses))


def tensor_parallel(checkpoint: str, output: str) -> None:
    dist.init_process_group("gloo")
    model = load(checkpoint, tp_plan="auto")
    result = model(rows(), labels=rows())
    result.loss.backward()
    if dist.get_rank() == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith("query")}
        rows_here = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
        torch.save({"logits": result.logits.detach(), "gradients": gradients, "rows of q_proj": rows_here}, output)


if __name__ == "__main__":
    mode, checkpoint, output = sys.argv[1:]
    {"DDP": ddp, "FSDP2": fsdp2, "TP": tensor_parallel}[mode](checkpoint, output)
    dist.destroy_process_group()
