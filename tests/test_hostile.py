"""Files from strangers: hostile content is refused, nothing outside of source and target is touched, nothing runs."""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import file_bytes, save_base, spoil_config
from test_crash_safety import in_child

from modeling_attnres.conversion import retrofit, revert, verify


INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    folder = save_base(tmp_path / "base", num_hidden_layers=2)
    (folder / "pytorch_model.bin").unlink()
    return folder


@pytest.fixture
def sharded(tmp_path):
    return save_base(tmp_path / "sharded", sharded=True, num_hidden_layers=2)


@pytest.fixture
def secret(tmp_path):
    """A file that nobody may open. `was_read(secret)` says whether somebody did, by whatever means."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "secret"
    file.write_text('{"a": "secret"}')
    # A read sets the time of access anew where it is older than the last change (Linux's relatime)
    os.utime(file, (0, time.time()))
    file.read_text()
    if file.stat().st_atime == 0:
        pytest.skip("this file system keeps no times of access")
    os.utime(file, (0, time.time()))
    return file


def was_read(secret):
    return secret.stat().st_atime != 0


def write_shard(path, header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def header_and_body(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


NORM = "model.norm.weight"


def info(**changes):
    """The header with one tensor's entry changed."""

    def spoil(folder):
        header, body = header_and_body(folder / "model.safetensors")
        header[NORM].update(changes)
        write_shard(folder / "model.safetensors", header, body)

    return spoil


def raw_header(change):
    """The header's text changed, for what a `dict` cannot hold."""

    def spoil(folder):
        header, body = header_and_body(folder / "model.safetensors")
        write_shard(folder / "model.safetensors", change(json.dumps(header), header).encode(), body)

    return spoil


def overlap(text, header):
    other = next(name for name in header if name not in (NORM, "__metadata__"))
    header[NORM]["data_offsets"] = header[other]["data_offsets"]
    return json.dumps(header)


def length(number):
    def spoil(folder):
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(struct.pack("<Q", number))

    return spoil


def text(name, change):
    def spoil(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return spoil


def config(**fields):
    return lambda folder: spoil_config(folder, **fields)


def without(part):
    """The weights of a base that lacks the tensors with this in their name."""

    def spoil(folder):
        file = folder / "model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if part not in name}, file)

    return spoil


def nested(depth):
    return lambda content: f'{content.rstrip()[:-1]}, "deep": {"[" * depth}{"]" * depth}}}'


def tokenizer(**fields):
    def spoil(folder):
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**content, **fields}))

    return spoil


def empty_tensor(header, shape):
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return json.dumps({**header, "zzz": {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}})


