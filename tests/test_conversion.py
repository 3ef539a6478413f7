"""Retrofit, verify and revert, as functions, on files."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AUTO_CLASSES, FAMILIES, randomize_depth_attention, tiny_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeling_attnres import AttnResForCausalLM, AttnResModel
from modeling_attnres.conversion import retrofit, revert, verify
from modeling_attnres.conversion.verify import TEXT
from modeling_attnres.conversion.writing import write_index


CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n"


@pytest.fixture(params=["single", "sharded"])
def base_folder(request, tmp_path):
    return save_base(tmp_path / "base", sharded=request.param == "sharded")


def save_base(folder, family="llama", sharded=False, dtype=torch.bfloat16, **fields):
    """A base checkpoint with what checkpoints carry."""
    tiny_base(family, **fields).to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}").save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("the license")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def file_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensor_hashes(folder):
    """sha256 over the bytes of each tensor, read by the safetensors library."""
    hashes = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            hashes[name] = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashes


def new_shard(output):
    """The last one holds what a retrofit adds."""
    return max(output.glob("*.safetensors"))


def greedy(model):
    return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False)


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_base_tensors_are_unchanged_and_everything_else_comes_along(base_folder, link, tmp_path):
    before = file_bytes(base_folder)
    output = retrofit(base_folder, tmp_path / "attnres", link=link)
    assert file_bytes(base_folder) == before, "the source is left alone"

    base_hashes, hashes = tensor_hashes(base_folder), tensor_hashes(output)
    added = hashes.keys() - base_hashes.keys()
    assert {name: hashes[name] for name in base_hashes} == base_hashes
    assert {name.rsplit(".", 1)[1] for name in added} == {"query", "key_norm"}
    shards = {shard for shard in output.glob("*.safetensors") if added & load_file(shard).keys()}
    assert shards == {new_shard(output)}, "one shard of their own"
    for name, tensor in load_file(new_shard(output)).items():
        assert tensor.dtype == torch.float32
        assert (tensor == (1 if name.endswith("key_norm") else 0)).all()
    linked = [shard.stat().st_nlink for shard in output.glob("*.safetensors") if shard not in shards]
    assert set(linked) == ({2} if link else {1})

    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == hashes.keys()
    assert all(name in load_file(output / shard) for name, shard in index["weight_map"].items())
    tensors = [t for shard in output.glob("*.safetensors") for t in load_file(shard).values()]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors)

    for name in before.keys() - {"config.json", "README.md", "pytorch_model.bin", "model.safetensors.index.json"}:
        if not name.endswith(".safetensors"):
            assert (output / name).read_bytes() == before[name], name
    assert not (output / "pytorch_model.bin").exists()
    card = (output / "README.md").read_text()
    assert "# base with Attention Residuals" in card and "base_model:" not in card, "a folder's name is not a Hub id"
    assert "license: apache-2.0" in card and "# A base" not in card

    base_config, config = (json.loads((folder / "config.json").read_text()) for folder in (base_folder, output))
    assert config["architectures"] == ["AttnResForCausalLM"]
    assert config["auto_map"].keys() == AUTO_CLASSES
    changed = {"model_type", "architectures"}
    assert {name for name in base_config if config[name] != base_config[name]} == changed
    assert {name for name in config.keys() - base_config.keys() if not name.startswith("attn_res_")} == {
        "base_model_type",
        "auto_map",
    }


@pytest.mark.parametrize("attn_res_type", ["block", "full"])
def test_from_a_base_to_a_trained_model(base_folder, attn_res_type, tmp_path):
    """The main job: retrofit, load through the Auto classes, generate, train, save, load."""
    output = retrofit(base_folder, tmp_path / "attnres", attn_res_type=attn_res_type)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert isinstance(model, AttnResForCausalLM) and model.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.attn_res_type == attn_res_type and model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(output).chat_template["tools"] == "{{ tools }}"
    assert torch.equal(greedy(model.float()), greedy(base.float()))

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    input_ids = torch.arange(1, 60).view(1, -1)
    losses = []
    for _ in range(5):
        losses.append(model(input_ids, labels=input_ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert all((layer.mlp_res.query != 0).any() for layer in loaded.model.layers)
    assert torch.equal(greedy(loaded), greedy(model))


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_revert_gives_the_base_back_to_the_byte(base_folder, link, tmp_path):
    (base_folder / "pytorch_model.bin").unlink()
    retrofit(base_folder, tmp_path / "attnres", link=link)
    revert(tmp_path / "attnres", tmp_path / "reverted")
    assert file_bytes(tmp_path / "reverted") == file_bytes(base_folder)


def test_revert_of_a_model_saved_by_transformers(base_folder, tmp_path):
    """Its shards hold base and AttnRes tensors mixed, and the base's own files are gone."""
    model = AutoModelForCausalLM.from_pretrained(retrofit(base_folder, tmp_path / "attnres"))
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    revert(tmp_path / "saved", tmp_path / "reverted")
    assert tensor_hashes(tmp_path / "reverted") == tensor_hashes(base_folder)
    base, reverted = (AutoModelForCausalLM.from_pretrained(f) for f in (base_folder, tmp_path / "reverted"))
    assert type(reverted) is type(base) and reverted.config.to_diff_dict() == base.config.to_diff_dict()
    assert torch.equal(greedy(reverted), greedy(base))
    assert not list((tmp_path / "reverted").glob("*.py"))


