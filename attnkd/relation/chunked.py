"""``impl="chunked"``: the relation row in plain PyTorch, a chunk of images at a time, with a hand-written backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnkd.operators import first_order_only, keep, kept

CHUNK = 1 << 22
"""Elements of a batch chunk that are held in float32 at a time."""


def per_image(
    student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int, normalize_dim: int, eps: float
) -> Tensor:
    """Mean over patches of (r_s − r_t)² for every image, [B] float32 (float64 for a float64 student)."""
    need_grad = torch.is_grad_enabled() and student.requires_grad
    return RelationRowFunction.apply(student, teacher, student_prefix, teacher_prefix, normalize_dim, eps, need_grad)


class RelationRowFunction(torch.autograd.Function):
    """Loss per image [B]; keeps numbers per token or channel only.

    Both normalisations make the row r_j = Σ_c w_jc F_0c F_jc, with w_jc = v_0 v_j (v an inverse norm of a token) or w_jc = v_c²
    (of a channel). With e_j = ∂loss/∂r_j the gradients are those of :mod:`attnkd_kernels.relation_row`, and for channels, with
    A_c = Σ_j e_j F_jc:   dF_jc = v_c² (e_j F_0c − 2 v_c² F_0c A_c F_jc),   dF_0c = v_c² (A_c − 2 v_c² F_0c A_c F_0c).
    """

    @staticmethod
    def forward(ctx, student, teacher, student_prefix, teacher_prefix, normalize_dim, eps, need_grad):
        losses, saved = [], []
        elements = max(math.prod(student.shape[1:]), math.prod(teacher.shape[1:]))
        size = max(CHUNK // elements, 1)
        with torch.autocast(student.device.type, enabled=False):
            for s, t in zip(student.split(size), teacher.split(size), strict=True):
                r_s, v = _row(s, student_prefix, normalize_dim, eps)
                gap = r_s - _row(t, teacher_prefix, normalize_dim, eps)[0].to(r_s.dtype)
                losses.append(gap.square().mean(1))
                if need_grad:
                    saved.append((2.0 / gap.shape[1] * gap, r_s, v))
        if need_grad:
            keep(ctx, student, *(torch.cat(parts) for parts in zip(*saved, strict=True)))
            ctx.options = (student_prefix, normalize_dim, size)
        return torch.cat(losses)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        student, e, r, v = kept(ctx)
        prefix, normalize_dim, size = ctx.options
        gradient = torch.zeros_like(student) if prefix > 1 else torch.empty_like(student)
        chunks = (x.split(size) for x in (student, grad[:, None] * e, r, v, gradient))
        with torch.autocast(student.device.type, enabled=False):
            for f, e_i, r_i, v_i, d in zip(*chunks, strict=True):
                d_cls, d_patches = _gradients(
                    f[:, :1].to(e.dtype), f[:, prefix:].to(e.dtype), e_i, r_i, v_i, normalize_dim
                )
                d[:, :1] = d_cls
                d[:, prefix:] = d_patches
        return gradient, None, None, None, None, None, None


def _gradients(
    cls: Tensor, patches: Tensor, e: Tensor, r: Tensor, v: Tensor, normalize_dim: int
) -> tuple[Tensor, Tensor]:
    """dF of the class token [b, 1, C] and of the patches [b, P, C], from e and r [b, P] and the inverse norms v."""
    if normalize_dim == -1:
        v_0, v_j = v[:, :1], v[:, 1:]
        a, diagonal = (e * v_0 * v_j)[..., None], (e * r * v_j.square())[..., None]
        diagonal_0 = ((e * r).sum(1, keepdim=True) * v_0.square())[..., None]
        return a.mT @ patches - diagonal_0 * cls, a * cls - diagonal * patches
    w = v[:, None].square()
    total = e[:, None] @ patches
    shrink = 2 * w * cls * total
    return w * (total - shrink * cls), w * (e[..., None] * cls - shrink * patches)


def _row(features: Tensor, prefix: int, normalize_dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """r [b, P] of features [b, N, C], and the inverse norms of class token and patches [b, 1 + P] or of channels [b, C]."""
    f = features.to(_accumulator(features))
    cls, patches = f[:, :1], f[:, prefix:]
    if normalize_dim == -1:
        v = _inverse(torch.cat([cls.square().sum(-1), patches.square().sum(-1)], 1), eps)
        return (patches @ cls.mT)[..., 0] * v[:, 1:] * v[:, :1], v
    v = _inverse(cls.square().sum(1) + patches.square().sum(1), eps)
    return (patches @ (cls * v[:, None].square()).mT)[..., 0], v


def _inverse(square: Tensor, eps: float) -> Tensor:
    """1/√square, and 0 where that has no direction; NaN where the square overflowed."""
    return torch.where(square <= eps * eps, 0.0, square.sqrt() / square)


def _accumulator(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
