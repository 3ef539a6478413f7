"""
Files of a base that are damaged, unsupported or hostile: they are refused with the reason. Nothing outside of source
and output is read or written, and nothing runs.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
from faults import in_child
from helpers import edit_json, file_bytes, save_base, there_and_back
from safetensors.torch import load_file, save_file

from modeling_attnres.conversion import retrofit, revert, verify


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, QUERY = "model.norm.weight", "model.layers.0.mlp_res.query"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for layout in ("single", "sharded"):
        save_base(folder / layout, sharded=layout == "sharded", num_hidden_layers=2)
    return folder


@pytest.fixture
def base(originals, tmp_path):
    return shutil.copytree(originals / "single", tmp_path / "base")


def watch(file):
    # A read sets the time of access anew where it is older than the last change (Linux's relatime)
    os.utime(file, (0, time.time()))


def was_read(file):
    return file.stat().st_atime != 0


@pytest.fixture
def secret(tmp_path):
    """A file that no code may open. `was_read(secret)` tells whether any code opened it."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "secret"
    file.write_text('{"a": "secret"}')
    watch(file)
    file.read_text()
    if not was_read(file):
        pytest.skip("this file system keeps no times of access")
    watch(file)
    return file


# Ways to spoil a base


def write_shard(path, header, body=b""):
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def header_and_body(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(name, content):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def remove(pattern):
    def spoil(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return spoil


def config(**fields):
    return lambda folder: edit_json(folder / "config.json", **fields)


def tokenizer(**fields):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **fields)


def index(**weight_map):
    def spoil(folder):
        content = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**content, **weight_map})

    return spoil


def add_tensor(shard, name, shape, dtype="F32"):
    """Adds a tensor without elements."""
    header, body = header_and_body(shard)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body)]}
    write_shard(shard, header, body)


def add_an_empty_tensor(folder):
    add_tensor(folder / "model.safetensors", "zzz", [0, 2**62, 2**62])


def truncate(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 10)


