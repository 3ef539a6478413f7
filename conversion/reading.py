# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
Reading a checkpoint that may come from a stranger: its files are parsed, never loaded. Nothing outside of the folder
is read, nothing is unpickled and no code is run. A `ValueError` or `FileNotFoundError` names what is wrong and where.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from safetensors import SafetensorError, safe_open


CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Older tokenizers kept their special tokens here, and transformers adds them to the tokenizer's configuration
SPECIAL_TOKENS = "special_tokens_map.json"
CARD = "README.md"

# Weights in other formats and the state of a training run are no part of the checkpoint
_LEFT_BEHIND = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.bin.index.json")
_FOLDERS_LEFT_BEHIND = ("checkpoint-*", "runs")
# Far more than any configuration has, and little enough for all code that walks through it
_DEEPEST_JSON = 100
_MOST_LABELS = 100_000


@dataclass
class Checkpoint:
    """
    A safetensors checkpoint on disk.

    Attributes:
        folder (`Path`): where it is.
        config (`dict`): config.json.
        shards (`dict[str, dict]`): header of each shard: `dtype`, `shape` and `data_offsets` of each tensor.
        stamps (`dict[Path, tuple]`): inode, size and time of the last change of each file.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, dict]]
    stamps: dict[Path, tuple[int, ...]]

    @property
    def tensors(self) -> dict[str, dict]:
        """`dtype`, `shape` and `data_offsets` of each tensor, by name."""
        return {name: info for header in self.shards.values() for name, info in header.items()}

    @property
    def weight_map(self) -> dict[str, str]:
        """The shard of each tensor, by name."""
        return {name: shard for shard, header in self.shards.items() for name in header}

    @property
    def architecture(self) -> str:
        """The model class that config.json names."""
        default = "AttnResForCausalLM" if self.config["model_type"] == "attnres" else "ForCausalLM"
        return (self.config.get("architectures") or [default])[0]

    def other_files(self) -> list[Path]:
        """The files beside config.json, index and weights (tokenizer, license, …), relative to the folder."""
        files = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [
            file
            for file in files
            if not any(part.startswith(".") for part in file.parts)
            and not any(folder.match(pattern) for folder in file.parents for pattern in _FOLDERS_LEFT_BEHIND)
            and not any(file.match(pattern) for pattern in (*_LEFT_BEHIND, "*.safetensors"))
            and str(file) not in (CONFIG, INDEX)
        ]


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """
    The folder of a checkpoint: a local folder as it is, the files of a Hub id by way of the Hub cache.

    Raises:
        `FileNotFoundError`: no such folder, and nothing by this name on the Hub or in its cache.
        `ValueError`: a revision of a local folder.
    """
    source = str(source)
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(
                f"`revision` is {revision!r}, but {source} is a local folder, which has none: leave it out."
            )
        return Path(source)
    nothing = f"{source} is neither a local folder nor a Hub id (`name` or `owner/name`)"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise FileNotFoundError(f"{nothing}.")
    try:
        patterns = [*_LEFT_BEHIND, "original/*", "consolidated*"]
        return Path(snapshot_download(source, revision=revision, ignore_patterns=patterns))
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{source}"
        raise PermissionError(f"{source} is gated: accept its terms at {page}, then run `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{source} has no revision {revision!r} on the Hub.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{nothing} that can be read. If it is a private one, run `hf auth login` first."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        raise FileNotFoundError(
            f"{source} is no local folder, it is not in the Hub cache, and the Hub cannot be reached."
        ) from error


def hub_snapshot(folder: str | Path) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the Hub cache. Other folders have none, even if their name reads like one."""
    path = Path(os.path.abspath(folder)).as_posix()
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)", path)
    return (found[1].replace("--", "/"), found[2]) if found else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """
    Reads config.json and the header of every shard, and checks that each shard is whole.

    Raises:
        `FileNotFoundError`: no config.json, no safetensors weights, or a shard that the index names is missing.
        `ValueError`: a file is not what it should be, for instance a truncated shard or a link out of the folder.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and leads_out_of(folder, path):
            raise ValueError(
                f"{path} is a link out of the folder, to {os.path.realpath(path)}: put the file itself in its place."
            )
    stamps = file_stamps(folder)
    _refuse_other_formats(folder)
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file():
            _check_tokenizer_config(read_json(folder / name), folder / name)
    if (folder / SINGLE_SHARD).is_file():
        shards = {SINGLE_SHARD: read_header(folder / SINGLE_SHARD)}
    elif (folder / INDEX).is_file():
        weight_map = read_weight_map(folder / INDEX)
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / INDEX} names the shard {shard!r}, which is not in the folder.")
            shards[shard] = read_header(folder / shard)
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise ValueError(f"{folder / INDEX} places the tensor {name!r} in {shard}, which does not hold it.")
    else:
        raise FileNotFoundError(
            f"{folder} has no {SINGLE_SHARD} and no {INDEX}. If its weights are in another format, load it with "
            "transformers and save it again: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    checkpoint = Checkpoint(folder, config, shards, stamps)
    count = len(checkpoint.tensors)
    if sum(map(len, shards.values())) > count:
        raise ValueError(f"{folder} holds a tensor twice, in two of its shards.")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layers <= count:
        raise ValueError(f"`num_hidden_layers` of {folder / CONFIG} is {layers}, but there are {count} tensors.")
    return checkpoint


def file_stamps(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What shows that a file was written to: inode, size and time of the last change."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


def leads_out_of(folder: str | Path, path: str | Path) -> bool:
    """Whether a path leads out of its folder: a stranger's link can lead to any file of this machine."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    # The Hub cache links each file of a snapshot to its content
    blobs = [ancestor.parent / "blobs" for ancestor in root.parents if ancestor.name == "snapshots"]
    return not any(own in target.parents for own in (root, *blobs))


