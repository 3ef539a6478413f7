"""Goes on training a retrofit (or any causal language model) with Trainer.

attnres retrofit BASE my-attnres
python examples/continue_training.py my-attnres my-attnres-trained --files my-texts/*.txt

`--report-to tensorboard` shows routing form while it trains (`tensorboard --logdir my-attnres-trained`). A run that was
killed goes on from its last checkpoint, which `--save-steps` makes, with `--resume`.
"""

import argparse
from pathlib import Path

import torch
from text import default_files, token_blocks
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


def continue_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    files: list[str],
    steps: int = 20,
    learning_rate: float = 5e-5,
    attn_res_learning_rate: float | None = None,
    batch_size: int = 4,
    block_length: int = 256,
    eval_blocks: int = 16,
    save_steps: int | None = None,
    resume: bool = False,
    report_to: str = "none",
) -> tuple[float, float]:
    """Trains and saves the model. Returns the loss on held-out text before and after."""
    train_blocks, held_out_blocks = token_blocks(files, tokenizer, block_length)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
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
        ),
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks.select(range(min(eval_blocks, len(held_out_blocks)))),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(
            lambda: adamw,
            {"learning_rate": learning_rate, "attn_res_learning_rate": attn_res_learning_rate},
        ),
    )
    if model.config.model_type == "attnres" and report_to != "none":
        trainer.add_callback(DepthAttentionCallback(trainer, per_sublayer=True))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return losses[0], losses[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("output", help="folder for the trained model")
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--attn-res-learning-rate", type=float, help="of queries and key norms (default: the same)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--save-steps", type=int, help="also save every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--report-to", default="none", help="for instance tensorboard")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    before, after = continue_training(
        model,
        tokenizer,
        args.output,
        args.files,
        steps=args.steps,
        learning_rate=args.learning_rate,
        attn_res_learning_rate=args.attn_res_learning_rate,
        batch_size=args.batch_size,
        block_length=args.block_length,
        save_steps=args.save_steps,
        resume=args.resume,
        report_to=args.report_to,
    )
    print(f"Loss on held-out text: {before:.3f} before, {after:.3f} after. Saved to {args.output}.")


if __name__ == "__main__":
    main()
