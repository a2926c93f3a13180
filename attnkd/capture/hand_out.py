"""Takes an attention's query out, and gives the gradients of what was taken back to it without a tensor of zeros.

A loss on the class token's row alone would send back a query gradient [B, H, N, D] that is 0 but for one row in N, and autograd
would add it to that of the attention: a fill and an addition over all rows. Here one autograd function hands the query out three
times (to the attention, to the captured call, and as the first row alone), and adds the row's gradient into the attention's.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def hand_out(query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The query [B, H, M, D] for the attention, for the captured call, and its first row [B, H, 1, D]; the row is None where
    nothing would be gained."""
    if not (torch.is_grad_enabled() and query.requires_grad and query.shape[2] > 1):
        return query, query, None
    if not torch.compiler.is_compiling():
        _alone()  # now, not in the middle of a backward
    return _HandOut.apply(query)


class _HandOut(torch.autograd.Function):
    """Three views of the query. Saves no tensor, so that activation checkpointing finds the same ones when it runs the block again,
    which it does without a tap."""

    @staticmethod
    def forward(ctx: Any, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rows = query.shape[2]
        return query.view_as(query), query.view_as(query), query[:, :, :1]

    @staticmethod
    def backward(ctx: Any, attention: Tensor | None, captured: Tensor | None, row: Tensor | None) -> Tensor | None:
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())  # else autograd or a compiler looks on
        ours = plain and attention is not None and _owners(attention) == _alone() and _distinct(attention)
        grad = captured if attention is None else attention
        if captured is not None and attention is not None:
            grad, ours = attention + captured, plain
        if row is None:
            return grad
        if grad is None:
            return torch.nn.functional.pad(row, (0, 0, 0, ctx.rows - 1))
        if ours:
            grad[:, :, :1] += row
            return grad
        return torch.cat([grad[:, :, :1] + row, grad[:, :, 1:]], 2)


def _owners(tensor: Tensor) -> tuple[int, ...]:
    """How many references there are: from Python, to the tensor, to its memory."""
    storage = tensor.untyped_storage()
    held: Any = tensor  # what counts its owners has no annotation
    return sys.getrefcount(tensor), held._use_count(), torch._C._storage_Use_Count(storage._cdata)


def _distinct(tensor: Tensor) -> bool:
    """No two elements share memory by a stride of 0. (type: a subclass may hold its data elsewhere.)"""
    return type(tensor) is Tensor and all(tensor.stride())


@functools.cache
def _alone() -> tuple[int, ...]:
    """What :func:`_owners` says of a gradient that nobody but the backward it was sent to holds: seen on one that is known to be so.

    Where this PyTorch cannot tell, no gradient is taken for unshared.
    """
    seen: list[tuple[int, ...]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (grad,) = grads
            del grads
            seen.append(_owners(grad))
            return grad

    if hasattr(torch._C, "_storage_Use_Count") and hasattr(Tensor, "_use_count"):
        x = torch.zeros(2, requires_grad=True)
        torch.autograd.grad((Look.apply(x) * 2.0).sum(), x)  # the product's backward makes a new tensor and hands it on
    return seen[0] if seen else ()
