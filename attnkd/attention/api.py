"""The operations: the divergence between a student's and a teacher's attention, and the attention rows themselves."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from attnkd.attention import chunked, dispatch, reference
from attnkd.attention.call import AttentionCall, compared
from attnkd.attention.checks import check_choice, check_temperature, kind
from attnkd.attention.kinds import once_a_kind
from attnkd.attention.merging import merge_logits, softmax_or_zero
from attnkd.attention.problem import MERGES, REDUCTIONS, Problem, Side, make_problem, make_side, unchecked
from attnkd.attention.reductions import check_reduction, check_weight, reduced, summands, weighted

if dispatch.TRITON_INSTALLED:
    # Not where it is used: torch.compile must find this module imported.
    from attnkd.attention import fused


@overload
def attention_divergence(
    student: AttentionCall,
    teacher: AttentionCall | None = None,
    /,
    *,
    rows: str | int = "all",
    teacher_probs: Tensor | None = None,
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor: ...


@overload
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
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor: ...


def attention_divergence(
    student_query: Tensor | AttentionCall,
    student_key: Tensor | AttentionCall | None = None,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    *,
    rows: str | int = "all",
    teacher_probs: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Divergence between two attentions, computed from queries and keys; no attention map is stored.

    Two forms::

        attention_divergence(student, teacher, rows="cls", ...)          # as an AttentionTap captured them
        attention_divergence(student_query, student_key, teacher_query, teacher_key, student_scale=..., ...)

    What a mask hides and rows of weight 0 never change the loss. NaN and infinities there still reach the gradients, which are
    products with all queries and keys (0 · NaN = NaN): padding must hold numbers.

    Captured calls contain their scales and masks, and say what their tokens are: registers, a distillation token, and a class token
    that only one model has are left out of both, before the softmax.

    With z = (scale·q·k + mask) / T and p = softmax(z) for student s and teacher t, the value of every query row is

    * ``forward_kl``: Σ_j p_t (log p_t − log p_s), the KL divergence KL(teacher ‖ student)
    * ``reverse_kl``: Σ_j p_s (log p_s − log p_t)
    * ``js``: ½ KL(p_t ‖ m) + ½ KL(p_s ‖ m) with m = ½ (p_s + p_t)
    * ``cross_entropy``: −Σ_j p_t log p_s
    * ``mse``: mean over the keys visible to both of (p_s − p_t)²
    * ``logit_mse``: mean over the keys visible to both of (z_s − z_t)²

    The class-token row of loose tensors is ``query[:, :, :1]``. Teacher tensors get no gradient. First derivatives only, by
    backward; forward-mode differentiation needs ``impl='reference'``.

    Args:
        student_query: [B, H, M, D], any strides; float16, bfloat16 or float32 (float64: ``chunked`` and ``reference``).
            Or the student's :class:`attnkd.AttentionCall`.
        student_key: [B, H, N, D]. Or the teacher's :class:`attnkd.AttentionCall`; none with ``teacher_probs``.
        teacher_query: [B, Ht, M, Dt]. Ht may differ from H when heads are merged.
        teacher_key: [B, Ht, N, Dt].
        rows: of captured calls: 'all', the row of every shared token; 'cls', the class token's row; or a number n, the first n
            shared tokens' rows.
        teacher_probs: [B, H, M, N] ([B, 1, M, N] with a merge), in place of the teacher: cached or resampled rows, over
            class token and patches where the student is a captured call. They are normalised to sum 1; the temperature is
            not applied to them. A key of probability 0 is hidden; a negative or NaN entry makes its row NaN.
        student_scale: a number that multiplies the student's scores; None means D**-0.5. Models differ.
        teacher_scale: the same for the teacher.
        student_mask: broadcasts to [B, H, M, N]; boolean (True = visible, as in scaled_dot_product_attention) or additive.
            An additive mask may require grad (a learned relative position bias).
        teacher_mask: broadcasts to [B, Ht, M, N].
        student_lse: [B, H, M] float32, the logarithm of Σ_j exp(student_scale · q·k_j + student_mask_j), −inf where no key is visible: what the
            model's own attention computed, where it is at hand. It saves a whole-map loss a sweep over the keys and changes no result;
            it is used without a merge at temperature 1. It gets no gradient of its own: the gradients are the same. A row whose
            probabilities exp(z − lse) sum to anything but 1, to within exp(±(1e-3 + 1e-6·abs(lse))), is an error.
        teacher_lse: the same for the teacher.
        merge: None compares head h with head h. 'logsum' compares softmax((1/T)·Σ_h log p^h), 'mean', 'max', 'min' the
            renormalised mean, max or min of the heads' probabilities. A key that one head's mask hides has probability 0 in
            that head; a row in which some head sees no key has the value 0.
        divergence: see above.
        temperature: a number T > 0, divides scores and masks of both sides.
        row_weight: broadcasts to [B, H, M] ([B, 1, M] with a merge); multiplies the rows. A row of weight 0 is left out of the loss
            even where it is infinite or NaN. Weights may be negative; a NaN weight makes the loss NaN. Gets no gradient.
        reduction: 'none' [B, H, M] ([B, 1, M] with a merge); 'sum'; 'batchmean', the sum divided by B; 'mean', the
            (weighted) mean over rows. A row that sees no key on either side, or whose ``teacher_probs`` are all 0, has the
            value 0 and does not count in the mean; a mean in which no row counts is NaN.
        impl: 'auto', 'triton', 'chunked' or 'reference'; see :mod:`attnkd.attention.dispatch`.

    Returns:
        float32 (float64 for float64 inputs), scalar or per row.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape, dtype, device or option, named; a scale or temperature that is a
            tensor (it would get no gradient); captured calls of different patch grids, or without class token for 'cls'; an LSE
            that is not that of the queries, keys, scale and mask. A GPU does not wait for that last check: as with an index out of
            range in PyTorch, the message comes from the kernel and the next synchronisation raises.
        NotImplementedError: an explicit ``impl`` that cannot be honoured.
    """
    if isinstance(student_query, AttentionCall):
        loose = {
            "teacher_query": teacher_query,
            "teacher_key": teacher_key,
            "student_scale": student_scale,
            "teacher_scale": teacher_scale,
            "student_mask": student_mask,
            "teacher_mask": teacher_mask,
            "student_lse": student_lse,
            "teacher_lse": teacher_lse,
        }
        calls = of_calls(student_query, student_key, rows, teacher_probs, loose)
        student_query, student_key, student_mask, student_scale, *_ = calls[0]
        student_lse = calls[0].lse
        if len(calls) == 2:
            teacher_query, teacher_key, teacher_mask, teacher_scale, *_ = calls[1]
            teacher_lse = calls[1].lse
    else:
        _refuse_rows(rows)
    tensors = *in_autocast(student_query, student_key), *in_autocast(teacher_query, teacher_key)
    if teacher_probs is student_mask is teacher_mask is student_lse is teacher_lse is row_weight is None:
        student_scale, teacher_scale, implementation, factor = _decided(
            *tensors, student_scale, teacher_scale, merge, divergence, temperature, reduction, impl
        )
        problem = unchecked(*tensors, student_scale, teacher_scale, merge, divergence, temperature)
        return _per_row(implementation, problem) if factor is None else _weighted_sum(implementation, problem, factor)
    check_choice("reduction", reduction, REDUCTIONS)
    problem = make_problem(
        *tensors, teacher_probs, student_scale, teacher_scale, student_mask, teacher_mask, merge, divergence, temperature,
        student_lse, teacher_lse,
    )  # fmt: skip
    return divergence_of(problem, choose(impl, problem), row_weight, reduction)


