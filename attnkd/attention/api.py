"""The operations: the divergence between a student's and a teacher's attention, and the attention rows themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkd.attention import chunked, dispatch, reference
from attnkd.attention.merging import merge_logits, softmax_or_zero
from attnkd.attention.problem import (
    HIDDEN_BELOW,
    MERGES,
    REDUCTIONS,
    Problem,
    Side,
    check_choice,
    check_temperature,
    make_problem,
    make_side,
    stored_mask,
)

if dispatch.TRITON_INSTALLED:
    # Not where they are used: torch.compile must find these modules imported.
    from attnkd.attention import fused_maps as ops_map
    from attnkd.attention import fused_rows as ops_row


def attention_divergence(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    *,
    teacher_probs: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Divergence between two attentions, computed from queries and keys; no attention map is stored.

    With z = (scale·q·k + mask) / T and p = softmax(z) for student s and teacher t, every query row is worth

    * ``forward_kl``: Σ_j p_t (log p_t − log p_s), the KL divergence KL(teacher ‖ student)
    * ``reverse_kl``: Σ_j p_s (log p_s − log p_t)
    * ``js``: ½ KL(p_t ‖ m) + ½ KL(p_s ‖ m) with m = ½ (p_s + p_t)
    * ``cross_entropy``: −Σ_j p_t log p_s
    * ``mse``: mean over the keys visible to both of (p_s − p_t)²
    * ``logit_mse``: mean over the keys visible to both of (z_s − z_t)²

    The class-token row is ``query[:, :, :1]``. Teacher tensors get no gradient.

    Args:
        student_query: [B, H, M, D], any strides; float16, bfloat16 or float32 (float64: ``chunked`` and ``reference``).
        student_key: [B, H, N, D].
        teacher_query: [B, Ht, M, Dt]. Ht may differ from H when heads are merged.
        teacher_key: [B, Ht, N, Dt].
        teacher_probs: [B, H, M, N] ([B, 1, M, N] with a merge), in place of teacher queries and keys: cached or resampled
            rows. They are normalised to sum 1; the temperature is not applied to them.
        student_scale: multiplies the student's scores; None means D**-0.5. Models differ: take it from the attention call.
        teacher_scale: the same for the teacher.
        student_mask: broadcasts to [B, H, M, N]; boolean (True = visible, as in scaled_dot_product_attention) or additive.
            An additive mask may require grad (a learned relative position bias).
        teacher_mask: broadcasts to [B, Ht, M, N].
        merge: None compares head h with head h. 'logsum' compares softmax((1/T)·Σ_h log p^h), 'mean', 'max', 'min' the
            renormalised mean, max or min of the heads' probabilities. A key that one head's mask hides has probability 0 in
            that head; a row that some head cannot see at all is worth 0.
        divergence: see above.
        temperature: T > 0, divides scores and masks of both sides.
        row_weight: broadcasts to [B, H, M] ([B, 1, M] with a merge); multiplies the rows. Gets no gradient.
        reduction: 'none' [B, H, M] ([B, 1, M] with a merge); 'sum'; 'batchmean', the sum divided by B; 'mean', the
            (weighted) mean over rows. A row that sees no key on either side is worth 0 and does not count in the mean.
        impl: 'auto', 'triton', 'chunked' or 'reference'; see :mod:`attnkd.attention.dispatch`.

    Returns:
        float32 (float64 for float64 inputs), scalar or per row.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape, dtype, device or option, named.
        NotImplementedError: an explicit ``impl`` that cannot be honoured.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    student_query, student_key = _autocast(student_query, student_key)
    teacher_query, teacher_key = _autocast(teacher_query, teacher_key)
    problem = make_problem(
        student_query,
        student_key,
        teacher_query,
        teacher_key,
        teacher_probs,
        student_scale,
        teacher_scale,
        student_mask,
        teacher_mask,
        merge,
        divergence,
        temperature,
    )
    implementation = dispatch.choose(impl, problem)
    weight = _check_weight(row_weight, problem)
    if reduction == "none":
        rows = _per_row(implementation, problem)
        return rows if weight is None else rows * weight
    if reduction in ("mean", "batchmean") and problem.rows_shape[0] == 0:
        raise ValueError(f"reduction: {reduction!r} of an empty batch is undefined, student_query has shape [0, ...]")
    if reduction == "mean" and problem.rows_shape[2] == 0:
        raise ValueError("reduction: 'mean' over no query rows is undefined, student_query has M = 0")
    return _weighted_sum(implementation, problem, _mean_weight(problem, weight, reduction))


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    merge: str | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """The attention rows of the given queries: softmax(z), merged over heads or not. Differentiable.

    Meant for a few rows (a class token to cache, to resample or to look at): the result has a value per query and key.

    Args:
        query: [B, H, M, D], any strides.
        key: [B, H, N, D].
        scale: multiplies the scores; None means D**-0.5.
        mask: broadcasts to [B, H, M, N]; boolean (True = visible) or additive.
        merge: None, 'logsum', 'mean', 'max' or 'min'; see :func:`attention_divergence`.
        temperature: T > 0, divides scores and mask.
        impl: 'auto', 'triton', 'chunked' or 'reference'.

    Returns:
        Probabilities [B, H, M, N], or [B, 1, M, N] when merged; float32 (float64 for float64 inputs). A row that sees no
        key is 0.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape, dtype or option, named.
        NotImplementedError: an explicit ``impl`` that cannot be honoured.
    """
    check_choice("merge", merge, MERGES)
    check_temperature(temperature)
    query, key = _autocast(query, key)
    side = make_side("", query, key, scale, mask)
    implementation = dispatch.choose_rows(impl, query)
    if implementation == "reference":
        rows = reference.attention_rows(side, merge, temperature)
        return rows if query.dtype == torch.float64 else rows.float()
    logits = _row_logits(implementation, side, merge == "logsum", temperature)
    if merge not in (None, "logsum"):
        logits = merge_logits(logits, merge)
    return logits.softmax(-1) if mask is None else softmax_or_zero(logits)


def _per_row(implementation: str, problem: Problem) -> Tensor:
    if implementation == "triton":
        few = problem.rows_shape[2] <= dispatch.MAX_ROWS
        return ops_row.per_row(problem) if few else ops_map.per_row(problem)
    return chunked.per_row(problem) if implementation == "chunked" else reference.per_row(problem)


def _weighted_sum(implementation: str, problem: Problem, weight: Tensor | float) -> Tensor:
    """Σ weight·row. ``chunked`` is told the weights so that it can finish the gradients in its forward sweep."""
    if implementation == "chunked":
        if not isinstance(weight, Tensor):
            assert problem.student.query is not None
            weight = problem.student.query.new_full((), weight, dtype=_loss_dtype(problem)).expand(problem.rows_shape)
        return chunked.weighted_sum(problem, weight)
    rows = _per_row(implementation, problem)
    return (rows * weight).sum() if isinstance(weight, Tensor) else rows.sum() * weight


def _row_logits(implementation: str, side: Side, wide: bool, temperature: float) -> Tensor:
    if implementation == "triton":
        return ops_row.row_logits(side, wide, temperature)
    assert side.query is not None and side.key is not None
    logits = chunked.row_logits(side.query, side.key, side.mask, side.scale, temperature)
    return merge_logits(logits, "logsum") if wide else logits


def _check_weight(weight: Tensor | None, problem: Problem) -> Tensor | None:
    if weight is None:
        return None
    assert problem.student.query is not None
    device = problem.student.query.device
    if not isinstance(weight, Tensor) or not (weight.dtype.is_floating_point or weight.dtype == torch.bool):
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"row_weight: expected a floating point or boolean tensor, got {got}")
    if weight.device != device:
        raise ValueError(f"row_weight: expected device {device} like student_query, got {weight.device}")
    try:
        return weight.detach().expand(problem.rows_shape)
    except RuntimeError:
        layout = "[B, H, M]" if problem.merge is None else "[B, 1, M]"
        raise ValueError(
            f"row_weight: expected a shape that broadcasts to {layout} = {problem.rows_shape}, got {tuple(weight.shape)}"
        ) from None


def _mean_weight(problem: Problem, weight: Tensor | None, reduction: str) -> Tensor | float:
    """What the rows [B, Ho, M] are multiplied with before they are summed: row weights and the reduction's divisor in one."""
    batch, heads, rows = problem.rows_shape
    alive = _rows_alive(problem) if reduction == "mean" else None
    if weight is None and alive is None:
        return {"sum": 1.0, "batchmean": 1.0 / max(batch, 1), "mean": 1.0 / max(batch * heads * rows, 1)}[reduction]
    if weight is None:
        assert alive is not None
        weight = torch.ones_like(alive, dtype=_loss_dtype(problem))
    weight = weight.to(_loss_dtype(problem))
    if reduction == "sum":
        return weight
    if reduction == "batchmean":
        return weight / batch
    return weight / (weight.sum() if alive is None else (weight * alive).sum())


def _loss_dtype(problem: Problem) -> torch.dtype:
    assert problem.student.query is not None
    return torch.float64 if problem.student.query.dtype == torch.float64 else torch.float32


def _rows_alive(problem: Problem) -> Tensor | None:
    """[B, Ho, M] boolean: rows that see a key on both sides; None when no mask can hide a whole row."""
    alive = None
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


def _autocast(query: Tensor | None, key: Tensor | None) -> tuple:
    """Under autocast the scores are computed in its dtype, as scaled_dot_product_attention does."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return query, key
    if query.device.type == "meta" or not torch.is_autocast_enabled(query.device.type):
        return query, key
    dtype = torch.get_autocast_dtype(query.device.type)
    cast = [t.to(dtype) if t.dtype in (torch.float16, torch.bfloat16, torch.float32) else t for t in (query, key)]
    return cast[0], cast[1]
