"""A saved model in a process that cannot import the package: only the code that travels with the checkpoint."""

import ast
import contextlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import AUTO_CLASSES, attnres_of, randomize_depth_attention, tiny_base
from safetensors.torch import load_file, save_file
from test_conversion import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

from modeling_attnres.conversion import retrofit, revert, verify


# An import hook that knows of no such package, so that an installed one cannot help
ISOLATED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_attnres":
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
assert type(model).__name__ == "AttnResForCausalLM" and type(headless).__name__.startswith("AttnRes")
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
    model = randomize_depth_attention(attnres_of(tiny_base(family), attn_res_block_size=2))
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


def test_an_older_transformers_is_named(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    script = """
import transformers
transformers.__version__ = "5.6.0"
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    message = "AttnRes models need transformers 5.16 or newer, found 5.6.0."
    assert run_isolated(script, output, tmp_path).splitlines()[-1] == message


def test_a_tool_that_saves_the_configuration_and_copies_weights_makes_a_complete_folder(tmp_path):
    """As mergekit does: `config.save_pretrained` brings the code, and the tool writes the weights itself."""
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    script = """
import shutil
from pathlib import Path
AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(work + "/copy")
for file in Path(folder).glob("*.safetensors*"):
    shutil.copy(file, work + "/copy")
model = AutoModelForCausalLM.from_pretrained(work + "/copy", trust_remote_code=True)
save_file({"logits": model(data["input_ids"]).logits.detach()}, work + "/out.safetensors")
"""
    logits = run_isolated(script, output, tmp_path)["logits"]
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits, model(torch.arange(1, 15)[None]).logits, rtol=0, atol=1e-5)


def test_the_code_that_travels_imports_torch_and_transformers_alone(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    files = {path.name: ast.parse(path.read_text()) for path in output.glob("*.py")}
    assert files.keys() == {
        "configuration_attnres.py",
        "depth_attention.py",
        "modeling_attnres.py",
        "residual_stream.py",
    }
    imported = set()
    for tree in files.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    # The last two are requirements of transformers
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "fla", "huggingface_hub", "packaging"}
    # fla is optional: what transformers asks for before it runs the code leaves it out
    assert not any("fla" in get_imports(path) for path in output.glob("*.py"))


# What could read the environment or a file, reach the network, run other code, or reach any of these by a detour
FORBIDDEN = {
    *("open", "exec", "eval", "compile", "__import__", "__builtins__", "__loader__", "globals", "breakpoint", "input"),
    *("os", "sys", "environb", "listdir", "scandir", "from_file", "save", "load_library", "load_state_dict_from_url"),
    *("from_pretrained", "push_to_hub", "cached_file", "hf_hub_download", "snapshot_download"),
    *("environ", "getenv", "load", "loads", "import_module", "hub", "system", "popen", "__subclasses__", "__globals__"),
}


def test_the_code_that_travels_is_minimal_and_names_nothing_dangerous(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    files = list(output.glob("*.py"))
    for path in files:
        # `torch.compile` compiles the function that it is given, Python's own any text
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if ast.unparse(node) != "torch.compile"]
        names = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes}
        assert not names & FORBIDDEN, path.name
    assert sum(len(path.read_text().splitlines()) for path in files) < 1250, "to be read before it is trusted"


AUDITED = """
import sys
seen = []
def audit(event, arguments):
    if event.split(".")[0] in ("open", "socket", "subprocess", "os", "shutil", "ctypes", "pickle"):
        # Who asked: an import, which Python does by itself, or a line of that code
        frame = sys._getframe(1)
        while frame and not any(part in frame.f_code.co_filename for part in ("importlib", "transformers_modules")):
            frame = frame.f_back
        if event.startswith("socket") or frame and "transformers_modules" in frame.f_code.co_filename:
            seen.append((event, str(arguments)[:200], frame and frame.f_code.co_name))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = data["input_ids"]
model(ids, labels=ids).loss.backward()
model.generate(ids, max_new_tokens=4, do_sample=False)
sys.addaudithook(audit)
for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
    del sys.modules[name]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model(ids, labels=ids).loss.backward()
model.generate(ids, max_new_tokens=4, do_sample=False)
assert len([name for name in sys.modules if name.startswith("transformers_modules")]) >= 5
print("seen:", seen)
"""


def test_the_code_that_travels_opens_nothing_and_sends_nothing(tmp_path):
    """While it is imported, makes a model, trains and generates."""
    output = retrofit(save_base(tmp_path / "base", dtype=torch.float32), tmp_path / "attnres")
    assert run_isolated(AUDITED, output, tmp_path).splitlines()[-1] == "seen: []"
    # The hook sees what it should
    with (output / "depth_attention.py").open("a") as file:
        file.write("\n\ndef peep():\n    open('/etc/hostname').close()\n\n\npeep()\n")
    assert "/etc/hostname" in run_isolated(AUDITED, output, tmp_path).splitlines()[-1]


def test_the_base_s_code_is_not_run_even_where_it_is_all_there_is(tmp_path):
    """`retrofit` has no flag that would make it: what it computes is the model of transformers."""
    base, ran = save_base(tmp_path / "base"), tmp_path / "ran"
    (base / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    config = json.loads((base / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "own.Own")
    for model_type in ("llama", "own"):
        (base / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto_map}))
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            retrofit(base, tmp_path / model_type)
        assert not ran.exists()
    assert (tmp_path / "llama").exists() and not (tmp_path / "own").exists()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "none": ("llama", {}),
    "llama3": ("llama", {**LLAMA3, "original_max_position_embeddings": 64}),
    "yarn": ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "longrope": ("phi3", {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
}


@pytest.mark.parametrize("named", [True, False], ids=["class named", "class not named"])
@pytest.mark.parametrize("rope", ROPES)
def test_the_tokenizer_needs_no_code_and_no_package(rope, named, tmp_path):
    """With the rope fields that checkpoints of transformers 4 have."""
    family, rope_scaling = ROPES[rope]
    base = save_base(tmp_path / "base", family, rope_parameters=None)
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, **({"rope_scaling": rope_scaling} if rope_scaling else {})}
    (base / "config.json").write_text(json.dumps(config))
    if not named:
        (base / "tokenizer_config.json").unlink()
    output = retrofit(base, tmp_path / "attnres")
    assert verify(base, output).passed
    script = "print(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)('word').input_ids)"
    expected = str(AutoTokenizer.from_pretrained(base)("word").input_ids)
    assert run_isolated(script, output, tmp_path).splitlines()[-1] == expected
    reverted = revert(output, tmp_path / "reverted")
    assert (reverted / "config.json").read_bytes() == (base / "config.json").read_bytes()
