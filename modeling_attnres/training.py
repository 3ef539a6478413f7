# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Settings of AttnRes models for training tools."""

import warnings
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .modeling_attnres import ATTN_RES_MODULES


if TYPE_CHECKING:
    from peft import PeftConfig


# The max change of the logits in one step. For SmolLM2, 0.4 is best if queries are trained alone; 1.3 ruins the model
MAX_LOGIT_STEP = 0.5


def attn_res_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    attn_res_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    r"""
    The trained parameters of a model in groups for an optimizer: matrices with weight decay; vectors and biases
    without; queries and key norms without, and with their own learning rate. Tensor parallelism adds groups of its own.

    Args:
        model (`nn.Module`): an AttnRes model or a base, also with PEFT's adapters or sharded by FSDP2 or ZeRO-3.
        learning_rate (`float`): the learning rate of all parameters except queries and key norms.
        attn_res_learning_rate (`float`, *optional*, defaults to `learning_rate`): that of queries and key norms.
        weight_decay (`float`, *optional*, defaults to 0.0): the weight decay of matrices.

    Returns:
        `list[dict[str, Any]]`: groups with `params`, `lr` and `weight_decay`. No group is empty.

    Warns if a step of Adam can change the logits of the depth attention by more than 0.5, and of half precision.

    ```python
    >>> def adamw(model, **kwargs):
    ...     return torch.optim.AdamW(attn_res_parameter_groups(model, **kwargs))

    >>> rates = {"learning_rate": 5e-5, "attn_res_learning_rate": 2e-4}
    >>> Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(lambda: adamw, rates))
    ```"""
    if attn_res_learning_rate is None:
        attn_res_learning_rate = learning_rate
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_attn_res = not set(ATTN_RES_MODULES).isdisjoint(name.split("."))
        # A parameter that DeepSpeed ZeRO-3 has sharded is empty, and has its shape in `ds_shape`. The biases of all
        # experts are one matrix, and Kimi Linear's `A_log`, one number for each head, has dimensions of size one
        shape = getattr(parameter, "ds_shape", parameter.shape)
        is_matrix = len(shape) > 1 and not is_attn_res and not name.endswith(("bias", "A_log"))
        lr = attn_res_learning_rate if is_attn_res else learning_rate
        group = {"params": [], "lr": lr, "weight_decay": weight_decay if is_matrix else 0.0}
        key = (is_attn_res, is_matrix, getattr(parameter, "device_mesh", None))
        groups.setdefault(key, group)["params"].append(parameter)
    if attn_res := [group for key, group in groups.items() if key[0]]:
        warn_of_half_precision(parameter for group in attn_res for parameter in group["params"])
        logit_step = attn_res_learning_rate * model.config.hidden_size / model.config.attn_res_temperature
        if logit_step > MAX_LOGIT_STEP:
            warnings.warn(
                f"`attn_res_learning_rate` is {attn_res_learning_rate:g}. With Adam, a step changes the logits of the "
                f"depth attention by up to {logit_step:.2g}. Steps above {MAX_LOGIT_STEP} can ruin a pretrained model: "
                f"use {attn_res_learning_rate * MAX_LOGIT_STEP / logit_step:.2g} or less, or a greater "
                "`attn_res_temperature`.",
                stacklevel=2,
            )
    return list(groups.values())


def warn_of_half_precision(parameters: Iterable[nn.Parameter]) -> None:
    # DeepSpeed ZeRO-3 (`ds_shape`) trains float32 copies
    if dtypes := {p.dtype for p in parameters if p.dtype.itemsize < 4 and not hasattr(p, "ds_shape")}:
        warnings.warn(
            f"Queries and key norms are {dtypes.pop()}, in which rounding loses small updates. Load the model by "
            "`from_pretrained`, which keeps them in float32, and use autocast (`bf16=True`) instead of a cast.",
            stacklevel=3,
        )


def with_base_targets(model: PreTrainedModel, peft_config: "PeftConfig") -> "PeftConfig":
    r"""
    A copy of a PEFT configuration with the targets that PEFT selects in the base of `model`. PEFT selects by
    `model_type`, so it has no default targets for an AttnRes model, and its `"all-linear"` leaves out the experts of a
    mixture, as do the targets of an adapter that was trained on the base in transformers 4.

    Args:
        model (`PreTrainedModel`): an AttnRes model.
        peft_config (`PeftConfig`): for instance a `LoraConfig`. `target_modules` can be `None`.

    Raises:
        `ValueError`: PEFT has no default targets for the base, or needs its weights to select them (FRoD, AdaMSS).

    ```python
    >>> config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=ATTN_RES_MODULES)
    >>> model = get_peft_model(model, with_base_targets(model, config))
    ```"""
    from peft import get_peft_model

    of_base = deepcopy(peft_config)
    of_base.modules_to_save = None
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.config._base_view())
    try:
        get_peft_model(base, of_base, low_cpu_mem_usage=True)
    except NotImplementedError as error:  # the base has no weights here
        raise ValueError(f"Set `target_modules` of the {type(peft_config).__name__}: {error}") from error
    of_base.modules_to_save = getattr(peft_config, "modules_to_save", None)
    of_base.base_model_name_or_path = peft_config.base_model_name_or_path
    return of_base
