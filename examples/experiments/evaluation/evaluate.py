"""Evaluates checkpoints with lm-eval, question by question: a retrofit next to its base.

    evaluate=examples/experiments/evaluation/evaluate.py
    python $evaluate BASE ATTNRES --include bigbench-tasks
    python $evaluate BASE --include bigbench-tasks --tasks bigbench    # the tasks at which the base is good
    python $evaluate BASE ATTNRES --tasks mmlu gsm8k                   # with access to the Hub

The default tasks are those of `yardstick.txt`, at which SmolLM2-135M-Instruct is better than chance. The script prints
the accuracies, the number of tasks at which the first checkpoint is better than chance, and the number of questions on
which each checkpoint makes the same choice as the first. The same with the command of lm-eval:

    lm_eval --model hf --model_args pretrained=ATTNRES,trust_remote_code=True --tasks mmlu gsm8k
"""

import argparse
import json
import math
import platform
import statistics
from collections import Counter
from pathlib import Path

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager


YARDSTICK = Path(__file__).with_name("yardstick.txt")


def evaluate(checkpoint: str, tasks: list[str], include: str | None, limit: int | None, batch_size: str) -> dict:
    """The questions of each task with the answers. A task with several filters (GSM8K) gives those of the last one."""
    samples = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": checkpoint, "trust_remote_code": True, "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=include),
        limit=limit,
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=0,
    )["samples"]
    return {task: [row for row in rows if row["filter"] == rows[-1]["filter"]] for task, rows in samples.items()}


def choice(sample: dict):
    """The number of the choice that is most likely per character, or the generated text."""
    answers = sample["filtered_resps"]
    if len(answers) == 1:
        return answers[0]
    lengths = [len(answer.strip()) for _, answer in sample["arguments"]]
    return max(range(len(answers)), key=lambda number: answers[number][0] / lengths[number])


def accuracy(samples: list[dict]) -> float:
    """The accuracy by likelihood per character, if the task has it. Without it, short answers nearly always win."""
    metric = next(name for name in ("acc_norm", "acc", "exact_match") if name in samples[0])
    return sum(sample[metric] for sample in samples) / len(samples)


def chance(samples: list[dict]) -> float:
    """
    The best accuracy of a rule that ignores the questions: guessing; one answer to all questions; always the shortest
    answer, the longest, or one of median length.
    """
    if len(samples[0]["resps"]) == 1:
        return 0.0
    right_answers, by_rule = Counter(), [0.0] * 4
    for sample in samples:
        answers = [answer.strip() for _, answer in sample["arguments"]]
        # Tasks of lm-eval give the number of the right answer or its text
        target = sample["target"]
        right = answers[target] if isinstance(target, int) else target
        right_answers[right] += 1
        lengths = [len(answer) for answer in answers]
        for rule, length in enumerate((min(lengths), max(lengths), statistics.median_low(lengths))):
            by_rule[rule] += (len(right) == length) / lengths.count(length)
        by_rule[-1] += 1 / len(answers)
    return max(*by_rule, *right_answers.values()) / len(samples)


def better_than_chance(samples: list[dict]) -> bool:
    """Better by two standard errors of chance."""
    guess = chance(samples)
    return accuracy(samples) > guess + 2 * math.sqrt(guess * (1 - guess) / len(samples))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders or Hub ids; the others are compared with the first")
    parser.add_argument("--include", help="folder of local tasks, as bigbench_tasks.py writes it")
    parser.add_argument("--tasks", nargs="+", help="tasks, groups or tags of lm-eval (default: those of yardstick.txt)")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--output", type=Path, help="JSON file for the accuracies")
    args = parser.parse_args()

    tasks = args.tasks or YARDSTICK.read_text().split()
    samples = {}
    for checkpoint in args.checkpoints:
        samples[checkpoint] = evaluate(checkpoint, tasks, args.include, args.limit, args.batch_size)
    first, *others = args.checkpoints

    print(platform.machine(), f"torch {torch.__version__}, transformers {transformers.__version__}", sep=", ", end=", ")
    print(f"lm-eval {lm_eval.__version__}\n")
    print("| task | questions | chance |", *(f" {Path(checkpoint).name} |" for checkpoint in args.checkpoints), sep="")
    print("|---|---|---|", "---|" * len(args.checkpoints), sep="")
    for task, answers in sorted(samples[first].items()):
        row = [f"{accuracy(samples[checkpoint][task]):.3f}" for checkpoint in args.checkpoints]
        print(f"| {task} | {len(answers)} | {chance(answers):.3f} |", *(f" {cell} |" for cell in row), sep="")

    good = [task for task, answers in sorted(samples[first].items()) if better_than_chance(answers)]
    print(f"\n{first} is better than chance, by two standard errors, at {len(good)} of {len(samples[first])} tasks.")
    agreement = {}
    for other in others:
        pairs = [
            (choice(a), choice(b))
            for task, answers in samples[first].items()
            for a, b in zip(answers, samples[other][task])
        ]
        same = sum(a == b for a, b in pairs)
        agreement[other] = [same, len(pairs)]
        print(f"{other} chooses as {first} does on {same} of {len(pairs)} questions.")
    if args.output:
        accuracies = {
            checkpoint: {task: accuracy(answers) for task, answers in own.items()}
            for checkpoint, own in samples.items()
        }
        figures = {"accuracy": accuracies, "better_than_chance": good, "chooses_as_the_first": agreement}
        args.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