def change_tensors(remove=None, add="a"):
    def spoil(folder):
        tensors = {**load_file(folder / "model.safetensors"), add: torch.zeros(32)}
        tensors.pop(remove, None)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def weights_in_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def only_a_gguf(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def repeat_a_tensor(folder):
    """A tensor of the first shard, with other values, in the second one too."""
    name, tensor = next(iter(load_file(folder / FIRST).items()))
    save_file({**load_file(folder / SECOND), name: tensor + 1}, folder / SECOND)


def forget_a_shard(folder):
    edit_json(folder / INDEX, weight_map=dict.fromkeys(load_file(folder / FIRST), FIRST))


NOT_WHOLE = "truncated or not a safetensors file"
INVALID = "config.json is not a valid configuration"
BAD_SOURCES = {
    "weights: none": (remove("model*"), "has no model.safetensors.*save_pretrained"),
    "weights: a GGUF": (only_a_gguf, "holds its weights in a GGUF file.*`gguf_file`"),
    "weights: an adapter": (write("adapter_config.json", "{}"), "holds a PEFT adapter"),
    "weights: truncated": (truncate, NOT_WHOLE),
    "weights: strides that no number counts": (add_an_empty_tensor, "No model can be built"),
    "weights: a pickle by that name": (write("model.safetensors", pickle.dumps({"a": 1})), NOT_WHOLE),
    "weights: a folder by that name": (weights_in_a_folder, "model.safetensors"),
    "weights: a tensor is missing": (change_tensors(remove=NORM), f"has no tensor '{NORM}'"),
    "weights: a tensor of ours": (
        change_tensors(add=QUERY),
        f"has a tensor '{QUERY}', the name of one that a retrofit",
    ),
    "config: none": (remove("config.json"), "has no config.json"),
    "config: empty": (write("config.json", "{}"), "has no `model_type`"),
    "config: a list": (write("config.json", "[]"), "has no `model_type`"),
    "config: not JSON": (write("config.json", '{"model_type": '), "config.json is not valid JSON"),
    "config: no text": (write("config.json", b"\xff\xfe{}"), "is not valid JSON"),
    "config: nested deep": (config(deep=json.loads("[" * 150 + "]" * 150)), "is nested more than 100 levels"),
    "config: nested deeper": (write("config.json", "[" * 10**6), "config.json is not valid JSON"),
    "config: half a surrogate pair": (config(name="\ud800"), "surrogates not allowed"),
    "config: model_type of a wrong type": (config(model_type=["llama"]), "has no `model_type`"),
    "config: model_type with a path": (config(model_type="../llama"), "no such model"),
    "config: model_type of an unsupported model": (config(model_type="bloom"), "not the residual stream"),
    "config: an AttnRes checkpoint": (config(model_type="attnres"), "is an AttnRes checkpoint already"),
    "config: another head": (config(architectures=["LlamaForQuestionAnswering"]), "only a causal language model"),
    "config: architectures no list": (config(architectures="LlamaForCausalLM"), "`architectures` of"),
    "config: architectures of a wrong type": (config(architectures=[5]), "`architectures` of"),
    "config: auto_map no object": (config(auto_map=["AutoModel"]), "`auto_map` of"),
    "config: a kernel from the Hub": (config(attn_implementation="someone/kernel"), "code from the Hub"),
    "config: a kernel, privately": (config(_attn_implementation="someone/kernel"), "code from the Hub"),
    "config: other weights": (
        config(transformers_weights="tokenizer.json"),
        "`transformers_weights` of .* is 'tokenizer.json': rename",
    ),
    "config: a size that is not a number": (config(vocab_size="#"), INVALID),
    "config: rope of a wrong type": (config(rope_parameters=[1]), f"{INVALID}|No model can be built"),
    "config: an unknown activation": (config(hidden_act="__import__('os')"), "No model can be built"),
    "config: a layer more than the weights": (config(num_hidden_layers=3), r"has no tensor 'model.layers.2\."),
    "config: a head without weights": (config(tie_word_embeddings=False), "has no tensor 'lm_head.weight'"),
    "config: another width": (config(intermediate_size=99), r"has shape \[32, 48\], but config.json makes it"),
    "config: endless width": (config(hidden_size=2**40), "shape|No model can be built"),
    "config: endless layers": (config(num_hidden_layers=10**18), "`num_hidden_layers` .* is 10{18}, but there are"),
    "config: endless labels": (config(num_labels=10**9), "`num_labels` .* is 10{9}, but can be at most"),
    "config: negative layers": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "tokenizer: a list": (write("tokenizer_config.json", "[]"), "is not the configuration of a tokenizer"),
    "tokenizer: another program": (
        tokenizer(mecab_kwargs={"mecab_option": "-r /etc/passwd"}),
        "`mecab_kwargs` of .*, options of another program",
    ),
    "our name for the base's own files": (lambda folder: (folder / "attnres_base").mkdir(), "Rename .*attnres_base"),
    "index: forgets a shard": (forget_a_shard, "has no tensor"),
    "index: a tensor in another shard": (index(**{NORM: FIRST}), f"'{NORM}' in {FIRST}, which does not hold it"),
    "index: a tensor in two shards": (repeat_a_tensor, "holds a tensor twice"),
    "index: a missing shard": (remove(SECOND), f"The shard .*{SECOND} is missing"),
    "index: a file outside": (index(a="../elsewhere/secret"), "names the shard '../elsewhere/secret'"),
    "index: an absolute path": (index(a="/etc/hostname.safetensors"), "names the shard '/"),
    "index: the folder": (index(a="."), r"names the shard '\.'"),
    "index: a name with a zero": (index(a="a\0b"), "names the shard"),
    "index: another kind of file": (index(a="config.json"), "names the shard 'config.json'"),
    "index: a name of a wrong type": (index(a=5), "has no `weight_map`"),
    "index: a list": (write(INDEX, "[]"), "has no `weight_map`"),
    "index: no weight_map": (write(INDEX, "{}"), "has no `weight_map`"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused_and_nothing_is_written(case, originals, secret, tmp_path):
    base = shutil.copytree(originals / ("sharded" if case.startswith("index") else "single"), tmp_path / "base")
    spoil, message = BAD_SOURCES[case]
    spoil(base)
    before = file_bytes(tmp_path)
    watch(secret)
    with pytest.raises((ValueError, OSError), match=message):
        retrofit(base, tmp_path / "output")
    assert not was_read(secret)
    assert file_bytes(tmp_path) == before


RETROFITS = {
    "endless layers": (config(num_hidden_layers=10**12), "`num_hidden_layers`"),
    "the base's index: no weight_map": (write(f"attnres_base/{INDEX}", "{}"), "has no `weight_map`"),
    "the base's index: a file outside": (
        write(f"attnres_base/{INDEX}", '{"weight_map": {"a": "../../outside"}}'),
        "names the shard '../../outside'",
    ),
}


@pytest.mark.parametrize("case", RETROFITS)
def test_a_bad_retrofit_is_not_reverted(case, base, tmp_path):
    output = retrofit(base, tmp_path / "output")
    spoil, message = RETROFITS[case]
    spoil(output)
    with pytest.raises(ValueError, match=message):
        revert(output, tmp_path / "reverted")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "output"}


def test_names_of_tensors_are_no_paths(base, tmp_path):
    """They travel as they are, and nothing is written under them."""
    for name in ("../../outside", str(tmp_path / "outside"), "a\0b", "model.layers.99999999999.weight", "‮"):
        add_tensor(base / "model.safetensors", name, [0], dtype="U8")
    output = there_and_back(base, tmp_path)
    assert load_file(output / FIRST).keys() == load_file(base / "model.safetensors").keys()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "attnres", "reverted"}


@pytest.mark.parametrize("name", ["model.safetensors", "LICENSE", "additional_chat_templates/other.jinja", "folder"])
def test_a_link_out_of_the_folder_is_refused(name, base, secret, tmp_path):
    target = secret.parent if name == "folder" else secret
    for link in (target, os.path.relpath(target, (base / name).parent)):
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(link)
        for convert in (retrofit, revert, verify):
            with pytest.raises(ValueError, match=f"{name} is a link out of the folder"):
                convert(base, tmp_path / "output")
    assert not was_read(secret) and not (tmp_path / "output").exists()


def test_links_within_the_folder_and_in_the_hub_cache_are_followed(base, tmp_path):
    expected = file_bytes(retrofit(base, tmp_path / "expected"))
    (base / "model.safetensors").rename(base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    (base / "loop").symlink_to("loop")
    output = retrofit(base, tmp_path / "output")
    assert file_bytes(output) == {**expected, "weights": (base / "weights").read_bytes()}

    expected.pop("additional_chat_templates/tools.jinja")
    blobs = tmp_path / "models--a--base" / "blobs"
    blobs.mkdir(parents=True)
    # A repository that is a model, and one that holds it in a folder
    for revision in ("base", "main/base"):
        snapshot = tmp_path / "models--a--base" / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for number, file in enumerate(base.iterdir()):
            if file.is_file() and file.name != "weights":
                shutil.copy(file, blobs / str(number))
                (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
        assert file_bytes(retrofit(snapshot, tmp_path / f"of_{revision}")) == expected
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(base / "config.json")
    with pytest.raises(ValueError, match="is a link out of the folder"):
        retrofit(snapshot, tmp_path / "of_hostile_snapshot")


FILE_FIELDS = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "spm_file", "chat_template_file")


@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.filterwarnings("ignore:The tokenizer of")
def test_paths_in_the_configuration_of_a_tokenizer_are_not_followed(name, has_tokenizer, base, secret, tmp_path):
    secret = secret.rename(secret.with_name("tokenizer.1.0.0.json"))
    if not has_tokenizer:
        (base / "tokenizer.json").unlink()
    content = json.loads((base / name).read_text()) if (base / name).exists() else {}
    for path in (str(secret), f"../elsewhere/{secret.name}"):
        fields = dict.fromkeys((*FILE_FIELDS, "gguf_file", "vocab", "merges"), path)
        fields |= {"fast_tokenizer_files": [path], "sp_model_kwargs": {"model_file": path}}
        for field, value in fields.items():
            (base / name).write_text(json.dumps({**content, field: value}))
            with pytest.raises(ValueError, match=f"`{field}` of .*{name} names .*, a file outside of the folder"):
                retrofit(base, tmp_path / "output")
        # Older tokenizers wrote this one, and nothing opens it
        (base / name).write_text(json.dumps({**content, "special_tokens_map_file": path}))
        retrofit(base, tmp_path / "output")
        shutil.rmtree(tmp_path / "output")
    assert not was_read(secret)


def test_a_file_of_the_current_folder_is_not_read_behind_one_of_the_checkpoint(base, tmp_path, monkeypatch):
    """transformers opens such a name in the current folder, which is not the checkpoint's."""
    (base / "tokenizer.json").unlink()
    for folder in (base, tmp_path):
        (folder / "decoy.json").write_text("{}")
    watch(tmp_path / "decoy.json")
    write("tokenizer_config.json", json.dumps({"tokenizer_class": "BertTokenizer", "vocab": "decoy.json"}))(base)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"`vocab` of .* {re.escape(str(tmp_path / 'decoy.json'))}, a file outside"):
        retrofit(base, tmp_path / "output")
    assert not was_read(tmp_path / "decoy.json")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def add_malice(folder, ran):
    """Pickles, the code of a tokenizer and the code of a model. Each makes a file if it is run."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "tokenizer.model", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malice(ran)))
    torch.save({"weight": Malice(ran)}, folder / "adapter_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))
    for name in ("modeling_own.py", "setup.py", "conftest.py", "sitecustomize.py", "torch.py", "json.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    config(auto_map={"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"})(folder)
    tokenizer(auto_map={"AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]})(folder)


def touched(function, *arguments):
    """Each file opened to write, renamed, linked, made or removed; each socket and each pickled name looked up."""
    seen = []

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            if mode is not None and set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                seen.append((event, os.path.abspath(path)))
        elif event in ("os.rename", "os.link", "os.symlink"):
            seen.extend((event, os.path.abspath(path)) for path in arguments[:2] if event != "os.link")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            seen.append((event, os.path.abspath(arguments[0])))
        elif event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "pickle.", "ctypes.dlopen")):
            seen.append((event, repr(arguments)))

    # The tests are offline, but users are not
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    # It cannot be taken off again, so this runs in a child
    sys.addaudithook(audit)
    function(*arguments)
    return seen


@pytest.mark.filterwarnings("ignore:The model code of")
def test_nothing_is_written_but_the_output_and_nothing_is_sent_or_run(base, tmp_path, monkeypatch):
    # Imports the modules that are imported at their first use
    there_and_back(base, tmp_path)
    add_malice(base, tmp_path / "ran")
    monkeypatch.chdir(base)
    work = tmp_path / "work"
    work.mkdir()

    def seen(*arguments):
        result = in_child(touched, *arguments)
        assert isinstance(result, list), result
        return result

    def outside(*arguments):
        return [entry for entry in seen(*arguments) if not Path(entry[1]).is_relative_to(work)]

    assert outside(retrofit, base, work / "output") == []
    assert any("reverted" in path for _, path in seen(revert, work / "output", work / "reverted")), "writing is seen"
    assert outside(revert, work / "output", work / "reverted again") == []
    assert seen(verify, base, work / "output") == []
    assert verify(base, work / "output").passed
    assert not (tmp_path / "ran").exists()


def test_model_code_and_pickles_are_not_used_for_want_of_others(base, tmp_path):
    add_malice(base, tmp_path / "ran")
    # Model code that transformers does not have, and weights in pickles alone
    config(model_type="own")(base)
    with pytest.raises(ValueError, match="own"):
        retrofit(base, tmp_path / "output")
    (base / "model.safetensors").unlink()
    for function in (retrofit, revert, verify):
        with pytest.raises((FileNotFoundError, ValueError)):
            function(base, tmp_path / "output")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "output").exists()
    pickle.loads((base / "pytorch_model.bin").read_bytes()).close()
    assert (tmp_path / "ran").exists(), "an opened pickle is noticed"


CARDS = {
    "no YAML": b"---\n: : [\n---\n",
    "no mapping": b"---\n- a\n---\n",
    "a Python object": b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    "no text": b"\xff\xfe\x00",
    "wide": b"---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nlicense: [*c, *c]\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_broken_model_card_loses_its_license_and_nothing_else(card, base, tmp_path):
    (base / "README.md").write_bytes(CARDS[card])
    with nullcontext() if card == "wide" else pytest.warns(UserWarning, match="new card has no license"):
        output = retrofit(base, tmp_path / "output")
    assert (output / "attnres_base" / "README.md").read_bytes() == CARDS[card]
    assert "# base with Attention Residuals" in (output / "README.md").read_text()


def test_a_file_of_the_base_with_a_name_of_ours_does_not_take_its_place(base, tmp_path):
    (base / "modeling_attnres.py").write_text("raise SystemExit('was run')")
    assert "was run" not in (there_and_back(base, tmp_path) / "modeling_attnres.py").read_text()


def test_a_base_that_transformers_cannot_load_is_not_verified(base, tmp_path):
    (base / "generation_config.json").write_text("[]")
    output = retrofit(base, tmp_path / "output")
    with pytest.raises(ValueError, match="base cannot be loaded"):
        verify(base, output)
