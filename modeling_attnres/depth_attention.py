# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention: a sublayer's input as a softmax-weighted sum over what earlier sublayers put out."""

import torch
from torch import nn


def depth_attention(
    query: torch.Tensor,
    key_norm: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    scale: str,
    eps: float,
) -> torch.Tensor:
    r"""
    Attention over depth, separately at each position ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031), section 3):
    `h = s · Σᵢ αᵢ vᵢ` with `α = softmaxᵢ(q · RMSNorm(vᵢ))`. All of it is computed in float32,
    or in float64 for such sources.

    Args:
        query (`torch.Tensor` of shape `(hidden_size,)`): the pseudo-query `q`.
        key_norm (`torch.Tensor` of shape `(hidden_size,)`): the weight of the keys' RMSNorm.
        sources (`tuple[torch.Tensor, ...]`): the `vᵢ`, at least one, each `(..., hidden_size)` and of one dtype.
        scale (`str`): `"sum"` (`s` = number of sources) or `"mean"` (`s = 1`).
        eps (`float`): the epsilon of the keys' RMSNorm.

    Returns:
        `torch.Tensor`: `h`, in the sources' shape and dtype.
    """
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack(sources).to(dtype)
    keys = nn.functional.rms_norm(values, values.shape[-1:], key_norm.to(dtype), eps)
    # No matrix product, which autocast would compute in half precision
    weights = (keys * query.to(dtype)).sum(dim=-1).softmax(dim=0)
    if scale == "sum":
        # Before the sum: with a zero query each weight is then 1, and `h` the plain sum
        weights = weights * len(sources)
    return (weights.unsqueeze(-1) * values).sum(dim=0).to(sources[0].dtype)


class DepthAttention(nn.Module):
    r"""
    Depth attention of one sublayer. Its query and the weight of its key norm are parameters of this very module, so
    that whatever gathers, moves, trains or skips parameters module by module finds both.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
    """

    def __init__(self, config):
        super().__init__()
        self.scale = config.attn_res_scale
        self.eps = config.attn_res_norm_eps
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.key_norm = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:
        """The `sources`, each `(batch, sequence, hidden_size)`, become one such tensor. See [`depth_attention`]."""
        return depth_attention(self.query, self.key_norm, sources, self.scale, self.eps)

    def extra_repr(self) -> str:
        return f"{self.query.shape[0]}, scale={self.scale!r}, eps={self.eps}"
