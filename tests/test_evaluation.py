"""The evaluation examples: tasks from files of BIG-bench, and checkpoints compared on them question by question."""

import json

import pytest
import yaml
from helpers import json_lines, run_example, trained_retrofit


def task_file(folder, count=30, **fields):
    examples = [
        {"input": f"Is {number} even?", "target_scores": {"yes": 1 - number % 2, "no": number % 2, "maybe": 0}}
        for number in range(count)
    ]
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": "any", "examples": examples, **fields}))


@pytest.fixture
def tasks(tmp_path):
    bigbench = tmp_path / "bigbench"
    task_file(bigbench / "parity" / "plain")
    prefixes = {"example_input_prefix": "\nNumber: ", "example_output_prefix": "\nAnswer: "}
    task_file(bigbench / "parity" / "dressed", task_prefix="Think.", **prefixes)
    task_file(bigbench / "few", count=29)
    task_file(bigbench / "excluded")
    task_file(bigbench / "long", task_prefix="x" * 400)  # three times, once for each choice
    run_example("experiments/evaluation/bigbench_tasks.py", bigbench, tmp_path / "tasks", "--exclude", "ex*")
    return tmp_path / "tasks"


def test_bigbench_files_become_tasks(tasks):
    names = ["bigbench_parity_dressed", "bigbench_parity_plain"]
    assert sorted(path.name for path in tasks.iterdir()) == [f"{n}.{e}" for n in names for e in ("jsonl", "yaml")]
    plain, dressed = (json_lines(tasks / f"bigbench_parity_{name}.jsonl") for name in ("plain", "dressed"))
    assert len(plain) == len(dressed) == 30
    choices = ["yes", "no", "maybe"]
    assert {"query": "\nQ: Is 0 even?\nA:", "choices": choices, "label": 0} in plain
    assert {"query": "Think.\nNumber: Is 1 even?\nAnswer:", "choices": choices, "label": 1} in dressed
    task = yaml.safe_load((tasks / "bigbench_parity_plain.yaml").read_text())
    assert task["task"] == "bigbench_parity_plain" and task["tag"] == "bigbench"


def test_a_retrofit_chooses_as_its_base_does(tasks, smollm2_folder, tmp_path):
    pytest.importorskip("lm_eval", reason="`pip install lm-eval`")
    trained, attnres = trained_retrofit(smollm2_folder, tmp_path, scale=0.3), tmp_path / "attnres"
    options = ("--include", tasks, "--tasks", "bigbench", "--limit", 6, "--output", tmp_path / "figures.json")
    output = run_example("experiments/evaluation/evaluate.py", smollm2_folder, attnres, trained, *options)
    figures = json.loads((tmp_path / "figures.json").read_text())
    same, total = figures["chooses_as_the_first"].pop(str(trained))
    assert same < total == 12 and figures["chooses_as_the_first"] == {str(attnres): [12, 12]}
    for folder, count in ((attnres, 12), (trained, same)):
        assert f"{folder} chooses as {smollm2_folder} does on {count} of 12 questions." in output
    assert figures["accuracy"][str(attnres)] == figures["accuracy"][str(smollm2_folder)]


def test_better_than_chance(tasks):
    """Chance is the best of guessing, one answer to all questions, and rules that only look at the lengths."""
    pytest.importorskip("lm_eval", reason="`pip install lm-eval`")
    from evaluation.evaluate import better_than_chance, chance

    def samples(rows, accuracy=0.0):
        """Rows of choices with the right one first. As in lm-eval's tasks, the target is its number or its text."""
        return [
            {
                **{"target": 0 if number % 2 else choices[0], "resps": [[()]] * len(choices)},
                **{"arguments": [("question", f" {choice}") for choice in choices]},
                "acc_norm": float(number < accuracy * len(rows)),
            }
            for number, choices in enumerate(rows)
        ]

    even = [("aye", "nay", "may"), ("nay", "may", "aye"), ("may", "aye", "nay")] * 20
    uneven = [("aye", "nay", "may")] * 45 + [("nay", "aye", "may")] * 15
    assert (chance(samples(even)), chance(samples(uneven))) == (pytest.approx(1 / 3), 0.75)
    for longest in range(3):
        sizes = [5, 3, 3, 1][longest:] + [5, 3, 3, 1][:longest]
        rows = [tuple(chr(97 + number % 26) * size for size in sizes) for number in range(60)]
        # First the longest, then one of the two in the middle
        assert chance(samples(rows)) == (1.0 if longest == 0 else 0.5)
    assert chance(samples([(chr(97 + number % 26), "four", "four") for number in range(60)])) == 1.0
    # Two standard errors of 60 questions are 0.122 and 0.112
    assert [better_than_chance(samples(even, accuracy)) for accuracy in (0.45, 0.47)] == [False, True]
    assert [better_than_chance(samples(uneven, accuracy)) for accuracy in (0.85, 0.87)] == [False, True]
