"""A few query rows as PyTorch operations: the row kernels registered as opaque ops inside autograd functions.

Opaque forward and backward ops (torch.library) keep torch.compile from looking inside; a plain autograd.Function around them
costs less per call than register_autograd and composes with compile, checkpointing and saved-tensor hooks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.owned import alone, distinct, owners
from attnkd.attention.problem import Problem, Side
from attnkd.attention.reductions import total
from attnkd.operators import first_order_only, keep, kept, register
from attnkd_kernels.replay import replayed
from attnkd_kernels.row.backward import row_kl_add, row_kl_bwd
from attnkd_kernels.row.kl import MAX_WIDTH, ONE_SWEEP, fits_whole, row_kl_fwd
from attnkd_kernels.row.logits import row_logits_bwd, row_logits_fwd
from attnkd_kernels.row.merge import KEYS_IN_REGISTERS, MAX_KEYS, row_merge


def _row_kl_fwd_fake(
    qs, ks, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, divergence, need_grad, factor=1.0
):
    B, H, M, D = qs.shape
    rows = (B, 1 if wide else H, M)
    empty = qs.new_empty(0, dtype=torch.float32)
    loss = qs.new_empty(rows, dtype=torch.float32)
    if not need_grad:
        return loss, empty, empty.clone()
    return (
        loss,
        qs.new_empty((*rows, ks.shape[2]), dtype=torch.float32),
        qs.new_empty((B, H, M, D), dtype=torch.float32),
    )


def _row_kl_bwd_fake(grad, coef, unit_dq, q, k, scale, temperature, wide, need_dq, need_dk, need_dmask):
    empty = grad.new_empty(0)
    return (
        q.new_empty(q.shape) if need_dq else empty,
        torch.empty_like(k) if need_dk else empty.clone(),
        torch.empty_like(coef) if need_dmask else empty.clone(),
    )


def _row_logits_fwd_fake(q, k, mask, scale, temperature, wide):
    B, H, M, _ = q.shape
    return q.new_empty((B, 1 if wide else H, M, k.shape[2]), dtype=torch.float32)


def _row_logits_bwd_fake(grad, q, k, scale, temperature, wide, need_dq, need_dk, need_dmask):
    return (
        q.new_empty(q.shape if need_dq else (0,)),
        torch.empty_like(k) if need_dk else grad.new_empty(0),
        grad.new_empty(grad.shape if need_dmask else (0,)),
    )


def _row_merge_fake(logits_s, logits_t, probs, merge, divergence, need_grad):
    B, H, M, _ = logits_s.shape
    loss = logits_s.new_empty((B, H if merge is None else 1, M))
    return loss, torch.empty_like(logits_s) if need_grad else logits_s.new_empty(0)


_row_kl_fwd = register(
    "row_kl_fwd(Tensor student_query, Tensor student_key, Tensor? student_mask, Tensor? teacher_query, Tensor? teacher_key, "
    "Tensor? teacher_mask, Tensor? teacher_probs, float student_scale, float teacher_scale, float temperature, bool wide, "
    "str divergence, bool need_grad, float factor=1.0) -> (Tensor, Tensor, Tensor)",
    replayed(row_kl_fwd),
    _row_kl_fwd_fake,
)
_row_kl_bwd = register(
    "row_kl_bwd(Tensor grad, Tensor coef, Tensor unit_dq, Tensor query, Tensor key, float scale, float temperature, bool wide, "
    "bool need_dq, bool need_dk, bool need_dmask) -> (Tensor, Tensor, Tensor)",
    replayed(row_kl_bwd),
    _row_kl_bwd_fake,
)
_row_kl_add = register(
    "row_kl_add(Tensor(a!) dq, Tensor(b!) dk, Tensor grad, Tensor coef, Tensor unit_dq, Tensor query, float scale, "
    "float temperature, bool wide) -> ()",
    replayed(row_kl_add),
    lambda *args: None,
)
_row_logits_fwd = register(
    "row_logits_fwd(Tensor query, Tensor key, Tensor? mask, float scale, float temperature, bool wide) -> Tensor",
    replayed(row_logits_fwd),
    _row_logits_fwd_fake,
)
_row_logits_bwd = register(
    "row_logits_bwd(Tensor grad, Tensor query, Tensor key, float scale, float temperature, bool wide, bool need_dq, "
    "bool need_dk, bool need_dmask) -> (Tensor, Tensor, Tensor)",
    replayed(row_logits_bwd),
    _row_logits_bwd_fake,
)
_row_merge = register(
    "row_merge(Tensor student_logits, Tensor? teacher_logits, Tensor? teacher_probs, str? merge, str divergence, "
    "bool need_grad) -> (Tensor, Tensor)",
    replayed(row_merge),
    _row_merge_fake,
)


class RowKLFunction(torch.autograd.Function):
    """Per-row divergence [B, Ho, M], or ``factor`` times its sum; K read once, no K read in the backward."""

    @staticmethod
    def forward(ctx, qs, ks, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, divergence, need_grad, factor):
        times = 1.0 if factor is None else factor
        loss, coef, unit_dq = _row_kl_fwd(
            qs, ks, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, divergence, need_grad, times
        )
        if need_grad:
            keep(ctx, coef, unit_dq, qs, ks)
            ctx.options = (
                scale_s,
                temperature / times,
                wide,
            )  # what is left of the gradients is divided by the temperature
            ctx.mask_dtype = None if ms is None else ms.dtype
        return total(loss, factor)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        coef, unit_dq, qs, ks = kept(ctx)
        need = ctx.needs_input_grad[:3]
        return *_asked(_row_kl_bwd(grad, coef, unit_dq, qs, ks, *ctx.options, *need), need, ctx.mask_dtype), *[
            None
        ] * 11


class BesideFunction(torch.autograd.Function):
    """A query, keys, and the divergence [B, Ho, 1] of the first row; query and keys go into an attention, whose gradients come back here
    and get the divergence's added, in place where they are nobody else's."""

    @staticmethod
    def forward(ctx, query, key, compared, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, divergence):
        """compared: those of the keys that are compared, [B, H, N', D]: all, or token 0 and the last N' − 1."""
        ctx.set_materialize_grads(False)
        loss, coef, unit_dq = _row_kl_fwd(
            query[:, :, :1], compared, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, divergence, True
        )
        left_out = key.shape[2] - compared.shape[2]
        if left_out:
            nothing = coef.new_zeros((*coef.shape[:3], left_out))
            coef = torch.cat([coef[..., :1], nothing, coef[..., 1:]], -1)
        keep(ctx, coef, unit_dq, query, key)
        ctx.options = (scale_s, temperature, wide)
        return query.view_as(query), key.view_as(key), loss

    @staticmethod
    def backward(ctx, dq, dk, grad):
        if grad is None:
            return dq, dk, *[None] * 11
        ours = not (dq is None or dk is None or torch.is_grad_enabled())
        ours = ours and owners(dq) == alone() and owners(dk) == alone() and distinct(dq) and distinct(dk)
        if not ours:
            return _beside_gradients(ctx, dq, dk, grad)
        coef, unit_dq, query, _ = kept(ctx)
        _row_kl_add(dq[:, :, :1], dk, grad, coef, unit_dq, query[:, :, :1], *ctx.options)
        return dq, dk, *[None] * 11


@first_order_only
def _beside_gradients(ctx, dq, dk, grad):
    """The same in new tensors."""
    coef, unit_dq, query, key = kept(ctx)
    row, keys, _ = _row_kl_bwd(grad, coef, unit_dq, query[:, :, :1], key, *ctx.options, True, True, False)
    dq = F.pad(row, (0, 0, 0, query.shape[2] - 1)) if dq is None else torch.cat([dq[:, :, :1] + row, dq[:, :, 1:]], 2)
    return dq, keys if dk is None else dk + keys, *[None] * 11


class RowMergeFunction(torch.autograd.Function):
    """Per-row divergence [B, Ho, M], or ``factor`` times its sum, by way of the rows' logits: heads merged by mean, max or min, or a
    divergence that needs whole rows."""

    @staticmethod
    def forward(
        ctx, qs, ks, ms, qt, kt, mt, probs, scale_s, scale_t, temperature, wide, merge, divergence, need_grad, factor
    ):
        logits_s = _row_logits_fwd(qs, ks, ms, scale_s, temperature, wide)
        logits_t = None if qt is None else _row_logits_fwd(qt, kt, mt, scale_t, temperature, wide)
        loss, unit = _row_merge(logits_s, logits_t, probs, None if wide else merge, divergence, need_grad)
        if need_grad:
            keep(ctx, unit, qs, ks)
            ctx.options = (scale_s, temperature if factor is None else temperature / factor, wide)
            ctx.mask_dtype = None if ms is None else ms.dtype
        return total(loss, factor)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        unit, qs, ks = kept(ctx)
        need = ctx.needs_input_grad[:3]
        unit = unit * (grad.unsqueeze(-1) if grad.ndim else grad)
        return *_asked(_row_logits_bwd(unit, qs, ks, *ctx.options, *need), need, ctx.mask_dtype), *[None] * 12


class RowLogitsFunction(torch.autograd.Function):
    """Logits [B, Ho, M, N] of a few rows."""

    @staticmethod
    def forward(ctx, query, key, mask, scale, temperature, wide):
        keep(ctx, query, key)
        ctx.options = (scale, temperature, wide)
        ctx.mask_dtype = None if mask is None else mask.dtype
        return _row_logits_fwd(query, key, mask, scale, temperature, wide)

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        query, key = kept(ctx)
        need = ctx.needs_input_grad[:3]
        return *_asked(_row_logits_bwd(grad, query, key, *ctx.options, *need), need, ctx.mask_dtype), None, None, None


class RowProbsFunction(torch.autograd.Function):
    """The softmax [B, Ho, M, N] of those logits; one node in the graph where there would be two."""

    @staticmethod
    def forward(ctx, query, key, scale, temperature, wide):
        probs = _row_logits_fwd(query, key, None, scale, temperature, wide).softmax(-1)
        keep(ctx, query, key, probs)
        ctx.options = (scale, temperature, wide)
        return probs

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        query, key, probs = kept(ctx)
        need = (*ctx.needs_input_grad[:2], False)
        unit = torch.ops.aten._softmax_backward_data(grad, probs, -1, probs.dtype)
        dq, dk, _ = _asked(_row_logits_bwd(unit, query, key, *ctx.options, *need), need, None)
        return dq, dk, None, None, None


def _asked(grads, need, mask_dtype):
    """dq, dk and dmask, the last in the mask's dtype; None for what is not needed."""
    dq, dk, dmask = grads
    return dq if need[0] else None, dk if need[1] else None, dmask.to(mask_dtype) if need[2] else None


def why_not(problem: Problem) -> str | None:
    """The reason for which the row kernels do not cover the problem, or None."""
    for side in (problem.student, problem.teacher):
        if side.query is not None:
            width = side.query.shape[3] * (side.query.shape[1] if problem.merge == "logsum" else 1)
            if width > MAX_WIDTH:
                return f"a head of {width} dims; the row kernels take up to {MAX_WIDTH}"
    if not _one_sweep(problem) and problem.num_keys > MAX_KEYS:
        return (
            f"{problem.num_keys} keys with merge={problem.merge!r}, divergence={problem.divergence!r}; up to {MAX_KEYS}"
        )
    return None


def per_row(problem: Problem, factor: float | None = None) -> Tensor:
    """Per-row divergence [B, Ho, M] in float32, or ``factor`` times its sum."""
    student, teacher = problem.student, problem.teacher
    wide = problem.merge == "logsum"
    need_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (student.query, student.key, student.mask)
    )
    inputs = (
        student.query, student.key, _merged_mask(student, wide), teacher.query, teacher.key, _merged_mask(teacher, wide),
        teacher.probs, student.scale, teacher.scale, problem.temperature, wide,
    )  # fmt: skip
    if _one_sweep(problem):
        return RowKLFunction.apply(*inputs, problem.divergence, need_grad, factor)
    return RowMergeFunction.apply(*inputs, problem.merge, problem.divergence, need_grad, factor)


