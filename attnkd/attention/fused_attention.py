"""Attention that yields its divergence on the way, as PyTorch operations: the kernels of :mod:`attnkd_kernels.attention`.

Wrapped like :mod:`attnkd.attention.fused_maps`. The gradients of queries, keys and values leave the backward in one packed tensor
[B, N, 3, H, D] where they fit one; a packed input takes it as it is, three inputs take views of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkd.attention.problem import Problem, stored_mask
from attnkd.operators import first_order_only, keep, kept, register
from attnkd_kernels.attention.launch import (
    Saved,
    allocate,
    allocate_grads,
    attention_bwd,
    attention_fwd,
    plain,
    unpacked,
)
from attnkd_kernels.attention.tiles import WIDEST
from attnkd_kernels.language import BOOL_ROW, NO_MASK
from attnkd_kernels.launch import architecture, mask_kind
from attnkd_kernels.map.launch import Maps, Model
from attnkd_kernels.replay import replayed

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
    "Tensor? teacher_query, Tensor? teacher_key, Tensor? teacher_mask, float teacher_scale, str divergence"
)
_SAVED = "Tensor out, Tensor lse_s, Tensor lse_t, Tensor centre, Tensor weight"


def _maps(
    query,
    key,
    value,
    mask,
    scale,
    teacher_query,
    teacher_key,
    teacher_mask,
    teacher_scale,
    divergence,
    teacher_lse=None,
) -> Maps:
    arch = architecture(query.device)
    if divergence == "none":
        return plain(query, key, mask, scale, arch)
    student, teacher = (
        Model(query, key, mask, scale, None),
        Model(teacher_query, teacher_key, teacher_mask, teacher_scale, teacher_lse),
    )
    return Maps(student, teacher, None, divergence, 1.0, arch)


def _attention_fwd(*inputs):
    """Output, loss and what the backward needs; see :class:`attnkd_kernels.attention.launch.Saved`."""
    return tuple(attention_fwd(_maps(*inputs), inputs[2]))


def _attention_fwd_fake(*inputs):
    return tuple(allocate(_maps(*inputs), inputs[2]))


def _attention_bwd(grad, loss_grad, *inputs):
    """One packed gradient, or three."""
    out, *saved = inputs[10:]
    return attention_bwd(_maps(*inputs[:10]), inputs[2], Saved(out, loss_grad, *saved), grad, loss_grad)


def _attention_bwd_fake(grad, loss_grad, *inputs):
    return allocate_grads(_maps(*inputs[:10]), inputs[2])


_fwd = register(
    f"attention_fwd({_INPUTS}, Tensor? teacher_lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    replayed(_attention_fwd),
    _attention_fwd_fake,
)
_bwd = register(
    f"attention_bwd(Tensor grad, Tensor loss_grad, {_INPUTS}, {_SAVED}) -> Tensor[]",
    replayed(_attention_bwd),
    _attention_bwd_fake,
)


DTYPES = (torch.float16, torch.bfloat16)
"""Whose products have matrix units. The kernels are right in float32 too, but slower than two separate sweeps."""
MASKS = (NO_MASK.value, BOOL_ROW.value)
"""Read without spilling registers. The kernels are right with all others too (:func:`attnkd_kernels.launch.mask_kind`)."""


class AttentionFunction(torch.autograd.Function):
    """(output [B, H, M, V], divergence of every row [B, H, M] fp32) of query, key and value, or of all three packed."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, scale: float,
        teacher_query: Tensor | None, teacher_key: Tensor | None, teacher_mask: Tensor | None, teacher_scale: float,
        divergence: str, teacher_lse: Tensor | None,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        inputs = [query] if key is None or value is None else [query, key, value]
        student = (*unpacked(inputs), mask, scale)
        teacher = (teacher_query, teacher_key, teacher_mask, teacher_scale, divergence)
        out, loss, *saved = _fwd(*student, *teacher, teacher_lse)
        keep(ctx, mask, teacher_query, teacher_key, teacher_mask, out, *saved, *inputs)
        ctx.options = (scale, teacher_scale, divergence)
        return out, loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, loss_grad: Tensor | None):
        mask, teacher_query, teacher_key, teacher_mask, out, lse_s, lse_t, centre, weight, *inputs = kept(ctx)
        scale, teacher_scale, divergence = ctx.options
        if grad is None:
            grad = out.new_zeros(()).expand(out.shape)
        if loss_grad is None:
            loss_grad = lse_s.new_zeros(()).expand(lse_s.shape)
        grads = _bwd(
            grad, loss_grad, *unpacked(inputs), mask, scale, teacher_query, teacher_key, teacher_mask, teacher_scale, divergence,
            out, lse_s, lse_t, centre, weight,
        )  # fmt: skip
        if len(inputs) == 1:
            return grads[0], *[None] * 10
        return *unpacked(grads), *[None] * 8


def why_not(problem: Problem, value: Tensor) -> str | None:
    """The reason for which these kernels cannot compute the problem, or None."""
    student, teacher = problem.student, problem.teacher
    if problem.merge is not None:
        return "heads are merged"
    if problem.temperature != 1:
        return "the temperature makes the compared attention another one than that of the output"
    if teacher.query is None or student.query is None:
        return "the teacher is given as probabilities"
    if student.mask is not None and student.mask.requires_grad:
        return "the mask requires grad"
    if max(value.shape[3], student.query.shape[3], teacher.query.shape[3]) > WIDEST:
        return f"a head has more than {WIDEST} channels"
    for mask in (student.mask, teacher.mask):
        if mask_kind(None if mask is None else stored_mask(mask)) not in MASKS:
            return "a mask that is not boolean and the same for all queries"
    for dtype in (student.query.dtype, teacher.query.dtype):
        if dtype not in DTYPES:
            return f"{dtype} products have no matrix unit"
    return None


def attend(inputs: list[Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """(output [B, H, M, V], divergence of every row [B, H, M] fp32); ``why_not`` is None.

    Args:
        inputs: query, key and value, or [qkv], packed [B, N, 3, H, D].
        problem: its divergence 'none' leaves the divergence out (a plain attention), and what is returned in its place is empty.
    """
    student, teacher = problem.student, problem.teacher
    student_mask, teacher_mask = (None if m is None else stored_mask(m) for m in (student.mask, teacher.mask))
    first, key, value = (inputs[0], None, None) if len(inputs) == 1 else inputs
    return AttentionFunction.apply(
        first, key, value, student_mask, student.scale, teacher.query, teacher.key, teacher_mask, teacher.scale,
        problem.divergence, teacher.lse,
    )  # fmt: skip
