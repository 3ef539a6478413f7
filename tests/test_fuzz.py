"""
Whatever stands in config.json, an index or a header: a whole retrofit or an error that says so, and nothing else.

Some seconds here; `python tests/soak.py fuzz` and `python tests/fuzz_coverage.py` go on for longer.
"""

import json
import shutil
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_conversion import file_bytes, save_base, tensor_hashes
from test_hostile import INDEX, NORM, header_and_body, write_shard

from modeling_attnres.conversion import retrofit, revert


EXAMPLES = 60


@cache
def bases():
    """A base in one file, and one in shards."""
    folder = Path(tempfile.mkdtemp())
    for name in ("single", "sharded"):
        save_base(folder / name, sharded=name == "sharded", num_hidden_layers=2)
        (folder / name / "pytorch_model.bin").unlink()
    return folder


NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf")]
)
TEXTS = st.sampled_from(["", ".", "..", "../base", "/etc/passwd", "None", "llama", "a/b", "\0", "\ud800", "F32"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXTS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
BYTES = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=4)), max_size=3)


@cache
def a_retrofit():
    return retrofit(bases() / "sharded", bases() / "attnres")


@cache
def config_fields():
    """Names of fields that a Llama's configuration has, and of those that are read beside them."""
    config = json.loads((bases() / "single" / "config.json").read_text())
    return sorted({*config, "auto_map", "quantization_config", "layer_types", "sliding_window", "attn_implementation"})


@cache
def retrofit_fields():
    return sorted(json.loads((a_retrofit() / "config.json").read_text()))


def base_shards():
    return sorted(path.name for path in (bases() / "sharded").glob("*.safetensors"))


def outcome(folder):
    """Retrofits and reverts it, or says why not. Either way nothing else is there and the source is as it was."""
    before, here = file_bytes(folder), folder.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = retrofit(folder, here / "output")
        except (ValueError, OSError) as error:
            assert str(error)
            assert [path.name for path in here.iterdir()] == [folder.name]
            return type(error).__name__
        assert file_bytes(folder) == before
        hashes = tensor_hashes(folder)
        assert {name: tensor_hashes(output)[name] for name in hashes} == hashes
        index = json.loads((output / INDEX).read_text())["weight_map"]
        assert all(name in load_file(output / shard) for name, shard in index.items())
        revert(output, here / "reverted")
        assert file_bytes(here / "reverted") == before
        assert {path.name for path in here.iterdir()} == {folder.name, "output", "reverted"}
    return "retrofit"


def with_changed(layout, change):
    with tempfile.TemporaryDirectory() as work:
        folder = shutil.copytree(bases() / layout, Path(work) / "base")
        change(folder)
        return outcome(folder)


def overwrite(path, changes):
    """Bytes in place of others, as a damaged disk or a patient stranger leaves them."""
    content = bytearray(path.read_bytes())
    for position, replacement in changes:
        position %= len(content) + 1
        content[position : position + len(replacement)] = replacement
    path.write_bytes(content)


def any_config(fields, removed, changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(fields)
        for name in removed:
            config.pop(name, None)
        (folder / "config.json").write_text(json.dumps(config))
        overwrite(folder / "config.json", changes)

    return with_changed("single", change)


def any_tokenizer(fields, special_tokens, changes, tokenizer_changes):
    def change(folder):
        if special_tokens is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **fields}))
        overwrite(folder / "tokenizer_config.json", changes)
        overwrite(folder / "tokenizer.json", tokenizer_changes)

    return with_changed("single", change)


def any_index(entries, others, changes):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update(entries)
        index.update(others)
        (folder / INDEX).write_text(json.dumps(index))
        overwrite(folder / INDEX, changes)

    return with_changed("sharded", change)


def any_header(entry, entries, length, changes):
    def change(folder):
        file = folder / "model.safetensors"
        header, body = header_and_body(file)
        header[NORM].update(entry)
        header.update(entries)
        write_shard(file, header, body)
        if length is not None:
            file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
        size = 8 + len(json.dumps(header))
        overwrite(file, [(position % size, replacement) for position, replacement in changes])

    return with_changed("single", change)


