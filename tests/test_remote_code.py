"""A saved model in a process that cannot import the package: only the code that travels with the checkpoint."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import AUTO_CLASSES, attnres_of, randomise_depth_attention, tiny_base
from safetensors.torch import load_file, save_file
from test_conversion import save_base
from transformers.dynamic_module_utils import get_imports

from attnres_conversion import retrofit


# An import hook that knows of no such packages, so that an installed one cannot help
ISOLATED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_attnres", "attnres_conversion"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, work = sys.argv[1:]
data = load_file(work + "/in.safetensors")
"""


def run_isolated(script, folder, work, **tensors):
    save_file({"input_ids": torch.arange(1, 15)[None], **tensors}, work / "in.safetensors")
    environment = {**os.environ, "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", ISOLATED + script, folder, work],
        capture_output=True,
        text=True,
        env=environment,
        cwd=work,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr
    return load_file(work / "out.safetensors") if (work / "out.safetensors").exists() else process.stdout


FORWARD = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "AttnResForCausalLM" and type(headless).__name__ == "AttnResModel"
assert "transformers_modules" in type(model).__module__
ids = data["input_ids"]
with torch.no_grad():
    save_file({
        "logits": model(ids).logits,
        "hidden": headless(ids).last_hidden_state,
        "generated": model.generate(ids, max_new_tokens=8, do_sample=False),
    }, work + "/out.safetensors")
"""


@pytest.mark.parametrize("saved_class", ["AttnResForCausalLM", "AttnResModel"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_saved_model_loads_without_the_package(saved_class, family, tmp_path):
    model = randomise_depth_attention(attnres_of(tiny_base(family), attn_res_block_size=2))
    saved = model if saved_class == "AttnResForCausalLM" else model.model
    saved.save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == AUTO_CLASSES

    ids = torch.arange(1, 15)[None]
    result = run_isolated(FORWARD, tmp_path / "saved", tmp_path)
    with torch.no_grad():
        # Up to the order in which a matrix product is summed, which depends on where a file's tensors lie in memory
        torch.testing.assert_close(result["hidden"], model.model(ids).last_hidden_state, rtol=0, atol=1e-5)
        if saved is model:
            torch.testing.assert_close(result["logits"], model(ids).logits, rtol=0, atol=1e-5)
            assert torch.equal(result["generated"], model.generate(ids, max_new_tokens=8, do_sample=False))


TRAIN = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
AutoTokenizer.from_pretrained(folder)
ids = data["input_ids"]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained(work + "/trained")
again = AutoModelForCausalLM.from_pretrained(work + "/trained", trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    save_file({"logits": again(ids).logits}, work + "/out.safetensors")
"""


def test_a_retrofit_trains_and_saves_without_the_package_and_loads_with_it(tmp_path):
    from transformers import AutoModelForCausalLM

    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    result = run_isolated(TRAIN, output, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(model).__module__ == "modeling_attnres.modeling_attnres"
    assert all((layer.mlp_res.query != 0).any() for layer in model.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(1, 15)[None]).logits, result["logits"], rtol=0, atol=1e-5)


def test_code_is_only_run_when_trusted(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    script = """
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    print("refused", "trust_remote_code" in str(error))
"""
    assert run_isolated(script, output, tmp_path).split()[-2:] == ["refused", "True"]


def test_the_code_that_travels_imports_torch_and_transformers_alone(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    files = {path.name: ast.parse(path.read_text()) for path in output.glob("*.py")}
    assert files.keys() == {
        "configuration_attnres.py",
        "depth_attention.py",
        "fused_depth_attention.py",
        "model_card.py",
        "modeling_attnres.py",
        "streaming_depth_attention.py",
    }
    imported = set()
    for tree in files.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module)
    standard = {name for name in imported if name.split(".")[0] in sys.stdlib_module_names}
    required = {"torch", "transformers", "huggingface_hub"}
    assert {name.split(".")[0] for name in imported - standard} == {*required, "fla"}
    # fla is optional: what transformers asks for before it runs the code leaves it out
    assert not any("fla" in get_imports(path) for path in output.glob("*.py"))
    assert standard == {"collections.abc", "contextlib", "functools", "math", "pathlib", "re", "threading", "typing"}
