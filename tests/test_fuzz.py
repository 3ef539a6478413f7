"""
Properties of the conversion for arbitrary bases and arbitrary content of their files. `pytest --thorough` tries more
examples. HypoFuzz runs for any time, guided by coverage (README.md).
"""

import json
import shutil
import struct
import tempfile
from contextlib import contextmanager
from functools import cache
from math import inf, nan
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, edit_json, file_bytes, save_base, tensor_hashes, tiny_base
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_hostile import INDEX, NORM, header_and_body, write_shard
from transformers import AutoModelForCausalLM

from modeling_attnres.conversion import retrofit, revert, verify
from modeling_attnres.conversion.verify import TOLERANCE


pytestmark = pytest.mark.filterwarnings("ignore")


@st.composite
def random_bases(draw):
    """Arguments of `tiny_base`, dtype, shard size, and whether the base has a head."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    # The third layer of RecurrentGemma is its first with attention, and without it the base fails
    least = 3 if family == "recurrent_gemma" else 2
    # Where the family's tiny configuration lists its layers, their number is fixed
    layers = 5 if "layer_types" in FAMILIES[family] else draw(st.integers(least, 7))
    fields = {
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.sampled_from([16, 48, 80])),
        "vocab_size": draw(st.integers(20, 200)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return family, fields, dtype, draw(st.sampled_from(["5KB", "20KB", "100KB", "1GB"])), draw(st.booleans())


OPTIONS = {
    "attn_res_type": st.sampled_from(["block", "full"]),
    "attn_res_block_size": st.none() | st.integers(1, 5),
    "link": st.booleans(),
}


@settings(max_examples=settings.default.max_examples // 3)
@given(random_bases(), st.fixed_dictionaries(OPTIONS))
def test_any_base(base, options):
    """A retrofit computes the same as its base, and revert gives the base back, also after transformers saved it."""
    family, fields, dtype, shard_size, has_head = base
    model = tiny_base(family, **fields).to(dtype)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (model if has_head else model.model).save_pretrained(work / "base", max_shard_size=shard_size)
        before = file_bytes(work / "base")
        output = retrofit(work / "base", work / "attnres", **options)
        # `verify` allows a third of it. float32 itself leaves more in a few random Qwen3-Next, the base's own error too
        assert verify(work / "base", output).relative_difference < 3 * TOLERANCE
        revert(output, work / "reverted")
        assert file_bytes(work / "reverted") == before == file_bytes(work / "base")
        assert {path.name for path in work.iterdir()} == {"base", "attnres", "reverted"}
        if has_head:
            for name in ("base", "attnres"):
                # Some tensors are loaded in float32 and saved so
                saved = AutoModelForCausalLM.from_pretrained(work / name)
                saved.save_pretrained(work / f"{name}_saved", max_shard_size="50KB")
            revert(work / "attnres_saved", work / "reverted_saved")
            assert tensor_hashes(work / "reverted_saved") == tensor_hashes(work / "base_saved")


@cache
def originals():
    """A base in one file, one in shards, and the retrofit of the latter."""
    folder = Path(tempfile.mkdtemp())
    for name in ("single", "sharded"):
        save_base(folder / name, sharded=name == "sharded", num_hidden_layers=2)
        assert convert(folder / name, folder) == "retrofit"
    retrofit(folder / "sharded", folder / "attnres")
    return folder


def convert(folder, work):
    """Retrofits and reverts it, or says why not. Either way nothing else is there and the source is as it was."""
    before, others = file_bytes(folder), set(work.iterdir())
    try:
        output = retrofit(folder, work / "output")
    except (ValueError, OSError) as error:
        assert str(error) and set(work.iterdir()) == others
        return type(error).__name__
    assert tensor_hashes(output).items() >= tensor_hashes(folder).items()
    index = json.loads((output / INDEX).read_text())["weight_map"]
    assert all(name in load_file(output / shard) for name, shard in index.items())
    revert(output, work / "reverted")
    assert file_bytes(work / "reverted") == before == file_bytes(folder)
    assert set(work.iterdir()) == {*others, output, work / "reverted"}
    shutil.rmtree(output)
    shutil.rmtree(work / "reverted")
    return "retrofit"


@contextmanager
def converted_copy(layout):
    """A copy to change. After the `with` statement, it is converted and the result is checked."""
    with tempfile.TemporaryDirectory() as work:
        folder = shutil.copytree(originals() / layout, Path(work) / "base")
        yield folder
        event(convert(folder, Path(work)))


def overwrite(file, overwritten):
    """As a damaged disk or a patient stranger does."""
    content = bytearray(file.read_bytes())
    for position, replacement in overwritten:
        position %= len(content) + 1
        content[position : position + len(replacement)] = replacement
    file.write_bytes(content)


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e308, nan, inf])
TEXTS = st.sampled_from(["", ".", "..", "../base", "/etc/passwd", "None", "llama", "a/b", "\0", "\ud800", "F32"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXTS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OVERWRITTEN = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=4)), max_size=3)
SHARD_NAMES = st.sampled_from(["model-00001-of-00002.safetensors", "../secret", "/etc/passwd", ".", "config.json"])
TENSOR_NAMES = st.sampled_from([NORM, "a", "../a", "/a", "__metadata__", "model.embed_tokens.weight"])
TENSOR_FIELDS = {
    "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "F8_E8M0", "C64", "XX"]) | VALUES,
    "shape": st.lists(NUMBERS | st.integers(0, 64), max_size=3) | VALUES,
    "data_offsets": st.lists(NUMBERS | st.integers(0, 4096), max_size=3) | VALUES,
}
TENSOR = st.fixed_dictionaries({}, optional=TENSOR_FIELDS)
TOKENIZER_FIELDS = st.sampled_from(
    ["tokenizer_class", "backend", "auto_map", "pad_token", "vocab_file", "tokenizer_file", "fast_tokenizer_files"]
)


def config_fields(name, *others):
    """Fields that config.json has, and others that are read from it."""
    return st.deferred(lambda: st.sampled_from(sorted({*json.loads((originals() / name).read_text()), *others})))


FIELDS = config_fields(
    "single/config.json", "auto_map", "quantization_config", "layer_types", "sliding_window", "attn_implementation"
)


@given(st.dictionaries(FIELDS, VALUES, max_size=3), st.sets(FIELDS, max_size=2), OVERWRITTEN)
def test_any_configuration(fields, removed, overwritten):
    with converted_copy("single") as folder:
        content = {**json.loads((folder / "config.json").read_text()), **fields}
        content = {name: value for name, value in content.items() if name not in removed}
        (folder / "config.json").write_text(json.dumps(content))
        overwrite(folder / "config.json", overwritten)


@given(
    st.dictionaries(TOKENIZER_FIELDS, VALUES, max_size=4),
    st.none() | st.dictionaries(TOKENIZER_FIELDS, VALUES, max_size=3) | VALUES,
    OVERWRITTEN,
    OVERWRITTEN,
)
def test_any_tokenizer(fields, special_tokens, overwritten, tokenizer_overwritten):
    with converted_copy("single") as folder:
        if special_tokens is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))
        edit_json(folder / "tokenizer_config.json", **fields)
        overwrite(folder / "tokenizer_config.json", overwritten)
        overwrite(folder / "tokenizer.json", tokenizer_overwritten)


@given(
    st.dictionaries(TENSOR_NAMES, SHARD_NAMES | VALUES, max_size=2),
    st.dictionaries(st.sampled_from(["weight_map", "metadata", "a"]), VALUES, max_size=1),
    OVERWRITTEN,
)
def test_any_index(entries, others, overwritten):
    with converted_copy("sharded") as folder:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, **{"weight_map": {**weight_map, **entries}, **others})
        overwrite(folder / INDEX, overwritten)


@given(
    TENSOR,
    st.dictionaries(TENSOR_NAMES, TENSOR | VALUES, max_size=2),
    st.none() | st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 5000),
    OVERWRITTEN,
)
def test_any_header(norm, others, length, overwritten):
    with converted_copy("single") as folder:
        file = folder / "model.safetensors"
        header, body = header_and_body(file)
        header[NORM].update(norm)
        header.update(others)
        write_shard(file, header, body)
        if length is not None:
            file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
        size = 8 + len(json.dumps(header))
        overwrite(file, [(position % size, replacement) for position, replacement in overwritten])


@given(
    st.dictionaries(config_fields("attnres/config.json"), VALUES, max_size=3),
    OVERWRITTEN,
    st.dictionaries(st.just("weight_map"), VALUES, max_size=1),
    st.lists(SHARD_NAMES | st.none(), max_size=2),
    OVERWRITTEN,
)
def test_any_retrofit_that_is_reverted(fields, overwritten, others, renamed, index_overwritten):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        folder = shutil.copytree(originals() / "attnres", work / "attnres")
        edit_json(folder / "config.json", **fields)
        overwrite(folder / "config.json", overwritten)
        index = folder / "attnres_base" / INDEX
        weight_map = json.loads(index.read_text())["weight_map"]
        # The names by which `revert` writes
        names = {shard: name or shard for shard, name in zip(sorted(set(weight_map.values())), renamed)}
        weight_map = {tensor: names.get(shard, shard) for tensor, shard in weight_map.items()}
        edit_json(index, **{"weight_map": weight_map, **others})
        overwrite(index, index_overwritten)
        before = file_bytes(folder)
        try:
            revert(folder, work / "reverted")
        except (ValueError, OSError) as error:
            assert str(error) and [path.name for path in work.iterdir()] == ["attnres"]
            event(type(error).__name__)
        else:
            assert tensor_hashes(work / "reverted").items() >= tensor_hashes(originals() / "sharded").items()
            event("reverted")
        assert file_bytes(folder) == before
