"""The multiple-choice files of BIG-bench as local tasks for lm-eval. They need no access to the Hub.

    pip download --no-deps --no-binary :all: bigbench    # 358 MB; nothing is installed
    python examples/experiments/evaluation/bigbench_tasks.py bigbench-1.0.0.tar.gz bigbench-tasks --exclude 'multiemo/*'

A `task.json` becomes a task `bigbench_…` of the tag `bigbench` if its questions are short and have few choices and one
right answer. The task has a YAML file and a file of questions, drawn at random with a fixed seed. The questions are
those of BIG-bench, without the list of choices: a small model cannot pick from a list, but it gives each answer a
probability. (`multiemo` is left out because its 110 tasks ask the same question about the same sentences in eleven
languages.)
"""

import argparse
import json
import random
import statistics
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import yaml


TAG = "bigbench"


def task_files(source: Path) -> Iterator[tuple[str, dict]]:
    """Name and content of each `task.json` in the source package or in a folder."""
    if source.is_dir():
        for path in sorted(source.rglob("task.json")):
            yield path.parent.relative_to(source).as_posix(), json.loads(path.read_text(encoding="utf-8"))
        return
    with tarfile.open(source) as archive:
        for member in archive:
            if member.name.endswith("/task.json"):
                name = member.name.partition("benchmark_tasks/")[2].removesuffix("/task.json")
                yield name, json.load(archive.extractfile(member))


def questions(task: dict) -> list[dict]:
    """The questions that have one right answer: `query`, `choices` and `label`, the right choice's number."""
    rows = []
    for example in task.get("examples", []):
        scores = example.get("target_scores", {})
        best = max(scores.values(), default=0)
        if not isinstance(example.get("input"), str) or list(scores.values()).count(best) != 1:
            continue
        choices = list(scores)
        query = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ") + example["input"]
        # lm-eval puts a space between question and answer
        query = (query + task.get("example_output_prefix", "\nA: ")).rstrip(" ")
        rows.append({"query": query, "choices": choices, "label": list(scores.values()).index(best)})
    return rows


def characters(row: dict) -> int:
    """Number of characters that a model reads to answer: the question with each choice."""
    return sum(len(row["query"]) + len(choice) for choice in row["choices"])


def write_task(name: str, rows: list[dict], folder: Path) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "tag": TAG,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the source package, or a folder with task.json files")
    parser.add_argument("output", type=Path, help="folder to write the tasks to")
    parser.add_argument(
        "--questions", type=int, default=160, help="of a task, at most; one with fewer than 30 has none"
    )
    parser.add_argument("--max-choices", type=int, default=10)
    parser.add_argument(
        "--max-characters", type=int, default=1000, help="of a question with each choice, median of its task"
    )
    parser.add_argument("--exclude", nargs="*", default=[], help="patterns of folders to leave out")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, task in task_files(args.source):
        if any(fnmatch(name, pattern) for pattern in args.exclude):
            continue
        rows = questions(task)
        if len(rows) < 30 or max(len(row["choices"]) for row in rows) > args.max_choices:
            continue
        if statistics.median(map(characters, rows)) > args.max_characters:
            continue
        rows = random.Random(0).sample(rows, min(args.questions, len(rows)))
        write_task(f"{TAG}_{name.replace('/', '_')}", rows, args.output)
        written += 1
    print(f"{written} tasks in {args.output}. Give that folder to evaluate.py or, as `--include_path`, to lm-eval.")


if __name__ == "__main__":
    main()
