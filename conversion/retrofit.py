# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Retrofit: a base checkpoint becomes an AttnRes checkpoint that computes the same."""

import os
import re
import shlex
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

import modeling_attnres
from modeling_attnres import AttnResConfig
from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS, AUTO_MAP

from .model_card import carried_license, model_card
from .reading import (
    CARD,
    CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    Checkpoint,
    find_checkpoint,
    hub_snapshot,
    read_checkpoint,
    read_json,
)
from .writing import check_copy, new_folder, parameter_count, place_files, shard_name, write_index, write_json


# The base's own files that a retrofit replaces are kept here, so that `revert` gives them back to the byte
REPLACED = "attnres_base"
# Trained at one learning rate, queries of all widths then change their logits as fast as those of this width
WIDTH_AT_TEMPERATURE_1 = 128


def retrofit(
    base: str | Path, output: str | Path, *, link: bool = False, revision: str | None = None, **attn_res
) -> Path:
    r"""
    Makes an AttnRes checkpoint of a base checkpoint. It works on files: the base's weights are copied or linked as they
    are, and the new tensors (zero queries, key norms of one, in float32) are in a shard of their own.

    With the default scale the result computes what its base computes, up to the rounding of its sums.

    Args:
        base (`str` or `Path`): folder or Hub id of the base checkpoint.
        output (`str` or `Path`): folder to write, new or empty.
        link (`bool`, *optional*, defaults to `False`):
            hard-link the base's weights instead of copying them. Both folders then share them.
        revision (`str`, *optional*): branch, tag or commit of a base on the Hub.
        attn_res: the `attn_res_*` fields of [`AttnResConfig`] that are to differ from their defaults, which a `None`
            stands for too. The default of `attn_res_temperature` is `hidden_size / 128` here: one learning rate then
            suits all widths.

    Returns:
        `Path`: the output.

    Raises:
        `FileNotFoundError`: no such base, or its config.json, safetensors weights or a shard is missing.
        `FileExistsError`: the output is there already and not an empty folder.
        `ValueError`: an unsupported base, an impossible value, a damaged file, weights that are not complete or do not
            fit, a base that is AttnRes already.
        `ImportError`: the base's tokenizer needs a package that is not installed.
    """
    source = read_checkpoint(find_checkpoint(base, revision))
    config = _attnres_config(source, attn_res)
    config_json = _config_json(source, config)
    architecture = config_json["architectures"][0]
    new = new_tensors(config, architecture)
    _check_weights(source, config, architecture, new)
    new = _as_named_in(source, new)
    if taken := sorted(new.keys() & source.tensors.keys()):
        raise ValueError(f"{source.folder} already holds a tensor {taken[0]!r}, the name of one that a retrofit adds.")

    tokenizer_config, tokenizer_class = tokenizer_config_of(source), _tokenizer_class(source)
    code = code_files()
    ours = {CONFIG, INDEX, CARD, *(file.name for file in code)}
    if tokenizer_class is not None and tokenizer_config:
        tokenizer_config["tokenizer_class"] = tokenizer_class
        ours.add(TOKENIZER_CONFIG)
    elif tokenizer_class is not None:
        config_json["tokenizer_class"] = tokenizer_class
    card = _card(source, config, architecture)
    # Listed before anything is written: a file that vanishes meanwhile is an error
    others = [file for file in source.other_files() if str(file) not in ours]
    replaced = [name for name in sorted(ours) if (source.folder / name).is_file()]

    with new_folder(Path(output), source.folder) as folder:
        shards = sorted(source.shards)
        count = len(shards) + 1
        place_files([(source.folder / s, folder / shard_name(i, count)) for i, s in enumerate(shards, 1)], link)
        tensors = {name: torch.full(shape, float(name.endswith("key_norm"))) for name, shape in new.items()}
        (folder / shard_name(count, count)).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_index(folder)
        write_json(folder / CONFIG, config_json)
        if TOKENIZER_CONFIG in ours:
            write_json(folder / TOKENIZER_CONFIG, tokenizer_config)
        place_files((source.folder / file, folder / file) for file in others)
        place_files((source.folder / name, folder / REPLACED / name) for name in replaced)
        for file in code:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
        check_copy(source, folder, source.tensors)
    return Path(output)


def new_tensors(config: AttnResConfig, architecture: str) -> dict[str, list[int]]:
    """
    Names and shapes of the tensors that a model of this configuration and class has beside those of its base.

    Raises:
        `ValueError`: no such model can be built.
    """
    try:
        with torch.device("meta"):
            model = getattr(modeling_attnres, architecture)(config)
    except Exception as error:  # noqa: BLE001  a stranger's configuration: transformers may fail on it anywhere
        raise ValueError(f"No model can be built from this configuration: {error}") from error
    return {
        f"{name}.{parameter_name}": list(parameter.shape)
        for name, module in model.named_modules()
        if type(module).__name__ == "DepthAttention"
        for parameter_name, parameter in module.named_parameters()
    }


