"""Retrofit, verify and revert, as functions, on files."""

import json
import math
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    AUTO_CLASSES,
    FAMILIES,
    edit_json,
    file_bytes,
    new_shard,
    randomize_depth_attention,
    run_python,
    save_base,
    tensor_hashes,
    there_and_back,
    tiny_base,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import AttnResForCausalLM, AttnResModel
from modeling_attnres.conversion import retrofit, revert, verify
from modeling_attnres.conversion.verify import TEXT


INDEX = "model.safetensors.index.json"
LEFT_BEHIND = (
    "pytorch_model.bin",
    "checkpoint-5/config.json",
    "checkpoint-5/trainer_state.json",
    "runs/Nov24/events",
    "original/params.json",
    ".cache/download",
)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_every_file_there_and_back(sharded, link, tmp_path):
    """The base's tensors are unchanged, everything else comes along, and `revert` gives every byte back."""
    base_folder = save_base(tmp_path / "base", sharded=sharded)
    base = file_bytes(base_folder)
    for name in LEFT_BEHIND:
        (base_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (base_folder / name).write_bytes(b"left behind")
    before = file_bytes(base_folder)
    output = retrofit(base_folder, tmp_path / "attnres", link=link)
    assert file_bytes(base_folder) == before, "the source is left alone"

    base_hashes, hashes = tensor_hashes(base_folder), tensor_hashes(output)
    assert hashes.items() >= base_hashes.items()
    shards = {path.name: load_file(path) for path in output.glob("*.safetensors")}
    added = shards[new_shard(output).name]
    assert added.keys() == hashes.keys() - base_hashes.keys()
    for name, tensor in added.items():
        assert tensor.dtype == torch.float32 and (tensor == {"query": 0, "key_norm": 1}[name.rsplit(".")[-1]]).all()
    links = {(output / name).stat().st_nlink for name in shards if name != new_shard(output).name}
    assert links == ({2} if link else {1})
    index = json.loads((output / INDEX).read_text())
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())

    written = file_bytes(output)
    assert not written.keys() & set(LEFT_BEHIND)
    others = {name for name in base.keys() - {"config.json", "README.md", INDEX} if not name.endswith(".safetensors")}
    assert {name: written[name] for name in others} == {name: base[name] for name in others}
    card = written["README.md"].decode()
    assert "# base with Attention Residuals" in card and "base_model:" not in card, "a folder's name is not a Hub id"
    assert "license: apache-2.0" in card and "# A base" not in card

    base_config, config = (json.loads(files["config.json"]) for files in (base, written))
    assert config["architectures"] == ["AttnResForCausalLM"] and config["auto_map"].keys() == AUTO_CLASSES
    assert {name for name in base_config if config[name] != base_config[name]} == {"model_type", "architectures"}
    new_fields = {name for name in config.keys() - base_config.keys() if not name.startswith("attn_res_")}
    assert new_fields == {"base_model_type", "auto_map"}

    revert(output, tmp_path / "reverted")
    assert file_bytes(tmp_path / "reverted") == base


def test_revert_of_a_model_saved_by_transformers(tmp_path):
    """
    Its shards hold base and AttnRes tensors mixed, and the base's own files are gone. A trained norm makes no
    difference at zero queries; a trained query does.
    """
    base_folder = save_base(tmp_path / "base", sharded=True)
    model = AutoModelForCausalLM.from_pretrained(retrofit(base_folder, tmp_path / "attnres"))
    with torch.no_grad():
        model.model.layers[3].mlp_res.key_norm.add_(1)
    model.save_pretrained(tmp_path / "norm_trained", max_shard_size="20KB")
    with torch.no_grad():
        model.model.layers[3].mlp_res.query[7] = 1e-30
    model.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    with pytest.raises(ValueError, match=r"1 queries are trained.*model\.layers\.3\.mlp_res\.query.*--force"):
        revert(tmp_path / "trained", tmp_path / "reverted")
    assert not (tmp_path / "reverted").exists()

    base_config = AutoConfig.from_pretrained(base_folder)
    for saved, force in (("norm_trained", False), ("trained", True)):
        reverted = revert(tmp_path / saved, tmp_path / f"{saved}_reverted", force=force)
        assert tensor_hashes(reverted) == tensor_hashes(base_folder)
        config = AutoConfig.from_pretrained(reverted)
        assert type(config) is type(base_config) and config.to_diff_dict() == base_config.to_diff_dict()
        assert not list(reverted.glob("*.py"))


