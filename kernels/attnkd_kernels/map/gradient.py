"""Whole-map divergence, backward: one sweep per gradient, tiles recomputed from the saved normalisers.

    dz_ij = upstream_i · weight_i · (term_ij − p_s,ij · centre_i)       (forms.py)
    dq_i  = scale/T · Σ_j dz_ij k_j          QUERIES_LEFT: a program owns BL queries and walks over the keys
    dk_j  = scale/T · Σ_i dz_ij q_i          otherwise:    a program owns BL keys and walks over the queries

The same kernel computes either: the operand that stays is *left*, the one that streams is *right*, and the result is
Σ dz · right. dq is launched only where the forward has not emitted it (value.py). No program writes what another one writes: no
atomics, bitwise reproducible. Three products and two exponentials per (row, key). A wide head (log-sum merging) is written OUT
columns at a time, each program recomputing the logits. With a mean over the student's H heads the gradient of one head needs the
mean of all, so every head recomputes all of them.

GRAD [B, Ho, M] any strides (0 included) fp32; OUT like the left operand, in its dtype; products in the operands' dtype with
fp32 accumulation. Nothing is saved for a second derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, at_head, side_at
from attnkd_kernels.map.forms import gap_of_logits, terms, where_shown
from attnkd_kernels.map.tile import (
    At,
    add_gradient,
    at_rows,
    at_tile,
    load_left,
    load_right,
    load_whole_right,
    log_probs,
    logits,
    move_head,
    no_gradient,
    row_values,
    skip_rows,
    store_gradient,
    without_checks,
)


class Given(NamedTuple):
    """What the backward knows of the rows of one student head: pointers to M values each, and which head it is."""

    lse_s: Any
    lse_t: Any
    centre: Any
    weight: Any
    grad: Any  # at the tile's first row
    grad_row: Any  # its stride
    head: Any


@triton.jit
def _map_gradient_kernel(
    student,  # Side: query [B, H, M, D_s], key [B, H, N, D_s], mask [B, H, M, N]
    teacher,  # Side: the same with Ht, D_t
    kept,  # Rows: lse_s, centre [B, Hs, M], lse_t [B, Ht', M], weight [B, Ho, M]
    upstream,  # RowValues [B, Ho, M] fp32
    OUT,  # Operand [B, H, M or N, D_s]: gradient of the left operand
    out_scale,  # scale/T of the student, divided by the averaged heads
    HS, M, N,
    S: tl.constexpr, T: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    left_rows = M if WIDE.QUERIES_LEFT else N
    CHUNKS: tl.constexpr = (S.WIDTH + WIDE.OUT - 1) // WIDE.OUT
    tiles = tl.cdiv(left_rows, WIDE.BL)
    row = tl.cast(tl.program_id(0) // (tiles * CHUNKS), tl.int64)  # of [B, Hs]
    l0 = (tl.program_id(0) // CHUNKS % tiles) * WIDE.BL
    o0 = (tl.program_id(0) % CHUNKS) * WIDE.OUT
    b, h = row // HS, row % HS
    at = At(l0, 0, M, N) if WIDE.QUERIES_LEFT else At(0, l0, M, N)
    student, teacher, given = at_row(student, teacher, kept, upstream, b, h, HS, M, S, T)
    student, teacher, given = at_tile(student, at), at_tile(teacher, at), given_at(given, at.q0)
    left = load_left(student, at, S, WIDE), load_left(teacher, at, T, WIDE)
    clear, stop = without_checks(student, teacher, at, S, T, WIDE)
    acc = no_gradient(S, WIDE.BL, WIDE.OUT)
    acc = _more(acc, student, teacher, given, left, at, (clear, stop), o0, S, T, NARROW)
    if WIDE.MASKS != "any":
        acc = _more(acc, student, teacher, given, left, at, (0, clear), o0, S, T, WIDE)

    factor = out_scale
    if WIDE.QUERIES_LEFT:
        factor = out_scale * upstream_values(given, at, WIDE)
    store_gradient(at_rows(at_head(OUT, b, h), l0), acc, factor, l0, left_rows, o0, S, WIDE.BL, WIDE.OUT)


@triton.jit
def at_row(student, teacher, kept, upstream, b, h, HS, M, S: tl.constexpr, T: tl.constexpr):
    """(student, teacher, Given) of one image and student head."""
    row = b * HS + h
    outer, ho, row_t = row, h, row
    if S.MEAN > 1 or T.MEAN > 1:  # merged: one row of the loss for all heads
        outer, ho, row_t = b, h * 0, b * T.MEAN
    grad = upstream.pointer + b * upstream.batch + ho * upstream.head
    given = Given(
        kept.lse_s + row * M, kept.lse_t + row_t * M, kept.centre + row * M, kept.weight + outer * M, grad, upstream.row, h
    )  # fmt: skip
    return side_at(student, b, h), side_at(teacher, b, ho), given


@triton.jit
def given_at(given, q0):
    """The same, its upstream gradient moved on by q0 rows."""
    grad = given.grad + tl.cast(q0, tl.int64) * given.grad_row
    return Given(given.lse_s, given.lse_t, given.centre, given.weight, grad, given.grad_row, given.head)


@triton.jit
def upstream_values(given, at, SWEEP: tl.constexpr):
    """upstream · weight of every query of the tile, [BQ, 1] or [1, BQ]."""
    q = tl.arange(0, SWEEP.BQ)
    if SWEEP.QUERIES_LEFT or SWEEP.CHECK:
        value = tl.load(given.grad + q * given.grad_row, mask=at.q0 + q < at.M, other=0.0)
    else:
        value = tl.load(given.grad + q * given.grad_row)
    if SWEEP.QUERIES_LEFT:
        value = value[:, None]
    else:
        value = value[None, :]
    if SWEEP.DIVERGENCE == "mse" or SWEEP.DIVERGENCE == "logit_mse":
        value *= row_values(given.weight, at, 0.0, SWEEP)
    return value


@triton.jit
def _more(acc, student, teacher, given, left, at, span, o0, S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr):
    """acc [BL, OUT] after the right rows of ``span`` (first, end)."""
    student, teacher = skip_rows(student, span[0], SWEEP), skip_rows(teacher, span[0], SWEEP)
    if not SWEEP.QUERIES_LEFT:
        given = given_at(given, span[0])
    for r0 in range(span[0], span[1], SWEEP.BR):
        if SWEEP.QUERIES_LEFT:
            here = At(at.q0, r0, at.M, at.N)
        else:
            here = At(r0, at.k0, at.M, at.N)
        right_s = load_whole_right(student, left[0], here, S, SWEEP)
        right_t = left[1]
        if T.MEAN == 1:
            right_t = load_whole_right(teacher, right_t, here, T, SWEEP)
        dz = dz_tile(student, teacher, given, left, (right_s, right_t), here, S, T, SWEEP)
        if not SWEEP.QUERIES_LEFT:
            dz = dz * upstream_values(given, here, SWEEP)
            given = given_at(given, SWEEP.BR)
        if not S.WHOLE:
            right_s = load_right(student, here, o0, S, SWEEP, SWEEP.OUT)
        acc = add_gradient(acc, dz, right_s, S)
        student, teacher = skip_rows(student, SWEEP.BR, SWEEP), skip_rows(teacher, SWEEP.BR, SWEEP)
    return acc


@triton.jit
def dz_tile(student, teacher, given, left, right, at, S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr):
    """[BL, BR]: term_ij − p_s,ij · centre_i, the gradient of the row's value with respect to a head's logits, but for weight."""
    MASKED: tl.constexpr = SWEEP.MASKS != "none" and SWEEP.CHECK
    DIVERGENCE: tl.constexpr = SWEEP.DIVERGENCE
    norm_s, norm_t = 0.0, 0.0
    if DIVERGENCE != "logit_mse":
        norm_s = row_values(given.lse_s, at, DEAD, SWEEP)
        if T.MEAN == 1:
            norm_t = row_values(given.lse_t, at, DEAD, SWEEP)
    lh = logits(student, left[0], right[0], at, student.factor, norm_s, S, SWEEP)
    lt = log_probs(teacher, given.lse_t, norm_t, left[1], right[1], at, T, SWEEP)
    if DIVERGENCE == "logit_mse":
        dz = gap_of_logits(lh, lt, MASKED)
    elif (DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy") and S.MEAN == 1:  # centre = −1
        dz = tl.exp2(lh) - where_shown(tl.exp2(lt), lh, MASKED)
    else:
        ls = lh
        if S.MEAN > 1:
            first_lse = given.lse_s - given.head * at.M
            ls = log_probs(move_head(student, -given.head), first_lse, 0.0, 0.0, 0.0, at, S, SWEEP)
        term, p = terms(lh, ls, lt, MASKED, S.MEAN > 1, DIVERGENCE)
        dz = term - p * row_values(given.centre, at, 0.0, SWEEP)
    return dz
