"""Attention and its divergence, backward: attention's own two sweeps, with the divergence in their tiles.

    dP_ij = do_i·v_j,    dS_ij = p_ij (dP_ij − δ_i) + g_i · weight_i · (term_ij − p_ij · centre_i)         (map/forms.py)
          = p_ij (dP_ij − shift_i) + coef_i · term_ij,    coef = g · weight,    shift = δ + coef · centre,    δ_i = o_i·do_i
    dq_i  = scale Σ_j dS_ij k_j        queries stay and keys stream; it also writes shift and coef for the next one
    dk_j  = scale Σ_i dS_ij q_i        keys stay and queries stream
    dv_j  = Σ_i p_ij do_i

Four products and two exponentials per (row, key) for dq, five and two for dk and dv; without a divergence three and one, four and one.
An upstream gradient g of 0 gives the same bits as no divergence. Every result is written once and by one program: no atomics. Where the caller
gives views of one packed tensor, the gradients land in place in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, LN2, at_head, side_at
from attnkd_kernels.map.forms import gap_of_logits, terms
from attnkd_kernels.map.tile import (
    At,
    add_gradient,
    at_rows,
    at_tile,
    load_head,
    load_left,
    load_whole_right,
    logits,
    no_gradient,
    product,
    row_products,
    row_values,
    skip_rows,
    store_gradient,
    without_checks,
)


class Outputs(NamedTuple):
    """Operands [B, H, M, V]: the attention's output and its upstream gradient; and the loss's upstream gradient [B, H, M, 1]."""

    out: Any
    grad: Any
    loss_grad: Any


class Known(NamedTuple):
    """What is known of every query row, pointers to [B, H, M] fp32."""

    lse_s: Any
    lse_t: Any
    shift: Any  # what is subtracted from dP
    coef: Any  # what the divergence's term is multiplied with


@triton.jit
def _attention_dq_kernel(
    student,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, H, M, N]
    value,  # Operand [B, H, N, V]
    teacher,  # Side: query [B, H, M, D_t], key [B, H, N, D_t], mask [B, H, M, N]
    kept,  # Rows [B, H, M]: centre and weight
    outputs,  # Outputs
    known,  # Known; shift and coef are written
    DQ,  # Operand [B, H, M, D]
    H, M, N,
    S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, WIDE.BL)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)  # of [B, H]
    at = At((tl.program_id(0) % tiles) * WIDE.BL, 0, M, N)
    b, h = row // H, row % H
    student, teacher, known = _at_row(student, teacher, known, b, h, H, M, WIDE)
    student, value = at_tile(student, at), at_head(value, b, h)
    DIVERGENCE: tl.constexpr = WIDE.DIVERGENCE

    m = at.q0 + tl.arange(0, WIDE.BL)
    do = load_head(at_rows(at_head(outputs.grad, b, h), at.q0), at.q0, M, V, WIDE.BL, True)
    o = load_head(at_rows(at_head(outputs.out, b, h), at.q0), at.q0, M, V, WIDE.BL, True)
    shift = row_products(o, do, V)
    norm_s = row_values(known.lse_s, at, DEAD, WIDE)
    norm_t, coef, left_t = 0.0, 0.0, 0.0
    if DIVERGENCE != "none":
        teacher = at_tile(teacher, at)
        left_t = load_left(teacher, at, T, WIDE)
        g = at_head(outputs.loss_grad, b, h)
        coef = tl.load(g.pointer + tl.cast(m, tl.int64) * g.row, mask=m < M, other=0.0)[:, None]
        if DIVERGENCE != "logit_mse":
            norm_t = row_values(known.lse_t, at, DEAD, WIDE)
            coef = tl.where(norm_t >= DEAD, 0.0, coef)
        coef = tl.where(norm_s >= DEAD, 0.0, coef)
        if DIVERGENCE == "mse" or DIVERGENCE == "logit_mse":
            coef *= row_values(kept.weight + row * M, at, 0.0, WIDE)
        if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
            shift -= coef
        elif DIVERGENCE != "logit_mse":
            shift += coef * row_values(kept.centre + row * M, at, 0.0, WIDE)
        tl.store(known.coef + m[:, None], coef, mask=(m < M)[:, None])
    tl.store(known.shift + m[:, None], shift, mask=(m < M)[:, None])
    left = load_left(student, at, S, WIDE), left_t, do
    clear, stop = without_checks(student, teacher, at, S, T, WIDE)
    rows = norm_s, norm_t, shift, coef
    dq = no_gradient(S, WIDE.BL, S.BLOCK)
    dq = _more_keys(dq, student, value, teacher, rows, left, at, (clear, stop), S, T, V, NARROW)
    if WIDE.MASKS != "any":
        dq = _more_keys(dq, student, value, teacher, rows, left, at, (0, clear), S, T, V, WIDE)
    store_gradient(at_rows(at_head(DQ, b, h), at.q0), dq, student.factor * LN2, at.q0, M, 0, S, WIDE.BL, S.BLOCK)


@triton.jit
def _more_keys(
    dq, student, value, teacher, rows, left, at, span, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, SWEEP: tl.constexpr
):  # fmt: skip
    """dq [BL, BLOCK] or Parts after the keys of ``span`` (first, end)."""
    student, value = skip_rows(student, span[0], SWEEP), at_rows(value, span[0])
    if SWEEP.DIVERGENCE != "none":
        teacher = skip_rows(teacher, span[0], SWEEP)
    for k0 in range(span[0], span[1], SWEEP.BR):
        here = At(at.q0, k0, at.M, at.N)
        k_s = load_whole_right(student, 0.0, here, S, SWEEP)
        k_t = k_s
        if SWEEP.DIVERGENCE != "none":
            k_t = load_whole_right(teacher, 0.0, here, T, SWEEP)
        v = load_head(value, k0, at.N, V, SWEEP.BR, SWEEP.CHECK)
        p, term = _probs_and_term(student, teacher, rows, left, (k_s, k_t), here, S, T, SWEEP)
        ds = _score_gradient(p, term, product(left[2], v, V), rows, SWEEP)
        dq = add_gradient(dq, ds, k_s, S)
        student, value = skip_rows(student, SWEEP.BR, SWEEP), at_rows(value, SWEEP.BR)
        if SWEEP.DIVERGENCE != "none":
            teacher = skip_rows(teacher, SWEEP.BR, SWEEP)
    return dq


@triton.jit
def _attention_dkv_kernel(
    student,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, H, M, N]
    value,  # Operand [B, H, N, V]
    teacher,  # Side: query [B, H, M, D_t], key [B, H, N, D_t], mask [B, H, M, N]
    GRAD,  # Operand [B, H, M, V]: the output's upstream gradient
    known,  # Known
    DK,  # Operand [B, H, N, D]
    DV,  # Operand [B, H, N, V]
    H, M, N,
    S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, WIDE.BL)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)  # of [B, H]
    at = At(0, (tl.program_id(0) % tiles) * WIDE.BL, M, N)
    b, h = row // H, row % H
    student, teacher, known = _at_row(student, teacher, known, b, h, H, M, WIDE)
    student, grad = at_tile(student, at), at_head(GRAD, b, h)
    left_t = 0.0
    if WIDE.DIVERGENCE != "none":
        teacher = at_tile(teacher, at)
        left_t = load_left(teacher, at, T, WIDE)
    v = load_head(at_rows(at_head(value, b, h), at.k0), at.k0, N, V, WIDE.BL, True)
    left = load_left(student, at, S, WIDE), left_t, v
    clear, stop = without_checks(student, teacher, at, S, T, WIDE)
    grads = no_gradient(S, WIDE.BL, S.BLOCK), no_gradient(V, WIDE.BL, V.BLOCK)
    grads = _more_queries(grads, student, grad, teacher, known, left, at, (clear, stop), S, T, V, NARROW)
    if WIDE.MASKS != "any":
        grads = _more_queries(grads, student, grad, teacher, known, left, at, (0, clear), S, T, V, WIDE)
    dk, dv = grads
    store_gradient(at_rows(at_head(DK, b, h), at.k0), dk, student.factor * LN2, at.k0, N, 0, S, WIDE.BL, S.BLOCK)
    store_gradient(at_rows(at_head(DV, b, h), at.k0), dv, 1.0, at.k0, N, 0, V, WIDE.BL, V.BLOCK)


@triton.jit
def _more_queries(
    grads, student, grad, teacher, known, left, at, span,
    S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """(dk, dv), each [BL, BLOCK] or Parts, after the queries of ``span`` (first, end)."""
    dk, dv = grads
    student, grad = skip_rows(student, span[0], SWEEP), at_rows(grad, span[0])
    if SWEEP.DIVERGENCE != "none":
        teacher = skip_rows(teacher, span[0], SWEEP)
    for q0 in range(span[0], span[1], SWEEP.BR):
        here = At(q0, at.k0, at.M, at.N)
        q_s = load_whole_right(student, 0.0, here, S, SWEEP)
        q_t = q_s
        norm_t, coef = 0.0, 0.0
        if SWEEP.DIVERGENCE != "none":
            q_t = load_whole_right(teacher, 0.0, here, T, SWEEP)
            coef = row_values(known.coef, here, 0.0, SWEEP)
            if SWEEP.DIVERGENCE != "logit_mse":
                norm_t = row_values(known.lse_t, here, DEAD, SWEEP)
        do = load_head(grad, q0, at.M, V, SWEEP.BR, SWEEP.CHECK)
        rows = row_values(known.lse_s, here, DEAD, SWEEP), norm_t, row_values(known.shift, here, 0.0, SWEEP), coef
        p, term = _probs_and_term(student, teacher, rows, left, (q_s, q_t), here, S, T, SWEEP)
        dv = add_gradient(dv, p, do, V)
        ds = _score_gradient(p, term, product(left[2], do, V), rows, SWEEP)
        dk = add_gradient(dk, ds, q_s, S)
        student, grad = skip_rows(student, SWEEP.BR, SWEEP), at_rows(grad, SWEEP.BR)
        if SWEEP.DIVERGENCE != "none":
            teacher = skip_rows(teacher, SWEEP.BR, SWEEP)
    return dk, dv


@triton.jit
def _at_row(student, teacher, known, b, h, H, M, SWEEP: tl.constexpr):
    """(student, teacher, Known) of one image and head; without a divergence the teacher is the student."""
    row = (b * H + h) * M
    student = side_at(student, b, h)
    if SWEEP.DIVERGENCE == "none":
        teacher = student
    else:
        teacher = side_at(teacher, b, h)
    return student, teacher, Known(known.lse_s + row, known.lse_t + row, known.shift + row, known.coef + row)


@triton.jit
def _probs_and_term(student, teacher, rows, left, right, at, S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr):
    """(p, term) [BL, BR]: the student's probabilities, and the divergence's term (forms.py); without one, 0."""
    MASKED: tl.constexpr = SWEEP.MASKS != "none" and SWEEP.CHECK
    ls = logits(student, left[0], right[0], at, student.factor, rows[0], S, SWEEP)
    if SWEEP.DIVERGENCE == "none":
        p = tl.exp2(ls)
        term = 0.0
    else:
        lt = logits(teacher, left[1], right[1], at, teacher.factor, rows[1], T, SWEEP)
        if SWEEP.DIVERGENCE == "logit_mse":
            p = tl.exp2(ls)
            term = gap_of_logits(ls + rows[0], lt, MASKED)
        else:
            term, p = terms(ls, ls, lt, MASKED, False, SWEEP.DIVERGENCE)
    return p, term


@triton.jit
def _score_gradient(p, term, dp, rows, SWEEP: tl.constexpr):
    """dS [BL, BR] from dP, for ``rows`` (lse_s, lse_t, shift, coef)."""
    ds = p * (dp - rows[2])
    if SWEEP.DIVERGENCE != "none":
        ds += rows[3] * term
    return ds