@once_a_kind
def _decided(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor | None, teacher_key: Tensor | None,
    student_scale: float | None, teacher_scale: float | None, merge: str | None, divergence: str, temperature: float,
    reduction: str, impl: str,
) -> tuple[float, float, str, float | None]:  # fmt: skip
    """The scales of both sides, the implementation, and what the sum of all rows is multiplied with (None: they are not summed); checked."""
    check_choice("reduction", reduction, REDUCTIONS)
    problem = make_problem(
        student_query, student_key, teacher_query, teacher_key, None, student_scale, teacher_scale, None, None, merge, divergence,
        temperature,
    )  # fmt: skip
    implementation = choose(impl, problem)
    check_reduction(problem, reduction)
    factor = None if reduction == "none" else summands(problem, None, reduction)
    assert not isinstance(factor, Tensor)  # nothing is masked
    return problem.student.scale, problem.teacher.scale, implementation, factor


def divergence_of(problem: Problem, implementation: str, row_weight: Tensor | None, reduction: str) -> Tensor:
    """:func:`attention_divergence` of a problem that was checked, by the implementation chosen for it."""
    weight = check_weight(row_weight, problem)
    check_reduction(problem, reduction)
    if reduction == "none":
        losses = _per_row(implementation, problem)
        return losses if weight is None else weighted(losses, weight)
    return _weighted_sum(implementation, problem, summands(problem, weight, reduction))


