"""The relation row: how similar the class token's features are to every patch token's, compared between two models.

With features F [B, N, C] of which token 0 is the class token, the row is r_j = ⟨G_0, G_j⟩ over the patches j, where G is F
L2-normalised. It is one row of the N×N Gram matrix of G, which is never formed.

Wang, Cao, Shi, Wu, Yang: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022, probe knowledge distillation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.dispatch import IMPLS, TRITON_INSTALLED, why_not_triton
from attnkd.attention.problem import check_choice, check_tensor
from attnkd.operators import first_order_only

if TRITON_INSTALLED:
    # Not where it is used: torch.compile must find this module imported.
    from attnkd.relation import fused as ops_relation

REDUCTIONS = ("none", "sum", "mean")
EPS = 1e-12
"""A token (a channel, for ``normalize_dim=-2``) whose norm is not above this has no direction."""
CHUNK = 1 << 22
"""Elements of a batch chunk that the plain PyTorch implementation holds in float32 at a time."""


def relation_row_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    student_prefix_tokens: int = 1,
    teacher_prefix_tokens: int = 1,
    normalize_dim: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Squared error between student's and teacher's similarity of class token and patches; no Gram matrix is stored.

    With G the features L2-normalised along ``normalize_dim`` and r_j = ⟨G_0, G_j⟩, an image is worth the mean over its
    patches j of (r_s,j − r_t,j)².

    What has no direction (a norm up to 1e-12) has similarity 0 and gets no gradient, where ``F.normalize`` would divide by
    1e-12 and hand back gradients of that scale.

    Args:
        student_features: [B, N, C], any strides; float16, bfloat16 or float32 (float64: ``chunked``, ``reference``). Token 0
            is the class token. The widths C of student and teacher may differ, the patches must be as many.
        teacher_features: [B, Nt, Ct]. Gets no gradient.
        student_prefix_tokens: number of tokens before the first patch, class token included. The others among them
            (registers, a distillation token) do not take part.
        teacher_prefix_tokens: the same for the teacher.
        normalize_dim: as ``dim`` of ``F.normalize``. -1: every token has norm 1, so r_j is a cosine (the paper). -2: every
            channel has norm 1 over class token and patches (the authors' published code); no fused kernel.
        reduction: 'none' [B]; 'sum'; 'mean' over the images.
        impl: 'auto', 'triton', 'chunked' or 'reference'; see :mod:`attnkd.attention.dispatch`.

    Returns:
        float32 (float64 for float64 student features), scalar or per image.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape, dtype, device or option, named.
        NotImplementedError: ``impl='triton'`` where it cannot be honoured.

    Example::

        loss = relation_row_loss(student_tokens, teacher_tokens)     # [B, 197, 192] and [B, 197, 768]
    """
    check_choice("normalize_dim", normalize_dim, (-1, -2))
    check_choice("reduction", reduction, REDUCTIONS)
    _check_features(student_features, teacher_features, student_prefix_tokens, teacher_prefix_tokens)
    teacher_features = teacher_features.detach()
    implementation = _choose(impl, student_features, teacher_features, normalize_dim)
    prefixes = (student_prefix_tokens, teacher_prefix_tokens)
    if implementation == "triton":
        loss = ops_relation.per_image(student_features, teacher_features, *prefixes, EPS)
    elif implementation == "chunked":
        need_grad = torch.is_grad_enabled() and student_features.requires_grad
        loss = _Chunked.apply(student_features, teacher_features, *prefixes, normalize_dim, need_grad)
    else:
        loss = reference_per_image(student_features, teacher_features, *prefixes, normalize_dim)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if len(loss) == 0:
        raise ValueError("reduction: 'mean' of an empty batch is undefined, student_features has shape [0, ...]")
    return loss.mean()