def summary(folder: Path) -> str:
    """What a retrofit is: base, layers, sources, new parameters."""
    checkpoint = read_checkpoint(folder)
    config = read_config(checkpoint)
    added = checkpoint.shards[max(checkpoint.shards)]
    count = sum(map(parameter_count, added.values()))
    total = sum(map(parameter_count, checkpoint.tensors.values()))
    layers, size = config.num_hidden_layers, config.attn_res_block_size
    sources = "each sublayer's output" if config.attn_res_type == "full" else f"{-(-layers // size)} blocks of {size}"
    exact = (
        "computes what its base computes" if config.attn_res_scale == "sum" else "does not compute what its base does"
    )
    return (
        f"{config.base_model_type}, {layers} layers, {config.attn_res_type} ({sources}), {count:,} new parameters "
        f"({count / total:.2%}); it {exact}"
    )


def read_config(checkpoint: Checkpoint) -> AttnResConfig:
    """
    The configuration of an AttnRes checkpoint, or a base's as an AttnRes configuration.

    Raises:
        `ValueError`: transformers finds it invalid.
    """
    try:
        return AttnResConfig.from_dict(checkpoint.config)
    except Exception as error:  # noqa: BLE001  a stranger's file: transformers may fail on it anywhere
        raise ValueError(f"{checkpoint.folder / CONFIG} is not a valid configuration: {_reason(error)}") from error


def require_attnres(checkpoint: Checkpoint) -> None:
    model_type = checkpoint.config["model_type"]
    if model_type != "attnres":
        raise ValueError(f"{checkpoint.folder} is not an AttnRes checkpoint: its `model_type` is {model_type!r}.")


def new_tensors_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """
    The new tensors of an AttnRes checkpoint, by the names that they have in it.

    Raises:
        `ValueError`: not an AttnRes checkpoint, or a configuration or class of which no model can be built.
    """
    require_attnres(checkpoint)
    classes = {name.split(".")[1] for auto_class, name in AUTO_MAP.items() if auto_class != "AutoConfig"}
    if checkpoint.architecture not in classes:
        raise ValueError(
            f"`architectures` of {checkpoint.folder / CONFIG} names {checkpoint.architecture!r}, which is no AttnRes "
            "model."
        )
    return _as_named_in(checkpoint, new_tensors(read_config(checkpoint), checkpoint.architecture))


def _as_named_in(checkpoint: Checkpoint, new: dict[str, list[int]]) -> dict[str, list[int]]:
    """transformers also loads a model with a head by the names of its bare decoder."""
    if any(name.startswith("model.") for name in checkpoint.tensors):
        return new
    return {name.removeprefix("model."): shape for name, shape in new.items()}


def code_files() -> list[Path]:
    """The files that the Auto classes run where the package is not installed."""
    path = modeling_attnres.modeling_attnres.__file__
    return [Path(path), *map(Path, get_relative_import_files(path))]


def tokenizer_config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / TOKENIZER_CONFIG
    return read_json(path) if path.is_file() else {}


def _attnres_config(source: Checkpoint, attn_res: dict[str, Any]) -> AttnResConfig:
    fields = [name for name in ATTN_RES_FIELDS if name != "base_model_type"]
    if unknown := sorted(attn_res.keys() - set(fields)):
        raise TypeError(f"`{unknown[0]}` is no option of a retrofit. There are: {', '.join(fields)}.")
    if source.config["model_type"] == "attnres":
        raise ValueError(f"{source.folder} is an AttnRes checkpoint already: its `model_type` is 'attnres'.")
    if (source.folder / REPLACED).exists():
        raise ValueError(
            f"{source.folder / REPLACED} is in the way: a retrofit keeps the files that it replaces in a folder "
            "of this name. Rename it."
        )
    # First without the options, so that an error blames config.json only if it is to blame
    width = read_config(source).hidden_size
    if not isinstance(width, int):
        raise ValueError(f"`hidden_size` of {source.folder / CONFIG} is {width!r}, but it has to be a number.")
    attn_res = {name: value for name, value in attn_res.items() if value is not None}
    attn_res = {"attn_res_temperature": width / WIDTH_AT_TEMPERATURE_1, **attn_res}
    try:
        return AttnResConfig.from_dict({**source.config, **attn_res})
    except Exception as error:  # noqa: BLE001  a validator wraps its `ValueError` or `TypeError`
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The error's text; of a validator's, without the validator's name."""
    return str(error.__cause__ or error)