@pytest.mark.parametrize("same_names", [False, True])
def test_a_model_saved_over_its_linked_retrofit(base_folder, same_names, tmp_path):
    """The source is not written through, no old shard stays, and the base's own index does not fit any more."""
    output = retrofit(base_folder, tmp_path / "attnres", link=True)
    before, names = file_bytes(base_folder), {shard.name for shard in output.glob("*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    weights = model.state_dict()

    for size in range(12_000, 150_000, 250):
        model.save_pretrained(tmp_path / str(size), max_shard_size=size)
        if (len(list((tmp_path / str(size)).glob("*.safetensors"))) == len(names)) == same_names:
            break
    model.save_pretrained(output, max_shard_size=size)
    assert file_bytes(base_folder) == before
    index = json.loads((output / "model.safetensors.index.json").read_text())
    saved = {shard.name for shard in output.glob("*.safetensors")}
    assert saved == set(index["weight_map"].values()) and (saved == names) == same_names
    with pytest.raises(ValueError, match="queries are trained"):
        revert(output, tmp_path / "reverted")
    revert(output, tmp_path / "reverted", force=True)
    reverted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reverted.state_dict().items())


def test_revert_refuses_trained_queries_unless_forced(base_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(retrofit(base_folder, tmp_path / "attnres"))
    with torch.no_grad():
        model.model.layers[3].mlp_res.key_norm.add_(1)
    model.save_pretrained(tmp_path / "norm_trained")
    revert(tmp_path / "norm_trained", tmp_path / "norm_reverted")

    with torch.no_grad():
        model.model.layers[3].mlp_res.query[7] = 1e-30
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"1 queries are trained.*model\.layers\.3\.mlp_res\.query.*--force"):
        revert(tmp_path / "trained", tmp_path / "reverted")
    assert not (tmp_path / "reverted").exists()
    revert(tmp_path / "trained", tmp_path / "reverted", force=True)
    assert tensor_hashes(tmp_path / "reverted") == tensor_hashes(base_folder)


def test_verify_passes_a_retrofit_and_fails_another_model(tmp_path):
    base = save_base(tmp_path / "base")
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
    embedding = tensors["model.embed_tokens.weight"]
    for token in range(5, 99, 20):
        row = embedding[token].clone()
        embedding[token, 3] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
        assert not verify(base, output).passed, token
        embedding[token] = row
    save_file(tensors, shard, metadata={"format": "pt"})
    assert verify(base, output).passed
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for folder, name in ((base, "model.safetensors"), (output, shard.name)):
        save_file(zeros, folder / name, metadata={"format": "pt"})
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


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
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


def test_verify_compares_the_tokenizers(tmp_path):
    base = save_base(tmp_path / "base")
    byte_pairs("bytes").save(str(base / "tokenizer.json"))
    output = retrofit(base, tmp_path / "attnres")
    assert verify(base, output).passed
    byte_pairs("metaspace").save(str(output / "tokenizer.json"))
    with pytest.raises(ValueError, match="The tokenizer of .*attnres makes"):
        verify(base, output)


def test_a_tokenizer_that_cannot_be_loaded_is_left_as_it_is(tmp_path):
    base = save_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="tokenizer of .*base cannot be loaded"):
        output = retrofit(base, tmp_path / "attnres")
    assert (output / "tokenizer.json").read_text() == "{}"
    with pytest.warns(UserWarning, match="tokenizer of .*base cannot be loaded and was not compared"):
        assert verify(base, output).passed


