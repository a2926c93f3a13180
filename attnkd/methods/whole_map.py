"""Whole attention maps of chosen heads, cut to the tokens two models share, and their divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.api import attention_divergence, reduce_rows
from attnkd.attention.call import AttentionCall, Heads, shared_tokens, take_heads
from attnkd.attention.checks import integer
from attnkd.attention.resampled_maps import resampled_map_divergence
from attnkd.capture.blocks import plain_class
from attnkd.capture.tokens import TokenLayout, check_same_grid, filled_in, padding


def num_heads(model: nn.Module, path: str) -> int:
    """The number of heads of an attention, as its module says."""
    attention = model.get_submodule(path)
    names = ("num_heads", "num_attention_heads", "n_heads", "heads")
    heads = integer(next((getattr(attention, name) for name in names if hasattr(attention, name)), None))
    config = getattr(attention, "config", None)
    heads = integer(getattr(config, "num_attention_heads", None)) if heads is None else heads  # ModernBERT
    if heads is None:
        raise TypeError(f"{path} ({plain_class(model.get_submodule(path)).__name__}): does not say its num_heads")
    return heads


def check_heads(name: str, heads: Sequence[int], count: int, path: str) -> Heads:
    """Head indices of an attention with ``count`` heads, each at most once; negative indices are refused."""
    chosen = []
    for head in heads:
        index = integer(head)
        if index is None:
            raise TypeError(f"{name}: expected head indices (int), got {head!r}")
        if not 0 <= index < count:
            raise ValueError(f"{name}: expected indices from 0 to {count - 1} ({path} has {count} heads), got {index}")
        chosen.append(index)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{name}: expected every head once, got {chosen} for {path}")
    return tuple(chosen)


def compared_maps(
    student: AttentionCall,
    teacher: AttentionCall,
    layouts: tuple[TokenLayout, TokenLayout],
    student_heads: Heads,
    teacher_heads: Heads,
    resample_mode: str | None = None,
) -> tuple[AttentionCall, AttentionCall]:
    """The heads, queries and keys that a comparison of whole maps is about.

    Args:
        student, teacher: as an :class:`attnkd.AttentionTap` returns them.
        layouts: student's and teacher's, for calls that do not say which of their tokens are class token and prefix tokens.
        student_heads, teacher_heads: student head i learns from teacher head i; with a merge any numbers of heads.
        resample_mode: whether maps over two patch grids can be compared, see :func:`map_rows`.

    Raises:
        ValueError: maps of different sizes, or of different patch grids without ``resample_mode``.
    """
    resized = resample_mode is not None and on_two_grids(student, teacher)
    if not resized:
        check_same_grid(student, teacher)
    student, teacher = filled_in(student, layouts[0]), filled_in(teacher, layouts[1])
    keep_cls = bool(student.has_cls and teacher.has_cls)
    s = take_heads(shared_tokens(student, keep_cls), student_heads)
    t = take_heads(shared_tokens(teacher, keep_cls), teacher_heads)
    squares = all(call.query.shape[2] == call.key.shape[2] for call in (s, t))
    if resized and not squares or not resized and s.query.shape[2] != t.query.shape[2]:
        raise ValueError(
            f"whole maps need the same tokens: the student's map is {s.query.shape[2]} x {s.key.shape[2]}, the "
            f"teacher's {t.query.shape[2]} x {t.key.shape[2]} (class token and patches); use models with the same patch "
            "grid, or a method that compares class-token rows (AttnDistill), which can be resized"
        )
    return s, t


def whole_map_divergence(
    student: AttentionCall,
    teacher: AttentionCall,
    *,
    merge: str | None = None,
    sample_weight: Tensor | None = None,
    rows: Tensor | None = None,
    resample_mode: str | None = None,
    **options: Any,
) -> Tensor:
    """The divergence of whole maps, averaged over images, heads and query rows; a scalar.

    Rows of padding do not count: tokens that the student's mask hides from all rows, see :func:`attnkd.capture.tokens.padding`.

    Args:
        student, teacher: as :func:`compared_maps` returns them.
        merge: None, or how the heads of each side become one map first.
        sample_weight: [B], multiplies every image's rows; the divisor stays the number of rows, so that a batch of
            small weights has a small loss.
        rows: the divergence of every row, where it was computed before.
        resample_mode: see :func:`map_rows`.
        options: divergence, temperature, impl; see :func:`attnkd.attention_divergence`.
    """
    padded = None
    if student.query.shape[2] == student.key.shape[2]:
        padded = padding(student.mask, student.key.shape[2])
    reduction, row_weight = "mean", None if padded is None else (~padded).float()[:, None]
    if sample_weight is not None:
        if (
            len(sample_weight) != student.query.shape[0]
        ):  # windows lie in the batch, those of an image one after the other
            sample_weight = sample_weight.repeat_interleave(student.query.shape[0] // len(sample_weight))
        heads = student.query.shape[1] if merge is None else 1
        counted = heads * student.query.shape[2] if row_weight is None else heads * row_weight.mean(0).sum()
        row_weight = (sample_weight / counted)[:, None, None] * (1 if row_weight is None else row_weight)
        reduction = "batchmean"
    weighting: dict[str, Any] = {"merge": merge, "row_weight": row_weight, "reduction": reduction}
    if on_two_grids(student, teacher):
        rows = map_rows(student, teacher, merge, resample_mode, **options) if rows is None else rows
        weight = torch.ones_like(rows) if row_weight is None else row_weight.expand(rows.shape)
        total = torch.where(weight == 0, 0.0, rows * weight).sum()
        return total / (weight.sum() if reduction == "mean" else len(rows))
    if rows is not None:
        return reduce_rows(rows, student, teacher, **weighting)
    return attention_divergence(student, teacher, **weighting, **options)


def on_two_grids(student: AttentionCall, teacher: AttentionCall) -> bool:
    """Whether two attentions are known to run over different patch grids."""
    return None not in (student.grid, teacher.grid) and student.grid != teacher.grid


def map_rows(
    student: AttentionCall, teacher: AttentionCall, merge: str | None, resample_mode: str | None, **options: Any
) -> Tensor:
    """The divergence of every row, [B, H, N] ([B, 1, N] with a merge).

    Args:
        student, teacher: as :func:`compared_maps` returns them.
        resample_mode: how a teacher's map over another patch grid is resized to the student's, see
            :mod:`attnkd.attention.resampled_maps`.
        options: divergence, temperature, impl; see :func:`attnkd.attention_divergence`.
    """
    if on_two_grids(student, teacher):
        padded = padding(student.mask, student.key.shape[2])
        return resampled_map_divergence(
            student, teacher, mode=str(resample_mode), merge=merge, padded=padded, **options
        )
    return attention_divergence(student, teacher, merge=merge, reduction="none", **options)