def read_header(shard: Path) -> dict[str, dict]:
    """The header of a whole shard: its tensors lie side by side and fill the file."""
    try:
        with safe_open(shard, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or not a safetensors file: {error}") from error
    with shard.open("rb") as file:
        # safetensors takes the last of two tensors of one name
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")), f"The header of {shard}")
    header.pop("__metadata__", None)
    return header


def read_weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, by name, as an index has it."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` from tensor names to file names.")
    for shard in weight_map.values():
        # `revert` also writes files by these names
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FileNotFoundError(f"{index} names the shard {shard!r}, which is not in the folder.")
    return weight_map


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, origin: Path | str) -> Any:
    """JSON that all readers understand in the same way."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} is there twice")
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        # Half of a surrogate pair can be read, but not written
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not valid JSON: {error}") from error
    level, depth = [content], 0
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(f"{origin} is nested more than {_DEEPEST_JSON} levels deep.")
        level = [child for part in level for child in (part.values() if isinstance(part, dict) else part)]
    return content


def _refuse_other_formats(folder: Path) -> None:
    has_weights = any(folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").exists():
        beside = " beside its weights, and transformers would load both" if (folder / CONFIG).exists() else ""
        raise ValueError(
            f"{folder} holds a PEFT adapter{beside}: merge it into its base (`merge_and_unload`, then "
            "`save_pretrained`) and use the merged checkpoint."
        )
    if not has_weights and (gguf := next(iter(sorted(folder.glob("*.gguf"))), None)):
        raise ValueError(
            f"{folder} holds its weights in a GGUF file: load it with `AutoModelForCausalLM.from_pretrained(FOLDER, "
            f'gguf_file="{gguf.name}")`, save it with `save_pretrained` and use the saved checkpoint.'
        )


def _check_config(config: Any, path: Path) -> None:
    """Checks the parts of a configuration that are used before transformers validates them."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} has no `model_type`: it is not the configuration of a model.")
    architectures, auto_map = config.get("architectures"), config.get("auto_map")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(f"`architectures` of {path} is {architectures!r}, but it has to be a list of class names.")
    if auto_map is not None and not isinstance(auto_map, dict):
        raise ValueError(f"`auto_map` of {path} is {auto_map!r}, but it has to map Auto classes to class names.")
    labels = config.get("num_labels")
    if isinstance(labels, int) and not 0 <= labels <= _MOST_LABELS:
        # transformers makes a name for each
        raise ValueError(f"`num_labels` of {path} is {labels}, but it can be at most {_MOST_LABELS}.")
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < 1:
        raise ValueError(f"`max_position_embeddings` of {path} is {positions}, but it has to be at least 1.")
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"`transformers_weights` of {path} names a file of weights, {config['transformers_weights']!r}: rename "
            "that file to model.safetensors and remove the field."
        )
    for name in ("attn_implementation", "experts_implementation"):
        for field in (name, f"_{name}", f"_{name}_internal"):
            # transformers would download a kernel named `owner/name` from the Hub and run it
            if "/" in str(config.get(field)):
                raise ValueError(f"`{field}` of {path} is {config[field]!r}, code from the Hub: remove the field.")


def _check_tokenizer_config(config: Any, path: Path) -> None:
    """AutoTokenizer takes some fields as paths and opens them, wherever they lead."""
    root = Path(os.path.realpath(path.parent))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a tokenizer.")
    for field, value in config.items():
        if field in ("mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs") and value:
            raise ValueError(f"`{field}` of {path} is {value!r}, options of another program: remove it.")
        # Older tokenizers noted in this field where they were made, and nothing opens it
        for name in [] if field == "special_tokens_map_file" else _texts(value):
            # The tokenizer's class decides whether it looks in the folder or in the current one
            for file in (root / name, Path(name)):
                if os.path.isfile(file) and root not in Path(os.path.abspath(file)).parents:
                    raise ValueError(
                        f"`{field}` of {path} names {name!r}, and {os.path.abspath(file)} is a file outside of the "
                        "folder: remove it."
                    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
