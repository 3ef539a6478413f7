"""Retrofits before and after the decay of the learning rate. All arms see the same tokens in the same order.

    python examples/experiments/pretrain.py runs --arms base --widths 32 --rates 8e-3 --lengths 0.8 1 \\
        --output base.jsonl
    python examples/experiments/retrofit_schedule.py runs base.jsonl --output retrofit-schedule.jsonl
    python examples/experiments/plot_training.py retrofit-schedule.jsonl --output retrofit-schedule.png

After eight tenths of the tokens, `base`, `plateau` and `queries-first` start from a base before its decay, and
`finished-base` and `finished` from a base whose schedule ended there. `plateau`, `queries-first` and `finished` are
retrofits. `queries-first` trains only queries and key norms in its first quarter. All arms train on the last two tenths
with a new optimizer, a warm-up and a decay to zero. Runs that are in the output are not repeated.
"""

import argparse
import json
from pathlib import Path

from datasets import DatasetDict
from pretrain import WEIGHT_DECAY, Run
from reads import add_input_dependent_queries
from text import sample
from training import record, train
from transformers import AutoModelForCausalLM

from modeling_attnres.conversion import retrofit
from modeling_attnres.probing import depth_attentions


# The length of the base's schedule
ARMS = {"base": 1, "plateau": 1, "queries-first": 1, "finished-base": 0.8, "finished": 0.8}
# With other reads, see pretrain.py
ARMS |= {"plateau-query16": 1, "plateau-query64": 1, "plateau-values": 1}


def continued(model, blocks, held_out, row: dict, rate: float) -> list[dict]:
    steps = len(blocks) // row["batch_size"]
    options = {"steps": steps, "eval_steps": steps, "batch_size": row["batch_size"]}
    return train(
        model,
        {"learning_rate": rate, "weight_decay": WEIGHT_DECAY},
        blocks,
        held_out,
        argparse.Namespace(**options, accumulation_steps=1, bf16=False),
        row["seed"],
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of pretrain.py")
    parser.add_argument("bases", type=Path, help="JSON lines of pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to which the runs are added")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:5])
    parser.add_argument("--factors", nargs="+", type=float, default=[1, 0.3], help="of the base's learning rate")
    parser.add_argument("--eval-blocks", type=int, default=128)
    args = parser.parse_args()

    text = DatasetDict.load_from_disk(args.folder / "text").with_format("torch")
    held_out = sample(text["held_out"], args.eval_blocks)
    rows = map(json.loads, args.bases.read_text().splitlines())
    rows = {Run(*(row[field] for field in Run._fields)): row for row in rows}
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = [{**json.loads(line), "losses": None} for line in lines]
    for run, row in rows.items():
        if run.arm != "base" or run.length != 1 or run._replace(length=0.8) not in rows:
            continue
        start = rows[run._replace(length=0.8)]["losses"][-1]["step"]
        blocks = text["train"].shuffle(seed=run.seed, keep_in_memory=True)
        blocks = blocks.select(range(start * row["batch_size"], row["losses"][-1]["step"] * row["batch_size"]))
        for arm in args.arms:
            for factor in args.factors:
                rate, rest = factor * run.learning_rate, blocks
                fields = {"width": run.width, "arm": arm, "seed": run.seed, "learning_rate": rate, "losses": None}
                if fields in done:
                    continue
                checkpoint = args.folder / run.folder / f"{ARMS[arm]:g}" / f"checkpoint-{start}"
                value_read = arm == "plateau-values"
                attnres = checkpoint.with_name("attnres-values" if value_read else "attnres")
                if "base" not in arm and not attnres.exists():
                    retrofit(checkpoint, attnres, link=True, attn_res_value_read=value_read)
                model = AutoModelForCausalLM.from_pretrained(checkpoint if "base" in arm else attnres)
                add_input_dependent_queries(model, arm)
                if arm == "queries-first":
                    quarter = len(blocks) // row["batch_size"] // 4 * row["batch_size"]
                    model.requires_grad_(False)
                    for module in depth_attentions(model).values():
                        module.requires_grad_(True)
                    continued(model, blocks.select(range(quarter)), held_out, row, rate)
                    model.requires_grad_(True)
                    rest = blocks.select(range(quarter, len(blocks)))
                losses = continued(model, rest, held_out, row, rate)
                record({**fields, "losses": losses}, args.output)


if __name__ == "__main__":
    main()