@pytest.mark.parametrize("size, same_names", [("12KB", False), ("18KB", True)], ids=["other names", "same names"])
def test_a_model_saved_over_its_linked_retrofit(size, same_names, tmp_path):
    """The source is not written through, no old shard stays, and the base's own index does not fit any more."""
    base_folder = save_base(tmp_path / "base", sharded=True)
    output = retrofit(base_folder, tmp_path / "attnres", link=True)
    before, names = file_bytes(base_folder), {shard.name for shard in output.glob("*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    weights = model.state_dict()
    model.save_pretrained(output, max_shard_size=size)
    assert file_bytes(base_folder) == before
    index = json.loads((output / INDEX).read_text())
    saved = {shard.name for shard in output.glob("*.safetensors")}
    assert saved == set(index["weight_map"].values()) and (saved == names) == same_names
    with pytest.raises(ValueError, match="queries are trained"):
        revert(output, tmp_path / "reverted")
    revert(output, tmp_path / "reverted", force=True)
    reverted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reverted.state_dict().items())


def test_verify_passes_a_retrofit_and_fails_another_model(base, tmp_path):
    output = retrofit(base, tmp_path / "attnres", attn_res_block_size=2)
    result = verify(base, output)
    assert result.passed and result.max_difference < 1e-5 * result.max_logit

    mean = verify(base, retrofit(base, tmp_path / "mean", attn_res_scale="mean"))
    assert not mean.passed, "the paper's form is not an exact retrofit"
    trained = randomize_depth_attention(AutoModelForCausalLM.from_pretrained(output), scale=0.01)
    trained.save_pretrained(tmp_path / "trained")
    result = verify(base, tmp_path / "trained")
    assert not result.passed and result.trained_queries == 10


def test_verify_finds_a_nan_anywhere(tmp_path):
    """In the embedding of one token: whichever sequence holds it, another comes after or before."""
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    output = retrofit(base, tmp_path / "attnres")
    shard = output / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    for token in range(5, 99, 20):
        embedding = tensors["model.embed_tokens.weight"].clone()
        embedding[token, 3] = math.nan
        save_file({**tensors, "model.embed_tokens.weight": embedding}, shard, metadata={"format": "pt"})
        result = verify(base, output)
        assert math.isnan(result.max_difference) and not result.passed, token
    save_file(tensors, shard, metadata={"format": "pt"})
    assert verify(base, output).passed
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for file in (base / "model.safetensors", shard):
        save_file(zeros, file, metadata={"format": "pt"})
    assert not verify(base, output).passed, "logits of zero show nothing"


def byte_pairs(kind):
    """A tokenizer as Llama 2 has it, with blanks as ▁, or as GPT-2 and Llama 3, on bytes; both with digits apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer, tokenizer.decoder = digits, decoders.Metaspace()
    else:
        on_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, on_bytes]), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


@pytest.mark.parametrize(
    "kind, declared",
    [
        ("metaspace", "LlamaTokenizerFast"),
        ("bytes", "LlamaTokenizerFast"),
        ("bytes", "Qwen2Tokenizer"),
        ("metaspace", "PreTrainedTokenizerFast"),
        ("bytes", None),
    ],
)
def test_the_tokenizer_is_the_base_s(kind, declared, tmp_path):
    """AutoTokenizer goes by `model_type`, and for some overrules the class in the file."""
    tokenizer, changed = byte_pairs(kind), set()
    for family in FAMILIES:
        folder, output = tmp_path / family / "base", tmp_path / family / "attnres"
        tiny_base(family).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        if declared is not None:
            content = {"bos_token": "<s>", "tokenizer_class": declared}
            (folder / "tokenizer_config.json").write_text(json.dumps(content))
        retrofit(folder, output)
        expected, actual = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(output)
        assert type(actual) is type(expected), family
        assert actual(TEXT).input_ids == expected(TEXT).input_ids, family
        if (output / "attnres_base" / "tokenizer_config.json").exists():
            changed.add(family)
        revert(output, tmp_path / family / "reverted")
        assert file_bytes(tmp_path / family / "reverted") == file_bytes(folder), family
    if declared == "LlamaTokenizerFast" and kind == "metaspace":
        assert {"phi3", "qwen2"} <= changed < set(FAMILIES), "some of them need it, not all"


def test_verify_compares_the_tokenizers(base, tmp_path):
    byte_pairs("bytes").save(str(base / "tokenizer.json"))
    output = retrofit(base, tmp_path / "attnres")
    assert verify(base, output).passed
    byte_pairs("metaspace").save(str(output / "tokenizer.json"))
    with pytest.raises(ValueError, match="The tokenizer of .*attnres makes"):
        verify(base, output)


def test_a_tokenizer_that_cannot_be_loaded_is_left_as_it_is(base, tmp_path):
    (base / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="tokenizer of .*base cannot be loaded"):
        output = retrofit(base, tmp_path / "attnres")
    assert (output / "tokenizer.json").read_text() == "{}"
    with pytest.warns(UserWarning, match="tokenizer of .*base cannot be loaded and was not compared"):
        assert verify(base, output).passed


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_files_are_as_private_as_those_of_the_base(mode, base, tmp_path):
    for file in ("model.safetensors", "tokenizer.json", "LICENSE"):
        (base / file).chmod(mode)
    output = retrofit(base, tmp_path / "attnres")
    for file in (min(output.glob("*.safetensors")), output / "tokenizer.json", output / "LICENSE"):
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_one_shard_with_an_index(base, tmp_path):
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    weight_map = dict.fromkeys(load_file(base / name), name)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    there_and_back(base, tmp_path)


def test_an_index_beside_a_single_file(tmp_path):
    """transformers leaves the index there when it saves one file over shards."""
    base = save_base(tmp_path / "base", sharded=True)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base)
    assert (base / INDEX).exists() and (base / "model.safetensors").exists()
    there_and_back(base, tmp_path)


def test_a_tokenizer_model_needs_sentencepiece(base, tmp_path, monkeypatch):
    """Whatever else is installed: the output must not depend on it."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for file in base.glob("token*"):
        file.unlink()
    (base / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ImportError, match="tokenizer.model needs a package: `pip install sentencepiece"):
        retrofit(base, tmp_path / "attnres")
    assert not (tmp_path / "attnres").exists()


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_names_without_the_prefix_of_the_decoder(architecture, tmp_path):
    """A decoder without a head, and a model with one, as Qwen3-Embedding."""
    base = tiny_base("qwen3", tie_word_embeddings=True)
    base.model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    edit_json(tmp_path / "base" / "config.json", architectures=[architecture])
    output = there_and_back(tmp_path / "base", tmp_path)
    model_class, base = (AttnResModel, base.model) if architecture == "Qwen3Model" else (AttnResForCausalLM, base)
    model, info = model_class.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    input_ids = torch.arange(9)[None]
    torch.testing.assert_close(model(input_ids)[0], base(input_ids)[0], rtol=0, atol=1e-5)


def test_a_base_with_model_code_of_its_own(base, tmp_path):
    """It is not taken over. transformers stumbles at a null in its place."""
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["own.Own", None]}
    edit_json(base / "config.json", auto_map=auto_map)
    with pytest.warns(UserWarning, match="model code of .*base .* is not used.*llama computes in transformers"):
        output = retrofit(base, tmp_path / "attnres")
    written = json.loads((output / "config.json").read_text())["auto_map"]
    assert written["AutoModelForCausalLM"] == "modeling_attnres.AttnResForCausalLM"
    assert written["AutoTokenizer"] == auto_map["AutoTokenizer"]
    edit_json(base / "config.json", auto_map=None)
    AutoModelForCausalLM.from_pretrained(retrofit(base, tmp_path / "null")).save_pretrained(tmp_path / "saved")


