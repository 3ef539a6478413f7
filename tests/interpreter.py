"""
fla's kernel in Triton's interpreter, which runs its source on a CPU. `TRITON_INTERPRET=1` has to be set before Triton
is imported.
"""

import importlib
from contextlib import contextmanager

import torch


class Number(int):
    """In the interpreter, the variable of a loop is a Python number. The kernel converts it as one of Triton's."""

    def __mul__(self, other):
        return Number(int(self) * int(other))

    def to(self, dtype):
        return self


@contextmanager
def on_cuda():
    """Every tensor says that it is on a CUDA device."""
    kernels = importlib.import_module("fla.ops.attnres.fused")
    kernels.range = lambda *bounds: map(Number, range(*bounds))
    for name in ("attnres_fwd_kernel", "attnres_bwd_kernel_dv", "attnres_bwd_kernel_dqdw"):
        kernel = getattr(kernels, name)
        # With several configurations, it would look for the fastest
        kernel.configs = kernel.configs[:1]
    torch.Tensor.is_cuda = True
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
