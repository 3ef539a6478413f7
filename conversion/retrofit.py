# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Retrofit: a base checkpoint becomes an AttnRes checkpoint that computes the same."""

import copy
import os
import re
import shlex
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import (
    CONFIG,
    INDEX,
    REPLACED,
    TOKENIZER_CONFIG,
    Checkpoint,
    check_copy,
    close_as,
    download,
    new_folder,
    place_files,
    read_checkpoint,
    read_json,
    shard_name,
    write_index,
    write_json,
)


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from modeling_attnres import AttnResConfig


# Trained at the same rate, queries of any width then change their logits as fast as those of this one
WIDTH_AT_TEMPERATURE_1 = 128
# What is no weight by itself, but comes beside one that is packed
_BESIDE_A_WEIGHT = re.compile(r"(absmax|bias|g_idx|scales?|scale_inv|shape|zeros|zero_points?)$")
# What GraniteMoE calls the weights of all experts of a layer
_GRANITE = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
# As safetensors names them
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def retrofit(
    source: str | Path,
    output: str | Path,
    attn_res_type: str = "block",
    attn_res_block_size: int | None = None,
    attn_res_scale: str = "sum",
    attn_res_norm_eps: float = 1e-6,
    attn_res_temperature: float | None = None,
    link: bool = False,
    revision: str | None = None,
) -> Path:
    r"""
    Makes an AttnRes checkpoint of a Llama-style one. It works on files: the base's weights are copied or linked as they
    are, the new tensors (zero queries, key norms of one) come in a shard of their own.

    With the default scale the result computes what its base computes, up to the rounding of its sums.

    Args:
        source (`str` or `Path`): folder or Hub id of the base checkpoint.
        output (`str` or `Path`): folder to write, new or empty.
        attn_res_type, attn_res_block_size, attn_res_scale, attn_res_norm_eps: see [`AttnResConfig`].
        attn_res_temperature (`float`, *optional*, defaults to `hidden_size / 128`):
            see [`AttnResConfig`]. With the default, one learning rate for all parameters is right at every width.
        link (`bool`, *optional*, defaults to `False`):
            hard-link the base's weights in place of copying them. Both folders then share them.
        revision (`str`, *optional*): branch, tag or commit of a source on the Hub.

    Returns:
        `Path`: the output.

    Raises:
        `FileNotFoundError`: no such source, or config.json, safetensors weights or a shard missing.
        `FileExistsError`: the output is there already and not an empty folder.
        `ValueError`: an unsupported base, an impossible value, a damaged file, weights that are not complete or do not
            fit, a source that is AttnRes already.
        `ImportError`: the base's tokenizer needs a package that is not installed.
    """
    source, output = str(source), Path(output)
    base = read_checkpoint(download(source, revision))
    attn_res = {
        "base_model_type": base.config["model_type"],
        "attn_res_type": attn_res_type,
        "attn_res_block_size": attn_res_block_size,
        "attn_res_scale": attn_res_scale,
        "attn_res_norm_eps": attn_res_norm_eps,
        "attn_res_temperature": attn_res_temperature,
    }
    config, config_json, tensors = _plan(base, attn_res)
    tokenizer_config, tokenizer_class = _tokenizer_config(base), _tokenizer_class(base)
    model_card = _model_card(base, config, config_json["architectures"][0])
    code = code_files()
    ours = {CONFIG, INDEX, "README.md", *(file.name for file in code)}
    if tokenizer_class is not None and tokenizer_config:
        tokenizer_config["tokenizer_class"] = tokenizer_class
        ours.add(TOKENIZER_CONFIG)
    elif tokenizer_class is not None:
        config_json["tokenizer_class"] = tokenizer_class
    # All of this before anything is written: a file that vanishes meanwhile is missed
    others = [file for file in base.other_files() if str(file) not in ours]
    replaced = [name for name in sorted(ours) if (base.folder / name).is_file()]

    with new_folder(output, base.folder) as folder:
        shards = sorted(base.weights.files_metadata)
        count = len(shards) + 1
        place_files([(base.folder / s, folder / shard_name(i, count)) for i, s in enumerate(shards, 1)], link)
        _save_tensors(tensors, folder / shard_name(count, count))
        write_index(folder)
        if TOKENIZER_CONFIG in ours:
            write_json(folder / TOKENIZER_CONFIG, tokenizer_config)
        write_json(folder / CONFIG, config_json)
        place_files([(base.folder / file, folder / file) for file in others])
        place_files([(base.folder / name, folder / REPLACED / name) for name in replaced])
        for file in code:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text(model_card, encoding="utf-8", newline="\n")
        for name in replaced:
            close_as(folder / name, base.folder / name)
        check_copy(base, folder, base.tensors.keys())
    return output


