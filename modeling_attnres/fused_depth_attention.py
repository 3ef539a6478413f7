# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention in few kernels: on a GPU those of flash-linear-attention, elsewhere those of torch's compiler."""

from collections.abc import Callable
from functools import cache

import torch

from .streaming_depth_attention import streaming_depth_attention


@cache
def compiled_operator() -> Callable:
    """[`streaming_depth_attention`] in loops that read half precision as it lies; one graph a number of sources."""
    try:
        # By itself torch gives up after eight
        return torch.compile(streaming_depth_attention, recompile_limit=256)
    except TypeError:  # torch before 2.13
        return torch.compile(streaming_depth_attention)


def compiled_depth_attention(
    query: torch.Tensor,
    key_norm: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    scale: str,
    eps: float,
) -> torch.Tensor:
    r"""
    Takes and gives what [`depth_attention`] does. The first call with a number of sources compiles.

    Raises:
        `ImportError`: there is no C++ compiler.
    """
    # Whoever compiles the whole model compiles this too
    attend = streaming_depth_attention if torch.compiler.is_compiling() else compiled_operator()
    try:
        return attend(query, key_norm, sources, scale, eps)
    except Exception as error:
        if "C++ compiler" not in str(error):
            raise
        raise ImportError(
            "`attn_res_implementation` is 'fused', which on a CPU needs a C++ compiler (g++ or clang++), and none was "
            "found: install one, or choose 'eager'."
        ) from error


@cache
def fused_kernel() -> Callable | None:
    """The package's function, or none where it is not there or too old."""
    try:
        # Not at the top of the file: it takes seconds
        from fla.ops.attnres import fused_attnres
    except ImportError:
        return None
    return fused_attnres


def fused_depth_attention(
    query: torch.Tensor,
    key_norm: torch.Tensor,
    sources: tuple[torch.Tensor, ...],
    scale: str,
    eps: float,
) -> torch.Tensor:
    r"""
    Takes and gives what [`depth_attention`] does. The kernel gives the mean in the sources' dtype, so that in half
    precision `scale="sum"` rounds twice.

    Raises:
        `ImportError`: the package is not there, or too old.
    """
    kernel = fused_kernel()
    if kernel is None:
        raise ImportError(
            "`attn_res_implementation` is 'fused', which needs the package flash-linear-attention, 0.6 or newer: "
            "`pip install -U flash-linear-attention`, or choose 'eager'."
        )
    output = kernel(query, sources, key_norm, rms_eps=eps)
    return output * len(sources) if scale == "sum" else output