def test_what_a_training_run_leaves_stays_behind(base_folder, tmp_path):
    for file in ("checkpoint-5/config.json", "checkpoint-5/trainer_state.json", "runs/Nov24/events"):
        (base_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (base_folder / file).write_text("{}")
    output = retrofit(base_folder, tmp_path / "attnres")
    assert not (output / "checkpoint-5").exists() and not (output / "runs").exists()


def test_a_private_base_stays_private(base_folder, tmp_path):
    """And all files of another one can be read by others."""
    umask = os.umask(0o022)
    for mode in (0o600, 0o644):
        for file in base_folder.rglob("*.*"):
            file.chmod(mode | 0o100 if file.is_dir() else mode)
        output = retrofit(base_folder, tmp_path / oct(mode))
        assert {stat.S_IMODE(shard.stat().st_mode) for shard in output.glob("*.safetensors")} <= {mode, 0o644}
        assert {stat.S_IMODE((output / file).stat().st_mode) for file in ("tokenizer.json", "LICENSE")} <= {mode, 0o644}
        assert stat.S_IMODE(min(output.glob("*.safetensors")).stat().st_mode) == mode
    os.umask(umask)


@pytest.mark.parametrize("layout", ["one shard with an index", "an index beside a single file"])
def test_odd_layouts(layout, tmp_path):
    base = save_base(tmp_path / "base", sharded=layout != "one shard with an index")
    (base / "pytorch_model.bin").unlink()
    if layout == "one shard with an index":
        name = "model-00001-of-00001.safetensors"
        (base / "model.safetensors").rename(base / name)
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(base / name), name)}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        # transformers leaves the index there when it saves one file over shards
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base)
        assert (base / "model.safetensors.index.json").exists() and (base / "model.safetensors").exists()
    output = retrofit(base, tmp_path / "attnres")
    assert verify(base, output).passed
    assert file_bytes(revert(output, tmp_path / "reverted")) == file_bytes(base)


