"""A saved model in a process that cannot import the package: only the code that travels with the checkpoint."""

import json

import pytest
import torch
from helpers import AUTO_CLASSES, BLOCK, INPUT_IDS, run_isolated, save_base, there_and_back, tiny_base, trained
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from modeling_attnres.conversion import retrofit


@pytest.fixture
def output(tmp_path):
    return retrofit(save_base(tmp_path / "base", dtype=torch.float32), tmp_path / "attnres")


FORWARD = """
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
headless = AutoModel.from_pretrained(name, trust_remote_code=True)
assert type(model).__name__ == "AttnResForCausalLM" and type(headless).__name__.startswith("AttnRes")
assert "transformers_modules" in type(model).__module__
with torch.no_grad():
    save_file({
        "logits": model(input_ids).logits,
        "hidden": headless(input_ids).last_hidden_state,
        "generated": model.generate(input_ids, max_new_tokens=8, do_sample=False),
    }, work + "/out.safetensors")
"""


@pytest.mark.parametrize("saved_class", ["AttnResForCausalLM", "AttnResModel"])
@torch.no_grad()
def test_a_saved_model_loads_without_the_package(saved_class, tmp_path):
    model = trained(tiny_base("qwen2"), **BLOCK)
    (model if saved_class == "AttnResForCausalLM" else model.model).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"].keys() == AUTO_CLASSES
    result = run_isolated(FORWARD, tmp_path / "saved", tmp_path)
    # Not bit-identical: the alignment of the tensors in memory changes the order of sums in a matrix product
    torch.testing.assert_close(result["hidden"], model.model(INPUT_IDS).last_hidden_state, rtol=0, atol=1e-5)
    if saved_class == "AttnResForCausalLM":
        torch.testing.assert_close(result["logits"], model(INPUT_IDS).logits, rtol=0, atol=1e-5)
        assert torch.equal(result["generated"], model.generate(INPUT_IDS, max_new_tokens=8, do_sample=False))


TRAIN = """
try:
    AutoModelForCausalLM.from_pretrained(name)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code was run that is not trusted")
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(input_ids, labels=input_ids).loss.backward()
optimizer.step()
model.save_pretrained(work + "/trained")
again = AutoModelForCausalLM.from_pretrained(work + "/trained", trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits, rtol=0, atol=1e-5)
    save_file({"logits": again(input_ids).logits}, work + "/out.safetensors")
"""


def test_a_retrofit_trains_and_saves_without_the_package_and_loads_with_it(output, tmp_path):
    """The code is only run if it is trusted."""
    result = run_isolated(TRAIN, output, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(model).__module__ == "modeling_attnres.modeling_attnres"
    assert all((layer.mlp_res.query != 0).any() for layer in model.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, result["logits"], rtol=0, atol=1e-5)


def test_an_older_transformers_is_named(output, tmp_path):
    # It copies only the files that the configuration imports itself, and must find all before it runs any
    files = {path.stem for path in output.glob("*.py")}
    assert {"configuration_attnres", *get_relative_imports(output / "configuration_attnres.py")} == files
    script = """
import transformers
transformers.__version__ = "5.6.0"
try:
    AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    message = "AttnRes models need transformers 5.16 or newer, found 5.6.0."
    assert run_isolated(script, output, tmp_path)[-1] == message


def test_a_tool_that_saves_the_configuration_and_copies_weights_makes_a_complete_folder(output, tmp_path):
    """As mergekit does: `config.save_pretrained` brings the code, and the tool writes the weights itself."""
    script = """
import shutil
from pathlib import Path
AutoConfig.from_pretrained(name, trust_remote_code=True).save_pretrained(work + "/copy")
for file in Path(name).glob("*.safetensors*"):
    shutil.copy(file, work + "/copy")
model = AutoModelForCausalLM.from_pretrained(work + "/copy", trust_remote_code=True)
save_file({"logits": model(input_ids).logits.detach()}, work + "/out.safetensors")
"""
    logits = run_isolated(script, output, tmp_path)["logits"]
    expected = AutoModelForCausalLM.from_pretrained(output)(INPUT_IDS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


AUDITED = """
import traceback
seen = []
def audit(event, arguments):
    if event.startswith(("open", "socket", "subprocess", "os.", "shutil", "ctypes", "pickle")):
        # The nearest caller is an import, which Python does by itself, or a line of that code
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe())]
        caller = next((file for file in files if "importlib" in file or "transformers_modules" in file), "")
        if event.startswith("socket") or "transformers_modules" in caller:
            seen.append((event, str(arguments)[:200]))

def use():
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    model(input_ids, labels=input_ids).loss.backward()
    model.generate(input_ids, max_new_tokens=4, do_sample=False)

use()
sys.addaudithook(audit)
for module in [module for module in sys.modules if module.startswith("transformers_modules")]:
    del sys.modules[module]
use()
print("seen:", seen)
"""


def test_the_code_that_travels_opens_nothing_and_sends_nothing(output, tmp_path):
    """While it is imported, makes a model, trains and generates."""
    assert run_isolated(AUDITED, output, tmp_path)[-1] == "seen: []"
    # The hook works
    with (output / "depth_attention.py").open("a") as file:
        file.write("\n\ndef peep():\n    open('/etc/hostname').close()\n\n\npeep()\n")
    assert "/etc/hostname" in run_isolated(AUDITED, output, tmp_path)[-1]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "none": ("llama", {}),
    "llama3": ("llama", {**LLAMA3, "original_max_position_embeddings": 64}),
    "yarn": ("qwen2", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "longrope": ("phi3", {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
}


@pytest.mark.parametrize("named", [True, False], ids=["class named", "class not named"])
def test_the_tokenizer_needs_no_code_and_no_package(named, tmp_path):
    """With the rope fields that checkpoints of transformers 4 have."""
    expected = []
    for rope, (family, rope_scaling) in ROPES.items():
        base = save_base(tmp_path / rope / "base", family)
        config = json.loads((base / "config.json").read_text())
        del config["rope_parameters"]
        scaling = {"rope_scaling": rope_scaling} if rope_scaling else {}
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0, **scaling}))
        if not named:
            (base / "tokenizer_config.json").unlink()
        there_and_back(base, tmp_path / rope)
        expected.append(str(AutoTokenizer.from_pretrained(base)("word").input_ids))
    script = f"""
for rope in {list(ROPES)}:
    print(AutoTokenizer.from_pretrained(f"{{name}}/{{rope}}/attnres", trust_remote_code=False)("word").input_ids)
"""
    assert run_isolated(script, tmp_path, tmp_path)[-len(ROPES) :] == expected
