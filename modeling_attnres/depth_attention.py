# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention: the input of a sublayer as a softmax-weighted sum over the outputs of earlier sublayers."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F


def depth_attention_weights(
    query: torch.Tensor, key_norm: torch.Tensor, sources: tuple[torch.Tensor, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The weights `α = softmaxᵢ(q · RMSNorm(vᵢ))` of [`depth_attention`], whose arguments it takes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weights, `(sources, ..., 1)`, and the sources, `(sources, ...,
        hidden_size)`, in float32, or in float64 for such sources.
    """
    values = torch.stack(sources)
    if values.dtype.itemsize < 4:
        values = values.float()
    keys = F.rms_norm(values, key_norm.shape, key_norm.to(values.dtype), eps)
    # No matrix product, because autocast would compute that in half precision
    return (query * keys).sum(dim=-1, keepdim=True).softmax(dim=0), values


def depth_attention(
    query: torch.Tensor, key_norm: torch.Tensor, sources: tuple[torch.Tensor, ...], scale: str, eps: float
) -> torch.Tensor:
    r"""
    Attention over depth, separately at each position ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031), section 3):
    `h = s · Σᵢ αᵢ vᵢ` with `α = softmaxᵢ(q · RMSNorm(vᵢ))`, computed in float32, or in float64 for such sources.

    Args:
        query (`torch.Tensor` of shape `(hidden_size,)`): the pseudo-query `q`.
        key_norm (`torch.Tensor` of shape `(hidden_size,)`): the weight of the keys' RMSNorm.
        sources (`tuple[torch.Tensor, ...]`): the `vᵢ`, at least one, each `(..., hidden_size)` and of one dtype.
        scale (`str`): `"sum"` (`s` = number of sources) or `"mean"` (`s = 1`).
        eps (`float`): the epsilon of the keys' RMSNorm.

    Returns:
        `torch.Tensor`: `h`, in the shape and dtype of a source.
    """
    weights, values = depth_attention_weights(query, key_norm, sources, eps)
    if scale == "sum":
        # Before the sum: with a zero query each weight is then 1, and `h` the plain sum
        weights = weights * len(sources)
    return (weights * values).sum(dim=0).to(sources[0].dtype)


def read_one_by_one(query, key_norm, sources, scale, eps, upcast=lambda source: source) -> tuple[torch.Tensor, ...]:
    """[`depth_attention`] without a stack, its logits, and `1 / rms(vᵢ)`. A source is `(tokens, hidden_size)`."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    scaled_query = query.to(dtype) * key_norm.to(dtype)
    norms, products = [], []
    with torch.autocast(scaled_query.device.type, enabled=False):
        for source in map(upcast, sources):
            # The norm first: it fetches a source from memory twice as fast as the product does
            norms.append(torch.linalg.vector_norm(source, dim=-1))
            products.append(torch.mv(source, scaled_query))
    inverse_rms = (torch.stack(norms).square() / query.shape[-1] + eps).rsqrt()
    logits = torch.stack(products) * inverse_rms

    weights = (logits.softmax(dim=0) * (len(sources) if scale == "sum" else 1)).unsqueeze(-1)
    output = weights[0] * upcast(sources[0])
    for weight, source in zip(weights[1:], sources[1:]):
        output.addcmul_(weight, upcast(source))
    return output, logits, inverse_rms


