"""Whole-map divergence, forward: one sweep over the keys, with the normalisers of both sides known.

    loss[b, h, i] = Div(softmax_j z_t[b, h, i, j] ‖ softmax_j z_s[b, h, i, j]),   z = (scale · q_i·k_j + mask_ij) / T

Nothing is online: no maximum, no rescaling, and every divergence is a plain sum (forms.py). Asked to (OUT), the same sweep emits the
query gradient of an upstream gradient of 1, Σ_j dz_j k_j, for the divergences whose dz needs nothing of the row's end:
forward_kl, cross_entropy (centre −1) and logit_mse. Two products and two exponentials per (row, key) or three and two;
logit_mse needs no exponentials; a mean over H heads one product, two exponentials and a logarithm a head, and as much again for
the student's heads' centres.

Rows that are dead on either side are worth 0 and get DEAD on both sides, so that the backward needs no branch.
Stored for the backward, fp32: CENTRE [B, Hs, M] and WEIGHT [B, Ho, M] where the divergence has them.
Types: queries and keys fp16, bf16 or fp32 (IEEE products), teacher and student independently; sums fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import WRONG, at_head, side_at
from attnkd_kernels.map.forms import add_keys, finish, gap_of_logits, no_sums, terms, where_shown
from attnkd_kernels.map.given import dead_rows, keep_normalisers, normalisers, wrong_rows
from attnkd_kernels.map.tile import (
    At,
    Rows,
    add_gradient,
    at_rows,
    at_tile,
    head_log_probs,
    load_left,
    load_right,
    load_whole_right,
    log_probs,
    no_gradient,
    skip_rows,
    store_gradient,
    without_checks,
    without_rows,
)


class Left(NamedTuple):
    """What stays with a program: the tiles [BL, BLOCK], or Parts, and the normalisers [BL, 1] of its queries."""

    student: Any
    teacher: Any
    norm_s: Any
    norm_t: Any


@triton.jit
def _map_value_kernel(
    student,  # Side: query [B, H, M, D_s], key [B, H, N, D_s], mask [B, H, M, N]
    teacher,  # Side: the same with Ht, D_t
    kept,  # Rows: lse_s [B, Hs, M], lse_t [B, Ht', M], written where they are given; centre and weight are written
    given,  # Given
    LOSS,  # [B, Ho, M] fp32
    UNIT_DQ,  # Operand [B, H, M, D_s], with OUT
    unit_scale,  # scale/T of the student
    HO, M, N,
    BH: tl.constexpr,  # the student's averaged heads, up to a power of two
    S: tl.constexpr, T: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, WIDE.BL)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)  # of [B, Ho]
    at = At((tl.program_id(0) % tiles) * WIDE.BL, 0, M, N)
    b, h = row // HO, row % HO
    student = at_tile(side_at(student, b, h), at)
    teacher = at_tile(side_at(teacher, b, h), at)
    rows = Rows(kept.lse_s + row * S.MEAN * M, kept.lse_t + row * T.MEAN * M, kept.centre, kept.weight)
    MASKED: tl.constexpr = WIDE.MASKS != "none"

    norm_s, norm_t = 0.0, 0.0
    if WIDE.DIVERGENCE != "logit_mse":
        norm_s = normalisers(given.student, rows.lse_s, b, h, at, WIDE)
        norm_t = normalisers(given.teacher, rows.lse_t, b, h, at, WIDE)
    left = Left(load_left(student, at, S, WIDE), load_left(teacher, at, T, WIDE), norm_s, norm_t)
    clear, stop = without_checks(student, teacher, at, S, T, WIDE)
    state = (
        no_sums(WIDE),
        tl.zeros([WIDE.BL, BH], tl.float32),
        0.0,
    )
    if WIDE.OUT > 0:
        state = state[0], state[1], no_gradient(S, WIDE.BL, WIDE.OUT)
    state = _more_keys(state, student, teacher, rows, left, at, (clear, stop), S, T, NARROW)
    if WIDE.MASKS != "any":
        state = _more_keys(state, student, teacher, rows, left, at, (0, clear), S, T, WIDE)
    sums, centres, unit = state

    m = at.q0 + tl.arange(0, WIDE.BL)
    value, centre, weight = finish(sums, clear if MASKED else N, MASKED, WIDE)
    if WIDE.DIVERGENCE != "logit_mse":
        wrong_s, wrong_t = (
            wrong_rows(given.student, norm_s, sums.sum_s),
            wrong_rows(given.teacher, norm_t, sums.sum_t),
        )
        dead = dead_rows(given.student, norm_s, rows.lse_s, m, M, S.MEAN)
        dead = dead | dead_rows(given.teacher, norm_t, rows.lse_t, m, M, T.MEAN)
        value = tl.where(wrong_s | wrong_t, float("nan"), tl.where(dead, 0.0, value))
        if MASKED:
            tl.debug_barrier()  # every warp has read the normalisers that are replaced now
        keep_normalisers(
            given.student,
            tl.where(wrong_s[:, None], WRONG, norm_s),
            rows.lse_s,
            dead & (wrong_s == 0),
            m,
            M,
            MASKED,
            S.MEAN,
        )
        keep_normalisers(
            given.teacher,
            tl.where(wrong_t[:, None], WRONG, norm_t),
            rows.lse_t,
            dead & (wrong_t == 0),
            m,
            M,
            MASKED,
            T.MEAN,
        )
        if WIDE.OUT > 0:
            unit = without_rows(unit, dead, S)
    tl.store(LOSS + row * M + m, value, mask=m < M)
    if WIDE.DIVERGENCE == "mse" or WIDE.DIVERGENCE == "logit_mse":
        tl.store(kept.weight + row * M + m, weight, mask=m < M)
    if S.MEAN > 1:
        for head in range(S.MEAN):
            mine = tl.sum(tl.where((tl.arange(0, BH) == head)[None, :], centres, 0.0), 1)
            tl.store(kept.centre + (row * S.MEAN + head) * M + m, tl.where(dead, 0.0, mine), mask=m < M)
    elif WIDE.DIVERGENCE == "reverse_kl" or WIDE.DIVERGENCE == "js" or WIDE.DIVERGENCE == "mse":
        tl.store(kept.centre + row * M + m, tl.where(dead, 0.0, centre), mask=m < M)
    if WIDE.OUT > 0:
        factor = unit_scale
        if WIDE.DIVERGENCE == "logit_mse":
            factor = unit_scale * weight[:, None]
        store_gradient(at_rows(at_head(UNIT_DQ, b, h), at.q0), unit, factor, at.q0, M, 0, S, WIDE.BL, WIDE.OUT)


@triton.jit
def _more_keys(state, student, teacher, rows, left, at, span, S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr):
    """(sums, centres, unit) after the keys of ``span`` (first, end)."""
    sums, centres, unit = state
    MASKED: tl.constexpr = SWEEP.MASKS != "none" and SWEEP.CHECK
    student, teacher = skip_rows(student, span[0], SWEEP), skip_rows(teacher, span[0], SWEEP)
    for k0 in range(span[0], span[1], SWEEP.BR):
        here = At(at.q0, k0, at.M, at.N)
        k_s, k_t = left.student, left.teacher
        if S.MEAN == 1:
            k_s = load_whole_right(student, k_s, here, S, SWEEP)
        if T.MEAN == 1:
            k_t = load_whole_right(teacher, k_t, here, T, SWEEP)
        ls = log_probs(student, rows.lse_s, left.norm_s, left.student, k_s, here, S, SWEEP)
        lt = log_probs(teacher, rows.lse_t, left.norm_t, left.teacher, k_t, here, T, SWEEP)
        ps = tl.exp2(ls)
        pt = tl.exp2(lt)
        sums = add_keys(sums, ls, lt, ps, pt, MASKED, SWEEP)
        if SWEEP.OUT > 0:
            if SWEEP.DIVERGENCE == "logit_mse":
                dz = gap_of_logits(ls, lt, MASKED)
            else:
                dz = ps - where_shown(pt, ls, MASKED)
            if not S.WHOLE:
                k_s = load_right(student, here, 0, S, SWEEP, SWEEP.OUT)
            unit = add_gradient(unit, dz, k_s, S)
        if S.MEAN > 1:
            for head in range(S.MEAN):
                lh = head_log_probs(student, rows.lse_s, head, here, S, SWEEP)
                term, _p = terms(lh, ls, lt, MASKED, True, SWEEP.DIVERGENCE)
                centres += tl.where((tl.arange(0, centres.shape[1]) == head)[None, :], tl.sum(term, 1)[:, None], 0.0)
        student, teacher = skip_rows(student, SWEEP.BR, SWEEP), skip_rows(teacher, SWEEP.BR, SWEEP)
    return sums, centres, unit