def reference_per_image(
    student: Tensor,
    teacher: Tensor,
    student_prefix: int,
    teacher_prefix: int,
    normalize_dim: int,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """The specification, [B]: both Gram matrices in ``precision``, their rows 0 subtracted."""
    rows = []
    for features, prefix in ((student, student_prefix), (teacher, teacher_prefix)):
        tokens = torch.cat([features[:, :1], features[:, prefix:]], 1).to(precision)
        # The clamp is F.normalize's; what it would blow up is made 0 here, in value and gradient.
        directed = tokens.detach().norm(dim=normalize_dim, keepdim=True) > EPS
        normal = F.normalize(torch.where(directed, tokens, 0.0), dim=normalize_dim, eps=EPS) * directed
        rows.append((normal @ normal.mT)[:, 0, 1:])
    loss = (rows[0] - rows[1]).square().mean(-1)
    return loss if student.dtype == torch.float64 else loss.float()


class _Chunked(torch.autograd.Function):
    """Loss per image [B] in plain PyTorch, a chunk of images at a time; keeps numbers per token or channel only.

    Both normalisations make the row r_j = Σ_c w_jc F_0c F_jc, with w_jc = v_0 v_j (v an inverse norm of a token) or w_jc = v_c²
    (of a channel). With e_j = ∂loss/∂r_j the gradients are those of :mod:`attnkd_kernels.relation_row`, and for channels, with
    A_c = Σ_j e_j F_jc:   dF_jc = v_c² (e_j F_0c − 2 v_c² F_0c A_c F_jc),   dF_0c = v_c² (A_c − 2 v_c² F_0c A_c F_0c).
    """

    @staticmethod
    def forward(ctx, student, teacher, student_prefix, teacher_prefix, normalize_dim, need_grad):
        losses, saved = [], []
        elements = max(math.prod(student.shape[1:]), math.prod(teacher.shape[1:]))
        size = max(CHUNK // elements, 1)
        with torch.autocast(student.device.type, enabled=False):
            for s, t in zip(student.split(size), teacher.split(size), strict=True):
                r_s, v = _row(s, student_prefix, normalize_dim)
                gap = r_s - _row(t, teacher_prefix, normalize_dim)[0].to(r_s.dtype)
                losses.append(gap.square().mean(1))
                if need_grad:
                    saved.append((2.0 / gap.shape[1] * gap, r_s, v))
        if need_grad:
            ctx.save_for_backward(student, *(torch.cat(parts) for parts in zip(*saved, strict=True)))
            ctx.options = (student_prefix, normalize_dim, size)
        return torch.cat(losses)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        student, e, r, v = ctx.saved_tensors
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
        return gradient, None, None, None, None, None


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


def _row(features: Tensor, prefix: int, normalize_dim: int) -> tuple[Tensor, Tensor]:
    """r [b, P] of features [b, N, C], and the inverse norms of class token and patches [b, 1 + P] or of channels [b, C]."""
    f = features.to(_accumulator(features))
    cls, patches = f[:, :1], f[:, prefix:]
    if normalize_dim == -1:
        v = _inverse(torch.cat([cls.square().sum(-1), patches.square().sum(-1)], 1))
        return (patches @ cls.mT)[..., 0] * v[:, 1:] * v[:, :1], v
    v = _inverse(cls.square().sum(1) + patches.square().sum(1))
    return (patches @ (cls * v[:, None].square()).mT)[..., 0], v


def _inverse(square: Tensor) -> Tensor:
    """1/√square, and 0 where that has no direction; NaN where the square overflowed."""
    return torch.where(square <= EPS * EPS, 0.0, square.sqrt() / square)


def _accumulator(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _choose(impl: str, student: Tensor, teacher: Tensor, normalize_dim: int) -> str:
    """The rule of :mod:`attnkd.attention.dispatch`."""
    check_choice("impl", impl, IMPLS)
    if impl in ("chunked", "reference"):
        return impl
    reason = why_not_triton(student.device, torch.float64 if teacher.dtype == torch.float64 else student.dtype)
    if reason is None and normalize_dim == -2:
        reason = "normalize_dim=-2 has no fused kernel: every channel's norm is needed before the row"
    if impl == "triton":
        if reason:
            raise NotImplementedError(f"impl='triton': {reason}")
        return "triton"
    return "chunked" if reason or student.device.type != "cuda" else "triton"


def _check_features(student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int) -> None:
    patches = {}
    for name, features, prefix in (("student", student, student_prefix), ("teacher", teacher, teacher_prefix)):
        check_tensor(f"{name}_features", features, 3, "[B, N, C]")
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 1:
            raise ValueError(f"{name}_prefix_tokens: expected an integer >= 1 (the class token counts), got {prefix!r}")
        patches[name] = features.shape[1] - prefix
        if patches[name] < 1 or features.shape[2] == 0:
            raise ValueError(
                f"{name}_features: expected at least one patch token behind {prefix} prefix tokens and one channel, got shape "
                f"{tuple(features.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"teacher_features: expected batch size B = {student.shape[0]} like student_features, got {teacher.shape[0]}"
        )
    if patches["student"] != patches["teacher"]:
        raise ValueError(
            f"teacher_features: expected {patches['student']} patch tokens like student_features, got {patches['teacher']} "
            f"(shapes {tuple(teacher.shape)} and {tuple(student.shape)}); models of different patch grids cannot be compared"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_features: expected device {student.device} like student_features, got {teacher.device}"
        )
