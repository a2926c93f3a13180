"""Whole maps as PyTorch operations: the map kernels registered as opaque ops inside an autograd function.

Opaque forward and backward ops (torch.library) keep torch.compile from looking inside; the plain autograd.Function around
them composes with compile, checkpointing and saved-tensor hooks, and raises on a second derivative. The ops see masks in
their stored shape, with size 1 where they are broadcast, so no compiler has a reason to materialise an expanded view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkd.attention.problem import Problem, stored_mask
from attnkd.attention.reductions import total
from attnkd.operators import first_order_only, keep, kept, register, without_autocast
from attnkd_kernels.launch import architecture, num_processors
from attnkd_kernels.map.launch import Maps, Model, Saved, allocate, map_bias_bwd, map_bwd, map_fwd
from attnkd_kernels.replay import replayed

MAX_WIDTH = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INPUTS = (
    "Tensor student_query, Tensor student_key, Tensor? student_mask, float student_scale, "
    "Tensor teacher_query, Tensor teacher_key, Tensor? teacher_mask, float teacher_scale, "
    "str? merge, str divergence, float temperature"
)
_KNOWN = "Tensor? student_lse, Tensor? teacher_lse"
_SAVED = "Tensor lse_s, Tensor lse_t, Tensor centre, Tensor weight, Tensor unit_dq"


def _maps(qs, ks, ms, scale_s, qt, kt, mt, scale_t, merge, divergence, temperature, known_s=None, known_t=None) -> Maps:
    student, teacher = Model(qs, ks, ms, scale_s, known_s), Model(qt, kt, mt, scale_t, known_t)
    return Maps(student, teacher, merge, divergence, temperature, architecture(qs.device))


def _map_fwd(*inputs):
    """loss [B, Ho, M] and what the backward needs; see :class:`attnkd_kernels.map.launch.Saved`."""
    return tuple(map_fwd(_maps(*inputs[:-1]), inputs[-1]))


def _map_fwd_fake(*inputs):
    return tuple(allocate(_maps(*inputs[:-1]), inputs[-1]))


def _map_bwd(grad, *inputs):
    """dq like query, dk like key, dmask fp32 [Bb, Hb, Mb, Nb]; what is not needed is empty."""
    *call, lse_s, lse_t, centre, weight, unit_dq, need_dq, need_dk, need_dmask = inputs
    maps, saved = _maps(*call), Saved(grad, lse_s, lse_t, centre, weight, unit_dq)
    dq, dk, dmask = (grad.new_empty(0) for _ in range(3))
    if need_dq:
        dq = map_bwd(maps, saved, grad, True)
    if need_dk:
        dk = map_bwd(maps, saved, grad, False)
    if need_dmask:
        dmask = map_bias_bwd(maps, saved, grad, num_processors(grad.device))
    return dq, dk, dmask


def _map_bwd_fake(grad, *inputs):
    maps, need_dq, need_dk, need_dmask = _maps(*inputs[:11]), *inputs[-3:]
    query, key, mask, *_ = maps.student
    dq, dk, dmask = (grad.new_empty(0) for _ in range(3))
    if need_dmask:
        assert mask is not None
        b, h, m, n = mask.shape
        dmask = grad.new_empty((b, 1 if maps.merge == "logsum" else h, m, n))
    return torch.empty_like(query) if need_dq else dq, torch.empty_like(key) if need_dk else dk, dmask


_fwd = register(
    f"map_fwd({_INPUTS}, {_KNOWN}, bool need_dq) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    replayed(_map_fwd),
    _map_fwd_fake,
)
_bwd = register(
    f"map_bwd(Tensor grad, {_INPUTS}, {_SAVED}, bool need_dq, bool need_dk, bool need_dmask) -> (Tensor, Tensor, Tensor)",
    replayed(_map_bwd),
    _map_bwd_fake,
)


class MapDivergenceFunction(torch.autograd.Function):
    """The divergence of every query row, [B, Ho, M] fp32, or ``factor`` times its sum; differentiable in the student's query, key
    and additive mask."""

    @staticmethod
    def forward(
        ctx: Any, qs: Tensor, ks: Tensor, ms: Tensor | None, qt: Tensor, kt: Tensor, mt: Tensor | None, *options: Any
    ):
        scale_s, scale_t, *how, lse_s, lse_t, need_dq, factor = options
        stored_s, stored_t = (None if mask is None else stored_mask(mask) for mask in (ms, mt))
        call = (qs, ks, stored_s, scale_s, qt, kt, stored_t, scale_t, *how)
        with without_autocast(qs.device.type):
            loss, *saved = _fwd(*call, lse_s, lse_t, need_dq)
        keep(ctx, qs, ks, stored_s, qt, kt, stored_t, *saved)
        ctx.options = (scale_s, scale_t, *how)
        ctx.mask_shape = None if ms is None else ms.shape
        ctx.factor = 1.0 if factor is None else factor
        return total(loss, factor)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor):
        qs, ks, stored_s, qt, kt, stored_t, *saved = kept(ctx)
        scale_s, scale_t, *how = ctx.options
        need = ctx.needs_input_grad[:3]
        call = (qs, ks, stored_s, scale_s, qt, kt, stored_t, scale_t, *how)
        if (
            ctx.factor != 1.0
        ):  # not later: a kernel's products take the upstream gradient in the inputs' dtype, and in float16 it can overflow
            grad = grad * ctx.factor
        with without_autocast(qs.device.type):
            dq, dk, dmask = _bwd(grad, *call, *saved, *need)
        if need[2]:
            assert stored_s is not None
            dmask = _spread(dmask, ctx.mask_shape, how[0]).to(stored_s.dtype)
        return dq if need[0] else None, dk if need[1] else None, dmask if need[2] else None, *[None] * 12


def _spread(total: Tensor, shape: torch.Size, merge: str | None) -> Tensor:
    """The gradient of the expanded view: every repetition gets an equal share of its entry's total, which the view's own
    backward adds up again. (Merged wide heads each get the whole: they add up to one bias.)"""
    share = 1
    for dim, size in enumerate(shape):
        if total.shape[dim] != size and not (dim == 1 and merge == "logsum"):
            share *= size
    return (total / share if share > 1 else total).expand(shape)


def why_not(problem: Problem) -> str | None:
    """The reason for which the map kernels cannot compute ``problem``, or None."""
    student, teacher, merge = problem.student, problem.teacher, problem.merge
    if merge in ("max", "min"):
        return f"merge={merge!r} of whole maps has no fused kernel; use impl='chunked'"
    if teacher.query is None or student.query is None:
        return "teacher_probs of whole maps have no fused kernel; use impl='chunked'"
    for name, side in (("student", student), ("teacher", teacher)):
        assert side.query is not None
        if side.query.dtype not in _DTYPES:
            return f"{name}_query: expected float16, bfloat16 or float32, got {side.query.dtype}; use impl='chunked'"
        width = side.query.shape[3] * (side.query.shape[1] if merge == "logsum" else 1)
        if width > MAX_WIDTH:
            return f"{name}_query: expected at most {MAX_WIDTH} channels for merge={merge!r}, got {width}; use impl='chunked'"
    return None


def per_row(problem: Problem, factor: float | None = None) -> Tensor:
    """The divergence of every query row, [B, Ho, M] float32 (see :mod:`attnkd.attention.reference` for its definition), or
    ``factor`` times its sum.

    Raises:
        NotImplementedError: a merge, dtype or size that no kernel covers; the message names the alternative.
    """
    reason = why_not(problem)
    if reason is not None:
        raise NotImplementedError(reason)
    s, t = problem.student, problem.teacher
    assert s.query is not None
    need_dq = torch.is_grad_enabled() and s.query.requires_grad
    return MapDivergenceFunction.apply(
        s.query, s.key, s.mask, t.query, t.key, t.mask, s.scale, t.scale, problem.merge, problem.divergence,
        problem.temperature, s.lse, t.lse, need_dq, factor,
    )  # fmt: skip