def test_a_tokenizer_model_needs_sentencepiece(base_folder, tmp_path, monkeypatch):
    """Whatever else is installed: the output must not depend on it."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for file in base_folder.glob("token*"):
        file.unlink()
    (base_folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ImportError, match="tokenizer.model needs a package: `pip install sentencepiece"):
        retrofit(base_folder, tmp_path / "attnres")
    assert not (tmp_path / "attnres").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_model_with_a_head_may_lack_the_prefix_of_its_decoder_s_names(sharded, tmp_path):
    """As Qwen3-Embedding does."""
    base = tiny_base("qwen3", tie_word_embeddings=True)
    base.model.save_pretrained(tmp_path / "base", max_shard_size="20KB" if sharded else "1GB")
    spoil_config(tmp_path / "base", architectures=["Qwen3ForCausalLM"])
    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    assert verify(tmp_path / "base", output).passed
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(greedy(model), greedy(base))
    revert(output, tmp_path / "reverted")
    assert file_bytes(tmp_path / "reverted") == file_bytes(tmp_path / "base")


def test_a_base_with_model_code_of_its_own(tmp_path):
    """It is neither run nor taken over; a null in its place, at which transformers stumbles, does not matter."""
    base = save_base(tmp_path / "base")
    spoil_config(base, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["own.Own", None]})
    (base / "modeling_own.py").write_text("raise SystemExit('was run')")
    with pytest.warns(UserWarning, match="model code of its own.*llama computes in transformers"):
        output = retrofit(base, tmp_path / "attnres")
    auto_map = json.loads((output / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_attnres.AttnResForCausalLM"
    assert auto_map["AutoTokenizer"] == ["own.Own", None]
    spoil_config(base, auto_map=None)
    (base / "modeling_own.py").unlink()
    AutoModelForCausalLM.from_pretrained(retrofit(base, tmp_path / "null")).save_pretrained(tmp_path / "saved")


def test_verify_compares_the_structure(tmp_path):
    base = save_base(tmp_path / "base")
    output = retrofit(base, tmp_path / "attnres")
    tensors = load_file(new_shard(output))
    del tensors["model.layers.4.output_res.query"]
    for stray, message in [
        ({"model.stray": torch.ones(2)}, r"model.stray is F32 \[2\] in .*attnres, but missing in .*base"),
        ({}, "attnres has no tensor 'model.layers.4.output_res.query'"),
    ]:
        save_file({**tensors, **stray}, new_shard(output), metadata={"format": "pt"})
        write_index(output)
        with pytest.raises(ValueError, match=message):
            verify(base, output)
    with pytest.raises(ValueError, match="is not an AttnRes checkpoint"):
        verify(base, base)
    with pytest.raises(ValueError, match="type 'llama'.*type 'qwen3'"):
        verify(save_base(tmp_path / "qwen3", "qwen3"), output)


def test_a_decoder_without_a_head(tmp_path):
    base = tiny_base("llama").model
    base.save_pretrained(tmp_path / "base")
    output = retrofit(tmp_path / "base", tmp_path / "attnres")
    model, info = AttnResModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    input_ids = torch.arange(9)[None]
    expected = base(input_ids).last_hidden_state
    torch.testing.assert_close(model(input_ids).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert verify(tmp_path / "base", output).passed
    revert(output, tmp_path / "reverted")
    assert file_bytes(tmp_path / "reverted") == file_bytes(tmp_path / "base")


def test_a_quantized_base(tmp_path):
    """fp8 weights with scales beside them, which transformers turns back into bfloat16 where there is no GPU."""
    fields = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    folder = save_base(tmp_path / "base", **fields, attention_bias=False, mlp_bias=False)
    (folder / "pytorch_model.bin").unlink()
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "dequantize": True}
    spoil_config(folder, quantization_config=fp8)
    output = retrofit(folder, tmp_path / "attnres")
    hashes = tensor_hashes(output)
    assert {name: hashes[name] for name in tensors} == tensor_hashes(folder)
    assert json.loads((output / "config.json").read_text())["quantization_config"] == fp8
    assert verify(folder, output).passed
    assert not verify(folder, retrofit(folder, tmp_path / "mean", attn_res_scale="mean")).passed
    assert file_bytes(revert(output, tmp_path / "reverted")) == file_bytes(folder)


def spoil_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def truncate(folder):
    shard = sorted(folder.glob("model*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 10)


def cut_header(folder):
    os.truncate(sorted(folder.glob("model*.safetensors"))[0], 100)


def empty_config(folder):
    (folder / "config.json").write_text("{}")


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def only_pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()


def only_gguf(folder):
    only_pickles(folder)
    (folder / "config.json").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def other_weights(folder):
    save_file({f"weight.{i}": torch.ones(2) for i in range(9)}, folder / "model.safetensors")


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "empty config": (empty_config, ValueError, "has no `model_type`"),
    "broken config": (broken_config, ValueError, "config.json is not valid JSON"),
    "no safetensors": (only_pickles, FileNotFoundError, "save_pretrained"),
    "truncated shard": (truncate, ValueError, "truncated or not a safetensors file"),
    "cut header": (cut_header, ValueError, "truncated or not a safetensors file"),
    "already AttnRes": (
        lambda f: spoil_config(f, model_type="attnres"),
        ValueError,
        "is an AttnRes checkpoint already",
    ),
    "unsupported": (lambda f: spoil_config(f, model_type="bloom"), ValueError, "not the residual stream"),
    "other head": (
        lambda f: spoil_config(f, architectures=["LlamaForQuestionAnswering"]),
        ValueError,
        "only a causal language model",
    ),
    "other weights": (other_weights, ValueError, "has no tensor 'lm_head.weight'"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ValueError, "holds a PEFT adapter"),
    "only a GGUF": (only_gguf, ValueError, 'holds its weights in a GGUF file.*gguf_file="model.gguf"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_source_is_refused_and_nothing_written(base_folder, damage, tmp_path):
    spoil, error, message = DAMAGE[damage]
    spoil(base_folder)
    before = file_bytes(base_folder)
    with pytest.raises(error, match=message):
        retrofit(base_folder, tmp_path / "attnres")
    assert file_bytes(base_folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_index_has_to_fit_its_shards(tmp_path):
    folder = save_base(tmp_path / "base", sharded=True)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = {**index["weight_map"], "model.norm.weight": shards[0]}
    index_file.write_text(json.dumps({**index, "weight_map": moved}))
    with pytest.raises(ValueError, match=f"'model.norm.weight' in {shards[0]}"):
        retrofit(folder, tmp_path / "attnres")
    index_file.write_text(json.dumps({**index, "weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="names the shard '../outside.safetensors'"):
        retrofit(folder, tmp_path / "attnres")
    index_file.write_text(json.dumps(index))
    (folder / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"The shard .*{shards[1]} is missing"):
        retrofit(folder, tmp_path / "attnres")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_output_has_to_be_new_or_empty(tmp_path, monkeypatch):
    folder = save_base(tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file", "base"):
        with pytest.raises(FileExistsError, match=f"{name} exists already and is not an empty folder"):
            retrofit(folder, tmp_path / name)
    with pytest.raises(ValueError, match="lies in the source"):
        retrofit(folder, folder / "attnres")
    (tmp_path / "empty").mkdir()
    assert retrofit(folder, tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    retrofit(folder, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current folder"):
        retrofit(folder, ".")
    retrofit(folder, "relative")
    assert os.listdir() == ["relative"]
    assert retrofit(folder, tmp_path / "deeper" / "down").is_dir()
    here = {"base", "deeper", "empty", "file", "full", "here", "link", "target"}
    assert {path.name for path in tmp_path.iterdir()} == here


def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path):
    for source in ("./no/such/folder", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is not a local folder, not in the Hub cache, and cannot"):
            retrofit(source, tmp_path / "attnres")
    with pytest.raises(
        FileNotFoundError, match="^someone/base is not a local folder, not in the Hub cache, and cannot"
    ):
        retrofit("someone/base", tmp_path / "attnres")
    with pytest.raises(ValueError, match="`revision` is 'main'"):
        retrofit(save_base(tmp_path / "base"), tmp_path / "attnres", revision="main")


# ru_maxrss would not do: a child starts with its parent's
MEASURE = """
import re, sys
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) // 1024
idle = peak()
from modeling_attnres.conversion import retrofit
retrofit(sys.argv[1], sys.argv[2])
retrofitted = peak()
block = bytearray(600 * 2**20)
print(retrofitted - idle, peak() - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's peak memory is read from Linux's /proc")
def test_two_gigabytes_are_converted_in_little_memory(tmp_path):
    folder = tmp_path / "base"
    tiny_base("llama", num_hidden_layers=4).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # The decoder stays tiny; what makes the checkpoint large is a random tensor in each of four shards
    weight_map = dict.fromkeys(tensors, "model-00001-of-00004.safetensors")
    for number in range(1, 5):
        noise = torch.randint(-128, 128, (512 * 2**20,), dtype=torch.int8)
        shard = {f"noise.{number}": noise, **(tensors if number == 1 else {})}
        name = f"model-0000{number}-of-00004.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map[f"noise.{number}"] = name
        del noise, shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    process = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "attnres"], capture_output=True, text=True, check=True
    )
    retrofitted, with_600_more = map(int, process.stdout.split())
    assert retrofitted < 500 and with_600_more > 600, f"{retrofitted} MB, {with_600_more} MB: the measure works"
    for number in range(1, 5):
        digests = []
        for path, count in [(folder, 4), (tmp_path / "attnres", 5)]:
            shard = path / f"model-0000{number}-of-0000{count}.safetensors"
            digests.append(hashlib.sha256(shard.read_bytes()).hexdigest())
        assert digests[0] == digests[1]
    with safe_open(new_shard(tmp_path / "attnres"), "pt") as file:
        assert len(file.keys()) == 2 * 8
    shutil.rmtree(tmp_path / "attnres")
    shutil.rmtree(folder)


def test_an_option_out_of_range_blames_the_option(tmp_path):
    base = save_base(tmp_path / "base")
    with pytest.raises(ValueError) as error:
        retrofit(base, tmp_path / "attnres", attn_res_block_size=0)
    assert "`attn_res_block_size` is 0" in str(error.value) and "config.json" not in str(error.value)
    with pytest.raises(TypeError, match="`block_size` is not an option of a retrofit.*attn_res_block_size"):
        retrofit(base, tmp_path / "attnres", block_size=2)
