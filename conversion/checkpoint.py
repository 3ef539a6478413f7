# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders: read one without loading it, fill a new one that is there whole or not at all."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm


if TYPE_CHECKING:
    # Imported where it is used: `attnres --help` need not wait for it
    from huggingface_hub.utils import SafetensorsRepoMetadata

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# The base's own files that a retrofit replaces, kept so that `revert` gives them back to the byte
REPLACED = "attnres_base"

# Weights in other formats and the state of a training run: none of it is part of the checkpoint
_LEFT_BEHIND = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "*.bin.index.json")
_FOLDERS_LEFT_BEHIND = ("checkpoint-*", "runs")


@dataclass
class Checkpoint:
    """A safetensors checkpoint on disk: its folder, its parsed config.json, the headers of its shards."""

    folder: Path
    config: dict[str, Any]
    weights: "SafetensorsRepoMetadata"

    @property
    def tensors(self) -> dict[str, Any]:
        """Dtype and shape of each tensor, by name."""
        return {name: info for file in self.weights.files_metadata.values() for name, info in file.tensors.items()}

    def other_files(self) -> list[Path]:
        """All that travels beside config.json, index and weights (tokenizer, licence, …), relative to the folder."""
        files = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [
            file
            for file in files
            if not any(part.startswith(".") for part in file.parts)
            and not any(folder.match(pattern) for folder in file.parents for pattern in _FOLDERS_LEFT_BEHIND)
            and not any(file.match(pattern) for pattern in (*_LEFT_BEHIND, "*.safetensors"))
            and str(file) not in (CONFIG, INDEX)
        ]


def download(source: str, revision: str | None = None) -> Path:
    """A local folder as it is, a Hub id's files by way of the Hub cache."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but the source {source} is a local folder: leave it out.")
        return Path(source)
    if Path(source).is_absolute() or source.count("/") > 1 or source.startswith("."):
        raise FileNotFoundError(f"{source} is neither a local folder nor a Hub id (`name` or `owner/name`).")
    patterns = [*_LEFT_BEHIND, "original/*", "consolidated*"]
    return Path(snapshot_download(source, revision=revision, ignore_patterns=patterns))


def read_checkpoint(folder: Path) -> Checkpoint:
    """
    Reads config.json and the header of every shard, and checks that each shard is whole.

    Raises:
        `FileNotFoundError`: no config.json, no safetensors weights, or a shard that the index names is missing.
        `ValueError`: a file is not what it should be, for instance a truncated shard.
    """
    from huggingface_hub import get_local_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / CONFIG} has no `model_type`: it is not the configuration of a model.")
    shards = [SINGLE_SHARD]
    if not (folder / SINGLE_SHARD).exists() and (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no `weight_map` from tensor names to file names.")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / INDEX} names the shard {shard!r}, which is not in the folder.")
    elif not (folder / SINGLE_SHARD).exists():
        raise FileNotFoundError(
            f"{folder} has no {SINGLE_SHARD} and no {INDEX}. If its weights are in another format, load it with "
            "transformers and save it again: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} is truncated or not a safetensors file: {error}") from error
    try:
        weights = get_local_safetensors_metadata(folder)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{folder} has weights that cannot be read: {error}") from error
    for name, shard in weights.weight_map.items():
        if name not in weights.files_metadata[shard].tensors:
            raise ValueError(f"{folder / INDEX} places the tensor {name!r} in {shard}, which does not hold it.")
    return Checkpoint(folder, config, weights)


def shard_name(number: int, count: int) -> str:
    """As transformers names its shards, which are also the ones that it clears away when it saves over them."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(folder: Path) -> None:
    """Writes the index over all shards in the folder."""
    from huggingface_hub import get_local_safetensors_metadata

    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map, size, parameters = {}, 0, 0
    for shard in shards:
        for name, info in get_local_safetensors_metadata(folder / shard).files_metadata[shard].tensors.items():
            weight_map[name] = shard
            size += info.data_offsets[1] - info.data_offsets[0]
            parameters += info.parameter_count
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


@contextmanager
def new_folder(output: Path, source: Path) -> Iterator[Path]:
    """
    A folder to write to, beside `output`, that becomes `output` if the block ends well and is removed otherwise.

    Raises:
        `FileExistsError`: `output` is there already and not an empty folder.
        `ValueError`: `output` lies in `source`, or is the current folder.
    """
    taken = FileExistsError(f"The output {output} exists already and is not an empty folder.")
    # A link to a folder stays a link
    target = output.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise taken
    if target == Path.cwd():
        raise ValueError(f"The output {output} is the current folder, which cannot be replaced: name another.")
    if source.resolve() in target.parents:
        raise ValueError(f"The output {output} lies in the source {source}: choose a folder outside of it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            raise
    except BaseException:
        shutil.rmtree(partial)
        raise


def place_files(pairs: list[tuple[Path, Path]], link: bool = False) -> None:
    """Copies each first path to the second, or hard-links it. A long copy shows its progress."""
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                # A file of the Hub cache is a symbolic link
                os.link(source.resolve(), target)
            except OSError as error:
                raise OSError(f"{source} cannot be linked to {target.parent} ({error}): leave out --link.") from error
    if link:
        return
    size = sum(source.stat().st_size for source, _ in pairs)
    with tqdm(total=size, desc="Copying", unit="B", unit_scale=True, delay=1) as progress:
        for source, target in pairs:
            with source.open("rb") as reader, target.open("xb") as writer:
                while chunk := reader.read(16 * 2**20):
                    writer.write(chunk)
                    progress.update(len(chunk))
