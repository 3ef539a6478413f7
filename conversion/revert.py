# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Revert: an AttnRes checkpoint becomes a checkpoint of its base again."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS

from .reading import (
    CARD,
    CONFIG,
    INDEX,
    SINGLE_SHARD,
    TOKENIZER_CONFIG,
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
    read_weight_map,
)
from .retrofit import REPLACED, code_files, new_tensors_of
from .writing import check_copy, new_folder, place_files, shard_name, write_index, write_json


def revert(attnres: str | Path, output: str | Path, *, force: bool = False, revision: str | None = None) -> Path:
    r"""
    Gives the base of an AttnRes checkpoint back. If the retrofit was not trained, every file is the base's to the byte.

    Args:
        attnres (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        output (`str` or `Path`): folder to write, new or empty.
        force (`bool`, *optional*, defaults to `False`):
            drop the queries and key norms even if they are trained: the base computes something else then.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.

    Returns:
        `Path`: the output.

    Raises:
        `FileNotFoundError`, `FileExistsError`: as for [`retrofit`].
        `ValueError`: not an AttnRes checkpoint, or its queries are trained and `force` is not given.
    """
    checkpoint = read_checkpoint(find_checkpoint(attnres, revision))
    new = new_tensors_of(checkpoint).keys() & checkpoint.tensors.keys()
    queries = [name for name in new if name.endswith(".query")]
    if not force and (trained := trained_queries(checkpoint, queries)):
        raise ValueError(
            f"{len(trained)} of {len(queries)} queries are trained (the first is {trained[0]!r}), so the base alone "
            "computes something else. To drop them all the same, use `force` (--force)."
        )
    base_shards = _base_shards(checkpoint, new)
    # Listed before anything is written: a file that vanishes meanwhile is an error
    code = [file.name for file in code_files()]
    replaced = [checkpoint.folder / REPLACED / name for name in (CONFIG, INDEX, CARD, TOKENIZER_CONFIG, *code)]
    replaced = [file for file in replaced if base_shards and file.is_file()]
    ours = {CARD, REPLACED, *code, *(file.name for file in replaced)}
    others = [file for file in checkpoint.other_files() if file.parts[0] not in ours]

    with new_folder(Path(output), checkpoint.folder) as folder:
        _write_weights(checkpoint, new, folder, base_shards)
        if base_shards:
            place_files((file, folder / file.name) for file in replaced)
        else:
            write_json(folder / CONFIG, _base_config_json(checkpoint))
            if len(list(folder.glob("*.safetensors"))) > 1:
                write_index(folder)
        place_files((checkpoint.folder / file, folder / file) for file in others)
        check_copy(checkpoint, folder, checkpoint.tensors.keys() - new)
    return Path(output)


def trained_queries(checkpoint: Checkpoint, queries: Collection[str]) -> list[str]:
    """The queries that are not zero any more."""
    trained = []
    for name in sorted(queries):
        with safe_open(checkpoint.folder / checkpoint.weight_map[name], framework="pt") as tensors:
            query = tensors.get_tensor(name)
        if not query.is_floating_point():
            raise ValueError(f"The tensor {name!r} of {checkpoint.folder} is {query.dtype}, not a float.")
        if query.to(torch.float32).any():
            trained.append(name)
    return trained


def _base_shards(checkpoint: Checkpoint, new: Collection[str]) -> dict[str, str]:
    """The base's own names of the shards, or none if transformers saved the checkpoint since the retrofit."""
    replaced = checkpoint.folder / REPLACED
    if not (replaced / CONFIG).is_file():
        return {}
    weight_map = {name: shard for name, shard in checkpoint.weight_map.items() if name not in new}
    base_weight_maps = [dict.fromkeys(weight_map, SINGLE_SHARD)]
    if (replaced / INDEX).is_file():
        # transformers leaves an old index beside a single file, and it means nothing there
        base_weight_maps.insert(0, read_weight_map(replaced / INDEX))
    for base_weight_map in base_weight_maps:
        names = sorted(set(base_weight_map.values()))
        renamed = {name: shard_name(i, len(names) + 1) for i, name in enumerate(names, 1)}
        if {name: renamed[shard] for name, shard in base_weight_map.items()} == weight_map:
            return {shard: name for name, shard in renamed.items()}
    return {}


def _write_weights(checkpoint: Checkpoint, new: Collection[str], folder: Path, base_shards: dict[str, str]) -> None:
    """Copies the shards of the base as they are, and saves the shards anew that hold new tensors too."""
    kept = {shard: header.keys() - new for shard, header in checkpoint.shards.items()}
    kept = {shard: names for shard, names in kept.items() if names}
    if len(kept) == 1 and not base_shards:
        base_shards = dict.fromkeys(kept, SINGLE_SHARD)
    copied = []
    for shard, names in kept.items():
        source, target = checkpoint.folder / shard, folder / base_shards.get(shard, shard)
        if names == checkpoint.shards[shard].keys():
            copied.append((source, target))
            continue
        try:
            with safe_open(source, framework="pt") as tensors:
                save_file({name: tensors.get_tensor(name) for name in names}, target, metadata=tensors.metadata())
        except SafetensorError as error:
            raise ValueError(f"{source} cannot be read by torch: {error}") from error
        shutil.copymode(source, target)
    place_files(copied)


def _base_config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base's config.json, of a checkpoint that transformers saved."""
    base_model_type = checkpoint.config["base_model_type"]
    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base_model_type].removesuffix("ForCausalLM")
    kept = {n: value for n, value in checkpoint.config.items() if n not in ATTN_RES_FIELDS and n != "auto_map"}
    architecture = checkpoint.architecture.replace("AttnRes", family)
    return {**kept, "model_type": base_model_type, "architectures": [architecture]}
