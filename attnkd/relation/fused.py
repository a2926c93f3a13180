"""The relation row as a PyTorch operation: its kernels registered as opaque ops inside an autograd function."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkd.operators import first_order_only, keep, kept, register
from attnkd_kernels.relation_row import num_blocks, relation_row_bwd, relation_row_fwd
from attnkd_kernels.replay import replayed


def _fwd_fake(student, teacher, student_prefix, teacher_prefix, eps, need_grad, factor=None):
    B, patches = student.shape[0], student.shape[1] - student_prefix
    loss = student.new_empty(B if factor is None else (), dtype=torch.float32)
    if not need_grad:
        return loss, loss.new_empty(0), loss.new_empty(0)
    blocks = num_blocks(patches, student.shape[2], teacher.shape[2])
    return loss, loss.new_empty((B, 2, patches)), loss.new_empty((B, blocks))


def _bwd_fake(grad, coef, b_0, student, student_prefix):
    return torch.empty_like(student)


_relation_row_fwd = register(
    "relation_row_fwd(Tensor student, Tensor teacher, int student_prefix, int teacher_prefix, float eps, bool need_grad, "
    "float? factor=None) -> (Tensor, Tensor, Tensor)",
    replayed(relation_row_fwd),
    _fwd_fake,
)
_relation_row_bwd = register(
    "relation_row_bwd(Tensor grad, Tensor coef, Tensor b_0, Tensor student, int student_prefix) -> Tensor",
    replayed(relation_row_bwd),
    _bwd_fake,
)


class RelationRowFunction(torch.autograd.Function):
    """Loss per image [B], or ``factor`` times its sum; the teacher gets no gradient."""

    @staticmethod
    def forward(ctx, student, teacher, student_prefix, teacher_prefix, eps, need_grad, factor):
        loss, coef, b_0 = _relation_row_fwd(student, teacher, student_prefix, teacher_prefix, eps, need_grad, factor)
        if need_grad:
            keep(ctx, coef, b_0, student)
            ctx.student_prefix = student_prefix
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        coef, b_0, student = kept(ctx)
        return _relation_row_bwd(grad, coef, b_0, student, ctx.student_prefix), *[None] * 6


def per_image(
    student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int, eps: float, factor: float | None
) -> Tensor:
    """Mean over patches of (r_s − r_t)² for every image, [B] fp32, or ``factor`` times its sum."""
    need_grad = torch.is_grad_enabled() and student.requires_grad
    return RelationRowFunction.apply(student, teacher, student_prefix, teacher_prefix, eps, need_grad, factor)