def beside(query: Tensor, key: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor] | None:
    """(query, key, divergence [B, Ho, 1] of the first row) where the row's gradients can be added to those of the attention that is
    computed of query and key; None where they cannot, or nothing would be gained.

    Args:
        query: [B, H, M, D], whose first row is the problem's.
        key: [B, H, N, D], of which the problem's are token 0 and the last; see :func:`attnkd.attention.call.class_row`.
    """
    student, teacher = problem.student, problem.teacher
    masked = student.mask is not None and student.mask.requires_grad
    trained = torch.is_grad_enabled() and query.requires_grad and key.requires_grad and not masked
    if not trained or torch.compiler.is_compiling() or not _one_sweep(problem):
        return None
    alone()  # now, not in the middle of a backward
    wide = problem.merge == "logsum"
    assert student.key is not None
    return BesideFunction.apply(
        query, key, student.key.detach(), _merged_mask(student, wide), teacher.query, teacher.key, _merged_mask(teacher, wide),
        teacher.probs, student.scale, teacher.scale, problem.temperature, wide, problem.divergence,
    )  # fmt: skip


def row_logits(side: Side, wide: bool, temperature: float) -> Tensor:
    """Logits [B, H, M, N] in float32 ([B, 1, M, N], summed over heads, when ``wide``); −inf where a key is hidden."""
    return RowLogitsFunction.apply(side.query, side.key, _merged_mask(side, wide), side.scale, temperature, wide)


