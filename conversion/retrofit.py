# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Retrofit: a base checkpoint becomes an AttnRes checkpoint that computes the same."""

import re
import warnings
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

import modeling_attnres
from modeling_attnres import AttnResConfig
from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS, AUTO_MAP, WIDTH_AT_TEMPERATURE_1

from .model_card import model_card, sources_in_words
from .reading import CARD, CONFIG, INDEX, KEPT, NEW_TENSOR, TOKENIZER_CONFIG, Checkpoint, other_files, read_checkpoint
from .writing import new_folder, place_files, write_index, write_json


def retrofit(
    base: str | Path, output: str | Path, *, link: bool = False, revision: str | None = None, **attn_res
) -> Path:
    r"""
    Makes an AttnRes checkpoint from a base checkpoint, on files. The base's weights are copied or linked as they are.
    The new tensors (zero queries, key norms of one, in float32) are in a shard of their own. With the default scale the
    result computes what its base computes, up to the rounding of its sums.

    Args:
        base (`str` or `Path`): folder or Hub id of the base checkpoint.
        output (`str` or `Path`): folder to write, new or empty. It is returned.
        link (`bool`, *optional*, defaults to `False`): hard-link the base's weights. Both folders then share them.
        revision (`str`, *optional*): branch, tag or commit of a base on the Hub.
        attn_res: `attn_res_*` fields of [`AttnResConfig`]. `None` means the default. Here, the default of
            `attn_res_temperature` is `hidden_size / 128`, so that one learning rate suits all widths.

    Raises:
        `FileNotFoundError`: no such base, or its config.json, safetensors weights or a shard is missing.
        `FileExistsError`: the output exists already and is not an empty folder.
        `ValueError`: an unsupported base, an impossible value, a damaged file, weights that are missing or do not fit.
        `ImportError`: the base's tokenizer needs a package that is not installed.
        `TypeError`: an unknown `attn_res_*` field.
    """
    source = read_checkpoint(base, revision)
    config = _attnres_config(source, attn_res)
    config_json = _config_json(source, config)
    new = _new_tensors(source, config, config_json["architectures"][0])
    json_files, code = {CONFIG: config_json}, code_files()
    if (tokenizer_class := _tokenizer_class(source)) is not None:
        name = TOKENIZER_CONFIG if source.tokenizer_config else CONFIG
        json_files[name] = {**(source.tokenizer_config or config_json), "tokenizer_class": tokenizer_class}
    ours = {*json_files, INDEX, CARD, *(file.name for file in code)}
    card = model_card(source, config, config_json["architectures"][0])
    # Listed before anything is written: a file that vanishes in the meantime is an error
    others = [file for file in other_files(source.folder) if str(file) not in ours]
    replaced = [name for name in sorted(ours) if (source.folder / name).is_file()]

    with new_folder(Path(output), source) as folder:
        count = len(source.shards) + 1
        # transformers removes files of such names when it saves over them
        *names, last = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        place_files(((source.folder / shard, folder / name) for shard, name in zip(source.shards, names)), link)
        (folder / last).write_bytes(save(new, metadata={"format": "pt"}))
        write_index(folder)
        for name, content in json_files.items():
            write_json(folder / name, content)
        place_files((source.folder / file, folder / file) for file in others)
        place_files((source.folder / name, folder / KEPT / name) for name in replaced)
        place_files((file, folder / file.name) for file in code)
        (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    return Path(output)


def summary(folder: Path) -> str:
    """A retrofit in a few words: base, layers, sources, new parameters, exact or not."""
    checkpoint = read_checkpoint(folder)
    config = checkpoint.attnres_config
    sizes = {name: prod(info["shape"]) for name, info in checkpoint.tensors.items()}
    new = sum(sizes[name] for name in checkpoint.new_tensors)
    base = f"{config.base_model_type}, {config.num_hidden_layers} layers"
    share = f"{new:,} new parameters ({new / sum(sizes.values()):.2%})"
    is_exact = config.attn_res_scale == "sum"
    exact = "It computes the same as its base" if is_exact else "It differs from its base (scale 'mean')"
    return f"{base}, {sources_in_words(config)}, {share}. {exact}"


def code_files() -> list[Path]:
    """The files that the Auto classes run where the package is not installed."""
    path = modeling_attnres.modeling_attnres.__file__
    return [Path(path), *map(Path, get_relative_import_files(path))]


def _attnres_config(source: Checkpoint, attn_res: dict[str, Any]) -> AttnResConfig:
    fields = [name for name in ATTN_RES_FIELDS if name != "base_model_type"]
    if unknown := sorted(attn_res.keys() - set(fields)):
        raise TypeError(f"`{unknown[0]}` is not an option of a retrofit. The options are: {', '.join(fields)}.")
    if source.config["model_type"] == "attnres":
        raise ValueError(f"{source.folder} is an AttnRes checkpoint already: its `model_type` is 'attnres'.")
    if (taken := source.folder / KEPT).exists():
        raise ValueError(f"Rename {taken}: a retrofit keeps the base's own files in a folder of this name.")
    # The configuration without the options comes first: its errors come from config.json
    width = source.attnres_config.hidden_size
    attn_res = {name: value for name, value in attn_res.items() if value is not None}
    try:
        attn_res = {"attn_res_temperature": width / WIDTH_AT_TEMPERATURE_1, **attn_res}
        return AttnResConfig.from_dict({**source.config, **attn_res})
    except Exception as error:  # noqa: BLE001  a validator wraps its `ValueError` or `TypeError`
        raise ValueError(str(error.__cause__ or error)) from error


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
        instead = f"the retrofit computes what {source.config['model_type']} computes in transformers"
        warnings.warn(f"The model code of {source.folder} (`auto_map`) is not used: {instead}.", stacklevel=3)
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


def _new_tensors(source: Checkpoint, config: AttnResConfig, architecture: str) -> dict[str, torch.Tensor]:
    """
    The tensors that a retrofit adds to its base. transformers loads the base's tensors, without values, into a model on
    the meta device. transformers knows the layout of each family's experts on the disk, and reports missing tensors and
    wrong shapes. The packed weights of a quantized base are not checked here, but by `verify`.
    """
    if taken := sorted(source.new_tensors):
        raise ValueError(f"{source.folder} has a tensor {taken[0]!r}, the name of one that a retrofit adds: rename it.")
    is_packed = source.config.get("quantization_config") is not None
    model_class = getattr(modeling_attnres, architecture)
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Otherwise transformers reports the new tensors as missing
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        if is_packed:
            with torch.device("meta"):
                model, problems = model_class(config), {"mismatched_keys": (), "missing_keys": set()}
        else:
            model, problems = model_class.from_pretrained(
                None,
                config=config,
                state_dict={n: torch.empty(info["shape"], device="meta") for n, info in source.tensors.items()},
                device_map={"": "meta"},
                # The function that computes attention does not matter here, and may not be installed
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # noqa: BLE001  untrusted files: transformers may fail on them anywhere
        raise ValueError(f"No model can be built from {source.folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
    for name, shape, expected in sorted(problems["mismatched_keys"]):
        raise ValueError(
            f"The tensor {name!r} of {source.folder} has shape {list(shape)}, but {CONFIG} makes it {list(expected)}."
        )
    if missing := sorted(name for name in problems["missing_keys"] if not NEW_TENSOR.search(name)):
        raise ValueError(f"{source.folder} has no tensor {missing[0]!r}, which {CONFIG} requires: the two do not fit.")
    # transformers also loads a model with a head if the tensors' names lack the prefix `model.`
    prefix = "" if any(name.startswith("model.") for name in source.tensors) else "model."
    return {
        name.removeprefix(prefix): torch.full(parameter.shape, float(name.endswith("key_norm")))
        for name, parameter in model.named_parameters()
        if NEW_TENSOR.search(name)
    }


def _tokenizer_class(source: Checkpoint) -> str | None:
    """
    The class that AutoTokenizer takes for the base, if the base's files do not name it: AutoTokenizer also goes by the
    `model_type`, and the retrofit has another one.
    """
    folder, content = source.folder, source.tokenizer_config
    if not any(folder.glob("token*")) or "auto_map" in content:
        return None
    is_sentencepiece = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if is_sentencepiece and find_spec("sentencepiece") is None:
        # transformers would try other packages, and the output would depend on the ones that are installed
        raise ImportError(f"{folder / 'tokenizer.model'} needs a package: `pip install sentencepiece protobuf`.")
    try:
        # The output must not depend on mistral-common being installed
        tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a tokenizer that cannot be loaded is left as it is
        if any(isinstance(cause, ImportError) for cause in (error, error.__cause__, error.__context__)):
            raise ImportError(f"The tokenizer of {folder} needs a package that is not installed: {error}") from error
        warnings.warn(f"The tokenizer of {folder} cannot be loaded and was not checked: {error}", stacklevel=3)
        return None
    named = content.get("tokenizer_class") or source.config.get("tokenizer_class") or ""
    tokenizer_class = type(tokenizer).__name__
    return None if named.removesuffix("Fast") == tokenizer_class.removesuffix("Fast") else tokenizer_class
