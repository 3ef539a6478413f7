# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint: a new folder is complete or not there at all."""

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

from .reading import INDEX, Checkpoint, file_stamps, read_checkpoint, read_header


@contextmanager
def new_folder(output: Path, source: Checkpoint) -> Iterator[Path]:
    """
    A hidden folder beside `output`. At the end of the `with` statement, its headers are read back and it is renamed to
    `output`. After an error, or if the source has changed, it is removed. A killed process leaves it, and the next run
    warns of it.
    """
    # A link to a folder stays a link
    target = output.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"The output {output} exists already and is not an empty folder.")
    if target == Path.cwd() or source.folder.resolve() in target.parents:
        raise ValueError(f"The output {output} is inside the source or is the current folder: choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        message = f"{unfinished} is from a killed run, or another run is using it: if none is active, remove it."
        warnings.warn(message, stacklevel=4)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        yield partial
        read_checkpoint(partial)
        if file_stamps(source.folder) != source.stamps:
            raise ValueError(f"{source.folder} changed while it was copied: try again when no process writes to it.")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def place_files(pairs: Iterable[tuple[Path, Path]], link: bool = False) -> None:
    """Copies, or hard-links, each first path to the second. A long copy shows its progress."""
    for source, target in tqdm(list(pairs), desc="Copying", unit="file", delay=1, disable=link):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not link:
            shutil.copy(source, target)
            continue
        try:
            # A file of the Hub cache is a symbolic link
            os.link(source.resolve(), target)
        except OSError as error:
            raise OSError(f"{source} cannot be linked to {target.parent} ({error}): leave out --link.") from error


def write_json(path: Path, content: Any) -> None:
    # The same bytes on every system
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_index(folder: Path) -> None:
    """Writes the index over all shards in the folder."""
    shards = {shard.name: read_header(shard) for shard in sorted(folder.glob("*.safetensors"))}
    offsets = [info["data_offsets"] for header in shards.values() for info in header.values()]
    weight_map = {name: shard for shard, header in shards.items() for name in header}
    metadata = {"total_size": sum(end - start for start, end in offsets)}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