def read_config(checkpoint: Checkpoint, **attn_res) -> "AttnResConfig":
    """
    The AttnRes configuration in a checkpoint's config.json, or in a base's together with the `attn_res` fields.

    Raises:
        `ValueError`: whatever transformers finds wrong with it.
    """
    from modeling_attnres import AttnResConfig

    try:
        return AttnResConfig.from_dict({**checkpoint.config, **attn_res})
    except Exception as error:  # noqa: BLE001  a stranger's file: transformers may stumble over it anywhere
        raise ValueError(f"No valid configuration from {checkpoint.folder / CONFIG}: {error}") from error


def attn_res_tensors(checkpoint: Checkpoint, config: "AttnResConfig", architecture: str) -> dict[str, "torch.Tensor"]:
    """
    The tensors that a model of that class has beside its base's, with their first values, in float32.

    Raises:
        `ValueError`: there is no such class, or the checkpoint's tensors do not fit the configuration.
    """
    import modeling_attnres
    from modeling_attnres.configuration_attnres import AUTO_MAP

    path = checkpoint.folder / CONFIG
    if architecture not in {name.split(".")[1] for auto_class, name in AUTO_MAP.items() if auto_class != "AutoConfig"}:
        raise ValueError(f"`architectures` of {path} names {architecture!r}, which is no AttnRes model.")
    model = _model_without_values(checkpoint, config, getattr(modeling_attnres, architecture))
    first_values = modeling_attnres.DepthAttention(config).state_dict()
    prefix = "model." if "embed_tokens.weight" in checkpoint.tensors else ""
    return {
        f"{module_name.removeprefix(prefix)}.{name}": value
        for module_name, module in model.named_modules()
        if isinstance(module, modeling_attnres.DepthAttention)
        for name, value in first_values.items()
    }


def _model_without_values(
    checkpoint: Checkpoint, config: "AttnResConfig", model_class: type["PreTrainedModel"]
) -> "PreTrainedModel":
    """
    The checkpoint's model on the meta device. transformers itself loads shapes for tensors, since it knows how each
    family's experts lie on disk, and what is missing or misshapen shows.
    """
    import torch
    from transformers.utils import logging

    import modeling_attnres

    path = checkpoint.folder / CONFIG
    quantised = _is_quantised(checkpoint)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # It would tell of the queries that are not there yet
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        tensors = {
            name: torch.empty(info.shape, device="meta")
            for name, info in checkpoint.tensors.items()
            if not (quantised and ".experts." in name)
        }
        model, problems = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            # What computes attention is of no matter here, and may not be installed
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001  as for the configuration
        reason = "the weights of its experts do not fit together" if "CONVERSION" in str(error) else error
        raise ValueError(f"No model can be built from {path} and the weights beside it: {reason}.") from error
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()

    for name, shape, expected in sorted(problems["mismatched_keys"]):
        # What is packed has a shape of its own
        info = checkpoint.tensors.get(name) or checkpoint.tensors.get(name.removeprefix("model."))
        if not quantised or info and (info.dtype in FLOATS or info.dtype.startswith("F8_")):
            raise ValueError(
                f"The tensor {name!r} of {checkpoint.folder} has the shape {list(shape)}, but {CONFIG} makes it "
                f"{list(expected)}."
            )
    # By the names that transformers takes them for, which are not always those on disk
    unexpected = problems["unexpected_keys"]

    def holds_packed(name):
        if ".experts." in name:
            return _holds_packed_experts(checkpoint, name, len(model.get_parameter(name)))
        module_name = name.removeprefix("model.").removesuffix(".weight")
        parts = (part for part in unexpected if part.removeprefix("model.").startswith(f"{module_name}."))
        return name.endswith(".weight") and any(not _BESIDE_A_WEIGHT.search(part) for part in parts)

    for name in sorted(problems["missing_keys"]):
        module_name = name.rpartition(".")[0]
        new = isinstance(model.get_submodule(module_name), modeling_attnres.DepthAttention)
        if not new and not (quantised and holds_packed(name)):
            raise ValueError(
                f"{checkpoint.folder} holds no tensor {name!r}, which {CONFIG} asks for: its weights are not complete, "
                "or not those of this configuration."
            )
    return model