def differentiable(query, key_norm, scale, eps, *sources) -> torch.Tensor:
    """[`read_one_by_one`] in PyTorch's own operations, which have all derivatives."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    # Converted once, so that a source's gradient is rounded once
    output, *_ = read_one_by_one(query, key_norm, [source.to(dtype) for source in sources], scale, eps)
    return output.to(sources[0].dtype)


class StreamingDepthAttention(torch.autograd.Function):
    r"""
    [`read_one_by_one`] with a backward pass that reads the sources one by one too, and keeps two numbers for each token
    and source. With `kᵢ = RMSNorm(vᵢ)`, `rᵢ = 1 / rms(vᵢ)`, `w` the norm's weight, logits `lᵢ = q · kᵢ`, a gradient `g`
    of `h` and `H = hidden_size`, the gradients are

    ```
    dαᵢ = s g · vᵢ        dlᵢ = αᵢ (dαᵢ - Σⱼ αⱼ dαⱼ)        d(q w) = Σᵢ dlᵢ rᵢ vᵢ
    dvᵢ = s αᵢ g + dlᵢ rᵢ (q w) - dlᵢ lᵢ rᵢ² vᵢ / H
    ```
    """

    @staticmethod
    def forward(ctx, query, key_norm, scale, eps, *sources):
        upcast = into_one_buffer(sources[0])
        output, logits, inverse_rms = read_one_by_one(query, key_norm, sources, scale, eps, upcast)
        ctx.save_for_backward(query, key_norm, logits, inverse_rms, *sources)
        ctx.scale, ctx.eps = scale, eps
        return output.to(sources[0].dtype)

    @staticmethod
    def backward(ctx, output_grad):
        query, key_norm, logits, inverse_rms, *sources = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(output_grad):
            # The gradients are differentiated in turn, so PyTorch's own operations compute them
            def read(query, key_norm, *sources):
                return differentiable(query, key_norm, ctx.scale, ctx.eps, *sources)

            query_grad, key_norm_grad, *source_grads = torch.func.vjp(read, query, key_norm, *sources)[1](output_grad)
            return query_grad, key_norm_grad, None, None, *source_grads

        dtype, factor = logits.dtype, len(sources) if ctx.scale == "sum" else 1
        scaled_query = query.to(dtype) * key_norm.to(dtype)
        output_grad = output_grad.to(dtype)
        weights = logits.softmax(dim=0)
        product = torch.empty_like(output_grad)
        weight_grads = torch.stack([product.copy_(source).mul_(output_grad).sum(dim=-1) for source in sources]) * factor
        logit_grads = weights * (weight_grads - (weights * weight_grads).sum(dim=0))

        # The factors of `scaled_query`, of the output's gradient and of the source itself in a source's gradient
        of_query = logit_grads * inverse_rms
        of_output_grad = (weights * factor).unsqueeze(-1)
        of_source = (of_query * logits * inverse_rms / -query.shape[-1]).unsqueeze(-1)
        scaled_query_grad = of_query.new_zeros(query.shape)
        source_grads = []
        for i, source in enumerate(map(into_one_buffer(sources[0]), sources)):
            source_grad = of_output_grad[i] * output_grad
            source_grad.addcmul_(of_query[i].unsqueeze(-1), scaled_query).addcmul_(of_source[i], source)
            scaled_query_grad.addmv_(source.t(), of_query[i])  # in place, which autocast leaves as it is
            source_grads.append(source_grad.to(sources[i].dtype))
        query_grad = (scaled_query_grad * key_norm).to(query.dtype)
        key_norm_grad = (scaled_query_grad * query).to(key_norm.dtype)
        return query_grad, key_norm_grad, None, None, *source_grads


def into_one_buffer(like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives a source in float32: the source itself, or a buffer that the next call overwrites."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (lambda source: source) if like.dtype == dtype else torch.empty_like(like, dtype=dtype).copy_


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether `torch.func` or forward mode is active. Neither works with our `autograd.Function`."""
    # PyTorch has no public name for the first. Without it, `autograd.Function` itself raises under a transform
    transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    return transforms_are_active() or any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def streaming_depth_attention(query, key_norm, sources, scale, eps) -> torch.Tensor:
    """[`depth_attention`] that reads the sources one after the other: less memory, and faster for many tokens."""
    # A compiler makes a backward pass of its own, as fast as ours
    by_torch = torch.compiler.is_compiling() or is_transformed(query, key_norm, *sources)
    attend = differentiable if by_torch else StreamingDepthAttention.apply
    output = attend(query, key_norm, scale, eps, *(source.reshape(-1, source.shape[-1]) for source in sources))
    return output.view(sources[0].shape)


@cache
def compiled_operator() -> Callable:
    try:
        # One graph for each number of sources. Without a limit of our own, torch gives up after eight
        return torch.compile(streaming_depth_attention, recompile_limit=256)
    except TypeError:  # torch before 2.13
        return torch.compile(streaming_depth_attention)


