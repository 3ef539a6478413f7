# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""What the training tools of others need to be told about an AttnRes model."""

import warnings
from collections import defaultdict
from typing import Any

from torch import nn


# The names of the depth attention modules, which PEFT trains in full as `modules_to_save`
ATTN_RES_MODULES = ["self_attention_res", "mlp_res", "output_res"]

# By how much a step may move the logits of a depth attention: 0.4 is best for SmolLM2's queries alone, and 1.3 ruins it
# (README, "Training")
LARGEST_LOGIT_STEP = 0.5


def attn_res_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    attn_res_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    r"""
    The parameters of a model as groups for an optimizer: matrices, with weight decay; vectors and biases, without;
    queries and key norms, at a learning rate of their own and without. Frozen parameters are left out; what tensor
    parallelism has spread over devices is a group apart, since an optimizer cannot take it together with the rest.

    Args:
        model (`nn.Module`): an AttnRes model or a base, also with PEFT's adapters or sharded by FSDP2 or ZeRO-3.
        learning_rate (`float`): the rate of all but queries and key norms.
        attn_res_learning_rate (`float`, *optional*, defaults to `learning_rate`): the rate of queries and key norms.
        weight_decay (`float`, *optional*, defaults to 0.0): the decay of matrices.

    Returns:
        `list[dict[str, Any]]`: groups with `params`, `lr` and `weight_decay`; none of them is empty.

    ```python
    >>> def adamw(model, **kwargs):
    ...     return torch.optim.AdamW(attn_res_parameter_groups(model, **kwargs))

    >>> rates = {"learning_rate": 5e-5, "attn_res_learning_rate": 2e-4}
    >>> Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(lambda: adamw, rates))
    ```"""
    if attn_res_learning_rate is None:
        attn_res_learning_rate = learning_rate
    matrices, vectors, attn_res = defaultdict(list), defaultdict(list), defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_attn_res = not set(ATTN_RES_MODULES).isdisjoint(name.split("."))
            # What DeepSpeed's ZeRO-3 has cut up is empty here and keeps its shape beside it. The biases of all experts
            # are one matrix, and Kimi Linear's `A_log`, a number for each head, has dimensions of one
            shape = getattr(parameter, "ds_shape", parameter.shape)
            is_matrix = len(shape) > 1 and not name.endswith(("bias", "A_log"))
            kind = attn_res if is_attn_res else matrices if is_matrix else vectors
            kind[getattr(parameter, "device_mesh", None)].append(parameter)
    if attn_res:
        _warn_of_long_steps(model.config, attn_res_learning_rate)
    kinds = [
        (matrices, {"lr": learning_rate, "weight_decay": weight_decay}),
        (vectors, {"lr": learning_rate, "weight_decay": 0.0}),
        (attn_res, {"lr": attn_res_learning_rate, "weight_decay": 0.0}),
    ]
    return [{"params": parameters, **options} for kind, options in kinds for parameters in kind.values()]


def _warn_of_long_steps(config, learning_rate: float) -> None:
    logit_step = learning_rate * config.hidden_size / config.attn_res_temperature
    if logit_step > LARGEST_LOGIT_STEP:
        warnings.warn(
            f"`attn_res_learning_rate` is {learning_rate:g}: with Adam, a step moves the logits of the depth attention "
            f"by up to {logit_step:.2g}. Steps above {LARGEST_LOGIT_STEP} can ruin a pretrained model: take "
            f"{learning_rate * LARGEST_LOGIT_STEP / logit_step:.2g} or less, or a greater `attn_res_temperature`.",
            stacklevel=3,
        )
