"""A source on the Hub and a checkpoint that goes there: against a stand-in on loopback, by processes of their own."""

import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request

import pytest
import torch
import transformers
import yaml
from helpers import (
    INPUT_IDS,
    TERMINAL,
    attnres,
    file_bytes,
    invoke_attnres,
    run,
    run_isolated,
    run_python,
    save_base,
    save_word_tokenizer,
    tensor_hashes,
    tiny_base,
    tiny_base_config,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import generate_model_card

from modeling_attnres import ATTN_RES_MODULES
from modeling_attnres.conversion import card as complete_card
from modeling_attnres.conversion import push, retrofit


pytest.importorskip("uvicorn", reason="`pip install transformers[serving]` installs the packages of the stand-in")
from hub_stand_in import USER, running_hub  # noqa: E402


BASE, NAME = f"{USER}/base", f"{USER}/base-attnres"


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def put_base(hub, folder):
    """A base checkpoint on the Hub, with files that a retrofit does not need."""
    save_base(folder)
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth"):
        (folder / name).write_bytes(b"not needed")
    hub.repositories[BASE] = file_bytes(folder)
    return folder


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("link", [[], ["--link"]], ids=["copy", "link"])
def test_a_hub_id_and_a_revision(hub, link, tmp_path):
    folder = put_base(hub, tmp_path / "base")
    environment = hub.environment(tmp_path / "cache", token="")
    run("attnres", "retrofit", BASE, tmp_path / "attnres", "--revision", "v1", *link, env=environment)
    base_hashes, hashes = tensor_hashes(folder), tensor_hashes(tmp_path / "attnres")
    assert {name: hashes[name] for name in base_hashes} == base_hashes
    card = (tmp_path / "attnres" / "README.md").read_text()
    assert f"base_model: {BASE}" in card and f"https://huggingface.co/{BASE}" in card
    assert not any(path.is_symlink() for path in (tmp_path / "attnres").rglob("*"))
    assert {"config.json", "model.safetensors", "LICENSE", "tokenizer.json"} <= set(hub.served)
    assert not {"pytorch_model.bin", "original/consolidated.00.pth"} & set(hub.served), "only the files needed"


LOAD = """
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32")
assert "transformers_modules" in type(model).__module__
AutoTokenizer.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(input_ids).logits}, work + "/out.safetensors")
"""


def logits_without_the_package(hub, name, work, load=LOAD):
    """Logits of a model on the Hub, by the code that travels with it."""
    return run_isolated(load, name, work, env=hub.environment(work / "other-cache"))["logits"]


def test_retrofit_and_upload(hub, tmp_path):
    put_base(hub, tmp_path / "base")
    environment = hub.environment(tmp_path / "cache")
    run("attnres", "retrofit", BASE, tmp_path / "attnres", "--block-size", 2, env=environment)
    uploaded = run("attnres", "push", tmp_path / "attnres", NAME, "--private", env={**TERMINAL, **environment})
    assert f"Uploaded to {hub.endpoint}/{NAME}" in uploaded
    assert hub.private == {NAME} and len(hub.commits) == 1

    expected, uploaded = file_bytes(tmp_path / "attnres"), dict(hub.repositories[NAME])
    card = uploaded.pop("README.md").decode()
    expected.pop("README.md")
    assert uploaded == expected
    data = metadata(card)
    assert data["base_model"] == BASE and data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers" and "attnres" in data["tags"]
    assert f'from_pretrained("{NAME}", trust_remote_code=True)' in card
    assert f"attnres retrofit {BASE} OUTPUT --type block --block-size 2 --scale sum --norm-eps 1e-06" in card
    assert f"torch {torch.__version__}" in card and "transformers 5." in card
    assert f"--revision {hub.sha(BASE)}" in card

    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{hub.endpoint}/{NAME}/resolve/main/config.json")
    with torch.no_grad():
        logits = tiny_base("llama").to(torch.bfloat16).float()(INPUT_IDS).logits
    torch.testing.assert_close(logits_without_the_package(hub, NAME, tmp_path), logits, rtol=0, atol=1e-5)


def test_a_refused_or_interrupted_upload_goes_on(hub, tmp_path):
    output = retrofit(save_base(tmp_path / "base", sharded=True), tmp_path / "attnres")
    environment = hub.environment(tmp_path / "cache")
    hub.accepts_object = lambda: False
    result = attnres("push", output, NAME, "--private", env=environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr and not hub.commits
    assert f"attnres push {output} {NAME} --private" in result.stderr

    def kill_at_the_second():
        if hub.received:
            process.kill()
        return not hub.received

    hub.accepts_object = kill_at_the_second
    push_it = ["attnres", "push", output, NAME]
    process = subprocess.Popen(push_it, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=300) == -signal.SIGKILL
    assert len(hub.received) == 1 and hub.repositories[NAME] == {} and not hub.commits

    hub.accepts_object = lambda: True
    run(*push_it, env=environment)
    assert len(hub.commits) == 1 and hub.private == {NAME}
    shards = [path for path in hub.repositories[NAME] if path.endswith(".safetensors")]
    assert len(shards) > 2 and len(hub.received) == len(set(hub.received)) == len(shards), "none was sent twice"
    expected = file_bytes(output)
    assert {**hub.repositories[NAME], "README.md": expected["README.md"]} == expected


PUSH = """
import sys, torch
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from modeling_attnres import ATTN_RES_MODULES
retrofit, model_name, adapter_name, uploaded_name, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(retrofit, dtype=torch.float32)
model.push_to_hub(model_name, private=True)
lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
model = get_peft_model(model, lora).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(model(torch.arange(1, 15)[None]).logits, work + "/logits.pt")
model.push_to_hub(adapter_name, private=True)
model.save_pretrained(work + "/adapter")
create_repo(uploaded_name)
upload_folder(repo_id=uploaded_name, folder_path=work + "/adapter")
"""

LOAD_ADAPTER = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32").eval()
assert "transformers_modules" in type(model.get_base_model()).__module__
with torch.no_grad():
    save_file({"logits": model(input_ids).logits}, work + "/out.safetensors")
"""


def test_models_and_adapters_push_themselves(hub, tmp_path):
    """
    As any model of transformers, with tags and code, and a card that is there stays. An adapter names the retrofit as
    its base, which comes from the Hub too, and holds the trained depth attention.
    """
    output = retrofit(save_base(tmp_path / "base", dtype=torch.float32), tmp_path / "attnres")
    hub.repositories[NAME] = file_bytes(output)
    model, adapter, uploaded = (f"{USER}/{name}" for name in ("model", "adapter", "uploaded"))
    hub.repositories[model] = {"README.md": b"---\nlicense: mit\n---\n# By hand\n"}
    environment = hub.environment(tmp_path / "cache")
    run_python(PUSH, NAME, model, adapter, uploaded, tmp_path, env=environment)
    card = hub.repositories[model]["README.md"].decode()
    assert "attnres" in metadata(card)["tags"] and "# By hand" in card
    assert hub.private == {adapter}, "one that was there stays public"

    # `model.push_to_hub` does not upload the tokenizer
    hub.repositories[model] |= {path: c for path, c in file_bytes(output).items() if path.startswith("token")}
    base_logits = tiny_base("llama")(INPUT_IDS).logits
    torch.testing.assert_close(logits_without_the_package(hub, model, tmp_path), base_logits, rtol=0, atol=1e-5)
    logits = logits_without_the_package(hub, adapter, tmp_path, LOAD_ADAPTER)
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt"), rtol=0, atol=1e-5)
    assert (logits - base_logits).abs().max() > 0.1
    # PEFT's own `push_to_hub` puts transformers' template in the place of the card
    assert metadata(hub.repositories[uploaded]["README.md"].decode())["base_model"] == NAME


AUDITED = """
import sys
def audit(event, arguments):
    if event.startswith("socket.connect") or event == "open" and str(arguments[0]).startswith(sys.argv[1]):
        print(event, arguments[0])
sys.addaudithook(audit)
import modeling_attnres
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_importing_and_loading_touch_nothing(tmp_path):
    """No connection, and of the checkpoint only those files are opened that any model of it opens."""
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    opened = {line.split("/")[-1] for line in run_python(AUDITED, output).splitlines()}
    assert {"config.json"} <= opened <= {"config.json", "generation_config.json", "model.safetensors.index.json"}


TASKS = {
    "Model": "feature-extraction",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}


@pytest.mark.parametrize("architecture", TASKS)
def test_the_code_in_the_card_loads_the_checkpoint(architecture, tmp_path):
    getattr(transformers, f"Llama{architecture}")(tiny_base_config("llama")).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", ["and", "word"])
    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    card = (output / "README.md").read_text()
    assert metadata(card)["pipeline_tag"] == TASKS[architecture]
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/this/checkpoint", str(output))
    names = {}
    exec(code, names)
    assert re.fullmatch(f"AttnRes(Llama)?{architecture}", type(names["model"]).__name__)
    assert names["tokenizer"]("word").input_ids == [1]


def test_a_checkpoint_without_a_card_and_a_base_are_not_pushed(tmp_path):
    base = save_base(tmp_path / "base")
    output = retrofit(base, tmp_path / "attnres")
    (output / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="has no README.md: `attnres card .*attnres` writes one"):
        push(output, NAME)
    with pytest.raises(ValueError, match="is not an AttnRes checkpoint: its `model_type` is 'llama'"):
        push(base, NAME)


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_the_card_of_a_training_tool_is_completed(kind, tmp_path):
    """TRL's card of a checkpoint and PEFT's of an adapter: neither knows the base and license of a local folder."""
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres", attn_res_block_size=2)
    card = (output / "README.md").read_text()
    (output / "README.md").write_text(card.replace("license:", f"base_model: {BASE}\nlicense:", 1))
    folder, model = tmp_path / kind, AutoModelForCausalLM.from_pretrained(output)
    if kind == "adapter":
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
        get_peft_model(model, lora).save_pretrained(folder)
        AutoTokenizer.from_pretrained(output).save_pretrained(folder)
    else:
        shutil.copytree(output, folder)
        generate_model_card(None, "my model", "me/mine", "a/dataset", ["sft"], None, None, "SFT").save(
            folder / "README.md"
        )
        with pytest.raises(ValueError, match="does not name the model that was trained: give it as the base"):
            complete_card(folder)
    of_tool = (folder / "README.md").read_text()
    for _ in range(2):
        result = invoke_attnres("card", folder, *(["--base", output] if kind == "checkpoint" else []))
        assert result.exit_code == 0, result.stderr
        card = (folder / "README.md").read_text()
        assert card.count("Type: block (3 blocks of 2 decoder layers); scale: `sum`") == 1
    expected = {"base_model": BASE, "license": "apache-2.0", "pipeline_tag": "text-generation"}
    expected["library_name"] = "peft" if kind == "adapter" else "transformers"
    data = metadata(card)
    assert {name: data[name] for name in expected} == expected
    assert {"attnres", *metadata(of_tool)["tags"]} == set(data["tags"]) and of_tool.split("---\n", 2)[2] in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1].replace("path/to/this/checkpoint", str(folder))
    exec(code, {})


def test_the_name_of_a_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    """Even if it looks like one, and however its path is spelled."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "someone" / "base")
    sources = ["someone/base", "someone/../someone/base"]
    cards = [(retrofit(source, f"attnres-{i}") / "README.md").read_text() for i, source in enumerate(sources)]
    assert cards[0] == cards[1] and "# base with Attention Residuals" in cards[0]
    assert "base_model" not in metadata(cards[0]) and "huggingface.co" not in cards[0]


def test_the_license_comes_along(tmp_path):
    base = save_base(tmp_path / "base")
    fields = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump({**fields, 'base_model': 'another/one'})}---\n# A base\n")
    data = metadata((retrofit(base, tmp_path / "attnres") / "README.md").read_text())
    assert data.items() >= fields.items() and "base_model" not in data
