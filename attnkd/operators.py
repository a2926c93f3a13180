"""What every hand-written operator shares: its registration, what it keeps for the backward, and a guard for that backward."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("attnkd", "FRAGMENT")


def register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``function`` as the opaque operator ``torch.ops.attnkd.<name>`` and return it.

    torch.compile does not look inside. There is no derivative: an autograd function calls it. On CPU tensors Triton kernels
    run in Triton's interpreter.

    Args:
        schema: ``name(arguments) -> results``, in the language of :func:`torch.library.define`.
        function: the same on real tensors of any device.
        fake: the same on tensors without data: allocates the results.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _unseen(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnkd::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.attnkd, name).default


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which torch.compile does not look either where it runs the operator itself: after a graph break it looks at all frames that
    Python runs, launchers too, the backward's among them. A process without the compiler does not import it for this."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call


def composite(schema: str, function: Callable[..., Any]) -> Any:
    """Register ``function``, made of PyTorch's own differentiable operators, as ``torch.ops.attnkd.<name>`` and return it.

    torch.compile's first stage does not look inside, so the function may decide by what only PyTorch knows; its second traces what it calls.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.attnkd, name).default


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, which refuses tensors made under ``torch.inference_mode``: those are kept beside it.

    A teacher's queries and keys often are such tensors. They carry no graph, so they make no circle of references.
    """
    ctx.beside = None
    if not torch.compiler.is_compiling() and any(x is not None and x.is_inference() for x in tensors):
        ctx.beside = [x if x is not None and x.is_inference() else None for x in tensors]
        tensors = tuple(x if other is None else None for x, other in zip(tensors, ctx.beside, strict=True))
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> list[Any]:
    """What :func:`keep` kept."""
    tensors = list(ctx.saved_tensors)
    if ctx.beside is not None:
        tensors = [saved if other is None else other for saved, other in zip(tensors, ctx.beside, strict=True)]
    if getattr(ctx, "anchors", None) is not None:
        ctx.anchors = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return tensors


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Around an operator: what its body computes keeps its precision. (Entering torch.autocast for nothing takes 10 µs.)"""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on the first ``count`` tensors, gradients, whose own backward refuses. The others only make the results part of the graph of
    what the gradients depend on: autograd runs no node that leads to none of the tensors it was asked about."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "attnkd's fused operations have no second derivative (double backward); use impl='reference' for one"
        )


def first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorates the ``backward`` of an autograd.Function, below ``@staticmethod``.

    PyTorch's ``once_differentiable`` refuses only where the upstream gradient requires grad. With ``create_graph=True`` and a
    plain loss it returns gradients that silently count as constants; here differentiating them raises.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # as always, but with create_graph=True
            return backward(ctx, *upstream)
        ctx.anchors = None if torch.compiler.is_compiling() else []  # not always: what it holds would stay in memory
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if ctx.anchors is not None:
            which = [i for i, grad in enumerate(grads) if grad is not None]
            anchors, ctx.anchors = [*ctx.anchors, torch.empty(0, requires_grad=True)], None
            refusing = _NoSecondDerivative.apply(len(which), *[grads[i] for i in which], *anchors)
            out = list(grads)
            for i, grad in zip(which, refusing, strict=True):
                out[i] = grad
            return tuple(out)
        return grads

    return guarded
