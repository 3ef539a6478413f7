"""From scratch, to the end of a schedule: a base and its Attention Residuals, at several widths and lengths.

    python examples/experiments/pretrain.py runs --output pretrain.jsonl
    python examples/experiments/plot_pretrain.py pretrain.jsonl --output pretrain.png

All arms start with the same weights and see the same batches, no text twice. `base` is a small Llama. The others are
named by type, scaling (`mean` is the form of the paper) and addition: an input-dependent query of a rank (reads.py), or
a separate read for the values of attention. The learning rate of each arm is swept at the first width and half the
length, until its best value is inside the sweep. It is divided by the width.

The rate is constant after a warm-up, and falls to zero over the last fifth of a run. So runs of several lengths share
their first part. Runs that are finished are in the output, and others go on from their last checkpoint: stop the
command at any time, start it again, or start it twice to use two cores.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from filelock import FileLock, Timeout
from reads import add_input_dependent_queries
from text import cut, dataset, package_files, sample
from train_base import llama_config, train_tokenizer
from training import record, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, set_seed

from modeling_attnres import AttnResConfig


ARMS = ("base", "block-sum", "full-sum", "block-mean", "full-mean")
# With other reads
READS = ("block-sum-query16", "block-sum-query64", "block-sum-values")
# A run of length 1 has ten times as many steps as there are between two checkpoints
UNITS = 10
SWEEP_LENGTH = 0.5
WEIGHT_DECAY = 0.1


class Run(NamedTuple):
    width: int
    arm: str
    learning_rate: float
    seed: int
    length: float

    @property
    def folder(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self[:-1])


def build(config: LlamaConfig, arm: str, seed: int) -> PreTrainedModel:
    set_seed(seed)
    base = AutoModelForCausalLM.from_config(config)
    if arm == "base":
        return base
    kind, scale, *reads = arm.split("-")
    attn_res = {"attn_res_type": kind, "attn_res_scale": scale, "attn_res_value_read": "values" in reads}
    config = AttnResConfig.from_base_config(config, **attn_res)
    model = AutoModelForCausalLM.from_config(config)
    # The base has no queries and no key norms
    model.load_state_dict(base.state_dict(), strict=False)
    add_input_dependent_queries(model, arm)
    return model


def prepare(folder: Path, args: argparse.Namespace) -> tuple[AutoTokenizer, Dataset, Dataset]:
    """The tokenizer and the blocks of text, made once."""
    with FileLock(folder / "text.lock"):
        if not (folder / "text").exists():
            files, held_out = package_files(args.packages)
            tokenizer = train_tokenizer([str(file) for file in files[::4]], args.vocab_size)
            tokenizer.save_pretrained(folder / "tokenizer")
            blocks = {"train": files, "held_out": held_out}
            blocks = {name: dataset(cut(files, tokenizer, args.block_length)) for name, files in blocks.items()}
            DatasetDict(blocks).save_to_disk(folder / "text")
    blocks = DatasetDict.load_from_disk(folder / "text").with_format("torch")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer, blocks["train"], sample(blocks["held_out"], args.eval_blocks)


def finished(output: Path) -> dict[Run, float]:
    """The final losses of the runs in the output."""
    rows = map(json.loads, output.read_text().splitlines()) if output.exists() else []
    runs = {Run(*(row[field] for field in Run._fields)): row["losses"][-1]["loss"] for row in rows}
    # The loss of a run that diverged is NaN
    return {run: math.inf if math.isnan(loss) else loss for run, loss in runs.items()}


def queue(args: argparse.Namespace, losses: dict[Run, float]) -> Iterator[Run]:
    """The runs that are left, in order of worth. Those whose learning rate is not known yet are not among them."""
    best = dict.fromkeys(args.arms, args.rates[0]) if len(args.rates) == 1 else {}
    for arm in args.arms:
        rates = list(args.rates)
        while arm not in best:
            runs = {rate: Run(args.widths[0], arm, rate, 0, SWEEP_LENGTH) for rate in rates}
            left = [run for run in runs.values() if run not in losses]
            if left:
                yield from left
                break
            lowest = min(rates, key=lambda rate: losses[runs[rate]])
            if lowest == rates[0]:
                rates.insert(0, lowest / 2)
            elif lowest == rates[-1]:
                rates.append(lowest * 2)
            else:
                best[arm] = lowest
    for width in args.widths:
        for length in args.lengths:
            for seed in args.seeds:
                for arm in args.arms if length <= 1 else ["base"]:
                    if arm in best:
                        run = Run(width, arm, best[arm] * args.widths[0] / width, seed, length)
                        if run not in losses:
                            yield run


def decay_start(unit: int, length: float) -> int:
    return round(0.8 * UNITS * length) * unit


def last_checkpoint(folder: Path, length: float, unit: int) -> Path | None:
    """The last checkpoint of a run, or of a run of another length before both decay."""
    checkpoints = {}
    # A checkpoint is complete when it has its last file
    for state in folder.glob("*/checkpoint-*/trainer_state.json"):
        step, other = int(state.parent.name.split("-")[1]), float(state.parts[-3])
        if other == length or step <= decay_start(unit, min(length, other)):
            checkpoints[step] = state.parent
    return checkpoints[max(checkpoints)] if checkpoints else None


def finish(run: Run, tokenizer: AutoTokenizer, train_blocks: Dataset, held_out_blocks: Dataset, args) -> dict:
    """Trains from the last checkpoint to the end, and returns the row of the run."""
    config = llama_config(tokenizer, run.width, args.layers)
    base = build(config, "base", run.seed)
    non_embedding = base.num_parameters() - base.get_input_embeddings().weight.numel()
    unit = round(args.tokens_per_parameter * non_embedding / UNITS / args.batch_size / args.block_length)
    steps = round(UNITS * run.length) * unit
    if steps * args.batch_size > len(train_blocks):
        raise ValueError(f"{run} needs {steps * args.batch_size} blocks, but the text has {len(train_blocks)}.")
    folder = args.folder / run.folder
    losses = train(
        build(config, run.arm, run.seed),
        {"learning_rate": run.learning_rate, "weight_decay": WEIGHT_DECAY},
        train_blocks.shuffle(seed=run.seed, keep_in_memory=True),
        held_out_blocks,
        argparse.Namespace(**vars(args), steps=steps, eval_steps=unit, accumulation_steps=1, bf16=False),
        run.seed,
        checkpoint=last_checkpoint(folder, run.length, unit),
        output_dir=folder / f"{run.length:g}",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=unit,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps - decay_start(unit, run.length), "decay_type": "linear"},
        warmup_steps=unit // 2,
    )
    settings = {name: getattr(args, name) for name in ("layers", "vocab_size", "batch_size", "block_length")}
    return {**run._asdict(), "non_embedding": non_embedding, **settings, "losses": losses}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for text and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines for finished runs")
    parser.add_argument("--packages", type=Path, default=Path(__file__).with_name("packages.txt"))
    parser.add_argument("--arms", nargs="+", choices=ARMS + READS, default=ARMS[:3])
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[4e-3, 8e-3, 1.6e-2], help="of the sweep (one: no sweep)"
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 48, 64, 96])
    parser.add_argument("--lengths", nargs="+", type=float, default=[1, 0.5, 2], help="above 1: of the base only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens-per-parameter", type=float, default=20, help="at length 1, without the embedding")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--eval-blocks", type=int, default=128)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    text = prepare(args.folder, args)
    while runs := list(queue(args, finished(args.output))):
        for run in runs:
            lock = FileLock(args.folder / f"{run.folder}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            with lock:
                record(finish(run, *text, args), args.output)
            break
        else:
            # The rest of the queue waits for the runs of other processes
            time.sleep(30)


if __name__ == "__main__":
    main()
