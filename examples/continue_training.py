"""Goes on training a retrofit (or any causal language model) with Trainer.

attnres retrofit BASE my-attnres
python examples/continue_training.py my-attnres my-attnres-trained --files my-texts/*.txt

`--report-to tensorboard` shows routing form while it trains (`tensorboard --logdir my-attnres-trained`). A run that was
killed goes on from its last checkpoint, which `--save-steps` makes, with `--resume`.
"""

import argparse
import os
from pathlib import Path

import torch
from experiments.text import default_files, token_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from modeling_attnres import attn_res_parameter_groups
from modeling_attnres.callback import DepthAttentionCallback


def adamw(model: torch.nn.Module, **rates: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(attn_res_parameter_groups(model, **rates))


def add_options(parser: argparse.ArgumentParser, learning_rate: float = 5e-5) -> None:
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--attn-res-learning-rate", type=float, help="of queries and key norms (default: the same)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--save-steps", type=int, help="also save every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--report-to", default="none", help="for instance tensorboard")
    parser.add_argument("--bf16", action="store_true", help="autocast; `accelerate launch` may have been told so too")


def training_arguments(
    output: str | Path,
    steps: int = 20,
    batch_size: int = 4,
    save_steps: int | None = None,
    report_to: str = "none",
    bf16: bool = False,
) -> TrainingArguments:
    """To be made before the model is loaded: it is from here that ZeRO-3 learns to cut it up."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 5),
        # At the start and at the end, within `train`: FSDP2 shards no model that has no optimizer yet
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        report_to=report_to,
        # DeepSpeed wants Trainer to be told what `accelerate launch` was
        bf16=bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
    )


def last_checkpoint(folder: str | Path) -> str | None:
    """Trainer writes its state last: a checkpoint without was being written when the run was killed."""
    whole = [state.parent for state in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def continue_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    files: list[str],
    learning_rate: float = 5e-5,
    attn_res_learning_rate: float | None = None,
    block_length: int = 256,
    eval_blocks: int = 16,
    resume: bool = False,
) -> tuple[float, float]:
    """Trains and saves the model. Returns the loss on held-out text before and after."""
    train_blocks, held_out_blocks = token_blocks(files, tokenizer, block_length)
    rates = {"learning_rate": learning_rate, "attn_res_learning_rate": attn_res_learning_rate}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks.select(range(min(eval_blocks, len(held_out_blocks)))),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(lambda: adamw, rates),
    )
    if model.config.model_type == "attnres" and args.report_to:
        trainer.add_callback(DepthAttentionCallback(trainer, per_sublayer=True))
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) if resume else None)
    trainer.save_model()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return losses[0], losses[-1]


def run(options: argparse.Namespace, prepare=lambda model: model) -> None:
    """What the options say, on the model that `prepare` makes of the checkpoint's."""
    args = training_arguments(
        options.output, options.steps, options.batch_size, options.save_steps, options.report_to, options.bf16
    )
    model = prepare(AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32))
    before, after = continue_training(
        model,
        AutoTokenizer.from_pretrained(options.checkpoint),
        args,
        options.files,
        learning_rate=options.learning_rate,
        attn_res_learning_rate=options.attn_res_learning_rate,
        block_length=options.block_length,
        resume=options.resume,
    )
    print(f"Loss on held-out text: {before:.3f} before, {after:.3f} after. Saved to {options.output}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("output", help="folder for the trained model")
    add_options(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
