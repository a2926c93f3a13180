"""``impl="triton"``: the row kernels for a few query rows, the whole-map kernels for more. Importing it needs Triton."""

from __future__ import annotations

from torch import Tensor

from attnkd.attention import dispatch, fused_maps, fused_rows
from attnkd.attention.fused_rows import row_logits, row_probs
from attnkd.attention.problem import Problem

__all__ = ["per_row", "row_logits", "row_probs", "why_not"]


def why_not(problem: Problem) -> str | None:
    """The reason for which no fused kernel covers this problem, or None."""
    return (fused_rows if problem.rows_shape[2] <= dispatch.MAX_ROWS else fused_maps).why_not(problem)


def per_row(problem: Problem, factor: float | None = None) -> Tensor:
    """The divergence of every query row, [B, Ho, M] in float32, or ``factor`` times its sum; ``why_not(problem)`` is None."""
    return (fused_rows if problem.rows_shape[2] <= dispatch.MAX_ROWS else fused_maps).per_row(problem, factor)
