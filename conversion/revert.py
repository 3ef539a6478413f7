# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Revert: an AttnRes checkpoint becomes a checkpoint of its base again."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS

from .reading import CARD, CONFIG, INDEX, KEPT, SINGLE_SHARD, Checkpoint, other_files, read_attnres, read_weight_map
from .retrofit import code_files
from .writing import new_folder, place_files, write_index, write_json


def revert(attnres: str | Path, output: str | Path, *, force: bool = False, revision: str | None = None) -> Path:
    r"""
    Restores the base of an AttnRes checkpoint. If the retrofit was not trained, all files are those of the base.

    Args:
        attnres (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        output (`str` or `Path`): folder to write, new or empty. It is returned.
        force (`bool`, *optional*, defaults to `False`): drop queries and key norms even if they are trained.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.

    Raises:
        `FileNotFoundError`, `FileExistsError`: as for [`retrofit`].
        `ValueError`: not an AttnRes checkpoint, or its queries are trained and `force` is not given.
    """
    checkpoint = read_attnres(attnres, revision)
    if not force and (trained := trained_queries(checkpoint)):
        raise ValueError(
            f"{len(trained)} queries are trained (the first is {trained[0]!r}), so the base computes something else. "
            "To drop them anyway, use `force` (--force)."
        )
    new = checkpoint.new_tensors
    shards = {shard: header.keys() - new for shard, header in checkpoint.shards.items() if header.keys() - new}
    names = _base_names(checkpoint)
    # Listed before anything is written: a file that vanishes in the meantime is an error
    replaced = [file for file in (checkpoint.folder / KEPT).glob("*") if names and file.suffix != ".safetensors"]
    ours = {CARD, KEPT, *(file.name for file in (*code_files(), *replaced))}
    others = [file for file in other_files(checkpoint.folder) if file.parts[0] not in ours]
    config_json = None if names else _base_config_json(checkpoint)
    names = names or ([SINGLE_SHARD] if len(shards) == 1 else sorted(shards))

    with new_folder(Path(output), checkpoint) as folder:
        for (shard, kept), name in zip(sorted(shards.items()), names):
            if kept == checkpoint.shards[shard].keys():
                place_files([(checkpoint.folder / shard, folder / name)])
                continue
            with safe_open(checkpoint.folder / shard, framework="pt") as tensors:
                base = {tensor: tensors.get_tensor(tensor) for tensor in kept}
                save_file(base, folder / name, metadata=tensors.metadata())
        if config_json is None:
            place_files((file, folder / file.name) for file in replaced)
        else:
            write_json(folder / CONFIG, config_json)
            if len(shards) > 1:
                write_index(folder)
        place_files((checkpoint.folder / file, folder / file) for file in others)
    return Path(output)


def trained_queries(checkpoint: Checkpoint) -> list[str]:
    """The queries that are not zero."""
    trained = []
    for shard, header in checkpoint.shards.items():
        queries = [name for name in header.keys() & checkpoint.new_tensors if name.endswith(".query")]
        with safe_open(checkpoint.folder / shard, framework="pt") as tensors:
            trained += [name for name in queries if tensors.get_tensor(name).float().any()]
    return sorted(trained)


def _base_names(checkpoint: Checkpoint) -> list[str]:
    """The base's own names of its shards, or none if the checkpoint was saved again after the retrofit."""
    *base, last = sorted(checkpoint.shards)
    replaced = checkpoint.folder / KEPT
    if not (replaced / CONFIG).is_file() or checkpoint.shards[last].keys() != checkpoint.new_tensors:
        return []
    if (replaced / INDEX).is_file():
        weight_map = read_weight_map(replaced / INDEX)
        names = sorted(set(weight_map.values()))
        # transformers leaves an old index beside a single file, and it means nothing there
        if weight_map.keys() == checkpoint.tensors.keys() - checkpoint.new_tensors and len(names) == len(base):
            return names
    return [SINGLE_SHARD] if len(base) == 1 else []


def _base_config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base's config.json, of a checkpoint that transformers saved."""
    base_model_type = checkpoint.attnres_config.base_model_type
    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base_model_type, "").removesuffix("ForCausalLM")
    kept = {n: value for n, value in checkpoint.config.items() if n not in ATTN_RES_FIELDS and n != "auto_map"}
    architecture = checkpoint.architecture.replace("AttnRes", family)
    return {**kept, "model_type": base_model_type, "architectures": [architecture]}
