"""Takes an attention's query out, and gives the gradients of what was taken back to it without a tensor of zeros.

A loss on the class token's row alone would send back a query gradient [B, H, N, D] that is 0 but for one row in N, and autograd
would add it to that of the attention: a fill and an addition over all rows. Here one autograd function hands the query out three
times (to the attention, to the captured call, and as the first row alone), and adds the row's gradient into the attention's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkd.attention.owned import alone, distinct, owners


def hand_out(query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The query [B, H, M, D] for the attention, for the captured call, and its first row [B, H, 1, D]; the row is None where
    nothing would be gained."""
    if not (torch.is_grad_enabled() and query.requires_grad and query.shape[2] > 1):
        return query, query, None
    if not torch.compiler.is_compiling():
        alone()  # now, not in the middle of a backward
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
        ours = plain and attention is not None and owners(attention) == alone() and distinct(attention)
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
