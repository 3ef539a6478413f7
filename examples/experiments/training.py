"""Training runs that can be compared: same text, same batches, loss on held-out text by step and by time."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_attnres import attn_res_parameter_groups


# All other arms have Attention Residuals
WITHOUT_ATTN_RES = ("base", "lora")
# Fields and options that may differ between two runs that are compared
NOT_SETTINGS = {
    *("base", "output", "save", "files"),
    *("arms", "rates", "attn_res_rates", "seeds", "block_size", "temperature"),
}


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Options that both sweeps have. Their defaults differ, so they are set by `parser.set_defaults`."""
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to which the runs are added")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of all parameters but queries and norms")
    parser.add_argument("--attn-res-rates", nargs="+", type=float, help="of queries and key norms (default: the same)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--block-size", type=int, help="layers in a block")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eval-steps", type=int)
    parser.add_argument("--eval-blocks", type=int, help="number of held-out blocks")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--accumulation-steps", type=int, default=1, help="batches in a step")
    parser.add_argument("--block-length", type=int, default=256, help="tokens in a block of text")
    parser.add_argument("--bf16", action="store_true", help="autocast")


def sweep(args: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Arm, seed and learning rates of each run that the options ask for."""
    for arm in args.arms:
        for rate in args.rates:
            for attn_res_rate in [None] if arm in WITHOUT_ATTN_RES else args.attn_res_rates or [rate]:
                own = {} if attn_res_rate is None else {"attn_res_learning_rate": attn_res_rate}
                for seed in args.seeds:
                    yield arm, seed, {"learning_rate": rate, **own}


def settings(args: argparse.Namespace) -> dict:
    """Options that two runs must share to be compared."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS and value is not None}


def record(row: dict, output: Path) -> None:
    """Adds the row of a run to the file, and prints it."""
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({**row, "losses": [round(point["loss"], 4) for point in row["losses"]]}, flush=True)


def adamw(model: torch.nn.Module, **rates: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(attn_res_parameter_groups(model, **rates))


# CPU seconds leave out the time that other processes take
seconds = time.perf_counter if torch.cuda.is_available() else time.process_time


class Clock(TrainerCallback):
    """Logs the seconds of training between two evaluations, so that checkpoints keep them."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.spent = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spent = seconds() - self.start

    def on_evaluate(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = self.spent
        self.start = seconds()


def train(
    model: torch.nn.Module,
    rates: dict[str, float],
    train_blocks,
    held_out_blocks,
    args: argparse.Namespace,
    seed: int,
    optim: str | None = None,
    checkpoint: Path | None = None,
    **options,
) -> list[dict]:
    """
    Losses on held-out text by step, with the seconds of training up to that step. `optim` names an optimizer of
    Trainer that replaces AdamW. It has one learning rate for all parameters. The run goes on from `checkpoint`.
    `options` replace those of `TrainingArguments` below.
    """
    if optim:
        options |= {"optim": optim, "learning_rate": rates["learning_rate"]}
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "output_dir": folder,
            "save_strategy": "no",
            "lr_scheduler_type": "cosine",
            "warmup_steps": args.steps // 10,
        }
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                gradient_accumulation_steps=args.accumulation_steps,
                eval_strategy="steps",
                eval_steps=args.eval_steps,
                eval_on_start=True,
                logging_steps=args.eval_steps,
                report_to="none",
                bf16=args.bf16,
                use_cpu=not torch.cuda.is_available(),
                # The seed alone decides which batches a step sees
                seed=seed,
                **defaults | options,
            ),
            train_dataset=train_blocks,
            eval_dataset=held_out_blocks,
            callbacks=[Clock()],
            optimizer_cls_and_kwargs=None if optim else (lambda: adamw, rates),
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    points, spent = {}, 0.0
    for row in trainer.state.log_history:
        if "eval_loss" in row:
            spent += row["seconds"]
            # A run that goes on from a checkpoint evaluates it again
            points[row["step"]] = {"step": row["step"], "loss": row["eval_loss"], "seconds": round(spent, 2)}
    return list(points.values())
