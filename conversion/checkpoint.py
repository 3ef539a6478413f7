# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders: read one without loading it, fill a new one that is there whole or not at all."""

import errno
import functools
import glob
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .untrusted import check_config, check_tokenizer_config, parse_json, refuse_links_out_of


if TYPE_CHECKING:
    # Imported where it is used: `attnres --help` need not wait for it
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What older tokenizers kept apart from it, and transformers adds to it
SPECIAL_TOKENS = "special_tokens_map.json"
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
    # What tells that a file was written to, of each file
    stamps: dict[Path, tuple[int, ...]]

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
    Reads config.json and the header of every shard, and checks that each shard is whole. The files may come from a
    stranger: nothing outside of the folder is read, nothing is unpickled, no code is run.

    Raises:
        `FileNotFoundError`: no config.json, no safetensors weights, or a shard that the index names is missing.
        `ValueError`: a file is not what it should be, for instance a truncated shard or a link out of the folder.
    """
    from huggingface_hub.utils import SafetensorsRepoMetadata

    refuse_links_out_of(folder)
    stamps = _stamps(folder)
    config = read_json(folder / CONFIG)
    check_config(config, folder / CONFIG)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file():
            check_tokenizer_config(read_json(folder / name), folder / name)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter (adapter_config.json) beside its weights, which transformers would "
            "load with them: merge it (`merge_and_unload`), or take the checkpoint without it."
        )
    if (folder / SINGLE_SHARD).is_file():
        files = {SINGLE_SHARD: read_shard(folder / SINGLE_SHARD)}
        weight_map = dict.fromkeys(files[SINGLE_SHARD].tensors, SINGLE_SHARD)
    elif (folder / INDEX).is_file():
        weight_map = read_weight_map(folder / INDEX)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / INDEX} names the shard {shard!r}, which is not in the folder.")
        files = {shard: read_shard(folder / shard) for shard in shards}
        for name, shard in weight_map.items():
            if name not in files[shard].tensors:
                raise ValueError(f"{folder / INDEX} places the tensor {name!r} in {shard}, which does not hold it.")
    else:
        raise FileNotFoundError(
            f"{folder} has no {SINGLE_SHARD} and no {INDEX}. If its weights are in another format, load it with "
            "transformers and save it again: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    sharded = len(files) > 1
    weights = SafetensorsRepoMetadata(metadata=None, sharded=sharded, weight_map=weight_map, files_metadata=files)
    checkpoint = Checkpoint(folder, config, weights, stamps)
    if sum(len(file.tensors) for file in files.values()) > len(checkpoint.tensors):
        raise ValueError(f"{folder} holds a tensor twice, in two of its shards.")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 <= layers <= len(checkpoint.tensors):
        raise ValueError(
            f"`num_hidden_layers` of {folder / CONFIG} is {layers}, but there are {len(checkpoint.tensors)} tensors."
        )
    return checkpoint


def _stamps(folder: Path) -> dict[Path, tuple[int, ...]]:
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


def read_shard(path: Path) -> "SafetensorsFileMetadata":
    """The header of a shard that is whole: its tensors lie side by side and fill the file."""
    from huggingface_hub import get_local_safetensors_metadata

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    with path.open("rb") as file:
        # Of two tensors of one name the library takes one
        parse_json(file.read(int.from_bytes(file.read(8), "little")), f"The header of {path}")
    return get_local_safetensors_metadata(path).files_metadata[path.name]


def shard_name(number: int, count: int) -> str:
    """As transformers names its shards, which are also the ones that it clears away when it saves over them."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    return parse_json(path.read_bytes(), path)


