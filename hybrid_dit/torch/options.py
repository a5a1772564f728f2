"""How the PyTorch side computes: which kernels, and whether element-wise work is compiled. One object, `options`."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch


@dataclasses.dataclass
class Options:
    """Choices that change speed, never the method; assign to the fields of `options`.

    Attributes:
        compile: run the linear part and flex attention through `torch.compile`. None: on CUDA where Triton is
            installed. Without it the element-wise steps of φ each go through memory.
        lse: a key of `hybrid_dit.torch.softmax.BACKENDS` for the stabiliser "lse" and for plain softmax.
        max: the same for the stabiliser "max", which needs a kernel that returns the rows' maxima.
    """

    compile: bool | None = None
    lse: str = "sdpa"
    max: str = "flex"


options = Options()


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def compiles(x: torch.Tensor) -> bool:
    """Whether functions on `x` are to be compiled."""
    if options.compile is None:
        return x.is_cuda and _HAS_TRITON
    return options.compile


def compiled(function: Callable) -> Callable:
    """Returns `function` under `torch.compile`; inside an outer `torch.compile` itself, to become part of that."""
    return function if torch.compiler.is_compiling() else _compiled(function)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
