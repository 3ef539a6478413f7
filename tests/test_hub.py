"""A source on the Hub and a checkpoint that goes there: against a stand-in on loopback, by processes of their own."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch
import transformers
import yaml
from conftest import attnres_of, randomise_depth_attention, save_word_tokenizer, tiny_base, tiny_base_config
from hub_stand_in import TOKEN, USER, running_hub
from safetensors.torch import load_file, save_file
from test_cli import attnres
from test_conversion import file_bytes, save_base, tensor_hashes
from test_remote_code import ISOLATED
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_attnres
from modeling_attnres.conversion import inspect_checkpoint, push, retrofit, verify
from modeling_attnres.conversion.page import write_page
from modeling_attnres.conversion.pictures import write_pictures
from modeling_attnres.conversion.push import keep_verification
from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.inspected import weights_digest
from modeling_attnres.model_card import with_pictures
from modeling_attnres.saving import _pictures


BASE, NAME = f"{USER}/base", f"{USER}/base-attnres"


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def put_base(hub, folder):
    """A base checkpoint on the Hub, with much that a retrofit has no use for."""
    save_base(folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not for us")
    hub.repositories[BASE] = file_bytes(folder)
    return folder


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("link", [[], ["--link"]], ids=["copy", "link"])
def test_a_hub_id_and_a_revision(hub, link, tmp_path):
    folder = put_base(hub, tmp_path / "base")
    environment = hub.environment(tmp_path / "cache", token=None)
    result = attnres("retrofit", BASE, tmp_path / "attnres", "--revision", "v1", *link, environment=environment)
    assert result.returncode == 0, result.stderr
    base_hashes, hashes = tensor_hashes(folder), tensor_hashes(tmp_path / "attnres")
    assert {name: hashes[name] for name in base_hashes} == base_hashes
    card = (tmp_path / "attnres" / "README.md").read_text()
    assert f"base_model: {BASE}" in card and f"https://huggingface.co/{BASE}" in card
    assert not any(path.is_symlink() for path in (tmp_path / "attnres").rglob("*"))
    served = {path for _, path in hub.served}
    assert {"config.json", "model.safetensors", "LICENSE", "tokenizer.json"} <= served
    assert not {"pytorch_model.bin", "original/consolidated.00.pth"} & served, "only the files needed"


LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
assert "transformers_modules" in type(model).__module__
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(torch.arange(1, 15)[None]).logits}, sys.argv[2])
"""


def load_without_the_package(hub, name, work, load=LOAD):
    """Logits of a model on the Hub, by the code that travels with it."""
    script = ISOLATED.replace('folder, work = sys.argv[1:]\ndata = load_file(work + "/in.safetensors")\n', "") + load
    process = subprocess.run(
        [sys.executable, "-c", script, name, work / "out.safetensors"],
        capture_output=True,
        text=True,
        env=hub.environment(work / "other-cache"),
        cwd=work,
    )
    assert process.returncode == 0, process.stderr
    return load_file(work / "out.safetensors")["logits"]


def test_retrofit_and_upload(hub, tmp_path):
    put_base(hub, tmp_path / "base")
    environment = hub.environment(tmp_path / "cache")
    result = attnres(
        *("retrofit", BASE, tmp_path / "attnres", "--block-size", 2),
        *("--push-to-hub", NAME, "--private"),
        environment=environment,
    )
    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {hub.endpoint}/{NAME}" in result.stdout
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
    assert f"Compared with its base, `{BASE}` at commit {hub.sha(BASE)}, by `attnres verify`" in card
    difference, largest = re.search(
        r"between logits was (\S+), the largest logit (\S+)\. The two computed the same", card
    ).groups()
    assert 0 < float(difference) < 1e-5 * float(largest)

    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{hub.endpoint}/{NAME}/resolve/main/config.json")
    with torch.no_grad():
        logits = tiny_base("llama").to(torch.bfloat16).float()(torch.arange(1, 15)[None]).logits
    torch.testing.assert_close(load_without_the_package(hub, NAME, tmp_path), logits, rtol=0, atol=1e-5)


