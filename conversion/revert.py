# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Revert: an AttnRes checkpoint becomes a checkpoint of its base again."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .checkpoint import (
    CONFIG,
    INDEX,
    REPLACED,
    SINGLE_SHARD,
    TOKENIZER_CONFIG,
    Checkpoint,
    check_copy,
    close_as,
    download,
    new_folder,
    place_files,
    read_checkpoint,
    read_weight_map,
    shard_name,
    write_index,
    write_json,
)
from .retrofit import FLOATS, attn_res_tensors, code_files, read_config


def revert(source: str | Path, output: str | Path, force: bool = False, revision: str | None = None) -> Path:
    r"""
    Gives the base of an AttnRes checkpoint back. Of a retrofit that was not trained, every file is the base's to the
    byte.

    Args:
        source (`str` or `Path`): folder or Hub id of the AttnRes checkpoint.
        output (`str` or `Path`): folder to write, new or empty.
        force (`bool`, *optional*, defaults to `False`):
            drop the queries and key norms even if they are trained: the base computes something else then.
        revision (`str`, *optional*): branch, tag or commit of a source on the Hub.

    Returns:
        `Path`: the output.

    Raises:
        `FileNotFoundError`, `FileExistsError`: as for [`retrofit`].
        `ValueError`: the source is not AttnRes, or it computes what its base cannot and `force` is not given.
    """
    checkpoint = read_checkpoint(download(str(source), revision))
    model_type = checkpoint.config["model_type"]
    if model_type != "attnres":
        raise ValueError(f"{checkpoint.folder} is not an AttnRes checkpoint: its `model_type` is {model_type!r}.")
    config = read_config(checkpoint)
    architecture = (checkpoint.config.get("architectures") or ["AttnResForCausalLM"])[0]
    attn_res = attn_res_tensors(checkpoint, config, architecture).keys() & checkpoint.tensors.keys()
    if not force:
        _refuse_trained_queries(checkpoint, attn_res)

    base_shards = _base_shards(checkpoint, attn_res)
    # Listed before anything is written: a file that vanishes meanwhile is missed
    code = [file.name for file in code_files()]
    names = (CONFIG, INDEX, "README.md", TOKENIZER_CONFIG, *code)
    replaced = [checkpoint.folder / REPLACED / name for name in names]
    replaced = [file for file in replaced if base_shards and file.is_file()]
    ours = {"README.md", REPLACED, *code, *(file.name for file in replaced)}
    others = [file for file in checkpoint.other_files() if file.parts[0] not in ours]
    with new_folder(Path(output), checkpoint.folder) as folder:
        _write_base_weights(checkpoint, attn_res, folder, base_shards)
        if base_shards:
            place_files([(file, folder / file.name) for file in replaced])
        else:
            # Saved anew by transformers since the retrofit: the base's index would name other shards
            write_json(folder / CONFIG, _base_config_json(checkpoint.config, config.base_model_type, architecture))
            close_as(folder / CONFIG, checkpoint.folder / CONFIG)
            if len(list(folder.glob("*.safetensors"))) > 1:
                write_index(folder)
        place_files([(checkpoint.folder / file, folder / file) for file in others])
        check_copy(checkpoint, folder, checkpoint.tensors.keys() - attn_res)
    return Path(output)


def _base_shards(checkpoint: Checkpoint, attn_res: set[str]) -> dict[str, str]:
    """The base's own names of the shards, or none if the checkpoint was saved anew since the retrofit."""
    replaced = checkpoint.folder / REPLACED
    if not (replaced / CONFIG).is_file():
        return {}
    weight_map = {name: shard for name, shard in checkpoint.weights.weight_map.items() if name not in attn_res}
    base_weight_maps = [dict.fromkeys(weight_map, SINGLE_SHARD)]
    if (replaced / INDEX).is_file():
        # Of no meaning where it was left beside a single file
        base_weight_maps.insert(0, read_weight_map(replaced / INDEX))
    for base_weight_map in base_weight_maps:
        names = sorted(set(base_weight_map.values()))
        renamed = {name: shard_name(i, len(names) + 1) for i, name in enumerate(names, 1)}
        if {name: renamed[shard] for name, shard in base_weight_map.items()} == weight_map:
            return {shard: name for name, shard in renamed.items()}
    return {}


def _refuse_trained_queries(checkpoint: Checkpoint, attn_res: set[str]) -> None:
    queries = sorted(name for name in attn_res if name.endswith(".query"))
    trained = []
    for name in queries:
        if checkpoint.tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"The tensor {name!r} of {checkpoint.folder} is {checkpoint.tensors[name].dtype}, no float."
            )
    for shard in sorted({checkpoint.weights.weight_map[name] for name in queries}):
        with safe_open(checkpoint.folder / shard, framework="pt") as tensors:
            trained += [n for n in queries if checkpoint.weights.weight_map[n] == shard and tensors.get_tensor(n).any()]
    if trained:
        raise ValueError(
            f"{len(trained)} of {len(queries)} queries are trained (the first is {trained[0]!r}), so the base alone "
            "computes something else. To drop them all the same, use `force` (--force)."
        )


def _write_base_weights(checkpoint: Checkpoint, attn_res: set[str], folder: Path, base_shards: dict[str, str]) -> None:
    """Copies the shards of the base as they are and saves those anew that hold AttnRes tensors too."""
    shards = {shard: file.tensors.keys() - attn_res for shard, file in checkpoint.weights.files_metadata.items()}
    shards = {shard: kept for shard, kept in shards.items() if kept}
    if len(shards) == 1 and not base_shards:
        base_shards = dict.fromkeys(shards, SINGLE_SHARD)
    copied = []
    for shard, kept in shards.items():
        target = folder / base_shards.get(shard, shard)
        if kept == checkpoint.weights.files_metadata[shard].tensors.keys():
            copied.append((checkpoint.folder / shard, target))
        else:
            from safetensors.torch import save_file

            # By itself it would let nobody else read the file
            target.touch()
            rights = target.stat().st_mode
            try:
                with safe_open(checkpoint.folder / shard, framework="pt") as tensors:
                    save_file({name: tensors.get_tensor(name) for name in kept}, target, metadata=tensors.metadata())
            except SafetensorError as error:
                raise ValueError(f"{checkpoint.folder / shard} cannot be read by torch: {error}") from error
            target.chmod(rights)
            close_as(target, checkpoint.folder / shard)
    place_files(copied)


def _base_config_json(config_json: dict[str, Any], base_model_type: str, architecture: str) -> dict[str, Any]:
    """config.json of the base of a checkpoint that was saved by transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS

    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base_model_type].removesuffix("ForCausalLM")
    kept = {name: value for name, value in config_json.items() if name not in ATTN_RES_FIELDS and name != "auto_map"}
    return {**kept, "model_type": base_model_type, "architectures": [architecture.replace("AttnRes", family)]}
