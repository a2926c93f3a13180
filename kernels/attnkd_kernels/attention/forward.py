"""Attention and its divergence, forward: one sweep over the keys.

    o_i = Σ_j p_s,ij v_j,    loss_i = Div(p_t,i ‖ p_s,i),    p = softmax_j(scale · q_i·k_j + mask_ij)

The teacher's normalisers are known (map/normaliser.py, or given); the student's come out of this sweep, online: logits are kept relative to the
largest so far, top, and when it rises by ``drop`` the sums follow,

    forward_kl, cross_entropy   Σ p_t (… − (s − top))          grows by drop · Σ p_t
    reverse_kl                  Σ 2^(s−top) ((s − top) − …)    shrinks by drop · Σ 2^(s−top), then is multiplied with 2^−drop

so that the forms of map/forms.py hold at the end as they are. js and mse compare finished probabilities: they are given the student's
normalisers too (KNOWN), and then nothing moves. Three products and two exponentials per (row, key); with DIVERGENCE "none" the
same code is a plain attention of two products and one exponential.

Written for the backward, fp32: LSE [B, H, M] of the student in units of log 2 (DEAD where a row sees no key; its output is 0), and
centre and weight [B, H, M] where the divergence has them. Types: fp16, bf16 or fp32 (IEEE products), the teacher's independently; sums fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, HIDDEN, NO_MASK, WRONG, at_head, hidden, shown, side_at
from attnkd_kernels.map.forms import Sums, add_keys, finish, no_sums
from attnkd_kernels.map.given import dead_rows, keep_normalisers, normalisers, wrong_rows
from attnkd_kernels.map.tile import (
    At,
    add_gradient,
    at_rows,
    at_tile,
    fold,
    load_head,
    load_left,
    load_whole_right,
    logits,
    no_gradient,
    row_values,
    skip_rows,
    store_gradient,
    times_rows,
    without_checks,
)


class Left(NamedTuple):
    """What stays with a program: the tiles [BL, BLOCK] (or Parts) of its queries, and their normalisers [BL, 1] where they are known."""

    student: Any
    teacher: Any
    norm_s: Any
    norm_t: Any


@triton.jit
def _attention_fwd_kernel(
    student,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, H, M, N]
    value,  # Operand [B, H, N, V]
    teacher,  # Side: query [B, H, M, D_t], key [B, H, N, D_t], mask [B, H, M, N]
    kept,  # Rows [B, H, M]: lse_t, written where it is given; lse_s, centre and weight are written
    given_t,  # RowValues [B, H, M], or None: the teacher's normalisers (map/given.py)
    OUT,  # Operand [B, H, M, V]
    LOSS,  # [B, H, M] fp32
    H, M, N,
    FUSE: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, WIDE.BL)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)  # of [B, H]
    at = At((tl.program_id(0) % tiles) * WIDE.BL, 0, M, N)
    b, h = row // H, row % H
    student, value = at_tile(side_at(student, b, h), at), at_head(value, b, h)
    MASKED: tl.constexpr = WIDE.MASKS != "none"
    DIVERGENCE: tl.constexpr = WIDE.DIVERGENCE
    KNOWN: tl.constexpr = DIVERGENCE == "js" or DIVERGENCE == "mse"
    left_t, norm_s, norm_t = 0.0, 0.0, 0.0
    if DIVERGENCE == "none":
        teacher = student
    else:
        teacher = at_tile(side_at(teacher, b, h), at)
        left_t = load_left(teacher, at, T, WIDE)
        if DIVERGENCE != "logit_mse":
            norm_t = normalisers(given_t, kept.lse_t + row * M, b, h, at, WIDE)
    if KNOWN:
        norm_s = row_values(kept.lse_s + row * M, at, DEAD, WIDE)
    left = Left(load_left(student, at, S, WIDE), left_t, norm_s, norm_t)
    clear, stop = without_checks(student, teacher, at, S, T, WIDE)
    state = (
        no_sums(WIDE),
        tl.full([WIDE.BL], HIDDEN, tl.float32),
        no_gradient(V, WIDE.BL, V.BLOCK),
    )
    state = _more_keys(state, student, value, teacher, left, at, (clear, stop), FUSE, S, T, V, NARROW)
    if WIDE.MASKS != "any":
        state = _more_keys(state, student, value, teacher, left, at, (0, clear), FUSE, S, T, V, WIDE)
    sums, top, acc = state

    m = at.q0 + tl.arange(0, WIDE.BL)
    total = tl.sum(sums.sum_s, 1)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    store_gradient(at_rows(at_head(OUT, b, h), at.q0), acc, share, at.q0, M, 0, V, WIDE.BL, V.BLOCK)
    if KNOWN:
        lse = tl.sum(norm_s, 1)
    else:
        alive = shown(top) | (total != total)  # NaN is no dead row
        lse = tl.where(alive, top + tl.log2(total), DEAD)
        tl.store(kept.lse_s + row * M + m, lse, mask=m < M)
    if DIVERGENCE != "none":
        loss, centre, weight = finish(sums, clear if MASKED else N, MASKED, WIDE)
        if DIVERGENCE != "logit_mse":
            dead_t = tl.sum(norm_t, 1) >= DEAD
            if given_t is not None:
                wrong_t = wrong_rows(given_t, norm_t, sums.sum_t)
                dead_t = dead_rows(given_t, norm_t, 0.0, m, M, 1)
                norm_t = tl.where(wrong_t[:, None], WRONG, norm_t)
                keep_normalisers(given_t, norm_t, kept.lse_t + row * M, dead_t & (wrong_t == 0), m, M, False, 1)
                loss = tl.where(wrong_t, float("nan"), loss)
            dead = (lse >= DEAD) | dead_t
            loss, centre = tl.where(dead, 0.0, loss), tl.where(dead, 0.0, centre)
        tl.store(LOSS + row * M + m, loss, mask=m < M)
        if DIVERGENCE == "mse" or DIVERGENCE == "logit_mse":
            tl.store(kept.weight + row * M + m, weight, mask=m < M)
        if DIVERGENCE == "reverse_kl" or DIVERGENCE == "js" or DIVERGENCE == "mse":
            tl.store(kept.centre + row * M + m, centre, mask=m < M)


@triton.jit
def _more_keys(
    state, student, value, teacher, left, at, span,
    FUSE: tl.constexpr, S: tl.constexpr, T: tl.constexpr, V: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """(sums, top [BL], output [BL, BLOCK] or Parts) after the keys of ``span`` (first, end); sums and output relative to top."""
    sums, top, acc = state
    MASKED: tl.constexpr = SWEEP.MASKS != "none" and SWEEP.CHECK
    DIVERGENCE: tl.constexpr = SWEEP.DIVERGENCE
    KNOWN: tl.constexpr = DIVERGENCE == "js" or DIVERGENCE == "mse"
    student, value = skip_rows(student, span[0], SWEEP), at_rows(value, span[0])
    if DIVERGENCE != "none":
        teacher = skip_rows(teacher, span[0], SWEEP)
    for k0 in range(span[0], span[1], SWEEP.BR):
        here = At(at.q0, k0, at.M, at.N)
        k_s = load_whole_right(student, 0.0, here, S, SWEEP)
        v = load_head(value, k0, at.N, V, SWEEP.BR, SWEEP.CHECK)
        if KNOWN:
            z = logits(student, left.student, k_s, here, student.factor, left.norm_s, S, SWEEP)
            u = z
        else:
            if FUSE and DIVERGENCE != "logit_mse" and (S.MASK == NO_MASK or not SWEEP.CHECK):
                z = logits(student, left.student, k_s, here, 1.0, 0.0, S, SWEEP)
                new = tl.maximum(top, tl.max(z, 1) * student.factor)
                z = z * student.factor
            else:
                z = logits(student, left.student, k_s, here, student.factor, 0.0, S, SWEEP)
                new = tl.maximum(top, tl.max(z, 1))
            base = new
            if MASKED:  # while no key was seen, nothing is relative to it
                base = tl.where(hidden(new), 0.0, new)
            u = z - base[:, None]
            a = tl.exp2(top - base)[:, None]
            sums = _relative_to(sums, a, (base - top)[:, None], DIVERGENCE)
            acc = times_rows(acc, a, V)
            top = new
        p = tl.exp2(u)
        if DIVERGENCE == "none" or DIVERGENCE == "logit_mse":
            value_, slope, square, sum_s, sum_t, clash, count = sums
            sums = Sums(value_, slope, square, sum_s + fold(p, SWEEP), sum_t, clash, count)
        if DIVERGENCE != "none":
            k_t = load_whole_right(teacher, 0.0, here, T, SWEEP)
            lt = logits(teacher, left.teacher, k_t, here, teacher.factor, left.norm_t, T, SWEEP)
            if DIVERGENCE == "logit_mse":
                sums = add_keys(sums, z, lt, p, p, MASKED, SWEEP)
            else:
                sums = add_keys(sums, u, lt, p, tl.exp2(lt), MASKED, SWEEP)
            teacher = skip_rows(teacher, SWEEP.BR, SWEEP)
        acc = add_gradient(acc, p, v, V)
        student, value = skip_rows(student, SWEEP.BR, SWEEP), at_rows(value, SWEEP.BR)
    return sums, top, acc


@triton.jit
def _relative_to(sums, a, drop, DIVERGENCE: tl.constexpr):
    """The sums after the largest logit rose by ``drop`` [BL, 1]; a = 2^−drop."""
    value, slope, square, sum_s, sum_t, clash, count = sums
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
        value += drop * (sum_t - clash)
    elif DIVERGENCE == "reverse_kl":
        value = a * (value - drop * (sum_s - clash))
        clash = a * clash
    return Sums(value, slope, square, a * sum_s, sum_t, clash, count)
