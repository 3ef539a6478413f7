"""The evaluation examples: tasks out of BIG-bench's files, and checkpoints judged on them question by question."""

import json

import pytest
import yaml
from conftest import randomise_depth_attention
from test_examples import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres_conversion import retrofit


def task_file(folder, name, count=30, **fields):
    examples = [
        {"input": f"Is {number} even?", "target_scores": {"yes": 1 - number % 2, "no": number % 2, "maybe": 0}}
        for number in range(count)
    ]
    (folder / name).mkdir(parents=True)
    (folder / name / "task.json").write_text(json.dumps({"name": "any", "examples": examples, **fields}))


@pytest.fixture
def tasks(tmp_path):
    bigbench = tmp_path / "bigbench"
    task_file(bigbench, "parity/plain")
    task_file(
        bigbench,
        "parity/dressed",
        **{"task_prefix": "Think.", "example_input_prefix": "\nNumber: ", "example_output_prefix": "\nAnswer: "},
    )
    task_file(bigbench, "few", count=29)
    task_file(bigbench, "excluded")
    task_file(bigbench, "long", task_prefix="x" * 400)  # three times, once for each choice
    run("evaluation/bigbench_tasks.py", bigbench, tmp_path / "tasks", "--exclude", "ex*")
    return tmp_path / "tasks"


def test_bigbench_files_become_tasks(tasks):
    names = ["bigbench_parity_dressed", "bigbench_parity_plain"]
    assert sorted(path.name for path in tasks.iterdir()) == [f"{n}.{e}" for n in names for e in ("jsonl", "yaml")]
    plain, dressed = (
        sorted(map(json.loads, (tasks / f"bigbench_parity_{name}.jsonl").read_text().splitlines()), key=str)
        for name in ("plain", "dressed")
    )
    assert len(plain) == len(dressed) == 30
    choices = ["yes", "no", "maybe"]
    assert {"query": "\nQ: Is 0 even?\nA:", "choices": choices, "label": 0} in plain
    assert {"query": "Think.\nNumber: Is 1 even?\nAnswer:", "choices": choices, "label": 1} in dressed
    task = yaml.safe_load((tasks / "bigbench_parity_plain.yaml").read_text())
    assert task["task"] == "bigbench_parity_plain" and task["tag"] == "bigbench"


def test_a_retrofit_chooses_as_its_base_does(tasks, smollm2_folder, tmp_path):
    pytest.importorskip("lm_eval", reason="`pip install lm-eval`")
    attnres = retrofit(smollm2_folder, tmp_path / "attnres", link=True)
    trained = randomise_depth_attention(AutoModelForCausalLM.from_pretrained(attnres), scale=0.3)
    trained.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(attnres).save_pretrained(tmp_path / "trained")
    options = ("--include", tasks, "--tasks", "bigbench", "--limit", 6, "--output", tmp_path / "figures.json")
    output = run("evaluation/evaluate.py", smollm2_folder, attnres, tmp_path / "trained", *options)
    assert f"{attnres} chooses as {smollm2_folder} does on 12 of 12 questions." in output
    same = int(output.split(f"{tmp_path / 'trained'} chooses as {smollm2_folder} does on ")[1].split()[0])
    assert same < 12
    accuracies = json.loads((tmp_path / "figures.json").read_text())["accuracy"]
    assert accuracies[str(attnres)] == accuracies[str(smollm2_folder)]


def test_better_than_chance(tasks):
    """Chance is what guessing gets, or one answer to all questions."""
    pytest.importorskip("lm_eval", reason="`pip install lm-eval`")
    from evaluation.evaluate import better_than_chance, chance

    choices = ["yes", "no", "maybe"]

    def samples(labels, accuracy):
        return [
            {
                **{"target": choices.index(label), "arguments": [("question", f" {choice}") for choice in choices]},
                **{"resps": [[()]] * 3, "acc": float(number < accuracy * len(labels))},
            }
            for number, label in enumerate(labels)
        ]

    even, uneven = ["yes", "no", "maybe"] * 20, ["yes"] * 45 + ["no"] * 15
    assert (chance(samples(even, 0)), chance(samples(uneven, 0))) == (pytest.approx(1 / 3), 0.75)
    # Two standard errors of 60 questions are 0.122 and 0.112
    assert [better_than_chance(samples(even, accuracy)) for accuracy in (0.45, 0.47)] == [False, True]
    assert [better_than_chance(samples(uneven, accuracy)) for accuracy in (0.85, 0.87)] == [False, True]
