"""The relation row: how similar the class token's features are to every patch token's, compared between two models.

With features F [B, N, C] of which token 0 is the class token, the row is r_j = ⟨G_0, G_j⟩ over the patches j, where G is F
L2-normalised. It is one row of the N×N Gram matrix of G, which is never formed.

Wang, Cao, Shi, Wu, Yang: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022, probe knowledge distillation.
"""

from __future__ import annotations

from torch import Tensor

from attnkd.attention import dispatch
from attnkd.attention.checks import check_choice, check_tensor, integer
from attnkd.attention.kinds import once_a_kind
from attnkd.relation import chunked, reference

if dispatch.TRITON_INSTALLED:
    # Not where it is used: torch.compile must find this module imported.
    from attnkd.relation import fused

REDUCTIONS = ("none", "sum", "mean")


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

    With G the features L2-normalised along ``normalize_dim`` and r_j = ⟨G_0, G_j⟩, the loss of an image is the mean over
    its patches j of (r_s,j − r_t,j)².

    NaN in an image's features makes its loss NaN. What has no direction (a norm up to 1e-12) has similarity 0 and gets no gradient, where ``F.normalize`` would divide by
    1e-12 and return gradients of that scale.

    Args:
        student_features: [B, N, C], any strides; float16, bfloat16 or float32 (float64: ``chunked``, ``reference``). Token 0
            is the class token. The widths C of student and teacher may differ, the patches must be as many.
        teacher_features: [B, Nt, Ct]. Gets no gradient.
        student_prefix_tokens: number of tokens before the first patch, class token included. The others among them
            (registers, a distillation token) are left out.
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
    implementation, normalize_dim, factor, prefix_s, prefix_t = _decided(
        student_features, teacher_features, student_prefix_tokens, teacher_prefix_tokens, normalize_dim, reduction, impl
    )
    features = student_features, teacher_features.detach(), prefix_s, prefix_t
    if implementation == "triton":
        return fused.per_image(*features, reference.EPS, factor)
    if implementation == "chunked":
        loss = chunked.per_image(*features, normalize_dim, reference.EPS)
    else:
        loss = reference.per_image(*features, normalize_dim)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


@once_a_kind
def _decided(
    student: Tensor,
    teacher: Tensor,
    student_prefix: int,
    teacher_prefix: int,
    normalize_dim: int,
    reduction: str,
    impl: str,
) -> tuple[str, int, float | None, int, int]:
    """The implementation, the dimension, what the sum over images is multiplied with (None: no sum), the numbers of prefix tokens; checked."""
    check_choice("normalize_dim", normalize_dim, (-1, -2))
    normalize_dim = int(normalize_dim)
    check_choice("reduction", reduction, REDUCTIONS)
    prefixes = _check_features(student, teacher, student_prefix, teacher_prefix)
    batch = student.shape[0]
    if reduction == "mean" and batch == 0:
        raise ValueError("reduction: 'mean' of an empty batch is undefined, student_features has shape [0, ...]")
    implementation = dispatch.choose(impl, (student, teacher), why_not_fused=lambda: _why_not_fused(normalize_dim))
    factor = {"none": None, "sum": 1.0, "mean": 1.0 / max(batch, 1)}[reduction]
    return implementation, normalize_dim, factor, *prefixes


def _why_not_fused(normalize_dim: int) -> str | None:
    if normalize_dim == -2:
        return "normalize_dim=-2 has no fused kernel: every channel's norm is needed before the row"
    return None


def _check_features(student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int) -> tuple[int, int]:
    """The numbers of prefix tokens."""
    patches, prefixes = {}, []
    for name, features, prefix in (("student", student, student_prefix), ("teacher", teacher, teacher_prefix)):
        check_tensor(f"{name}_features", features, 3, "[B, N, C]")
        count = integer(prefix)
        if count is None or count < 1:
            raise ValueError(f"{name}_prefix_tokens: expected an integer >= 1 (the class token counts), got {prefix!r}")
        prefixes.append(count)
        patches[name] = features.shape[1] - count
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
    return prefixes[0], prefixes[1]