@overload
def attention_rows(
    call: AttentionCall,
    /,
    *,
    rows: str | int = "all",
    merge: str | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor: ...


@overload
def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    merge: str | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor: ...


def attention_rows(
    query: Tensor | AttentionCall,
    key: Tensor | None = None,
    *,
    rows: str | int = "all",
    scale: float | None = None,
    mask: Tensor | None = None,
    merge: str | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """The attention rows of the given queries: softmax(z), merged over heads or not. Differentiable.

    Meant for a few rows (a class token to cache, to resample or to draw): the result has a value per query and key. Two
    forms::

        attention_rows(call, rows="cls")                    # as an AttentionTap captured it: scale and mask are in it
        attention_rows(query, key, scale=..., mask=...)

    Args:
        query: [B, H, M, D], any strides. Or an :class:`attnkd.AttentionCall`, of which registers and distillation token
            are left out, before the softmax.
        key: [B, H, N, D].
        rows: of a captured call: 'all'; 'cls', the class token's row; or a number n, the first n tokens' rows.
        scale: a number that multiplies the scores; None means D**-0.5.
        mask: broadcasts to [B, H, M, N]; boolean (True = visible) or additive.
        merge: None, 'logsum', 'mean', 'max' or 'min'; see :func:`attention_divergence`.
        temperature: a number T > 0, divides scores and mask.
        impl: 'auto', 'triton', 'chunked' or 'reference'.

    Returns:
        Probabilities [B, H, M, N], or [B, 1, M, N] when merged; float32 (float64 for float64 inputs). A row that sees no
        key is 0.

    Raises:
        TypeError, ValueError: a wrong type, rank, shape, dtype or option, named.
        NotImplementedError: an explicit ``impl`` that cannot be honoured.
    """
    if isinstance(query, AttentionCall):
        refuse_loose({"key": key, "scale": scale, "mask": mask})
        (call,) = compared(rows, call=query)
        query, key, mask, scale = call.query, call.key, call.mask, call.scale
    else:
        _refuse_rows(rows)
    query, key = in_autocast(query, key)
    assert not isinstance(query, AttentionCall)
    scale, implementation = _rows_decided(query, key, scale, mask, merge, temperature, impl)
    side = Side(query, key, None if mask is None else mask.expand(*query.shape[:3], key.shape[2]), scale)
    if implementation == "reference":
        probs = reference.attention_rows(side, merge, temperature)
        return probs if query.dtype == torch.float64 else probs.float()
    if implementation == "triton" and mask is None and merge in (None, "logsum"):
        return fused.row_probs(side, merge is not None, temperature)
    logits = _row_logits(implementation, side, merge == "logsum", temperature)
    if merge not in (None, "logsum"):
        logits = merge_logits(logits, merge)
    return logits.softmax(-1) if mask is None else softmax_or_zero(logits)


@once_a_kind
def _rows_decided(
    query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None, merge: str | None, temperature: float, impl: str
) -> tuple[float, str]:  # fmt: skip
    """The scale and the implementation of :func:`attention_rows`; checked."""
    check_choice("merge", merge, MERGES)
    check_temperature(temperature)
    side = make_side("", query, key, scale, mask)
    return side.scale, dispatch.choose(impl, (side.query, side.key), (side.mask,))


def reduce_rows(
    rows: Tensor,
    student: AttentionCall,
    teacher: AttentionCall,
    *,
    merge: str | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The divergences of all rows, as ``reduction='none'`` returned them for the same calls, weighted and reduced afterwards.

    Raises:
        ValueError: rows of another shape than these calls have.
    """
    problem = problem_of_calls(student, teacher, "all", None, merge, "forward_kl", 1.0)
    if tuple(rows.shape) != problem.rows_shape:
        raise ValueError(f"rows: expected {problem.rows_shape} of these calls, got {tuple(rows.shape)}")
    check_reduction(problem, reduction)
    return reduced(rows, problem, check_weight(row_weight, problem), reduction)


def choose(impl: str, problem: Problem) -> str:
    """The implementation of :func:`attention_divergence`; see :func:`attnkd.attention.dispatch.choose`."""
    s, t = problem.student, problem.teacher
    inputs, beside = (s.query, s.key, t.query, t.key), (s.mask, t.mask, t.probs)
    return dispatch.choose(impl, inputs, beside, lambda: fused.why_not(problem))


def problem_of_calls(
    student: AttentionCall,
    teacher: Any,
    rows: str | int,
    teacher_probs: Tensor | None,
    merge: str | None,
    divergence: str,
    temperature: float,
) -> Problem:
    """The problem of captured calls, checked."""
    s, *others = of_calls(student, teacher, rows, teacher_probs, {})
    t = others[0] if others else AttentionCall(None, None, None, None)  # type: ignore[arg-type]
    return make_problem(
        *in_autocast(s.query, s.key), *in_autocast(t.query, t.key), teacher_probs,
        s.scale, t.scale, s.mask, t.mask, merge, divergence, temperature, s.lse, t.lse,
    )  # fmt: skip


def of_calls(
    student: AttentionCall, teacher: Any, rows: str | int, teacher_probs: Tensor | None, loose: dict[str, Any]
) -> list[AttentionCall]:
    """What is compared of captured calls: the student's and, unless its rows are given, the teacher's."""
    refuse_loose(loose)
    if teacher is not None and not isinstance(teacher, AttentionCall):
        raise TypeError(
            f"teacher: expected an AttentionCall beside the student's, got {kind(teacher)}; finished rows of the teacher go "
            "into teacher_probs"
        )
    if (teacher is None) == (teacher_probs is None):
        raise ValueError(
            f"teacher: expected an AttentionCall or teacher_probs, got {'neither' if teacher is None else 'both'}"
        )
    calls = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    return compared(rows, **calls)


def refuse_loose(loose: dict[str, Any]) -> None:
    """A captured call has its own keys, masks and scales."""
    for name, value in loose.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected nothing beside a captured call, which has its own, got {kind(value)}; to change it, pass "
                f"call._replace({name.split('_')[-1]}=...)"
            )


def _refuse_rows(rows: str | int) -> None:
    if rows != "all":
        raise ValueError(
            f"rows: {rows!r} is for captured calls, which know their tokens; for loose tensors pass the rows wanted as "
            "queries (the class token's: query[:, :, :1], the first n: query[:, :, :n]) and leave rows out"
        )


def _per_row(implementation: str, problem: Problem) -> Tensor:
    if implementation == "triton":
        return fused.per_row(problem)
    return chunked.per_row(problem) if implementation == "chunked" else reference.per_row(problem)


def _weighted_sum(implementation: str, problem: Problem, weight: Tensor | float) -> Tensor:
    """Σ weight·row. ``chunked`` gets the weights so that it can finish the gradients in its forward sweep."""
    if implementation == "chunked":
        if not isinstance(weight, Tensor):
            assert problem.student.query is not None
            weight = problem.student.query.new_full((), weight, dtype=problem.dtype).expand(problem.rows_shape)
        return chunked.weighted_sum(problem, weight)
    if implementation == "triton" and not isinstance(weight, Tensor):
        return fused.per_row(problem, weight)
    losses = _per_row(implementation, problem)
    return weighted(losses, weight).sum() if isinstance(weight, Tensor) else losses.sum() * weight


def _row_logits(implementation: str, side: Side, wide: bool, temperature: float) -> Tensor:
    if implementation == "triton":
        return fused.row_logits(side, wide, temperature)
    assert side.query is not None and side.key is not None
    logits = chunked.row_logits(side.query, side.key, side.mask, side.scale, temperature)
    return merge_logits(logits, "logsum") if wide else logits


def in_autocast(query: Any, key: Any) -> tuple[Any, Any]:
    """Under autocast the scores are computed in its dtype, as scaled_dot_product_attention does."""
    query, key = all_in_autocast(query, key)
    return query, key


def all_in_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The same for any number of tensors."""
    if not torch._C._is_any_autocast_enabled() or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in (torch.float16, torch.bfloat16, torch.float32) else t for t in tensors)
