# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Looking into depth attention while a model runs: its weights, and what happens without a source."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .depth_attention import depth_attention_weights


def depth_attentions(model: nn.Module) -> list[nn.Module]:
    """The depth attention modules, in the order in which they are called; of remote code too."""
    return [module for module in model.modules() if type(module).__name__ == "DepthAttention"]


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the weights of each depth attention, `(batch, sequence, sources)`, of each forward pass in the block."""
    weights = []

    def keep(module, sources, output):
        values = torch.stack(sources)
        query = module.query / module.temperature
        weights.append(depth_attention_weights(query, module.key_norm, values, module.eps).movedim(0, -1))

    with ExitStack() as hooks:
        for module in depth_attentions(model):
            hooks.callback(module.register_forward_hook(keep).remove)
        yield weights


@contextmanager
def masked_sources(model: nn.Module, mask: torch.BoolTensor) -> Iterator[None]:
    """Takes sources out of depth attentions, as if they were not there: `mask` has a row for each, `False` drops."""
    with ExitStack() as hooks:
        for module, row in zip(depth_attentions(model), mask.tolist(), strict=True):

            def keep(module, sources, row=row):
                return tuple(source for source, kept in zip(sources, row) if kept)

            hooks.callback(module.register_forward_pre_hook(keep).remove)
        yield