def row_probs(side: Side, wide: bool, temperature: float) -> Tensor:
    """softmax(logits) of :func:`row_logits` without a mask."""
    return RowProbsFunction.apply(side.query, side.key, side.scale, temperature, wide)


def _one_sweep(problem: Problem) -> bool:
    """Whether one sweep over the keys gives loss, coefficients and query gradient. Else the rows' logits come first: the keys are then read
    once for all rows, and the student's once more in the backward."""
    if problem.merge not in (None, "logsum"):
        return False
    if problem.divergence in ONE_SWEEP and (problem.rows_shape[2] == 1 or problem.num_keys > KEYS_IN_REGISTERS):
        return True
    keys = []
    for side in (problem.student, problem.teacher):
        if side.key is not None:
            heads = side.num_heads if problem.merge == "logsum" else 1
            keys.append((heads * side.key.shape[3], side.key.element_size()))
    return fits_whole(problem.num_keys, *keys)


def _merged_mask(side: Side, wide: bool) -> Tensor | None:
    """The mask [B, Ho, M, N] of a wide head: logits add up over heads, and with them the additive masks."""
    mask = side.mask
    if mask is None or not wide:
        return mask
    if mask.dtype == torch.bool:
        return mask.all(1, keepdim=True) if mask.shape[1] > 1 and mask.stride(1) else mask[:, :1]
    if mask.stride(1) == 0 or mask.shape[1] == 1:
        return mask[:, :1].float() * side.num_heads
    return mask.float().sum(1, keepdim=True)
