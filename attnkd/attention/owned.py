"""Whether a gradient belongs to the backward that it was sent to alone, so that it may be written in place."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def owners(tensor: Tensor) -> tuple[int, ...]:
    """How many references there are: from Python, to the tensor, to its memory."""
    storage = tensor.untyped_storage()
    held: Any = tensor  # what counts its owners has no annotation
    return sys.getrefcount(tensor), held._use_count(), torch._C._storage_Use_Count(storage._cdata)


def distinct(tensor: Tensor) -> bool:
    """No two elements share memory by a stride of 0. (type: a subclass may hold its data elsewhere.)"""
    return type(tensor) is Tensor and all(tensor.stride())


@functools.cache
def alone() -> tuple[int, ...]:
    """What :func:`owners` says of a gradient that nobody but the backward it was sent to holds: seen on one that is known to be so.

    Where this PyTorch cannot tell, no gradient is taken for unshared.
    """
    if "torch._dynamo" in sys.modules:  # a frame that torch.compile looks at holds more references than an eager one
        return torch.compiler.disable(_seen)()
    return _seen()


def _seen() -> tuple[int, ...]:
    seen: list[tuple[int, ...]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (grad,) = grads
            del grads
            seen.append(owners(grad))
            return grad

    if hasattr(torch._C, "_storage_Use_Count") and hasattr(Tensor, "_use_count"):
        x = torch.zeros(2, requires_grad=True)
        torch.autograd.grad((Look.apply(x) * 2.0).sum(), x)  # the product's backward makes a new tensor and hands it on
    return seen[0] if seen else ()
