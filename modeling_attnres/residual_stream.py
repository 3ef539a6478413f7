# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""The residual stream on which a base's decoder layer runs."""

import inspect
import operator
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx, nn


ADDITIONS = {operator.add, operator.iadd, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
MULTIPLICATIONS = {operator.mul, operator.imul, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}


class ResidualStream:
    r"""
    The residual stream, stored as the sources of depth attention ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031),
    section 3). It takes the place of `hidden_states` in the forward of a base's decoder layer:

    - `stream + output` appends `output` as a new source, or adds it to the last one;
    - `stream * number` scales every source;
    - a submodule that is called with the stream receives `stream.read()`.

    Any other operation raises a `TypeError`.

    Args:
        sources (`tuple[Tensor, ...]`): the embedding, followed by the block sums (Block AttnRes; the last one is
            that of the current block) or by every sublayer's output (Full AttnRes). Each is `(batch, sequence,
            hidden_size)`.
        reads (`Iterator[Callable]`, *optional*): the depth attentions of this layer that have not been used yet.
        opens_source (`bool`, *optional*): whether the next output becomes a source of its own.
        is_full (`bool`, *optional*): whether every output becomes a source of its own.
    """

    def __init__(
        self,
        sources: tuple[Tensor, ...],
        reads: Iterator[Callable] | None = None,
        opens_source: bool = False,
        is_full: bool = False,
    ):
        self.sources = sources
        self.reads = reads
        self.opens_source = opens_source
        self.is_full = is_full
        self.value = None

    def read(self) -> Tensor:
        """The depth attention over the sources, computed once. A single source is returned as it is."""
        if self.value is None:
            self.value = self.sources[0] if len(self.sources) == 1 else next(self.reads)(*self.sources)
        return self.value

    def __add__(self, output: Tensor) -> "ResidualStream":
        sources = self.sources
        if isinstance(output, ResidualStream) or output.shape != self.shape:
            raise TypeError("a residual stream can only be added to a tensor of its own shape")
        if output.dtype != self.dtype:
            # Under autocast the output can have another dtype. As in a sum of tensors, the wider one is taken
            dtype = torch.promote_types(output.dtype, self.dtype)
            sources, output = tuple(source.to(dtype) for source in sources), output.to(dtype)
        if self.opens_source or self.is_full:
            sources = (*sources, output)
        else:
            sources = (*sources[:-1], sources[-1] + output)
        return ResidualStream(sources, self.reads, False, self.is_full)

    def __mul__(self, factor: float | Tensor) -> "ResidualStream":
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise TypeError("a residual stream can only be multiplied by a number")
        sources = tuple(source * factor for source in self.sources)
        return ResidualStream(sources, self.reads, self.opens_source, self.is_full)

    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        # `tensor + stream` calls this method, and under a compiler `stream + tensor` too. The methods are called by
        # name, because `+` would recurse
        if function in ADDITIONS and not kwargs:
            return args[0].__add__(args[1]) if isinstance(args[0], cls) else args[1].__add__(args[0])
        if function in MULTIPLICATIONS and not kwargs:
            return args[0].__mul__(args[1]) if isinstance(args[0], cls) else args[1].__mul__(args[0])
        name = getattr(function, "__name__", function)
        raise TypeError(
            f"a residual stream supports `+`, multiplication by a number and submodule calls, but not `{name}`"
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            f"a residual stream supports `+`, multiplication by a number and submodule calls, but not `{name}`"
        )

    shape = property(lambda self: self.sources[0].shape)
    dtype = property(lambda self: self.sources[0].dtype)
    device = property(lambda self: self.sources[0].device)


class Reader:
    """
    Replaces `self` in the forward of the base's decoder layer. Submodules that are called with the stream receive its
    read. `call` calls a submodule; [`trace`] replaces it.
    """

    def __init__(self, module: nn.Module, call: Callable):
        self._module = module
        self._call = call

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return Reader(value, self._call)
        # A helper method of the layer sees the reader as `self`, too
        return value.__func__.__get__(self) if inspect.ismethod(value) else value

    def __call__(self, *args, **kwargs):
        return self._call(self._module, *map(read, args), **{name: read(value) for name, value in kwargs.items()})


def read(value: Any) -> Any:
    return value.read() if isinstance(value, ResidualStream) else value


def call(module: nn.Module, *args, **kwargs):
    return module(*args, **kwargs)


class Symbol(fx.Proxy):
    """Placeholder for a tensor while the forward of a layer is traced."""

    def __add__(self, other):
        # `ResidualStream.__radd__` handles it
        return NotImplemented if isinstance(other, ResidualStream) else super().__add__(other)

    def __mul__(self, other):
        return NotImplemented if isinstance(other, ResidualStream) else super().__mul__(other)


class SymbolTracer(fx.proxy.GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> Symbol:
        return Symbol(node, self)

    def symbol(self, *args, **kwargs) -> Symbol:
        return self.proxy(self.graph.placeholder("symbol"))

    def to_bool(self, obj: fx.Proxy) -> bool:
        # `__add__` of the stream compares shapes and dtypes by `!=`. They do not differ
        return False


def trace(layer: nn.Module, forward: Callable) -> tuple[int, int]:
    """
    Runs the forward of a base's decoder layer on symbols, without its submodules. It determines how many depth
    attentions the layer has: one for each state of the stream that a submodule is called with.

    Returns:
        `tuple[int, int]`: the numbers of reads, and of outputs that are added to the stream.
    """
    tracer, reads = SymbolTracer(fx.Graph()), []

    def depth_attention(*sources):
        reads.append(sources)
        return tracer.symbol()

    parameters = list(inspect.signature(forward).parameters.values())[2:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    # Two sources, since a single one is read without a depth attention
    stream = ResidualStream((tracer.symbol(), tracer.symbol()), repeat(depth_attention), is_full=True)
    output = forward(Reader(layer, tracer.symbol), stream, **{name: tracer.symbol() for name in required})
    stream = output[0] if isinstance(output, tuple) else output
    if not isinstance(stream, ResidualStream):
        raise TypeError("its result is not the residual stream")
    return len(reads), len(stream.sources) - 2
