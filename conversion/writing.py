# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint: a new folder is there whole or not at all."""

import errno
import functools
import glob
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .reading import CONFIG, INDEX, Checkpoint, file_stamps, read_checkpoint, read_header


@contextmanager
def new_folder(output: Path, source: Path) -> Iterator[Path]:
    """
    A folder to write to, beside `output`. It is renamed to `output` if the block ends well, and removed otherwise. A
    killed process leaves it there, under a hidden name, since no other process can know whether it is still in use.

    Raises:
        `FileExistsError`: `output` is there already and not an empty folder.
        `ValueError`: `output` lies in `source` or is the current folder.
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
    for unfinished in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        message = (
            f"{unfinished} was left by a killed run, or belongs to one that is still going: if none is, remove it."
        )
        warnings.warn(message, stacklevel=4)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # The error of a full disk does not say where
            error.filename = str(output)
        raise


def place_files(pairs: Iterable[tuple[Path, Path]], link: bool = False) -> None:
    """Copies, or hard-links, each first path to the second. A long copy shows its progress."""
    pairs = list(pairs)
    # Larger ones do not stay in the processor's cache, and 16 MB took five times as long
    buffer = memoryview(bytearray(2**20))
    size = 0 if link else sum(source.stat().st_size for source, _ in pairs)
    with tqdm(total=size, desc="Copying", unit="B", unit_scale=True, delay=1, disable=link) as progress:
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                try:
                    # A file of the Hub cache is a symbolic link
                    os.link(source.resolve(), target)
                except OSError as error:
                    message = f"{source} cannot be linked to {target.parent} ({error}): leave out --link."
                    raise OSError(message) from error
                continue
            # A private file stays private
            opener = functools.partial(os.open, mode=source.stat().st_mode & 0o777 | 0o600)
            with source.open("rb") as reader, open(target, "xb", opener=opener) as writer:
                while length := reader.readinto(buffer):
                    writer.write(buffer[:length])
                    progress.update(length)


def shard_name(number: int, count: int) -> str:
    """The name that transformers gives to shards. It removes files of such names when it saves over them."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_json(path: Path, content: Any) -> None:
    # The same bytes on every system
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_index(folder: Path) -> None:
    """Writes the index over all shards in the folder."""
    weight_map, size, parameters = {}, 0, 0
    for shard in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(shard).items():
            weight_map[name] = shard.name
            size += info["data_offsets"][1] - info["data_offsets"][0]
            parameters += parameter_count(info)
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def parameter_count(info: dict) -> int:
    return functools.reduce(lambda product, length: product * length, info["shape"], 1)


def check_copy(source: Checkpoint, folder: Path, names: Iterable[str]) -> None:
    """
    Reads the headers of the copy, and checks that the source was not written to while it was copied: shards of two of
    its versions would fit together, too.

    Raises:
        `ValueError`: a shard is not whole or lacks a tensor of the source, or somebody wrote to the source.
    """
    expected, written = source.tensors, read_checkpoint(folder).tensors
    fits = all(
        name in written
        and (written[name]["dtype"], written[name]["shape"]) == (expected[name]["dtype"], expected[name]["shape"])
        for name in names
    )
    now = file_stamps(source.folder)
    used = [source.folder / file for file in (CONFIG, INDEX, *source.shards, *source.other_files())]
    changed = any(now[file] != source.stamps[file] for file in used if file in now and file in source.stamps)
    if changed or not fits:
        raise ValueError(f"{source.folder} changed while it was copied: try again when nothing writes to it.")


def _sync(path: Path) -> None:
    # Elsewhere a file that is open for reading cannot be synced
    if os.name == "posix" and path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
