"""What continued training makes of a base and of its retrofit: each arm on the same batches, from the same loss.

    python examples/compare_training.py BASE --arms base attnres --seeds 0 1 2 --output losses.jsonl
    python examples/compare_training.py BASE --arms attnres --attn-res-rates 5e-5 2e-4 1e-3 --output losses.jsonl

Arms: `base` and `attnres` train all parameters, `attnres-only` the queries and key norms, `lora` and `lora-attnres` a
LoRA of all linear layers, the latter with the queries and key norms in full. By default the text is newer than the
models.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from continue_training import adamw
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from text import recent_files, sample, token_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_attnres.conversion import retrofit
from modeling_attnres.training import ATTN_RES_MODULES


ARMS = ("base", "attnres", "attnres-only", "lora", "lora-attnres")


def adapted(model: PreTrainedModel, arm: str, rank: int) -> torch.nn.Module:
    if arm in ("base", "attnres"):
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=DUMMY_TARGET_MODULES if arm == "attnres-only" else "all-linear",
        modules_to_save=None if arm == "lora" else ATTN_RES_MODULES,
    )
    return get_peft_model(model, config)


class Clock(TrainerCallback):
    """How many seconds had been trained at each evaluation; the evaluations themselves do not count."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.spent, self.seconds = 0.0, []

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spent += time.perf_counter() - self.start

    def on_evaluate(self, args, state, control, **kwargs):
        self.seconds.append(round(self.spent, 2))
        self.start = time.perf_counter()


def train(
    model: torch.nn.Module,
    rates: dict[str, float],
    train_blocks,
    held_out_blocks,
    args,
    seed: int,
    optim: str | None = None,
) -> list[dict]:
    """
    Losses on held-out text, by step, with the seconds of training up to there. `optim` is an optimizer of Trainer's
    own, with one rate for all parameters, in the place of AdamW with our groups.
    """
    clock = Clock()
    own = {"optim": optim, "learning_rate": rates["learning_rate"]} if optim else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                gradient_accumulation_steps=args.accumulation_steps,
                lr_scheduler_type="cosine",
                warmup_steps=args.steps // 10,
                eval_strategy="steps",
                eval_steps=args.eval_steps,
                eval_on_start=True,
                logging_steps=args.eval_steps,
                save_strategy="no",
                report_to="none",
                bf16=args.bf16,
                use_cpu=not torch.cuda.is_available(),
                # Which batches a step sees hangs on the seed alone
                seed=seed,
                **own,
            ),
            train_dataset=train_blocks,
            eval_dataset=held_out_blocks,
            callbacks=[clock],
            optimizer_cls_and_kwargs=None if optim else (lambda: adamw, rates),
        )
        trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    return [
        {"step": row["step"], "loss": row["eval_loss"], "seconds": seconds}
        for row, seconds in zip(evaluations, clock.seconds)
    ]


def settings(args: argparse.Namespace) -> dict:
    """What two runs must share to be compared; the row says the rest by itself."""
    itself = {
        "base",
        "output",
        "save",
        "files",
        "arms",
        "rates",
        "attn_res_rates",
        "seeds",
        "block_size",
        "temperature",
    }
    return {name: value for name, value in vars(args).items() if name not in itself and value is not None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of the base")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines that runs are added to")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-5], help="learning rates of all but AttnRes")
    parser.add_argument("--attn-res-rates", nargs="+", type=float, help="of queries and key norms (default: the same)")
    parser.add_argument("--optim", help="an optimizer of Trainer's, one rate for all (default: AdamW with our groups)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--type", choices=["block", "full"], default="block")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--files", nargs="+", help="text files (default: the newest sources of transformers)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-steps", type=int, default=20)
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation-steps", type=int, default=1, help="batches that a step's gradient is made of")
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--save", type=Path, help="folder for the trained models with AttnRes, for `attnres inspect`")
    args = parser.parse_args()
    if args.optim and args.attn_res_rates:
        parser.error(f"--attn-res-rates with --optim {args.optim}: an optimizer of Trainer's has one rate for all.")

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    train_blocks, held_out_blocks = token_blocks(args.files or recent_files(), tokenizer, args.block_length)
    held_out_blocks = sample(held_out_blocks, args.eval_blocks)
    with tempfile.TemporaryDirectory() as folder:
        attnres = retrofit(
            args.base,
            Path(folder) / "attnres",
            attn_res_type=args.type,
            attn_res_block_size=args.block_size,
            attn_res_temperature=args.temperature,
            link=True,
        )
        for arm in args.arms:
            attn_res_rates = args.attn_res_rates if "attnres" in arm else None
            for rate in args.rates:
                for attn_res_rate in attn_res_rates or [rate]:
                    for seed in args.seeds:
                        set_seed(seed)
                        checkpoint = attnres if "attnres" in arm else args.base
                        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
                        temperature = getattr(model.config, "attn_res_temperature", None)
                        block_size = getattr(model.config, "attn_res_block_size", None)
                        model = adapted(model, arm, args.lora_rank)
                        rates = {"learning_rate": rate}
                        if "attnres" in arm:
                            rates["attn_res_learning_rate"] = attn_res_rate
                        start = time.perf_counter()
                        losses = train(model, rates, train_blocks, held_out_blocks, args, seed, args.optim)
                        row = {
                            **{"base": Path(args.base).name, "arm": arm, "seed": seed, **settings(args), **rates},
                            **{"block_size": block_size, "temperature": temperature, "losses": losses},
                            "seconds": round(time.perf_counter() - start),
                        }
                        with args.output.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print({**row, "losses": [round(point["loss"], 4) for point in losses]}, flush=True)
                        if args.save and "attnres" in arm:
                            trained = args.save / f"{arm}-{rate:g}-{attn_res_rate:g}-seed{seed}"
                            merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
                            merged.save_pretrained(trained)
                            tokenizer.save_pretrained(trained)


if __name__ == "__main__":
    main()
