"""Serving by transformers itself: `transformers serve` and `chat`, pipelines, assisted generation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import EXAMPLES, run_isolated, trained_retrofit
from server import chat, served
from transformers import AutoModelForCausalLM, AutoTokenizer


QUESTIONS = ["Name three colors of the rainbow.", "What is the capital of France?"]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def trained_folder(smollm2_folder, tmp_path_factory):
    return trained_retrofit(smollm2_folder, tmp_path_factory.mktemp("trained"), scale=0.002)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def chat_inputs(folder, question):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def greedy(model, inputs, **options):
    tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False, **options)
    return tokens[0, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def expected(trained_folder, smollm2_folder):
    """The answers of `generate` by question. Those of the base differ."""
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    inputs = [chat_inputs(trained_folder, question) for question in QUESTIONS]
    texts, base_texts = (
        [tokenizer.decode(greedy(model, each), skip_special_tokens=True) for each in inputs]
        for model in map(load, (trained_folder, smollm2_folder))
    )
    assert all(text != base_text for text, base_text in zip(texts, base_texts))
    return dict(zip(QUESTIONS, texts))


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


@pytest.mark.parametrize("retrofit_is", ["target", "draft"])
def test_assisted_generation(trained_folder, smollm2_folder, retrofit_is):
    """The draft proposes, the target decides: greedy, the target's own tokens."""
    trained, base = load(trained_folder), load(smollm2_folder)
    target, draft = (trained, base) if retrofit_is == "target" else (base, trained)
    drafted = []
    draft.register_forward_hook(lambda *_: drafted.append(1))
    for question in QUESTIONS:
        inputs = chat_inputs(smollm2_folder, question)
        assert torch.equal(greedy(target, inputs, assistant_model=draft), greedy(target, inputs))
    assert drafted
