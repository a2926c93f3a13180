"""From the divergence of every row to one number: row weights, and which rows a mean counts."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkd.attention.checks import kind
from attnkd.attention.problem import HIDDEN_BELOW, Problem, stored_mask


def check_reduction(problem: Problem, reduction: str) -> None:
    """
    Raises:
        ValueError: a mean over nothing.
    """
    if reduction in ("mean", "batchmean") and problem.rows_shape[0] == 0:
        raise ValueError(f"reduction: {reduction!r} of an empty batch is undefined, student_query has shape [0, ...]")
    if reduction == "mean" and problem.rows_shape[2] == 0:
        raise ValueError("reduction: 'mean' over no query rows is undefined, student_query has M = 0")


def check_weight(weight: Tensor | None, problem: Problem) -> Tensor | None:
    """``row_weight`` as [B, Ho, M] in the dtype of the loss, without gradient."""
    if weight is None:
        return None
    assert problem.student.query is not None
    device = problem.student.query.device
    if not isinstance(weight, Tensor) or not (weight.dtype.is_floating_point or weight.dtype == torch.bool):
        got = weight.dtype if isinstance(weight, Tensor) else kind(weight)
        raise TypeError(f"row_weight: expected a floating point or boolean tensor, got {got}")
    if weight.device != device:
        raise ValueError(f"row_weight: expected device {device} like student_query, got {weight.device}")
    # A copy, if made under inference_mode: such a tensor cannot be used in the rows' backward.
    copy = not torch.compiler.is_compiling() and weight.is_inference()
    try:
        return weight.detach().to(problem.dtype, copy=copy).expand(problem.rows_shape)
    except RuntimeError:
        layout = "[B, H, M]" if problem.merge is None else "[B, 1, M]"
        raise ValueError(
            f"row_weight: expected a shape that broadcasts to {layout} = {problem.rows_shape}, got {tuple(weight.shape)}"
        ) from None


def summands(problem: Problem, weight: Tensor | None, reduction: str) -> Tensor | float:
    """What the rows [B, Ho, M] are multiplied with before they are summed: row weights and the reduction's divisor in one."""
    batch, heads, rows = problem.rows_shape
    alive = _rows_alive(problem) if reduction == "mean" else None
    if weight is None and alive is None:
        return {"sum": 1.0, "batchmean": 1.0 / max(batch, 1), "mean": 1.0 / max(batch * heads * rows, 1)}[reduction]
    if weight is None:
        assert alive is not None
        weight = torch.ones_like(alive, dtype=problem.dtype)
    if reduction == "sum":
        return weight
    if reduction == "batchmean":
        return weight / batch
    return weight / (weight.sum() if alive is None else (weight * alive).sum())


def total(rows: Tensor, factor: float | None) -> Tensor:
    """factor · Σ rows, or with None the rows as they are. For the inside of an autograd function, whose backward knows the factor: as
    operations of their own, sum and product would put two more nodes into the graph and two more launches on the way back."""
    if factor is None:
        return rows
    if factor == 1.0:
        return rows.sum()
    return rows.mean() if factor * rows.numel() == 1.0 else rows.sum() * factor  # one launch where it can be


def reduced(rows: Tensor, problem: Problem, weight: Tensor | None, reduction: str) -> Tensor:
    """The divergences [B, Ho, M] of all rows, weighted and reduced."""
    if reduction == "none":
        return rows if weight is None else weighted(rows, weight)
    factors = summands(problem, weight, reduction)
    return weighted(rows, factors).sum() if isinstance(factors, Tensor) else rows.sum() * factors


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """weight · row; a row of weight 0 is left out, even where it is infinite or NaN."""
    return torch.where(weight == 0, 0.0, weight * rows)


def _rows_alive(problem: Problem) -> Tensor | None:
    """[B, Ho, M] boolean: rows that see a key on both sides; None when neither masks nor probabilities can hide a whole row."""
    alive = None if problem.teacher.probs is None else (problem.teacher.probs != 0).any(-1)
    for side in (problem.student, problem.teacher):
        if side.mask is None:
            continue
        mask = stored_mask(side.mask)  # what is broadcast is not written out for this either
        visible = mask if mask.dtype == torch.bool else ~(mask <= HIDDEN_BELOW)
        if problem.merge in ("logsum", "min"):  # a key that one head hides is hidden
            visible = visible.all(1, keepdim=True)
        rows = visible.any(-1)
        rows = rows if problem.merge is None else rows.all(1, keepdim=True)
        alive = rows if alive is None else alive & rows
    return None if alive is None else alive.expand(problem.rows_shape)