def compiled_depth_attention(query, key_norm, sources, scale, eps) -> torch.Tensor:
    """[`depth_attention`] compiled by PyTorch, for many tokens in half precision on a CPU. Needs a C++ compiler."""
    return compiled_operator()(query, key_norm, sources, scale, eps)


@cache
def fla_kernel() -> Callable | None:
    try:
        from fla.ops.attnres import fused_attnres  # takes seconds
    except ImportError:
        return None
    return fused_attnres


def refuse_second_derivatives(_: torch.Tensor):
    if torch.is_grad_enabled():  # the kernel's gradients would be taken for constants
        raise NotImplementedError(
            "`attn_res_implementation` is 'fla' (or 'auto' on a CUDA device), whose kernel has first derivatives only: "
            "choose 'streaming' for `create_graph=True`."
        )


def fla_depth_attention(query, key_norm, sources, scale, eps) -> torch.Tensor:
    """[`depth_attention`] by flash-linear-attention. In half precision, it rounds twice: its kernel rounds the mean."""
    if fla_kernel() is None:
        raise ImportError(
            "`attn_res_implementation` is 'fla', which needs the package flash-linear-attention, 0.6 or newer: "
            "`pip install -U flash-linear-attention`, or choose 'auto'."
        )
    if not sources[0].is_cuda or sources[0].dtype == torch.float64:
        raise ValueError(
            "`attn_res_implementation` is 'fla', which computes in float32 or half precision on a CUDA device, but the "
            f"hidden states are {sources[0].dtype} on {sources[0].device}: choose 'auto'."
        )
    output = fla_kernel()(query, sources, key_norm, rms_eps=eps)
    if output.requires_grad:
        output.register_hook(refuse_second_derivatives)
    return output * len(sources) if scale == "sum" else output


# The number of elements of all sources above which `streaming` is faster than `eager` (measured on a CPU)
STREAMING_SIZE = 2**19


def auto_depth_attention(query, key_norm, sources, scale, eps) -> torch.Tensor:
    """[`depth_attention`] by the fastest implementation at hand for these sources."""
    source, attend = sources[0], depth_attention
    takes_kernel = source.is_cuda and source.dtype != torch.float64 and not torch.compiler.is_compiling()
    if takes_kernel and not is_transformed(query, key_norm, *sources) and fla_kernel() is not None:
        attend = fla_depth_attention
    elif len(sources) * source.numel() > STREAMING_SIZE and not source.is_meta:
        attend = streaming_depth_attention
    return attend(query, key_norm, sources, scale, eps)


# The values of `config.attn_res_implementation`
ATTN_RES_IMPLEMENTATIONS = {
    "auto": auto_depth_attention,
    "eager": depth_attention,
    "streaming": streaming_depth_attention,
    "compiled": compiled_depth_attention,
    "fla": fla_depth_attention,
}


class DepthAttention(nn.Module):
    r"""
    The depth attention of one sublayer. Query and key norm are parameters of one module, since many tools gather, move,
    train or skip parameters by module. `from_pretrained` keeps them in float32.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
    """

    def __init__(self, config):
        super().__init__()
        self.implementation = config.attn_res_implementation
        self.scale = config.attn_res_scale
        self.eps = config.attn_res_norm_eps
        self.temperature = config.attn_res_temperature
        self.query = nn.Parameter(torch.zeros(config.hidden_size, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.float32))

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:
        """[`depth_attention`] over `sources`, each `(batch, sequence, hidden_size)`."""
        attend = ATTN_RES_IMPLEMENTATIONS[self.implementation]
        return attend(self.tempered_query(), self.key_norm, sources, self.scale, self.eps)

    def attention_weights(self, *sources: torch.Tensor) -> torch.Tensor:
        """The weights that [`~DepthAttention.forward`] gives to `sources`, `(batch, sequence, sources)`, in float32."""
        weights, _ = depth_attention_weights(self.tempered_query(), self.key_norm, sources, self.eps)
        return weights.squeeze(-1).movedim(0, -1)

    def tempered_query(self) -> torch.Tensor:
        return self.query if self.temperature == 1.0 else self.query / self.temperature

    def extra_repr(self) -> str:
        return f"{self.query.shape[0]}, scale={self.scale!r}, eps={self.eps}, temperature={self.temperature}"
