# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
Reading a checkpoint that may be untrusted: its files are parsed, never loaded. Nothing outside of the folder
is read, nothing is unpickled and no code is run. A `ValueError` or `FileNotFoundError` names the file and the problem.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

import modeling_attnres
from modeling_attnres import AttnResConfig


CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Older tokenizers kept their special tokens here, and transformers adds them to the tokenizer's configuration
SPECIAL_TOKENS = "special_tokens_map.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
# A retrofit keeps the base's own files that it replaces here, so that `revert` gives them back to the byte
KEPT = "attnres_base"
NEW_TENSOR = re.compile(r"(^|\.)layers\.\d+\.\w+_res\.(query|key_norm)$")

# Weights in other formats and the state of a training run are not part of the checkpoint
_LEFT_BEHIND = [
    *("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.bin.index.json"),
    *("original/*", "consolidated*.safetensors", "checkpoint-*/*", "*/checkpoint-*/*", "runs/*", "*/runs/*"),
]
_MAX_JSON_DEPTH = 100


@dataclass
class Checkpoint:
    """A safetensors checkpoint on disk. `name` is the path or Hub id that the user gave."""

    name: str
    folder: Path
    config: dict[str, Any]
    # The header of each shard: `dtype`, `shape` and `data_offsets` of each tensor, by name
    shards: dict[str, dict[str, dict]]
    # See `file_stamps`
    stamps: dict[Path, tuple[int, ...]]

    @cached_property
    def tensors(self) -> dict[str, dict]:
        """The headers of all shards in one."""
        return {name: info for header in self.shards.values() for name, info in header.items()}

    @cached_property
    def new_tensors(self) -> set[str]:
        """The names of the queries and key norms."""
        return set(filter(NEW_TENSOR.search, self.tensors))

    @property
    def architecture(self) -> str:
        """The model class that config.json names."""
        return (self.config.get("architectures") or ["AttnResForCausalLM"])[0]

    @cached_property
    def attnres_config(self) -> AttnResConfig:
        """config.json as an [`AttnResConfig`], also for a base."""
        try:
            return AttnResConfig.from_dict(self.config)
        except Exception as error:  # noqa: BLE001  an untrusted file: transformers may fail on it anywhere
            # A validator wraps its error
            reason = error.__cause__ or error
            raise ValueError(f"{self.folder / CONFIG} is not a valid configuration: {reason}") from error

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        path = self.folder / TOKENIZER_CONFIG
        return read_json(path) if path.is_file() else {}


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Any error in the `with` statement becomes a `ValueError`: libraries may fail on untrusted files in any way."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message}: {error}") from error


def other_files(folder: Path) -> list[Path]:
    """The files beside configuration, index and weights (tokenizer, license, …), relative to the folder."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    ignored = [*_LEFT_BEHIND, "*.safetensors", ".*", "*/.*", CONFIG, INDEX, ADAPTER_CONFIG]
    return list(filter_repo_objects(files, ignore_patterns=ignored, key=str))


def find_checkpoint(source: str | Path, revision: str | None = None, only: str | None = None) -> Path:
    """A local folder as it is, or the files (or `only` one) of a Hub id in the Hub cache."""
    source = str(source)
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but {source} is a local folder, which has none: remove it.")
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=only, ignore_patterns=_LEFT_BEHIND))
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source} has no revision {revision!r} on the Hub.") from error
    except (ConnectionError, FileNotFoundError, ValueError, errors.HTTPError) as error:
        raise FileNotFoundError(
            f"{source} is not a local folder, not in the Hub cache, and cannot be read from the Hub. If it is gated, "
            "accept its terms on its page; if it is gated or private, run `hf auth login`."
        ) from error


def read_attnres(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Reads an AttnRes checkpoint, and refuses others."""
    checkpoint = read_checkpoint(source, revision)
    if (model_type := checkpoint.config["model_type"]) != "attnres":
        raise ValueError(f"{checkpoint.folder} is not an AttnRes checkpoint: its `model_type` is {model_type!r}.")
    if not hasattr(modeling_attnres, checkpoint.architecture):
        raise ValueError(f"`architectures` of {checkpoint.folder} names no AttnRes class: {checkpoint.architecture!r}.")
    return checkpoint


def read_adapter(source: str | Path, base: str | Path | None = None) -> tuple[Path, Checkpoint]:
    """The folder of a PEFT adapter, and the AttnRes checkpoint that it belongs to: `base`, or else the recorded one."""
    folder = find_checkpoint(source)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG}.")
    if not (folder / ADAPTER).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER}.")
    _check_files(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    recorded = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not (base or recorded):
        raise ValueError(f"{folder} does not name its base: give it (`base`, --base).")
    try:
        return folder, read_attnres(base or recorded)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The base of {folder} was not found: {error} Correct `base_model_name_or_path` ({recorded!r}) in its "
            f"{ADAPTER_CONFIG}, or give another base (--base of `attnres merge` and `attnres card`)."
        ) from error


