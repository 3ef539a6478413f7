# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Recording and masking depth attention by hooks: any head, in `generate`, under DDP, with PEFT, on remote code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import compress

import torch
from torch import nn


def depth_attentions(model: nn.Module) -> dict[str, nn.Module]:
    r"""
    The depth attentions of a model in the order of their calls, by names like `"layer 3 attention"`, `"layer 3 MLP"`
    and `"output"`. The first read of a layer is named after its attention, although parallel sublayers share it. With
    PEFT, these are the modules in use.
    """
    kinds = {"self_attention_res": "attention", "value_res": "values", "mlp_res": "MLP"}
    modules = {}
    for layer in decoder_layers(model):
        for name in (*layer.read_names[:1], "value_res", *layer.read_names[1:], "output_res"):
            # Layers of older remote code have no `value_res`
            if (module := getattr(layer, name, None)) is None:
                continue
            if hasattr(module, "modules_to_save"):
                module = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module
            kind = kinds.get(name, name.removesuffix("_res"))
            modules["output" if name == "output_res" else f"layer {layer.layer_idx} {kind}"] = module
    return modules


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, recognized by their attributes, since the classes of remote code are its own."""
    layers = [module for module in model.modules() if hasattr(module, "read_names") and hasattr(module, "output_res")]
    if not layers:
        raise ValueError(f"The model is a {type(model).__name__}, which has no depth attention.")
    return layers


def depth_sources(model: nn.Module) -> list[str]:
    """The names of the sources in order. A depth attention attends over the first of them, as many as exist by then."""
    layers = decoder_layers(model)
    if layers[0].is_full:
        kinds = ("attention", "MLP", "second MLP", "third MLP", "fourth MLP")
        outputs = [f"layer {i} {kinds[k]}" for i, layer in enumerate(layers) for k in range(layer.num_outputs)]
        return ["embedding", *outputs]
    first = [layer.layer_idx for layer in layers if layer.is_block_boundary]
    last = [*(layer_idx - 1 for layer_idx in first[1:]), len(layers) - 1]
    return ["embedding", *(f"layers {a}-{b}" if a < b else f"layer {a}" for a, b in zip(first, last))]


@contextmanager
def recorded_weights(
    model: nn.Module, measure: Callable = lambda module, sources: module.attention_weights(*sources)
) -> Iterator[dict[str, list]]:
    r"""
    Records the weights `α` of every depth attention in the forward passes inside the `with` statement: for each (see
    [`depth_attentions`]) a float32 tensor of shape `(batch, sequence, sources)` per forward pass, or another result of
    `measure(module, sources)`.

    ```python
    >>> with recorded_weights(model) as weights:
    ...     model(**inputs)
    >>> weights["layer 3 MLP"][0].mean((0, 1))
    ```"""
    recorded = {}
    with ExitStack() as hooks:
        for name, module in depth_attentions(model).items():
            recorded[name] = []

            def record(module, sources, _, name=name):
                recorded[name].append(measure(module, sources))

            hooks.callback(module.register_forward_hook(record).remove)
        yield recorded


@contextmanager
def masked_sources(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    r"""
    Takes sources out of depth attentions in the forward passes inside the `with` statement, as if they did not exist:
    the softmax covers the remaining ones, and `"sum"` scaling counts them.

    Args:
        model (`nn.Module`): a model with depth attentions.
        mask (`torch.Tensor` of dtype bool, of shape `(depth attentions, sources)`):
            rows as in [`depth_attentions`], columns as in [`depth_sources`]. `False` takes a source out.

    Raises:
        `ValueError`: the mask has another shape or dtype, or leaves a depth attention without sources.
    """
    modules = depth_attentions(model)
    expected = (len(modules), len(depth_sources(model)))
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(f"`mask` is {mask.dtype} of shape {tuple(mask.shape)}, but must be torch.bool of {expected}.")
    with ExitStack() as hooks:
        for (name, module), row in zip(modules.items(), mask.tolist()):

            def drop(module, sources, name=name, row=row):
                if not any(row[: len(sources)]):
                    raise ValueError(f"`mask` leaves {name!r} none of its {len(sources)} sources.")
                return tuple(compress(sources, row))

            hooks.callback(module.register_forward_pre_hook(drop).remove)
        yield
