"""A guard for hand-written backward passes: they have no second derivative, and must say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients whose own backward refuses. ``anchor`` only makes the result part of a graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "attnkd's fused operations have no second derivative (double backward); use impl='reference' for one"
        )


def first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorates the ``backward`` of an autograd.Function, below ``@staticmethod``.

    PyTorch's ``once_differentiable`` refuses only where the upstream gradient requires grad. With ``create_graph=True`` and a
    plain loss it hands over gradients that silently count as constants; here differentiating them raises.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            which = [i for i, grad in enumerate(grads) if grad is not None]
            anchor = torch.empty(0, requires_grad=True)
            refusing = _NoSecondDerivative.apply(anchor, *[grads[i] for i in which])
            out = list(grads)
            for i, grad in zip(which, refusing, strict=True):
                out[i] = grad
            return tuple(out)
        return grads

    return guarded
