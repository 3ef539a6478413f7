# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention that goes from source to source: what `depth_attention` computes, without a copy of the sources."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def into_one_buffer(like: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives a source in `dtype`: itself, or copied into one buffer, which the next one overwrites."""
    if like.dtype == dtype:
        return lambda source: source
    return torch.empty_like(like, dtype=dtype).copy_


class StreamingDepthAttention(torch.autograd.Function):
    r"""
    [`depth_attention`] of sources of shape `(tokens, hidden_size)`.

    The sources are read where they lie, one after the other, and kept for the backward pass by reference; beside them
    it keeps two numbers for each token and source. With `kᵢ = RMSNorm(vᵢ)`, `rᵢ = 1 / rms(vᵢ)`, `w` the norm's weight,
    logits `lᵢ = q · kᵢ`, a gradient `g` of `h` and `H = hidden_size`, the gradients are

    ```
    dαᵢ = s g · vᵢ        dlᵢ = αᵢ (dαᵢ - Σⱼ αⱼ dαⱼ)        d(q w) = Σᵢ dlᵢ rᵢ vᵢ
    dvᵢ = s αᵢ g + dlᵢ rᵢ (q w) - dlᵢ lᵢ rᵢ² vᵢ / H
    ```

    Matrix products are given their output or work in place, which autocast leaves in the inputs' precision.
    """

    @staticmethod
    def forward(
        query: torch.Tensor, key_norm: torch.Tensor, factor: int, eps: float, *sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(sources[0].dtype, torch.float32)
        scaled_query = query.to(dtype) * key_norm.to(dtype)
        logits = scaled_query.new_empty(len(sources), sources[0].shape[0])
        inverse_rms = torch.empty_like(logits)
        upcast = into_one_buffer(sources[0], dtype)
        for i, source in enumerate(sources):
            # The norm first: it fetches a source from memory twice as fast as the product does
            source = upcast(source)
            torch.linalg.vector_norm(source, dim=-1, out=inverse_rms[i])
            torch.mv(source, scaled_query, out=logits[i])
        inverse_rms.square_().div_(query.shape[-1]).add_(eps).rsqrt_()
        logits *= inverse_rms

        weights = (logits.softmax(dim=0) * factor).unsqueeze(-1)
        output = weights[0] * upcast(sources[0])
        for weight, source in zip(weights[1:], sources[1:]):
            output.addcmul_(weight, upcast(source))
        return output.to(sources[0].dtype), logits, inverse_rms

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key_norm, factor, _, *sources = inputs
        _, logits, inverse_rms = output
        ctx.mark_non_differentiable(logits, inverse_rms)
        ctx.save_for_backward(query, key_norm, logits, inverse_rms, *sources)
        ctx.factor = factor

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad, *_):
        query, key_norm, logits, inverse_rms, *sources = ctx.saved_tensors
        dtype = logits.dtype
        scaled_query = query.to(dtype) * key_norm.to(dtype)
        output_grad = output_grad.to(dtype)

        weights = logits.softmax(dim=0)
        weight_grads = torch.empty_like(weights)
        product = torch.empty_like(output_grad)
        for i, source in enumerate(sources):
            torch.sum(torch.mul(output_grad, source, out=product), dim=-1, out=weight_grads[i])
        weight_grads *= ctx.factor
        logit_grads = weights * (weight_grads - (weights * weight_grads).sum(dim=0))

        # What `scaled_query`, the output's gradient and the source itself weigh in a source's gradient
        of_query = logit_grads * inverse_rms
        of_output_grad = (weights * ctx.factor).unsqueeze(-1)
        of_source = (of_query * logits * inverse_rms / -query.shape[-1]).unsqueeze(-1)
        scaled_query_grad = torch.zeros_like(scaled_query)
        source_grads = []
        upcast = into_one_buffer(sources[0], dtype)
        for i, source in enumerate(map(upcast, sources)):
            source_grad = of_output_grad[i] * output_grad
            source_grad.addcmul_(of_query[i].unsqueeze(-1), scaled_query).addcmul_(of_source[i], source)
            scaled_query_grad.addmv_(source.t(), of_query[i])
            source_grads.append(source_grad.to(sources[i].dtype))
        query_grad = (scaled_query_grad * key_norm).to(query.dtype)
        key_norm_grad = (scaled_query_grad * query).to(key_norm.dtype)
        return query_grad, key_norm_grad, None, None, *source_grads


def streaming_depth_attention(
    query: torch.Tensor,
    key_norm: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    scale: str,
    eps: float,
) -> torch.Tensor:
    """Takes and gives what [`depth_attention`] does, and is differentiable once."""
    shape = sources[0].shape
    factor = len(sources) if scale == "sum" else 1
    flat_sources = [source.reshape(-1, shape[-1]) for source in sources]
    # Without gradients there is nothing to keep, and a compiler with dynamic shapes mistakes what `apply` is given
    attend = StreamingDepthAttention.apply if torch.is_grad_enabled() else StreamingDepthAttention.forward
    output, _, _ = attend(query, key_norm, factor, eps, *flat_sources)
    return output.view(shape)