def _is_quantised(checkpoint: Checkpoint) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    quantisation = checkpoint.config.get("quantization_config")
    if quantisation is None:
        return False
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    older = isinstance(quantisation, dict) and (quantisation.get("load_in_8bit") or quantisation.get("load_in_4bit"))
    if not older and (not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ValueError(
            f"`quantization_config` of {checkpoint.folder / CONFIG} has {method!r} for its `quant_method`, which "
            "transformers does not know: take the field out if the weights are not quantised."
        )
    return True


def _holds_packed_experts(checkpoint: Checkpoint, name: str, count: int) -> bool:
    """Whether a quantised checkpoint holds this parameter of all of a layer's experts, by whatever names."""
    # Not all families call the module around them alike
    layer, parameter = re.search(r"layers\.\d+\.", name)[0], name.rpartition(".")[2]
    tensors = [tensor for tensor in checkpoint.tensors if layer in tensor]
    weights = [tensor for tensor in tensors if not _BESIDE_A_WEIGHT.search(tensor)]
    # All in one, as it is or packed
    together = (f".experts.{parameter}", f".{_GRANITE.get(parameter)}.")
    if any(tensor.endswith(together[0]) for tensor in tensors) or any(p in w for w in weights for p in together):
        return True
    # One by one: NUMBER.up_proj.weight
    experts = defaultdict(set)
    for tensor in weights:
        if one := re.search(r"\.experts\.(\d+)\.(\w+)\.", tensor):
            experts[one[2]].add(int(one[1]))
    return len(experts) == 3 and all(numbers == set(range(count)) for numbers in experts.values())


def _plan(base: Checkpoint, attn_res: dict[str, Any]) -> tuple["AttnResConfig", dict[str, Any], dict[str, Any]]:
    """Configuration, config.json and new tensors of the retrofit; all that can be wrong with the base shows here."""
    import torch

    from modeling_attnres.configuration_attnres import ATTN_RES_FIELDS, AUTO_MAP

    if base.config["model_type"] == "attnres":
        raise ValueError(f"{base.folder} is an AttnRes checkpoint already: its `model_type` is 'attnres'.")
    if (base.folder / REPLACED).exists():
        raise ValueError(
            f"{base.folder / REPLACED} is in the way: a retrofit keeps what it replaces by that name. Rename it."
        )
    given = {name: value for name, value in attn_res.items() if value is not None}
    config = read_config(base, **given)
    if "attn_res_temperature" not in given:
        config.attn_res_temperature = config.hidden_size / WIDTH_AT_TEMPERATURE_1
    base_auto_map = base.config.get("auto_map") or {}
    if any(name.startswith("AutoModel") for name in base_auto_map):
        warnings.warn(
            f"{base.folder} brings model code of its own (`auto_map`). It is not run: the retrofit computes what the "
            f"{base.config['model_type']} of transformers computes.",
            stacklevel=3,
        )

    base_architecture = (base.config.get("architectures") or ["ForCausalLM"])[0]
    kind = re.search(r"(ForCausalLM|ForSequenceClassification|ForTokenClassification|Model)$", base_architecture)
    if kind is None:
        raise ValueError(
            f"`architectures` of {base.folder / CONFIG} names {base_architecture}, but only a causal language model, a "
            "sequence or token classifier and a decoder without a head (…Model) can be retrofitted."
        )
    architecture = f"AttnRes{kind[0]}"
    # transformers takes the names of a bare decoder for a model with a head, too
    embeddings = ["embed_tokens.weight"] if kind[0] == "Model" else ["model.embed_tokens.weight", "embed_tokens.weight"]
    embedding = next((name for name in embeddings if name in base.tensors), None)
    if embedding is None:
        raise ValueError(
            f"{base.folder} holds no tensor {embeddings[0]!r}: these are not the weights of a {base_architecture}. If "
            "transformers loads them all the same, load and save them with it."
        )
    if base.tensors[embedding].dtype not in FLOATS:
        raise ValueError(f"The tensor {embedding!r} of {base.folder} is {base.tensors[embedding].dtype}, not a float.")

    config_json = {
        **base.config,
        **{name: getattr(config, name) for name in ATTN_RES_FIELDS},
        "model_type": "attnres",
        "architectures": [architecture],
        "auto_map": {**base_auto_map, **AUTO_MAP},
    }
    tensors = attn_res_tensors(base, config, architecture)
    if taken := sorted(tensors.keys() & base.tensors.keys()):
        raise ValueError(f"{base.folder} holds a tensor {taken[0]!r} already, the name of one that a retrofit adds.")
    dtype = getattr(torch, FLOATS[base.tensors[embedding].dtype])
    # Cloned, since a file must not share memory between tensors
    return config, config_json, {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}


def _tokenizer_class(base: Checkpoint) -> str | None:
    """
    The class that AutoTokenizer takes for the base, where the base's files do not name it: AutoTokenizer goes by the
    `model_type` too, and the retrofit's is another.
    """
    from transformers import AutoTokenizer

    content = _tokenizer_config(base)
    if "auto_map" in content or "AutoTokenizer" in (base.config.get("auto_map") or {}):
        warnings.warn(
            f"The tokenizer of {base.folder} brings code of its own. It is not run here, but whoever loads it with "
            "`trust_remote_code=True` runs it.",
            stacklevel=3,
        )
    if not any(base.folder.glob("token*")) or "auto_map" in content:
        return None
    try:
        # As where mistral-common is not installed: what is written must not depend on that
        tokenizer = AutoTokenizer.from_pretrained(base.folder, mistral_format=False, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a tokenizer that cannot be loaded is left as it is
        cause = error
        while cause is not None and not isinstance(cause, ImportError):
            cause = cause.__context__
        if cause is not None:
            # What is written must not depend on what is installed
            raise ImportError(f"The tokenizer of {base.folder} needs a package: {error} ({cause})") from error
        warnings.warn(f"The tokenizer of {base.folder} cannot be loaded and was not checked: {error}", stacklevel=3)
        return None
    named = content.get("tokenizer_class") or base.config.get("tokenizer_class") or ""
    tokenizer_class = type(tokenizer).__name__
    return None if named.removesuffix("Fast") == tokenizer_class.removesuffix("Fast") else tokenizer_class


def _tokenizer_config(base: Checkpoint) -> dict[str, Any]:
    return read_json(base.folder / TOKENIZER_CONFIG) if (base.folder / TOKENIZER_CONFIG).is_file() else {}


def _licence(base: Checkpoint) -> dict[str, Any]:
    """What the base's model card says of its licence."""
    from modeling_attnres.model_card import card_metadata, carried_licence

    path = base.folder / "README.md"
    if not path.is_file():
        return {}
    try:
        return carried_licence(card_metadata(path.read_text(encoding="utf-8")), base.folder)
    except Exception as error:  # noqa: BLE001  the card is written anew; the old one stays in `attnres_base`
        warnings.warn(f"{path} cannot be read and its licence was not taken over: {error}", stacklevel=3)
        return {}


def _save_tensors(tensors: dict[str, "torch.Tensor"], path: Path) -> None:
    from safetensors.torch import save

    # `save_file` would let nobody else read the file
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def code_files() -> list[Path]:
    """The files that the Auto classes run when the package is not installed."""
    from transformers.dynamic_module_utils import get_relative_import_files

    from modeling_attnres import modeling_attnres

    return [Path(modeling_attnres.__file__), *map(Path, get_relative_import_files(modeling_attnres.__file__))]


def _model_card(base: Checkpoint, config: "AttnResConfig", architecture: str) -> str:
    import modeling_attnres
    from modeling_attnres.model_card import hub_snapshot, model_card

    # A folder's name may read as a Hub id, and is none
    base_model, commit = hub_snapshot(base.folder) or (None, None)
    base_name = base_model or os.path.basename(os.path.abspath(base.folder))
    # True of it whatever comes after, since a card that is there stays when a trained model is saved beside it
    state = "As retrofitted, its weights are the base's and its queries are zero"
    if config.attn_res_scale == "sum":
        state += ": until it is trained further, it computes what its base computes"
    options = {
        "--type": config.attn_res_type,
        "--block-size": config.attn_res_block_size,
        "--scale": config.attn_res_scale,
        "--norm-eps": config.attn_res_norm_eps,
        "--temperature": config.attn_res_temperature,
        **({"--revision": commit} if commit else {}),
    }
    arguments = [base_name, "OUTPUT", *(str(word) for option in options.items() for word in option)]
    made = f"`{shlex.join(['attnres', 'retrofit', *arguments])}`"
    auto_class = getattr(modeling_attnres, architecture)._auto_class
    return model_card(config, auto_class, base_model, _licence(base), f"{state}.", made, base_name=base_name)
