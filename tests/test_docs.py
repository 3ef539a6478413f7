"""The links, code and commands of every README. The tests of the scripts run most commands."""

import ast
import re
import shlex
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] not in ("build", "venv"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_code_parses_and_scripts_exist(page):
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(code.replace(">>> ", "").replace("... ", ""))
        if language == "bash":
            for word in shlex.split(code, comments=True):
                is_ours = re.fullmatch(r"(examples|tests|conversion|\.ci)/[\w/]+(\.py|\.sh|\.ipynb)?", word)
                assert not is_ours or (ROOT / word).exists(), word


def test_the_first_block_of_the_readme(smollm2_folder, tmp_path, monkeypatch):
    code = next(code for language, code in FENCE.findall((ROOT / "README.md").read_text()) if language == "python")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2_folder)), namespace)
    inputs = namespace["tokenizer"]("The capital of France is", return_tensors="pt")
    output = namespace["model"].generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in namespace["tokenizer"].decode(output[0])
