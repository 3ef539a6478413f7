"""Serving by transformers itself: `transformers serve` and `chat`, pipelines, assisted generation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import EXAMPLES, answer, chat_inputs, run_isolated, trained_retrofit
from server import chat, served
from transformers import AutoModelForCausalLM, AutoTokenizer


QUESTIONS = ["Name three colors of the rainbow.", "What is the capital of France?"]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def trained_folder(smollm2_folder, tmp_path_factory):
    return trained_retrofit(smollm2_folder, tmp_path_factory.mktemp("trained"), scale=0.002)


@pytest.fixture(scope="module")
def models(trained_folder, smollm2_folder):
    folders = {"attnres": trained_folder, "base": smollm2_folder}
    return {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in folders.items()}


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def expected(models, tokenizer):
    """The answers of `generate` by question. Those of the base differ."""
    answers, of_base = ({q: answer(model, tokenizer, q, MAX_TOKENS) for q in QUESTIONS} for model in models.values())
    assert all(answers[question] != of_base[question] for question in QUESTIONS)
    return answers


def test_transformers_serve_and_chat(trained_folder, expected, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="`pip install transformers[serving]` installs the packages of a server")
    script = EXAMPLES / "serving" / "transformers_serve.py"
    command = (sys.executable, script, "--dtype", "float32", "--device", "cpu")
    with served(*command, log=tmp_path / "log", HF_HOME=str(tmp_path)) as url:
        for question, text in expected.items():
            assert chat(url, trained_folder, question, MAX_TOKENS) == text
            assert chat(url, trained_folder, question, MAX_TOKENS, stream=True) == text
        flags = ("do_sample=False", f"max_new_tokens={MAX_TOKENS}")
        session = subprocess.run(
            [sys.executable, "-m", "transformers.cli.transformers", "chat", trained_folder, url, *flags],
            input=f"{QUESTIONS[0]}\n!exit\n",
            capture_output=True,
            text=True,
            timeout=120,
            # Offline it would not ask a server of its own machine either
            env={**os.environ, "COLUMNS": "1000", "HF_HUB_OFFLINE": "0"},
        )
        assert expected[QUESTIONS[0]].split("\n")[0].strip() in session.stdout, session.stdout + session.stderr


PIPELINE = """
import json
generator = pipeline("text-generation", name, trust_remote_code=True, dtype=torch.float32)
assert "transformers_modules" in type(generator.model).__module__
for question in json.loads(open(work + "/questions.json").read()):
    messages = [{"role": "user", "content": question}]
    print(json.dumps(generator(messages, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]))
"""


def test_pipeline(trained_folder, expected, tmp_path):
    """By the code that travels with the checkpoint: the package cannot be imported."""
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    answers = map(json.loads, run_isolated(PIPELINE, trained_folder, tmp_path))
    assert list(answers) == [{"role": "assistant", "content": expected[question]} for question in QUESTIONS]


@pytest.mark.parametrize("target, draft", [("attnres", "base"), ("base", "attnres")])
def test_assisted_generation(target, draft, models, tokenizer):
    """The draft proposes, the target decides: greedy, the target's own tokens."""
    drafted = []
    hook = models[draft].register_forward_hook(lambda *_: drafted.append(1))
    options = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
    for question in QUESTIONS:
        inputs = chat_inputs(tokenizer, question)
        assisted = models[target].generate(**inputs, **options, assistant_model=models[draft])
        assert torch.equal(assisted, models[target].generate(**inputs, **options))
    assert drafted
    hook.remove()
