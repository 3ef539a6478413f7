# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention: a sublayer's input as a softmax-weighted sum over what earlier sublayers put out."""

import torch
from torch import nn

from .fused_depth_attention import compiled_depth_attention, fused_depth_attention, fused_kernel
from .streaming_depth_attention import streaming_depth_attention


def depth_attention_weights(
    query: torch.Tensor, key_norm: torch.Tensor, values: torch.Tensor, eps: float
) -> torch.Tensor:
    r"""
    The `α = softmaxᵢ(q · RMSNorm(vᵢ))` of [`depth_attention`], of sources in one tensor.

    Args:
        query, key_norm (`torch.Tensor` of shape `(hidden_size,)`): as for [`depth_attention`].
        values (`torch.Tensor` of shape `(sources, ..., hidden_size)`): the `vᵢ`, of the query's dtype.
        eps (`float`): the epsilon of the keys' RMSNorm.

    Returns:
        `torch.Tensor` of shape `(sources, ...)`.
    """
    # `q · RMSNorm(v)`, with the norm's weight taken to the query and its factor out of the product. No matrix product,
    # which autocast would compute in half precision
    mean_squares = torch.linalg.vector_norm(values, dim=-1).square() / values.shape[-1]
    logits = (values * (query * key_norm)).sum(dim=-1) * (mean_squares + eps).rsqrt()
    return logits.softmax(dim=0)


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
    query, key_norm, values = (
        # In a decoding step each call counts, one that does nothing too
        tensor if tensor.dtype == dtype else tensor.to(dtype)
        for tensor in (query, key_norm, torch.stack(sources))
    )
    weights = depth_attention_weights(query, key_norm, values, eps)
    if scale == "sum":
        # Before the sum: with a zero query each weight is then 1, and `h` the plain sum
        weights = weights * len(sources)
    output = (weights.unsqueeze(-1) * values).sum(dim=0)
    return output if output.dtype == sources[0].dtype else output.to(sources[0].dtype)


# Numbers in a source from which on it pays to go from source to source (measured on a CPU); below, the fewest calls win
STREAMING_SIZE = 2**16


def choose_implementation(name: str, source: torch.Tensor):
    """The function that an `attn_res_implementation` stands for, with sources like this one."""
    if name == "auto":
        # A compiler fuses by itself; the kernel computes in float32
        takes_kernel = source.is_cuda and source.dtype != torch.float64 and not torch.compiler.is_compiling()
        name = "fused" if takes_kernel and fused_kernel() is not None else "eager"
    if name == "fused" and source.is_cuda:
        return fused_depth_attention
    if source.numel() <= STREAMING_SIZE:
        return depth_attention
    return streaming_depth_attention if name == "eager" else compiled_depth_attention


class DepthAttention(nn.Module):
    r"""
    Depth attention of one sublayer. Its query and the weight of its key norm are parameters of this very module, so
    that whatever gathers, moves, trains or skips parameters module by module finds both.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = config.attn_res_scale
        self.eps = config.attn_res_norm_eps
        self.temperature = config.attn_res_temperature
        # In float32 in half precision models too, since bfloat16 has no number between 1 and 1.008
        self.query = nn.Parameter(torch.zeros(config.hidden_size, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.float32))

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:
        r"""
        The sources become one tensor. See [`depth_attention`].

        Args:
            sources (`torch.Tensor` of shape `(batch, sequence, hidden_size)`): the `vᵢ`.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, hidden_size)`.
        """
        query = self.query
        if self.temperature != 1.0:
            # Logits are float32, so what they are made of is not rounded to less
            query = query.to(torch.promote_types(query.dtype, torch.float32)) / self.temperature
        attend = choose_implementation(self.config.attn_res_implementation, sources[0])
        return attend(query, self.key_norm, sources, self.scale, self.eps)

    def attention_weights(self, *sources: torch.Tensor) -> torch.Tensor:
        """`(batch, sequence, sources)` in float32, or float64."""
        dtype = torch.promote_types(sources[0].dtype, torch.float32)
        query, key_norm, values = (t.to(dtype) for t in (self.query, self.key_norm, torch.stack(sources)))
        return depth_attention_weights(query / self.temperature, key_norm, values, self.eps).movedim(0, -1)

    def extra_repr(self) -> str:
        return f"{self.query.shape[0]}, scale={self.scale!r}, eps={self.eps}, temperature={self.temperature}"