def _config_json(source: Checkpoint, config: AttnResConfig) -> dict[str, Any]:
    """The base's config.json with the fields of the retrofit."""
    kind = re.search(r"(ForCausalLM|ForSequenceClassification|ForTokenClassification|Model)$", source.architecture)
    if kind is None:
        raise ValueError(
            f"`architectures` of {source.folder / CONFIG} names {source.architecture}, but only a causal language "
            "model, a sequence or token classifier and a decoder without a head (…Model) can be retrofitted."
        )
    auto_map = source.config.get("auto_map") or {}
    if any(name.startswith("AutoModel") for name in auto_map):
        warnings.warn(
            f"{source.folder} has model code of its own (`auto_map`). It is not run: the retrofit computes what "
            f"{source.config['model_type']} computes in transformers.",
            stacklevel=3,
        )
    config_json = {
        **source.config,
        **{name: getattr(config, name) for name in ATTN_RES_FIELDS},
        "model_type": "attnres",
        "architectures": [f"AttnRes{kind[0]}"],
        "auto_map": {**auto_map, **AUTO_MAP},
    }
    if source.config.get("rope_scaling") and "rope_parameters" not in source.config:
        # Without this package AutoTokenizer reads config.json as a plain configuration, which fails on the older form
        config_json["rope_parameters"] = config.rope_parameters
        for name in ("rope_scaling", "rope_theta"):
            config_json.pop(name, None)
    return config_json


def _check_weights(source: Checkpoint, config: AttnResConfig, architecture: str, new: dict[str, list[int]]) -> None:
    """
    Checks that no tensor of the base is missing or has a wrong shape. transformers itself loads tensors without values,
    since it knows how each family keeps its experts on disk. Packed weights of a quantized base are left to `verify`.
    """
    if source.config.get("quantization_config") is not None:
        return
    path = source.folder / CONFIG
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # It would report the queries that are not there yet
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        tensors = {name: torch.empty(info["shape"], device="meta") for name, info in source.tensors.items()}
        _, problems = getattr(modeling_attnres, architecture).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            # The function that computes attention does not matter here, and may not be installed
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001  a stranger's file: transformers may fail on it anywhere
        reason = "the weights of its experts do not fit together" if "CONVERSION" in str(error) else error
        raise ValueError(f"No model can be built from {path} and the weights beside it: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
    for name, shape, expected in sorted(problems["mismatched_keys"]):
        raise ValueError(
            f"The tensor {name!r} of {source.folder} has the shape {list(shape)}, but {CONFIG} makes it "
            f"{list(expected)}."
        )
    for name in sorted(problems["missing_keys"] - new.keys()):
        raise ValueError(
            f"{source.folder} holds no tensor {name!r}, which {CONFIG} asks for: its weights are not complete, or not "
            "those of this configuration."
        )


def _tokenizer_class(source: Checkpoint) -> str | None:
    """
    The class that AutoTokenizer takes for the base, if the base's files do not name it: AutoTokenizer also goes by the
    `model_type`, and the retrofit's is another.
    """
    content, folder = tokenizer_config_of(source), source.folder
    if "auto_map" in content or "AutoTokenizer" in (source.config.get("auto_map") or {}):
        warnings.warn(
            f"The tokenizer of {folder} has code of its own. It is not run here, but it runs where the tokenizer is "
            "loaded with `trust_remote_code=True`.",
            stacklevel=3,
        )
    if not any(folder.glob("token*")) or "auto_map" in content:
        return None
    only_sentencepiece = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_sentencepiece and find_spec("sentencepiece") is None:
        # transformers would try other packages, and the output would depend on the ones that are installed
        raise ImportError(
            f"The tokenizer of {folder} is a tokenizer.model alone, which needs the package sentencepiece: "
            "`pip install sentencepiece protobuf`."
        )
    try:
        # The output must not depend on mistral-common being installed
        tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a tokenizer that cannot be loaded is left as it is
        cause = error
        while cause is not None and not isinstance(cause, ImportError):
            cause = cause.__context__
        if cause is not None:
            raise ImportError(f"The tokenizer of {folder} needs a package that is not installed: {cause}") from error
        warnings.warn(f"The tokenizer of {folder} cannot be loaded and was not checked: {error}", stacklevel=3)
        return None
    named = content.get("tokenizer_class") or source.config.get("tokenizer_class") or ""
    tokenizer_class = type(tokenizer).__name__
    return None if named.removesuffix("Fast") == tokenizer_class.removesuffix("Fast") else tokenizer_class


def _card(source: Checkpoint, config: AttnResConfig, architecture: str) -> str:
    # A folder's name may look like a Hub id, and is none
    hub_id, commit = hub_snapshot(source.folder) or (None, None)
    options = {
        "--type": config.attn_res_type,
        "--block-size": config.attn_res_block_size,
        "--scale": config.attn_res_scale,
        "--norm-eps": config.attn_res_norm_eps,
        "--temperature": config.attn_res_temperature,
        **({"--revision": commit} if commit else {}),
    }
    name = hub_id or os.path.basename(os.path.abspath(source.folder))
    words = ["attnres", "retrofit", name, "OUTPUT", *(str(word) for option in options.items() for word in option)]
    auto_class = getattr(modeling_attnres, architecture)._auto_class
    exact = ", and the model computes what its base computes" if config.attn_res_scale == "sum" else ""
    state = f"Until it is trained further, its weights are the base's and its queries are zero{exact}."
    made = f"`{shlex.join(words)}`"
    return model_card(config, auto_class, name, carried_license(source.folder), state, made, hub_id)