def test_verify_compares_the_structure(base, tmp_path):
    output = retrofit(base, tmp_path / "attnres")
    with pytest.raises(ValueError, match="type 'llama'.*type 'qwen3'"):
        verify(save_base(tmp_path / "qwen3", "qwen3"), output)
    tensors = {name: t for shard in output.glob("*.safetensors") for name, t in load_file(shard).items()}
    del tensors["model.layers.4.output_res.query"]
    for stray, message in [
        ({"model.stray": torch.ones(2)}, r"model.stray is F32 \[2\] in .*attnres, but missing in .*base"),
        ({}, "attnres has no tensor 'model.layers.4.output_res.query'"),
    ]:
        # It is read in place of the shards
        save_file({**tensors, **stray}, output / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            verify(base, output)


def test_a_quantized_base(tmp_path):
    """fp8 weights with scales beside them, which transformers turns back into bfloat16 where there is no GPU."""
    fields = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    folder = save_base(tmp_path / "base", **fields, attention_bias=False, mlp_bias=False)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "dequantize": True}
    edit_json(folder / "config.json", quantization_config=fp8)
    output = there_and_back(folder, tmp_path)
    assert tensor_hashes(output).items() >= tensor_hashes(folder).items()
    assert json.loads((output / "config.json").read_text())["quantization_config"] == fp8
    assert not verify(folder, retrofit(folder, tmp_path / "mean", attn_res_scale="mean")).passed