def any_retrofit(fields, changes, base_index, renamed, index_changes):
    """What `revert` is given."""
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = shutil.copytree(a_retrofit(), Path(work) / "attnres")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        overwrite(folder / "config.json", changes)
        index = json.loads((folder / "attnres_base" / INDEX).read_text())
        # The names by which `revert` writes
        index["weight_map"] = {name: renamed.get(shard, shard) for name, shard in index["weight_map"].items()}
        (folder / "attnres_base" / INDEX).write_text(json.dumps({**index, **base_index}))
        overwrite(folder / "attnres_base" / INDEX, index_changes)
        before = file_bytes(folder)
        try:
            revert(folder, Path(work) / "reverted")
        except (ValueError, OSError) as error:
            assert str(error) and [path.name for path in Path(work).iterdir()] == ["attnres"]
            return type(error).__name__
        finally:
            assert file_bytes(folder) == before
        expected = tensor_hashes(bases() / "sharded")
        actual = tensor_hashes(Path(work) / "reverted")
        assert {name: actual[name] for name in expected} == expected
        return "revert"


SHARD_NAMES = st.sampled_from(["model-00001-of-00002.safetensors", "../secret", "/etc/passwd", ".", "config.json"])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "F8_E8M0", "C64", "XX"]) | VALUES,
        "shape": st.lists(NUMBERS | st.integers(0, 64), max_size=3) | VALUES,
        "data_offsets": st.lists(NUMBERS | st.integers(0, 4096), max_size=3) | VALUES,
    },
)
TENSOR_NAMES = st.sampled_from([NORM, "a", "../a", "/a", "__metadata__", "model.embed_tokens.weight"])
TOKENIZER_FIELDS = st.sampled_from(
    ["tokenizer_class", "backend", "auto_map", "pad_token", "vocab_file", "tokenizer_file", "fast_tokenizer_files"]
)
TARGETS = {
    any_config: {
        "fields": st.dictionaries(st.deferred(lambda: st.sampled_from(config_fields())), VALUES, max_size=3),
        "removed": st.lists(st.deferred(lambda: st.sampled_from(config_fields())), max_size=2),
        "changes": BYTES,
    },
    any_tokenizer: {
        "fields": st.dictionaries(TOKENIZER_FIELDS, VALUES, max_size=4),
        "special_tokens": st.none() | st.dictionaries(TOKENIZER_FIELDS, VALUES, max_size=3) | VALUES,
        "changes": BYTES,
        "tokenizer_changes": BYTES,
    },
    any_index: {
        "entries": st.dictionaries(TENSOR_NAMES, SHARD_NAMES | VALUES, max_size=2),
        "others": st.dictionaries(st.sampled_from(["weight_map", "metadata", "a"]), VALUES, max_size=1),
        "changes": BYTES,
    },
    any_retrofit: {
        "fields": st.dictionaries(st.deferred(lambda: st.sampled_from(retrofit_fields())), VALUES, max_size=3),
        "changes": BYTES,
        "base_index": st.dictionaries(st.just("weight_map"), VALUES, max_size=1),
        "renamed": st.dictionaries(st.deferred(lambda: st.sampled_from(base_shards())), SHARD_NAMES, max_size=2),
        "index_changes": BYTES,
    },
    any_header: {
        "entry": ENTRY,
        "entries": st.dictionaries(TENSOR_NAMES, ENTRY | VALUES, max_size=2),
        "length": st.none() | st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 5000),
        "changes": BYTES,
    },
}


def fuzz(target, examples):
    """Runs one over so many examples, the same ones each time. Returns how often it came to what."""
    outcomes = {}

    def run(**arguments):
        result = target(**arguments)
        outcomes[result] = outcomes.get(result, 0) + 1

    run.__name__ = target.__name__
    settings(max_examples=examples, deadline=None, database=None, derandomize=True)(given(**TARGETS[target])(run))()
    return outcomes


def test_any_configuration():
    assert {"retrofit", "ValueError"} <= fuzz(any_config, EXAMPLES).keys()


def test_any_tokenizer():
    assert "retrofit" in fuzz(any_tokenizer, EXAMPLES // 2)


def test_any_index():
    assert {"retrofit", "ValueError"} <= fuzz(any_index, EXAMPLES).keys()


def test_any_header():
    assert {"retrofit", "ValueError"} <= fuzz(any_header, EXAMPLES).keys()


def test_any_retrofit():
    assert {"revert", "ValueError"} <= fuzz(any_retrofit, EXAMPLES).keys()