NOT_WHOLE = "truncated or not a safetensors file"
INVALID = "config.json is not a valid configuration"
HOSTILE = {
    "header: negative offset": (info(data_offsets=[-64, 0]), NOT_WHOLE),
    "header: offset beyond the file": (info(data_offsets=[0, 2**62]), NOT_WHOLE),
    "header: overlapping tensors": (raw_header(overlap), NOT_WHOLE),
    "header: shape and offsets differ": (info(shape=[2**20]), NOT_WHOLE),
    "header: unknown dtype": (info(dtype="BF17"), NOT_WHOLE),
    "header: no object": (raw_header(lambda text, header: "[]"), NOT_WHOLE),
    "header: deep": (raw_header(lambda text, header: "[" * 10**5), NOT_WHOLE),
    "header: longer than the file": (length(2**40), NOT_WHOLE),
    "weights: a pickle by that name": (
        lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        NOT_WHOLE,
    ),
    "weights: a folder by that name": (
        lambda folder: [(folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()],
        "model.safetensors",
    ),
    "weights: a tensor is missing": (without("1.mlp.up_proj.w"), "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
    "weights: no head": (config(tie_word_embeddings=False), "has no tensor 'lm_head.weight'"),
    "weights: no last norm": (without(NORM), f"has no tensor '{NORM}'"),
    "config: a layer more than the weights": (config(num_hidden_layers=3), r"has no tensor 'model.layers.2\."),
    "config: weights by another name": (
        config(transformers_weights="tokenizer.json"),
        "`transformers_weights` of .* names a file of weights, 'tokenizer.json'",
    ),
    "header: strides that no number counts": (
        raw_header(lambda text, header: empty_tensor(header, [0, 2**62, 2**62])),
        "No model can be built",
    ),
    "weights: a tensor of ours": (
        lambda folder: save_file(
            {**load_file(folder / "model.safetensors"), "model.layers.0.mlp_res.query": torch.zeros(32)},
            folder / "model.safetensors",
        ),
        "has a tensor 'model.layers.0.mlp_res.query' already",
    ),
    "tokenizer config: a path in a library's options": (
        lambda folder: [
            (folder.parent / "spiece.model").write_text(""),
            tokenizer(sp_model_kwargs={"model_file": "../spiece.model"})(folder),
        ],
        "`sp_model_kwargs` of .* names .*/spiece.model, a file outside",
    ),
    "tokenizer config: another program's options": (
        tokenizer(mecab_kwargs={"mecab_option": "-r /etc/passwd"}),
        "`mecab_kwargs` of .*, options of another program",
    ),
    "config: nested deep": (
        text("config.json", nested(150)),
        "config.json is not valid JSON: it is nested more than 100 levels",
    ),
    "config: nested deeper": (text("config.json", nested(10**6)), "config.json is not valid JSON"),
    "config: a list": (text("config.json", lambda content: f"[{content}]"), "has no `model_type`"),
    "config: no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "is not valid JSON"),
    "config: half a surrogate pair": (config(name="\ud800"), "surrogates not allowed"),
    "config: a size that is not a number": (config(vocab_size="#"), INVALID),
    "config: endless layers": (config(num_hidden_layers=10**18), "`num_hidden_layers` .* is 10{18}, but there are"),
    "config: endless labels": (config(num_labels=10**9), "`num_labels` .* is 10{9}, but can be at most"),
    "config: no layers": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "config: other experts": (
        lambda folder: [shutil.rmtree(folder), save_base(folder, "mixtral"), config(num_local_experts=8)(folder)],
        "has shape|has no tensor|No model can be built",
    ),
    "config: endless width": (config(hidden_size=2**40), "shape|No model can be built"),
    "config: endless vocabulary": (config(vocab_size=10**15), "shape|No model can be built"),
    "config: endless heads": (config(num_attention_heads=2**62), "shape|No model can be built|not a valid"),
    "config: no heads": (config(num_attention_heads=0), "No model can be built|not a valid"),
    "config: another width": (config(intermediate_size=99), r"has shape \[32, 48\], but config.json makes it"),
    "config: width of a wrong type": (config(hidden_size="32"), INVALID),
    "config: width null": (config(hidden_size=None), INVALID),
    "config: rope of a wrong type": (config(rope_parameters=[1]), f"{INVALID}|No model can be built"),
    "config: an unknown activation": (config(hidden_act="__import__('os')"), "No model can be built"),
    "config: an unknown dtype": (config(dtype="float31"), f"{INVALID}|No model can be built"),
    "config: model_type of a wrong type": (config(model_type=["llama"]), "has no `model_type`"),
    "config: model_type with a path": (config(model_type="../llama"), "no such model"),
    "config: architectures no list": (config(architectures="LlamaForCausalLM"), "`architectures` of"),
    "config: architectures of a wrong type": (config(architectures=[5]), "`architectures` of"),
    "config: auto_map no object": (config(auto_map=["AutoModel"]), "`auto_map` of"),
    "config: a kernel from the Hub": (config(attn_implementation="someone/kernel"), "code from the Hub"),
    "config: a kernel, privately": (config(_attn_implementation="someone/kernel"), "code from the Hub"),
    "tokenizer config: a list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "is not the configuration of a tokenizer",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case, base, tmp_path):
    spoil, message = HOSTILE[case]
    spoil(base)
    before = file_bytes(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        retrofit(base, tmp_path / "output")
    assert file_bytes(tmp_path) == before


def index(**weight_map):
    def spoil(folder):
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"].update(weight_map)
        (folder / INDEX).write_text(json.dumps(content))

    return spoil


def second_shard_again(folder):
    """A tensor of the first shard, with other values, in the second one too."""
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    header, body = header_and_body(second)
    tensors = header_and_body(first)[0]
    name = next(name for name in tensors if name != "__metadata__")
    end, size = len(body), tensors[name]["data_offsets"][1] - tensors[name]["data_offsets"][0]
    header[name] = {**tensors[name], "data_offsets": [end, end + size]}
    write_shard(second, header, body + bytes(size))


def forget_a_shard(folder):
    content = json.loads((folder / INDEX).read_text())
    last = max(content["weight_map"].values())
    content["weight_map"] = {name: shard for name, shard in content["weight_map"].items() if shard != last}
    (folder / INDEX).write_text(json.dumps(content))


HOSTILE_INDEX = {
    "a shard that it does not name": (forget_a_shard, "has no tensor"),
    "a file outside": (index(a="../elsewhere/secret"), "names the shard '../elsewhere/secret'"),
    "an absolute path": (lambda folder: index(a=str(folder / "config.json"))(folder), "names the shard '/"),
    "the folder": (index(a="."), "names the shard '.'"),
    "no name": (index(a=""), "names the shard ''"),
    "a name with a zero": (index(a="a\0b"), "names the shard"),
    "another kind of file": (index(a="config.json"), "names the shard 'config.json'"),
    "a tensor that is not there": (index(**{NORM + "2": "config.json"}), "names the shard 'config.json'"),
    "a name of a wrong type": (index(a=5), "has no `weight_map`"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "has no `weight_map`"),
    "no weight_map": (lambda folder: (folder / INDEX).write_text("{}"), "has no `weight_map`"),
    "one tensor in two shards": (second_shard_again, "holds a tensor twice"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_hostile_indexes_are_refused(case, sharded, secret, tmp_path):
    spoil, message = HOSTILE_INDEX[case]
    spoil(sharded)
    before = file_bytes(tmp_path)
    os.utime(secret, (0, time.time()))
    with pytest.raises((ValueError, OSError), match=message):
        retrofit(sharded, tmp_path / "output")
    assert not was_read(secret)
    assert file_bytes(tmp_path) == before


def test_names_of_tensors_are_no_paths(base, tmp_path):
    """They travel as they are, and nothing is written under them."""
    header, body = header_and_body(base / "model.safetensors")
    for name in ("../../outside", str(tmp_path / "outside"), "a\0b", "model.layers.99999999999.weight", "‮"):
        header[name] = {"dtype": "U8", "shape": [0], "data_offsets": [len(body), len(body)]}
    write_shard(base / "model.safetensors", header, body)
    output = retrofit(base, tmp_path / "output")
    assert load_file(output / "model-00001-of-00002.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert verify(base, output).passed
    revert(output, tmp_path / "reverted")
    assert file_bytes(tmp_path / "reverted") == file_bytes(base)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "output", "reverted"}


LINKS = {
    "weights": "model.safetensors",
    "config": "config.json",
    "tokenizer": "tokenizer.json",
    "license": "LICENSE",
    "another file": "notes.txt",
    "in a folder": "additional_chat_templates/other.jinja",
    "card": "README.md",
}


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize("file", LINKS.values(), ids=LINKS)
def test_a_link_out_of_the_folder_is_refused(file, absolute, base, secret, tmp_path):
    (base / file).unlink(missing_ok=True)
    (base / file).symlink_to(secret if absolute else os.path.relpath(secret, (base / file).parent))
    with pytest.raises(ValueError, match=f"{file} is a link out of the folder"):
        retrofit(base, tmp_path / "output")
    with pytest.raises(ValueError, match=f"{file} is a link out of the folder"):
        verify(base, base)
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


def test_a_linked_folder_is_refused_too(base, secret, tmp_path):
    (base / "more").symlink_to(secret.parent)
    with pytest.raises(ValueError, match="more is a link out of the folder"):
        retrofit(base, tmp_path / "output")
    assert not was_read(secret)


TOKENIZER_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "spm_file", "vocab", "merges")
TOKENIZER_PATHS += ("chat_template_file", "gguf_file", "special_tokens_map_file", "fast_tokenizer_files")


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
def test_paths_in_a_tokenizer_s_configuration_are_not_followed(tokenizer_class, base, secret, tmp_path):
    """With the tokenizer's own files there, and without."""
    secret = secret.rename(secret.with_name("tokenizer.1.0.0.json"))
    content = json.loads((base / "tokenizer_config.json").read_text())
    number = 0
    for _ in range(2):
        for field in TOKENIZER_PATHS:
            for path in (str(secret), f"../elsewhere/{secret.name}"):
                value = [path] if field == "fast_tokenizer_files" else path
                changed = {**content, field: value, "tokenizer_class": tokenizer_class}
                (base / "tokenizer_config.json").write_text(json.dumps(changed))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if field == "special_tokens_map_file":
                        number += 1
                        retrofit(base, tmp_path / str(number))
                    else:
                        with pytest.raises(ValueError, match=f"`{field}` of .*, a file outside of the folder"):
                            retrofit(base, tmp_path / "output")
                assert not was_read(secret), (field, path)
        (base / "tokenizer.json").unlink(missing_ok=True)


def test_a_file_of_the_current_folder_is_not_read_behind_one_of_the_checkpoint_s(base, tmp_path, monkeypatch):
    """transformers opens such a name where it stands, and that is not in the checkpoint."""
    (base / "tokenizer.json").unlink()
    for folder in (base, tmp_path):
        (folder / "decoy.json").write_text("{}")
    os.utime(tmp_path / "decoy.json", (0, time.time()))
    fields = {"tokenizer_class": "BertTokenizer", "vocab": "decoy.json"}
    (base / "tokenizer_config.json").write_text(json.dumps(fields))
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
    """Pickles, a tokenizer's code and a model's code, each of which leaves a file if it is run."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "tokenizer.model", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malice(ran)))
    torch.save({"weight": Malice(ran)}, folder / "adapter_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))
    code = f"open({str(ran)!r}, 'w')\nclass Own: ...\n"
    for name in ("modeling_own.py", "setup.py", "conftest.py", "sitecustomize.py", "torch.py", "json.py"):
        (folder / name).write_text(code)
    spoil_config(folder, auto_map={"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"})
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer_config, "auto_map": auto_map}))


def there_and_back(base, tmp_path):
    output = retrofit(base, tmp_path / "output")
    assert verify(base, output).passed
    return revert(output, tmp_path / "reverted")


def test_pickles_are_never_unpickled_and_code_is_never_run(base, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    add_malice(base, ran)
    pickle.loads((base / "pytorch_model.bin").read_bytes()).close()
    assert ran.exists(), "what is unpickled shows"
    ran.unlink()
    monkeypatch.chdir(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there_and_back(base, tmp_path)
    assert not ran.exists()
    (base / "model.safetensors").unlink()
    for function in (retrofit, revert, verify):
        with pytest.raises((FileNotFoundError, ValueError)):
            function(base, tmp_path / "another")
    assert not ran.exists() and not (tmp_path / "another").exists()


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


def test_nothing_is_written_but_the_output_and_nothing_is_sent(base, tmp_path):
    # Imports what is imported when it is first needed
    there_and_back(base, tmp_path)
    (tmp_path / "work").mkdir()

    def outside(function, source, output):
        seen = touched(function, source, tmp_path / "work" / output)
        assert any("output" in path for _, path in seen), "what is written is seen"
        return [entry for entry in seen if not Path(entry[1]).is_relative_to(tmp_path / "work")]

    assert in_child(outside, retrofit, base, "output") == (0, "[]")
    assert in_child(outside, revert, tmp_path / "work" / "output", "output_reverted") == (0, "[]")
    assert in_child(lambda: touched(verify, base, tmp_path / "work" / "output")) == (0, "[]")


def base_index(content):
    def spoil(folder):
        (folder / "attnres_base" / INDEX).write_text(content)

    return spoil


HOSTILE_ATTNRES = {
    "endless layers": (config(num_hidden_layers=10**12), "`num_hidden_layers`"),
    "the base's index: no weight_map": (base_index("{}"), "has no `weight_map`"),
    "the base's index: not JSON": (base_index("{"), "is not valid JSON"),
    "the base's index: names outside": (
        base_index(json.dumps({"weight_map": {"a": "../../outside"}})),
        "names the shard '../../outside'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ATTNRES)
def test_a_hostile_retrofit_is_not_reverted(case, base, tmp_path):
    output = retrofit(base, tmp_path / "output")
    spoil, message = HOSTILE_ATTNRES[case]
    spoil(output)
    with pytest.raises((ValueError, OSError), match=message):
        revert(output, tmp_path / "reverted")
    assert not (tmp_path / "reverted").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "output", "reverted"}


def test_a_link_out_of_a_retrofit_is_refused(base, secret, tmp_path):
    output = retrofit(base, tmp_path / "output")
    (output / "attnres_base" / "extra.json").symlink_to(secret)
    with pytest.raises(ValueError, match="is a link out of the folder"):
        revert(output, tmp_path / "reverted")
    assert not was_read(secret)


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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = retrofit(base, tmp_path / "output")
    assert card == "wide" or any("new card has no license" in str(warning.message) for warning in caught)
    assert (output / "attnres_base" / "README.md").read_bytes() == CARDS[card]
    assert "# base with Attention Residuals" in (output / "README.md").read_text()


def test_what_transformers_cannot_load_is_not_verified(base, tmp_path):
    (base / "generation_config.json").write_text("[]")
    output = retrofit(base, tmp_path / "output")
    with pytest.raises(ValueError, match="base cannot be loaded"):
        verify(base, output)


def test_names_of_ours_in_the_source_do_not_take_our_place(base, tmp_path):
    """A base that brings a file named as one that travels with the retrofit, and gets it back."""
    (base / "modeling_attnres.py").write_text("raise SystemExit('was run')")
    expected = retrofit(base, tmp_path / "output") / "modeling_attnres.py"
    assert "was run" not in expected.read_text()
    reverted = file_bytes(revert(tmp_path / "output", tmp_path / "reverted"))
    assert reverted == {name: content for name, content in file_bytes(base).items() if not name.endswith(".bin")}
    (base / "attnres_base").mkdir()
    (base / "attnres_base" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="Rename .*attnres_base"):
        retrofit(base, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_special_tokens_name_no_file_outside(tmp_path):
    """transformers adds them to the tokenizer's configuration."""
    base = save_base(tmp_path / "base")
    (tmp_path / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    outside = {"tokenizer_file": str(tmp_path / "tokenizer.json")}
    (base / "special_tokens_map.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match="`tokenizer_file` of .*special_tokens_map.json names"):
        retrofit(base, tmp_path / "attnres")