def test_the_output_has_to_be_new_or_empty(base, tmp_path, monkeypatch):
    for name in ("here", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "something").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    for output, message in [
        ("../full", "full exists already and is not an empty folder"),
        ("../base", "base exists already and is not an empty folder"),
        ("../base/LICENSE", "LICENSE exists already and is not an empty folder"),
        ("../base/attnres", "is inside the source"),
        (".", "is the current folder"),
    ]:
        with pytest.raises((FileExistsError, ValueError), match=message):
            retrofit(base, output)
    os.mkdir("empty")
    os.mkdir("target")
    os.symlink("target", "link")
    for output in ("empty", "link", "new", "deeper/down"):
        assert (retrofit(base, output) / "config.json").is_file()
    assert os.path.islink("link") and sorted(os.listdir()) == ["deeper", "empty", "link", "new", "target"]
    assert os.listdir("deeper") == ["down"] and sorted(os.listdir(tmp_path)) == ["base", "full", "here"]


@pytest.mark.parametrize("source", ["./no/such/folder", "/nothing/here", "a/b/c", "someone/base"])
def test_what_is_neither_a_folder_nor_a_hub_id(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{source} is not a local folder, not in the Hub cache, and cannot"):
        retrofit(source, tmp_path / "attnres")


@pytest.mark.parametrize(
    "option, error, message",
    [
        ({"revision": "main"}, ValueError, "`revision` is 'main', but .*base is a local folder"),
        ({"attn_res_block_size": 0}, ValueError, "^`attn_res_block_size` is 0, but a block has at least 1 layer.$"),
        ({"block_size": 2}, TypeError, "`block_size` is not an option of a retrofit.*attn_res_block_size"),
    ],
    ids=["revision of a folder", "out of range", "unknown"],
)
def test_a_wrong_option_is_named(option, error, message, base, tmp_path):
    with pytest.raises(error, match=message):
        retrofit(base, tmp_path / "attnres", **option)


RETROFIT = "import sys; from modeling_attnres.conversion import retrofit; retrofit(*sys.argv[1:])"
SURROUNDINGS = {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Pacific/Auckland"}
SURROUNDINGS |= {"HOME": "/nonexistent", "USER": "somebody", "OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "5"}


def test_the_same_bytes_in_other_surroundings(tmp_path):
    base = save_base(tmp_path / "base", sharded=True)
    edit_json(base / "config.json", name="naïve 深")
    expected = file_bytes(retrofit(base, tmp_path / "here"))
    (tmp_path / "a folder").mkdir()
    run_python(RETROFIT, "../base", "attnres", cwd=tmp_path / "a folder", env=SURROUNDINGS)
    assert file_bytes(tmp_path / "a folder" / "attnres") == expected


# ru_maxrss would not do: a child starts with its parent's
MEASURE = """
import re, sys
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) // 1024
from modeling_attnres.conversion import retrofit
from transformers import LlamaForCausalLM  # which `retrofit` imports too
idle = peak()
retrofit(sys.argv[1], sys.argv[2])
retrofitted = peak()
block = bytearray(600 * 2**20)
print(retrofitted - idle, peak() - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's peak memory is read from Linux's /proc")
def test_a_large_checkpoint_is_converted_in_little_memory(base, tmp_path):
    """The decoder stays tiny. The checkpoint is large by one tensor of 600 MB."""
    tensors = load_file(base / "model.safetensors")
    tensors["large"] = torch.ones(600 * 2**20, dtype=torch.int8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    del tensors
    retrofitted, with_600_more = map(int, run_python(MEASURE, base, tmp_path / "attnres").split())
    assert retrofitted < 60 and with_600_more > 600, f"{retrofitted} MB, {with_600_more} MB: the measure works"
    shutil.rmtree(tmp_path / "attnres")
    shutil.rmtree(base)