def test_what_computes_something_else_says_so(hub, tmp_path):
    base = save_base(tmp_path / "base")
    environment = hub.environment(tmp_path / "cache")
    arguments = ("--scale", "mean", "--push-to-hub", "base-attnres")
    result = attnres("retrofit", base, tmp_path / "attnres", *arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    assert not hub.private and list(hub.repositories) == [NAME], "the token's owner"
    assert "The two computed different things" in hub.repositories[NAME]["README.md"].decode()


def test_an_interrupted_upload_goes_on(hub, tmp_path):
    base = save_base(tmp_path / "base", sharded=True)
    environment = hub.environment(tmp_path / "cache")
    hub.hold = threading.Event()
    process = subprocess.Popen(
        ["attnres", "retrofit", str(base), str(tmp_path / "attnres"), "--push-to-hub", NAME],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert hub.waiting.wait(120), "one object arrived, another is on its way"
    process.kill()
    process.wait()
    hub.hold.set()
    assert len(hub.received) == 1 and hub.repositories[NAME] == {} and not hub.commits

    hub.hold = None
    result = attnres("retrofit", base, tmp_path / "attnres", "--push-to-hub", NAME, environment=environment)
    assert result.returncode == 1 and f"attnres push {tmp_path / 'attnres'} {NAME}" in result.stderr.replace("\n", "")
    result = attnres("push", tmp_path / "attnres", NAME, environment=environment)
    assert result.returncode == 0, result.stderr
    shards = [path for path in hub.repositories[NAME] if path.endswith(".safetensors")]
    assert len(shards) > 2 and len(hub.received) == len(set(hub.received)) == len(shards), "none was sent twice"
    expected = file_bytes(tmp_path / "attnres")
    assert {**hub.repositories[NAME], "README.md": expected["README.md"]} == expected
    assert "The two computed the same" in hub.repositories[NAME]["README.md"].decode(), "that was known before"


def test_a_refused_upload_says_how_to_go_on(hub, tmp_path):
    base = save_base(tmp_path / "base")
    hub.refuse_objects = True
    environment = hub.environment(tmp_path / "cache")
    result = attnres(
        "retrofit", base, tmp_path / "attnres", "--push-to-hub", NAME, "--private", environment=environment
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"attnres push {tmp_path / 'attnres'} {NAME} --private" in result.stderr
    assert (tmp_path / "attnres" / "config.json").is_file() and not hub.commits
    hub.refuse_objects = False
    result = attnres("push", tmp_path / "attnres", NAME, "--private", environment=environment)
    assert result.returncode == 0 and len(hub.commits) == 1 and hub.private == {NAME}, result.stderr
    with pytest.raises(ValueError, match="is not AttnRes: its `model_type` is 'llama'"):
        push(base, NAME)


def test_the_heat_map_is_in_the_card(hub, tmp_path):
    base = save_base(tmp_path / "base")
    save_word_tokenizer(base, ["and", "word"])
    output = retrofit(base, tmp_path / "attnres")
    inspections = [inspect_checkpoint(output, "word word and word")]
    write_pictures(inspections, output / "inspection")
    write_page(inspections, output / "inspection" / "page.html")
    on_disk = (output / "README.md").read_text()
    result = attnres("push", output, NAME, environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    files = hub.repositories[NAME]
    card = files["README.md"].decode()
    assert card.count("](inspection/weights.png)") == card.count("](inspection/page.html)") == 1
    assert files["inspection/weights.png"].startswith(b"\x89PNG") and b"<html" in files["inspection/page.html"]
    assert (output / "README.md").read_text() == on_disk


def run(hub, script, *arguments, cache):
    """A script in a process that has the package and this Hub."""
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=hub.environment(cache),
    )
    assert process.returncode == 0, process.stderr
    return process.stderr


PUSH = """
import sys, torch
from transformers import AutoModelForCausalLM
import modeling_attnres
folder, logits, *names = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    model.model.output_res.query += 0.1
for name in names:
    model.push_to_hub(name, private=True)
torch.save(model(torch.arange(1, 15)[None]).logits.detach(), logits)
"""


def test_a_model_pushes_itself(hub, tmp_path):
    base = save_base(tmp_path / "base")
    card_by_hand = b"---\nlicense: mit\n---\n# By hand\n"
    hub.repositories[f"{USER}/by-hand"] = {"README.md": card_by_hand}
    arguments = (retrofit(base, tmp_path / "attnres"), tmp_path / "logits.pt", NAME, f"{USER}/by-hand")
    run(hub, PUSH, *arguments, cache=tmp_path / "cache")
    card = hub.repositories[NAME]["README.md"].decode()
    data = metadata(card)
    assert "base_model" not in data and data["license"] == "apache-2.0" and "attnres" in data["tags"]
    assert f'from_pretrained("{NAME}", trust_remote_code=True)' in card
    assert "`attnres retrofit base OUTPUT" in card and "## Verification" not in card, "nobody verified it"
    assert hub.private == {NAME}
    hub.repositories[NAME] |= {path: c for path, c in file_bytes(base).items() if path.startswith("token")}
    logits = load_without_the_package(hub, NAME, tmp_path)
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt"), rtol=0, atol=1e-5)
    by_hand = hub.repositories[f"{USER}/by-hand"]
    assert "# By hand" in by_hand["README.md"].decode() and "config.json" in by_hand


LOAD_AND_PUSH = """
import sys, torch
from transformers import AutoModelForCausalLM
import modeling_attnres
folder, *names = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
"""
PUSH_UNTOUCHED = f"""{LOAD_AND_PUSH}
model.push_to_hub(names[0])
"""
PUSH_TRAINED = f"""{LOAD_AND_PUSH}
with torch.no_grad():
    model.lm_head.weight[3] += 0.1
model.push_to_hub(names[0])
model.push_to_hub(names[1])
model.save_pretrained(folder, push_to_hub=True, repo_id=names[2])
"""


def test_a_model_s_card_says_what_was_found_of_its_weights(hub, tmp_path):
    """The comparison with its base is history, whatever came after; a heat map is of what is pushed, or left out."""
    base = save_base(tmp_path / "base")
    save_word_tokenizer(base, ["and", "word"])
    output = retrofit(base, tmp_path / "attnres")
    result = attnres("verify", base, output)
    assert result.returncode == 0, result.stderr
    difference = re.search(r"Largest difference (\S+),", result.stdout)[1]
    inspections = [inspect_checkpoint(output, "word word and word")]
    write_pictures(inspections, output / "inspection")
    write_page(inspections, output / "inspection" / "page.html")
    for path in (output / "inspection").iterdir():
        # As a copy may leave them: what they show does not depend on when they were written
        os.utime(path, (0, 0))
    pictures = {
        f"inspection/{name}": (output / "inspection" / name).read_bytes() for name in ("weights.png", "page.html")
    }

    names = [f"{USER}/{name}" for name in ("untouched", "trained", "in-place")]
    run(hub, PUSH_UNTOUCHED, output, names[0], cache=tmp_path / "cache")
    files = hub.repositories[names[0]]
    card = files["README.md"].decode()
    assert {path: files.get(path) for path in pictures} == pictures
    assert card.count("](inspection/weights.png)") == card.count("](inspection/page.html)") == 1
    assert "Compared with its base, `base`, by" in card and f"between logits was {difference}," in card
    assert "`attnres retrofit base OUTPUT" in card and card.count("Saved by transformers") == 1

    warned = run(hub, PUSH_TRAINED, output, *names, cache=tmp_path / "cache")
    assert (
        "inspection/weights.png, inspection/page.html in" in warned and "To show what is uploaded: `attnres" in warned
    )
    # The folder holds the trained model now, and pictures that are newer and of the earlier one
    for path in (output / "inspection").iterdir():
        path.touch()
    names.append(f"{USER}/later")
    assert "left out" in run(hub, PUSH_UNTOUCHED, output, names[-1], cache=tmp_path / "cache")
    for name in names:
        card = hub.repositories[name]["README.md"].decode()
        assert "inspection/" not in card and "`attnres retrofit base OUTPUT" in card, name
        assert "before any training that followed" in card and f"between logits was {difference}," in card
        assert name == names[0] or "inspection/weights.png" not in hub.repositories[name]


CHAIN = """
import sys
from transformers import AutoModelForCausalLM
from modeling_attnres import AttnResForCausalLM
source, work, *names = sys.argv[1:]
for name in names:
    model = (AttnResForCausalLM if source == sys.argv[1] else AutoModelForCausalLM).from_pretrained(source)
    for folder in ("saved", "saved-again"):
        model.save_pretrained(f"{work}/{name}/{folder}")
        model = AutoModelForCausalLM.from_pretrained(f"{work}/{name}/{folder}")
    model.push_to_hub(name)
    source = name
"""


def test_base_and_licence_go_from_the_hub_through_folders_to_the_hub(hub, tmp_path):
    """From a base on the Hub, and from an AttnRes model there."""
    folder = put_base(hub, tmp_path / "base")
    licence = {"license": "other", "license_name": "own", "license_link": "https://example.org/licence"}
    merged = {**licence, "base_model": ["someone/one", "someone/two"]}
    hub.repositories[BASE]["README.md"] = f"---\n{yaml.safe_dump(merged)}---\n# A merge\n".encode()
    names = [NAME, f"{USER}/next"]
    run(hub, CHAIN, BASE, tmp_path / "work", *names, cache=tmp_path / "cache")
    for name in names:
        card = hub.repositories[name]["README.md"].decode()
        data = metadata(card)
        assert data["base_model"] == BASE and {key: data[key] for key in licence} == licence
        assert f'from_pretrained("{name}", trust_remote_code=True)' in card
    # The base's card, in its folder, names what it was merged of: of the retrofit that is not the base
    (folder / "README.md").write_bytes(hub.repositories[BASE]["README.md"])
    data = metadata((retrofit(folder, tmp_path / "attnres") / "README.md").read_text())
    assert "base_model" not in data and {key: data[key] for key in licence} == licence
    # A list that stands in an AttnRes model's card stays one
    path = tmp_path / "attnres" / "README.md"
    path.write_text(path.read_text().replace("---\n", "---\nbase_model:\n- someone/one\n- someone/two\n", 1))
    AutoModelForCausalLM.from_pretrained(tmp_path / "attnres").save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert metadata(card)["base_model"] == ["someone/one", "someone/two"]
    assert "[someone/one](https://huggingface.co/someone/one), [someone/two](https" in card


def test_a_base_that_can_have_no_hub_id_is_named_in_the_text(hub, tmp_path):
    base = save_base(tmp_path / "a base (1)")
    arguments = ("retrofit", base, tmp_path / "attnres", "--push-to-hub", NAME)
    result = attnres(*arguments, environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    card = hub.repositories[NAME]["README.md"].decode()
    assert "base_model" not in metadata(card) and "# a base (1) with Attention Residuals" in card


def test_under_another_name_the_card_says_that_name(hub, tmp_path):
    """A folder whose card has a Hub id in it already, and pictures where links have to be quoted."""
    base = save_base(tmp_path / "base")
    save_word_tokenizer(base, ["and", "word"])
    output = retrofit(base, tmp_path / "attnres")
    card = (output / "README.md").read_text().replace("path/to/this/checkpoint", NAME)
    (output / "README.md").write_text(card)
    write_pictures([inspect_checkpoint(output, "word word and word")], output / "a look (1)")
    other = f"{USER}/other"
    result = attnres("push", output, other, environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    sent = hub.repositories[other]["README.md"].decode()
    assert NAME not in sent and sent.count(f'from_pretrained("{other}", trust_remote_code=True)') == 2
    assert "](a%20look%20%281%29/weights.png)" in sent and "a look (1)/weights.png" in hub.repositories[other]


INTERRUPTED = """
import sys
from transformers import AutoModelForCausalLM
import modeling_attnres
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2], max_shard_size="20KB")
"""


def test_an_interrupted_push_of_a_model_can_be_run_again(hub, tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    hub.hold = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, output, NAME],
        env=hub.environment(tmp_path / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert hub.waiting.wait(120), "one object arrived, another is on its way"
    process.kill()
    process.wait()
    hub.hold.set()
    assert len(hub.received) == 1 and hub.repositories[NAME] == {} and not hub.commits
    hub.hold = None
    run(hub, INTERRUPTED, output, NAME, cache=tmp_path / "cache")
    shards = [path for path in hub.repositories[NAME] if path.endswith(".safetensors")]
    assert len(shards) > 2 and len(hub.received) == len(set(hub.received)) == len(shards), "none was sent twice"
    assert "`attnres retrofit base OUTPUT" in hub.repositories[NAME]["README.md"].decode()


TRAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import modeling_attnres
folder, output, name = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
data = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 4
options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "hub_model_id": name, "save_strategy": "no"}
trainer = Trainer(model, TrainingArguments(output, **options), train_dataset=data)
trainer.train()
trainer.push_to_hub(finetuned_from="someone/base", license="apache-2.0")
"""


def test_trainer_pushes_with_its_own_card(hub, tmp_path):
    """As the README says: it has our tag, and base and licence from whoever calls it."""
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    run(hub, TRAIN, output, tmp_path / "trained", NAME, cache=tmp_path / "cache")
    data = metadata(hub.repositories[NAME]["README.md"].decode())
    assert {"attnres", "generated_from_trainer"} <= set(data["tags"]) and data["library_name"] == "transformers"
    assert data["base_model"] == "someone/base" and data["license"] == "apache-2.0"
    assert "modeling_attnres.py" in hub.repositories[NAME]


PUSH_ADAPTER = """
import sys, torch
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from modeling_attnres import ATTN_RES_MODULES
attnres, pushed, uploaded, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(attnres, dtype=torch.float32)
lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
model = get_peft_model(model, lora).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(model(torch.arange(1, 15)[None]).logits, work + "/logits.pt")
model.push_to_hub(pushed, private=True)
model.save_pretrained(work + "/adapter")
create_repo(uploaded)
upload_folder(repo_id=uploaded, folder_path=work + "/adapter")
"""

LOAD_ADAPTER = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32").eval()
assert "transformers_modules" in type(model.get_base_model()).__module__
with torch.no_grad():
    save_file({"logits": model(torch.arange(1, 15)[None]).logits}, sys.argv[2])
"""


def test_an_adapter_pushes_itself(hub, tmp_path):
    """Who loads it gets its base, a retrofit, from the Hub too, and the trained depth attention with the LoRA."""
    hub.repositories[NAME] = file_bytes(retrofit(save_base(tmp_path / "base"), tmp_path / "attnres"))
    pushed, uploaded = f"{USER}/pushed", f"{USER}/uploaded"
    process = subprocess.run(
        [sys.executable, "-c", PUSH_ADAPTER, NAME, pushed, uploaded, tmp_path],
        capture_output=True,
        text=True,
        env=hub.environment(tmp_path / "cache"),
    )
    assert process.returncode == 0, process.stderr
    assert hub.private == {pushed}
    expected = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(
        load_without_the_package(hub, pushed, tmp_path, LOAD_ADAPTER), expected, rtol=0, atol=1e-5
    )
    assert (expected - load_without_the_package(hub, NAME, tmp_path)).abs().max() > 0.1
    # PEFT's own `push_to_hub` puts transformers' template in the place of the card
    for name in (pushed, uploaded):
        assert json.loads(hub.repositories[name]["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert metadata(hub.repositories[uploaded]["README.md"].decode())["base_model"] == NAME


def test_the_card_of_a_model_that_was_never_saved(tmp_path):
    model = randomise_depth_attention(attnres_of(tiny_base("llama"), attn_res_block_size=2))
    data = metadata(model.model_card())
    assert "base_model" not in data and data["library_name"] == "transformers" and data["tags"] == ["attnres"]
    model.config.name_or_path = model.name_or_path = str(tmp_path / "gone")
    assert "base_model" not in metadata(model.model_card())
    # From a retrofit through a training run's checkpoints
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    for folder in (tmp_path / "trained", tmp_path / "trained-more"):
        model = type(model).from_pretrained(output)
        model.save_pretrained(folder)
        card = (folder / "README.md").read_text()
        data = metadata(card)
        assert "base_model" not in data and data["license"] == "apache-2.0" and data["tags"] == ["attnres"]
        assert card.count("`attnres retrofit base OUTPUT") == 1
        output = folder
    # A card that cannot be read stops no save
    (output / "README.md").write_text("---\na: [\n---\n")
    type(model).from_pretrained(output).save_pretrained(tmp_path / "unread")
    assert "base_model" not in metadata((tmp_path / "unread" / "README.md").read_text())
    # Loaded from a base's own folder, that is its base, whatever its card names as its own, and it has no Hub id
    folder = save_base(tmp_path / "a-base")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n")
    card = type(model).from_pretrained(folder).model_card()
    assert "# a-base with Attention Residuals" in card
    assert "base_model" not in metadata(card) and metadata(card)["license"] == "mit"


def test_what_others_wrote_into_a_card_stays(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    path = output / "README.md"
    for _ in range(2):
        assert attnres("verify", tmp_path / "base", output).returncode == 0
        notes = "\n# Training\n\nNotes.\n\n## Depth attention\n\nMine.\n"
        path.write_text(path.read_text() + notes)
    card = path.read_text()
    assert card.count("Notes.") == card.count("Mine.") == 2 and card.count("## Verification") == 1
    assert with_pictures(card, []).count("Mine.") == 2


def test_a_card_claims_nothing_of_another_model(tmp_path):
    """Of one that is made of the configuration alone, and of one with another depth attention."""
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    assert attnres("verify", tmp_path / "base", output).returncode == 0
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output)).save_pretrained(tmp_path / "random")
    assert not (tmp_path / "random" / "README.md").exists()
    model = AutoModelForCausalLM.from_pretrained(output, attn_res_scale="mean", attn_res_type="full")
    # As for any model, by position
    model.save_pretrained(tmp_path / "other", True, model.state_dict())
    card = (tmp_path / "other" / "README.md").read_text()
    assert metadata(card)["license"] == "apache-2.0"
    assert "Verification" not in card and "attnres retrofit" not in card


def test_no_picture_of_other_weights_is_pushed(hub, tmp_path):
    """By what it shows, whenever it was written; and what others made is no heat map and no page of ours."""
    base = save_base(tmp_path / "base")
    save_word_tokenizer(base, ["and", "word"])
    output = retrofit(base, tmp_path / "attnres")
    inspection = inspect_checkpoint(output, "word word and word")
    write_pictures([inspection], output / "inspection")
    write_page([inspection], output / "inspection" / "look.html")
    shutil.copytree(output, tmp_path / "trained")
    shard = tmp_path / "trained" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})
    now = max(path.stat().st_mtime for path in (tmp_path / "trained").glob("*"))
    for path in (tmp_path / "trained" / "inspection").iterdir():
        os.utime(path, (now + 60, now + 60))
    environment = hub.environment(tmp_path / "cache")
    names = {"weights.png", "entropy.png", "queries.png", "look.html"}

    for folder, foreign in ((output, False), (tmp_path / "trained", True)):
        if foreign:
            for name in ("page.html", "logo.png", "about.html"):
                (folder / name).write_bytes(b"somebody's own")
        name = f"{USER}/{folder.name}"
        result = attnres("push", folder, name, environment=environment)
        assert result.returncode == 0, result.stderr
        files = hub.repositories[name]
        card = files["README.md"].decode()
        sent = {path.removeprefix("inspection/") for path in files if path.startswith("inspection/")}
        assert sent == (set() if foreign else names)
        assert ("](inspection/weights.png)" in card) != foreign
        # Of a name that the card does not show, or of others: files like any
        assert (
            ".html" not in card
            and "logo.png" not in card
            and ("logo.png" in files) == ("about.html" in files) == foreign
        )
        assert "page.html" not in files
        assert all((f"inspection/{name}" in result.stderr) == foreign for name in names)
        assert (
            (f"page.html in {folder} left out" in result.stderr)
            == ("attnres inspect CHECKPOINT --output" in result.stderr)
            == foreign
        )


@pytest.mark.parametrize(
    "architecture, task",
    [
        ("AttnResModel", "feature-extraction"),
        ("AttnResForCausalLM", "text-generation"),
        ("AttnResForQuestionAnswering", "question-answering"),
        ("AttnResForSequenceClassification", "text-classification"),
        ("AttnResForTokenClassification", "token-classification"),
    ],
)
def test_a_card_loads_the_class_that_was_saved(architecture, task, tmp_path):
    base_class = getattr(transformers, architecture.replace("AttnRes", "Llama"))
    base_class(tiny_base_config("llama")).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", ["and", "word"])
    model = getattr(modeling_attnres, architecture).from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    save_word_tokenizer(tmp_path / "saved", ["and", "word"])
    folders = [tmp_path / "saved"]
    if architecture != "AttnResForQuestionAnswering":  # of which no retrofit is made
        folders.append(retrofit(tmp_path / "base", tmp_path / "attnres"))
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert metadata(card)["pipeline_tag"] == task
        assert ("`attnres inspect`" in card) == (folder.name == "saved" and task == "text-generation"), (
            "it takes no other"
        )
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        names = {}
        exec(code.replace("path/to/this/checkpoint", str(folder)), names)
        assert type(names["model"]).__name__ == architecture and names["tokenizer"]("word").input_ids == [1]


def test_what_others_wrote_is_not_rewritten_for_the_hub(hub, tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    theirs = 'base_model: not, a Hub id\n\n    load = AutoModel.from_pretrained("theirs", trust_remote_code=True)\n'
    head, body = (output / "README.md").read_text().split("---\n\n", 1)
    (output / "README.md").write_text(f"{head}---\n\n{theirs}\n{body}\n{theirs}")
    result = attnres("push", output, NAME, environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    card = hub.repositories[NAME]["README.md"].decode()
    assert card.count(theirs) == 2 and card.count(f'from_pretrained("{NAME}", trust_remote_code=True)') == 2
    assert "path/to/this/checkpoint" not in card


def test_a_folder_s_name_is_no_hub_id(tmp_path, monkeypatch):
    """Even if it reads like one. The Hub cache's folders say whose they are."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "someone" / "base")
    AttnResForCausalLM.from_pretrained("someone/base").save_pretrained("saved")
    for folder in (retrofit("someone/base", "attnres"), tmp_path / "saved"):
        card = (folder / "README.md").read_text()
        assert "base_model" not in metadata(card) and "huggingface.co" not in card
        assert "# base with Attention Residuals" in card
    snapshot = tmp_path / "models--someone--base" / "snapshots" / ("0a" * 20)
    shutil.copytree("someone/base", snapshot)
    (snapshot / "README.md").unlink()
    AttnResForCausalLM.from_pretrained(snapshot).save_pretrained("saved-2")
    for folder in (retrofit(snapshot, "attnres-2"), tmp_path / "saved-2"):
        assert metadata((folder / "README.md").read_text())["base_model"] == "someone/base"


LOAD_THEN_SAVE = """
import sys
from transformers import AutoModelForCausalLM
from modeling_attnres import AttnResForCausalLM
name, token, work = sys.argv[1:]
models = [c.from_pretrained(name, revision="v1", token=token) for c in (AutoModelForCausalLM, AttnResForCausalLM)]
print("loaded", flush=True)
sys.stdin.readline()
for i, model in enumerate(models):
    model.save_pretrained(f"{work}/{i}")
"""


def test_a_save_says_what_was_there_at_load_and_asks_nobody(hub, tmp_path):
    """A private source, by a token that is given and not logged in with; then its card changes, and the Hub is gone."""
    files = file_bytes(retrofit(save_base(tmp_path / "base"), tmp_path / "attnres"))
    card = files["README.md"].decode().replace("---\n", f"---\nbase_model: {BASE}\n", 1)
    hub.repositories[NAME] = {**files, "README.md": card.encode()}
    hub.private.add(NAME)
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD_THEN_SAVE, NAME, TOKEN, tmp_path],
        env=hub.environment(tmp_path / "cache", token=None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "loaded\n"
    hub.repositories[NAME]["README.md"] = card.replace("apache-2.0", "mit").replace(BASE, "someone/else").encode()
    served = len(hub.served)
    hub.shutdown()
    process.communicate("\n")
    assert process.returncode == 0 and len(hub.served) == served
    for i in range(2):
        data = metadata((tmp_path / str(i) / "README.md").read_text())
        assert data["base_model"] == BASE and data["license"] == "apache-2.0"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_card_keeps_its_rights_and_is_on_the_disk(mode, tmp_path, monkeypatch):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    (output / "README.md").chmod(mode)
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("replaced"), replace(*paths)))
    keep_verification(output, verify(tmp_path / "base", output))
    assert "## Verification" in (output / "README.md").read_text()
    assert stat.S_IMODE((output / "README.md").stat().st_mode) == mode
    assert happened == [str(output / ".README.md.partial"), "replaced", str(output)]
    assert not (output / ".README.md.partial").exists()


# What it leaves in the cache is the model without its card
LOAD_AS_REMOTE_CODE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
"""
LOAD = """
import sys, time
from transformers import AutoModelForCausalLM
import modeling_attnres
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert time.perf_counter() - start < 5 and "text-generation" in model.model_card()
"""


def test_without_a_network_nobody_waits_for_a_card(hub, tmp_path):
    hub.repositories[NAME] = file_bytes(retrofit(save_base(tmp_path / "base"), tmp_path / "attnres"))
    environment = hub.environment(tmp_path / "cache")
    # Nobody answers at the other address
    for script, endpoint in ((LOAD_AS_REMOTE_CODE, environment["HF_ENDPOINT"]), (LOAD, "http://127.0.0.1:9")):
        process = subprocess.run(
            [sys.executable, "-c", script, NAME],
            capture_output=True,
            text=True,
            env=environment | {"HF_ENDPOINT": endpoint},
        )
        assert process.returncode == 0, process.stderr


def test_a_card_at_the_root_is_that_of_a_subfolder(tmp_path):
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "run" / "checkpoint")
    (output / "README.md").rename(tmp_path / "run" / "README.md")
    card = AutoModelForCausalLM.from_pretrained(tmp_path / "run", subfolder="checkpoint").model_card()
    assert metadata(card)["license"] == "apache-2.0" and "# base with Attention Residuals" in card


LINKED = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# A base\n"


def test_a_linked_licence_comes_along(hub, tmp_path):
    base = save_base(tmp_path / "base")
    (base / "README.md").write_text(LINKED)
    hub.repositories[BASE] = file_bytes(base)
    own = {"README.md": LINKED.replace("own", "theirs").encode(), "LICENSE": b"their own"}
    hub.repositories[f"{USER}/by-hand"] = dict(own)
    # From a folder, the file
    output = retrofit(base, tmp_path / "attnres")
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "LICENSE").read_text() == "the licence"
    run(hub, PUSH, tmp_path / "saved", tmp_path / "logits.pt", NAME, f"{USER}/by-hand", cache=tmp_path / "cache")
    assert metadata(hub.repositories[NAME]["README.md"].decode())["license_link"] == "LICENSE"
    assert hub.repositories[NAME]["LICENSE"] == b"the licence"
    assert hub.repositories[f"{USER}/by-hand"]["LICENSE"] == own["LICENSE"], "the repository has its own"
    script = f"{LOAD_AND_PUSH}\nmodel.save_pretrained(names[0], push_to_hub=True, repo_id=names[1])\n"
    arguments = (tmp_path / "saved", tmp_path / "at-once", f"{USER}/at-once")
    run(hub, script, *arguments, cache=tmp_path / "cache")
    for files in (hub.repositories[arguments[-1]], file_bytes(tmp_path / "at-once")):
        assert metadata(files["README.md"].decode())["license_link"] == "LICENSE"
        assert files["LICENSE"] == b"the licence"
    # From the Hub, a link to there
    run(hub, CHAIN, BASE, tmp_path / "work", f"{USER}/other", cache=tmp_path / "cache")
    link = f"https://huggingface.co/{BASE}/blob/{hub.sha(BASE)}/LICENSE"
    assert metadata(hub.repositories[f"{USER}/other"]["README.md"].decode())["license_link"] == link
    result = attnres("retrofit", BASE, tmp_path / "attnres-2", environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert metadata((tmp_path / "attnres-2" / "README.md").read_text())["license_link"] == link
    # A card that links to nothing
    (output / "LICENSE").unlink()
    result = attnres("push", output, f"{USER}/third", environment=hub.environment(tmp_path / "cache"))
    assert result.returncode == 0 and "is 'LICENSE', a file that is not there" in result.stderr


@pytest.mark.parametrize("kind", ["gone", "a path out", "a path out and back", "a link out", "hooks"])
def test_no_file_from_elsewhere_comes_as_the_licence(kind, tmp_path):
    (tmp_path / "secret").write_text("secret")
    output = retrofit(save_base(tmp_path / "base"), tmp_path / "attnres")
    card = (output / "README.md").read_text()
    links = {"a path out": "../secret", "a path out and back": "../attnres/LICENCE", "hooks": ".git/hooks/licence"}
    link = links.get(kind, "LICENCE")
    (output / ".git" / "hooks").mkdir(parents=True)
    (output / ".git" / "hooks" / "licence").write_text("secret")
    (output / "README.md").write_text(card.replace("license: apache-2.0", f"license: other\nlicense_link: {link}"))
    if kind == "a link out":
        (output / "LICENCE").symlink_to(tmp_path / "secret")
    if kind == "a path out and back":
        (output / "LICENCE").write_text("licence")
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path / "saved" / "here")
    data = metadata((tmp_path / "saved" / "here" / "README.md").read_text())
    assert data["license"] == "other" and "license_link" not in data
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["here"], "nothing is written beside"
    assert "secret" not in [
        path.read_bytes()[:6].decode(errors="replace") for path in (tmp_path / "saved").rglob("*") if path.is_file()
    ]


def test_no_file_from_elsewhere_comes_by_a_link(tmp_path):
    """In a checkpoint that a stranger gave, or in the folder to save to."""
    (tmp_path / "base").mkdir()
    output = retrofit(save_base(tmp_path / "base" / "base"), tmp_path / "attnres")
    (output / "README.md").rename(tmp_path / "elsewhere.md")
    (output / "README.md").symlink_to(tmp_path / "elsewhere.md")
    digest = weights_digest(AttnResConfig.from_pretrained(output), output.glob("*.safetensors"))
    (tmp_path / "elsewhere.html").write_text(f'<meta name="attnres-weights" content="{digest}">')
    (output / "inspection").mkdir()
    (output / "inspection" / "page.html").symlink_to(tmp_path / "elsewhere.html")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert _pictures(model, tmp_path / "base") == []
    assert "license" not in metadata(model.model_card())
    (output / "inspection" / "page.html").unlink()
    shutil.copy(tmp_path / "elsewhere.html", output / "inspection" / "page.html")
    shutil.copytree(output, tmp_path / "saved", ignore=shutil.ignore_patterns("inspection"))
    assert _pictures(model, tmp_path / "saved") == ["inspection/page.html"], "one that is there is taken"

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "README.md").symlink_to(tmp_path / "made.md")
    model.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "made.md").exists()