def read_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Reads config.json and the header of every shard, and checks that each shard is complete."""
    folder = find_checkpoint(source, revision)
    if (folder / ADAPTER_CONFIG).exists():
        how = "with `attnres merge`, or PEFT's `merge_and_unload` if the base has no depth attention"
        raise ValueError(f"{folder} holds a PEFT adapter: merge it into its base first, {how}.")
    stamps = file_stamps(folder)
    _check_files(folder)
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.gguf")):
        raise ValueError(
            f"{folder} holds its weights in a GGUF file: load it with `AutoModelForCausalLM.from_pretrained` and "
            "`gguf_file`, and use what `save_pretrained` saves."
        )
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    if (folder / SINGLE_SHARD).is_file():
        shards = {SINGLE_SHARD: read_header(folder / SINGLE_SHARD)}
    elif (folder / INDEX).is_file():
        weight_map = read_weight_map(folder / INDEX)
        shards = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise ValueError(f"{folder / INDEX} places the tensor {name!r} in {shard}, which does not hold it.")
    else:
        raise FileNotFoundError(
            f"{folder} has no {SINGLE_SHARD} and no {INDEX}. If it has weights in another format, load them with "
            "`AutoModelForCausalLM.from_pretrained`, and use what `save_pretrained` saves."
        )
    checkpoint = Checkpoint(str(source), folder, config, shards, stamps)
    count = len(checkpoint.tensors)
    if sum(map(len, shards.values())) > count:
        raise ValueError(f"{folder} holds a tensor twice, in two of its shards.")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layers <= count:
        raise ValueError(f"`num_hidden_layers` of {folder / CONFIG} is {layers}, but there are {count} tensors.")
    return checkpoint


def file_stamps(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Inode, size and time of the last change of each file: they differ after a file was written to."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


def _check_files(folder: Path) -> None:
    root = folder.resolve()
    # The Hub cache links each file of a snapshot to its content
    blobs = [ancestor.parent / "blobs" for ancestor in root.parents if ancestor.name == "snapshots"]
    for path in sorted(folder.rglob("*")):
        target = os.path.realpath(path)
        if path.is_symlink() and not any(own in Path(target).parents for own in (root, *blobs)):
            raise ValueError(f"{path} is a link out of the folder, to {target}: copy it instead.")
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file():
            _check_tokenizer_config(read_json(folder / name), folder / name)


def read_header(shard: Path) -> dict[str, dict]:
    """The header of a shard. The safetensors library checks that the shard is complete."""
    if not shard.is_file():
        raise FileNotFoundError(f"The shard {shard} is missing.")
    try:
        with safe_open(shard, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or not a safetensors file: {error}") from error
    with shard.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")), f"The header of {shard}")
    header.pop("__metadata__", None)
    return header


def read_weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor in an index, by name."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` from tensor names to file names.")
    for shard in weight_map.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names the shard {shard!r}, which is not the name of a safetensors file.")
    return weight_map


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, origin: Path | str) -> Any:
    try:
        content = json.loads(text.decode("utf-8"))
        # Code that reads it later may fail on deep nesting
        list(_texts(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not valid JSON: {error}") from error
    return content


def _check_config(config: Any, path: Path) -> None:
    """Checks the fields that are used before transformers validates them, and those that would load other files."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} has no `model_type`: it is not the configuration of a model.")
    for field, kind in (("architectures", list), ("auto_map", dict)):
        value = config.get(field) or kind()
        if not isinstance(value, kind) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"`{field}` of {path} is {value!r}, but must be a {kind.__name__} of class names.")
    if isinstance(labels := config.get("num_labels"), int) and labels > 100_000:
        # transformers makes a name for each
        raise ValueError(f"`num_labels` of {path} is {labels}, but can be at most 100,000.")
    if (weights := config.get("transformers_weights")) is not None:
        raise ValueError(
            f"`transformers_weights` of {path} is {weights!r}: rename that file to {SINGLE_SHARD} and remove the field."
        )
    for field, value in config.items():
        # transformers would download a kernel named `owner/name` from the Hub and run it
        if re.fullmatch("_?(attn|experts)_implementation(_internal)?", field) and "/" in str(value):
            raise ValueError(f"`{field}` of {path} is {value!r}, code from the Hub: remove the field.")


def _check_tokenizer_config(config: Any, path: Path) -> None:
    """AutoTokenizer opens the files that some fields name, wherever they are."""
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a tokenizer.")
    root = Path(os.path.realpath(path.parent))
    for field, value in config.items():
        if field in ("mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs") and value:
            raise ValueError(f"`{field}` of {path} is {value!r}, options of another program: remove it.")
        # Older tokenizers wrote this field, and nothing opens the file in it
        for name in [] if field == "special_tokens_map_file" else _texts(value):
            # The tokenizer's class decides whether it looks in the folder or in the current one
            for file in map(os.path.abspath, (root / name, name)):
                if os.path.isfile(file) and root not in Path(file).parents:
                    raise ValueError(f"`{field}` of {path} names {file}, a file outside of the folder: remove it.")


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings in the values of a JSON file. Raises a `ValueError` if it is nested too deep."""
    if depth > _MAX_JSON_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part, depth + 1)