def read_weight_map(index: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` from tensor names to file names.")
    for shard in weight_map.values():
        # What is written goes by these names too
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FileNotFoundError(f"{index} names the shard {shard!r}, which is not in the folder.")
    return weight_map


def write_json(path: Path, content: Any) -> None:
    # The same bytes on every system
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_index(folder: Path) -> None:
    """Writes the index over all shards in the folder."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map, size, parameters = {}, 0, 0
    for shard in shards:
        for name, info in read_shard(folder / shard).tensors.items():
            weight_map[name] = shard
            size += info.data_offsets[1] - info.data_offsets[0]
            parameters += info.parameter_count
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def close_as(path: Path, replaced: Path) -> None:
    """Takes the rights away from a written file that the one in whose place it comes does not give."""
    path.chmod(path.stat().st_mode & replaced.stat().st_mode & 0o777 | 0o600)


def replace_text(path: Path, content: str) -> None:
    """Writes a file in the place of another, with its rights. A killed process leaves the one or the other."""
    mode = path.stat().st_mode & 0o777
    new = path.with_name(f".{path.name}.partial")
    new.unlink(missing_ok=True)
    try:
        with open(new, "x", encoding="utf-8", opener=functools.partial(os.open, mode=0o600)) as file:
            file.write(content)
        new.chmod(mode)
        _sync(new)
        # A file of the Hub cache is a link: what it leads to stays
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def new_folder(output: Path, source: Path) -> Iterator[Path]:
    """
    A folder to write to, beside `output`, that becomes `output` if the block ends well and is removed otherwise. A
    process that is killed leaves it behind, under its hidden name: nobody else can tell whether it is still written to.

    Raises:
        `FileExistsError`: `output` is there already and not an empty folder.
        `PermissionError`: nothing can be written beside `output`.
        `ValueError`: `output` lies in `source`, is the current folder or a mount point.
    """
    taken = FileExistsError(f"The output {output} exists already and is not an empty folder.")
    # A link to a folder stays a link
    target = output.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise taken
    if target == Path.cwd():
        raise ValueError(f"The output {output} is the current folder, which cannot be replaced: name another.")
    mounted = ValueError(f"The output {output} is a mount point, which cannot be replaced: name a folder in it.")
    if os.path.ismount(target):
        raise mounted
    if source.resolve() in target.parents:
        raise ValueError(f"The output {output} lies in the source {source}: choose a folder outside of it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The longest name that leaves room for what is added
    hidden = f".{os.fsdecode(os.fsencode(target.name)[:230])}"
    for unfinished in sorted(target.parent.glob(f"{glob.escape(hidden)}.{'[0-9a-f]' * 8}.partial")):
        message = f"{unfinished} is what a killed run left, or one that still goes on: if none does, remove it."
        warnings.warn(message, stacklevel=4)
    partial = target.parent / f"{hidden}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
    except PermissionError as error:
        reason = f"{error.strerror} to write beside the output, where it is made before it has its name"
        raise PermissionError(error.errno, reason, str(target.parent)) from error
    if target.exists():
        # Whom it was closed to, it stays closed to
        partial.chmod(target.stat().st_mode & 0o777 | 0o700)
    try:
        yield partial
        # On the disk before it has its name: a power cut must not leave one without the other
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            if error.errno == errno.EBUSY:
                # A folder of the same disk, mounted: nothing tells it from others before
                raise mounted from error
            raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A full disk does not say where
            error.filename = str(output)
        raise
    # The output is there, whatever becomes of this
    with suppress(OSError):
        _sync(target.parent)


def _sync(path: Path) -> None:
    # Elsewhere a folder cannot be opened, nor a file synced that is open for reading
    if os.name == "posix":
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            # Some network file systems cannot sync a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(file)


def check_copy(source: Checkpoint, folder: Path, names: Iterable[str]) -> None:
    """
    Reads the headers of what was written again, and looks whether the source is still what was read of it: files of two
    of its versions would fit together, too.

    Raises:
        `ValueError`: a shard is not whole or lacks a tensor of the source's, or somebody wrote to the source meanwhile.
    """
    written = read_checkpoint(folder).tensors
    tensors = source.tensors

    def described(info):
        return info and (info.dtype, info.shape)

    used = {source.folder / CONFIG, source.folder / INDEX, *(source.folder / file for file in source.other_files())}
    used |= {source.folder / shard for shard in source.weights.files_metadata}
    now = _stamps(source.folder)
    if any(described(written.get(name)) != described(tensors[name]) for name in names) or any(
        now[path] != stamp for path, stamp in source.stamps.items() if path in used and path in now
    ):
        raise ValueError(f"{source.folder} changed while it was copied: try again when nothing writes to it.")


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
            with source.open("rb") as reader:
                # Open to nobody whom the source was closed to
                mode = os.fstat(reader.fileno()).st_mode & 0o777 | 0o600
                create = functools.partial(os.open, mode=mode)
                with open(target, "xb", opener=create) as writer:
                    while chunk := reader.read(16 * 2**20):
                        writer.write(chunk)
                        progress.update(len(chunk))
