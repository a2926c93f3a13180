"""Whole-map divergence, forward: one sweep over the keys with online statistics of both sides.

    loss[b, h, i] = Div(softmax_j z_t[b, h, i, j] ‖ softmax_j z_s[b, h, i, j]),   z = (scale · q_i·k_j + mask_ij) / T

for forward_kl, reverse_kl, cross_entropy, mse and logit_mse; per head, or over one wide head (log-sum merging). Two matrix
products and two exponentials per (row, key); no [M, N] tensor. js and the mean merge need finished normalisers: map_value.py.

UNIT (forward_kl and cross_entropy, heads of at most BD channels): the query gradient of an upstream gradient of 1,

    unit_i = scale/T · Σ_j (p_s,ij − p_t,ij) k_j,

is itself an online attention output, so two more products here replace a whole sweep of three in the backward. It is kept
as Σ (p_s − p_t) k with the probabilities normalised by what was seen so far and corrected by Σ p_t k when more arrives:
the rounding to the matrix unit's type then falls on the *difference* and close maps keep an exact gradient.

Saved for the backward: LSE_S, LSE_T [B, Ho, M] (log2 units), CENTRE [B, Ho, M] (map_forms.py),
WEIGHT [B, Ho, M] (2 / count; the two MSEs), all fp32. Recomputed there: the logits.
FUSE leaves the products unscaled until the maximum is subtracted: one fused multiply-add in place of two operations. It needs
positive scales and no masks.
Types: queries and keys fp16, bf16 or fp32 (IEEE products), teacher and student independently; statistics fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.map_common import DEAD, HIDDEN, TINY, at_head, load_rows, logits, scores, shown
from attnkd_kernels.map_forms import finish_kl, gap_of_logits, online_kl, online_mse


@triton.jit
def _map_fwd_kernel(
    QS,  # [B, H, M, D_S]
    KS,  # [B, H, N, D_S]
    MASK_S,  # [B, H, M, N] any strides, or unused
    QT,  # [B, Ht, M, D_T]
    KT,  # [B, Ht, N, D_T]
    MASK_T,  # [B, Ht, M, N]
    LOSS,  # [B, Ho, M] fp32
    LSE_S,  # [B, Ho, M] fp32
    LSE_T,  # [B, Ho, M] fp32
    CENTRE,  # [B, Ho, M] fp32
    WEIGHT,  # [B, Ho, M] fp32
    UNIT,  # [B, Ho, M, D_S] like QS
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    un_b, un_h, un_m, un_d,
    factor_s, bias_s, factor_t, bias_t, unit_scale,
    HO, M, N,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, WITH_UNIT: tl.constexpr, FUSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM)
    row = tl.program_id(0) // tiles  # of [B, Ho]
    m0 = (tl.program_id(0) % tiles) * BM
    b = tl.cast(row // HO, tl.int64)
    h = row % HO
    qs = at_head((QS + b * qs_b, qs_h, qs_m, qs_d), h)
    ks = at_head((KS + b * ks_b, ks_h, ks_n, ks_d), h)
    qt = at_head((QT + b * qt_b, qt_h, qt_m, qt_d), h)
    kt = at_head((KT + b * kt_b, kt_h, kt_n, kt_d), h)
    mask_s = at_head((MASK_S + b * ms_b, ms_h, ms_m, ms_n), h)
    mask_t = at_head((MASK_T + b * mt_b, mt_h, mt_m, mt_n), h)
    MASKED: tl.constexpr = KIND_S != 0 or KIND_T != 0
    REVERSE: tl.constexpr = DIV == "reverse_kl"
    CROSS: tl.constexpr = DIV == "cross_entropy"

    a_s = load_rows(qs, m0, M, 0, D_S, WIDTH_S, BM, BD_S, True)  # [BM, BD_S], unused when wide
    a_t = load_rows(qt, m0, M, 0, D_T, WIDTH_T, BM, BD_T, True)
    top_s = tl.full([BM], HIDDEN, tl.float32)
    top_t = tl.full([BM], HIDDEN, tl.float32)
    sum_s = tl.zeros([BM], tl.float32)
    sum_t = tl.zeros([BM], tl.float32)
    x = tl.zeros([BM], tl.float32)  # cross, or square
    y = tl.zeros([BM], tl.float32)  # both, or slope
    w = tl.zeros([BM], tl.float32)  # clash, or teacher
    count = tl.zeros([BM], tl.float32)
    unit = tl.zeros([BM, BD_S], tl.float32)  # Σ (p_s − p_t) k
    unit_t = tl.zeros([BM, BD_S], tl.float32)  # Σ p_t k

    last = ((N - 1) // BN) * BN
    for n0 in range(0, last, BN):
        top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t = _fwd_tile(
            a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
            top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t,
            D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
            DIV, WITH_UNIT, FUSE, BM, BN, BD_S, BD_T, False,
        )  # fmt: skip
    top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t = _fwd_tile(
        a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, last, M, N, factor_s, bias_s, factor_t, bias_t,
        top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t,
        D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
        DIV, WITH_UNIT, FUSE, BM, BN, BD_S, BD_T, True,
    )  # fmt: skip

    m = m0 + tl.arange(0, BM)
    inside = m < M
    at = tl.cast(row, tl.int64) * M + m
    alive = (shown(top_s) | (sum_s != sum_s)) & (shown(top_t) | (sum_t != sum_t))  # NaN is no dead row
    if DIV == "logit_mse" or DIV == "mse":
        if not MASKED:
            count += N
        weight = 2.0 / tl.maximum(count, 1.0)
        value = 0.5 * weight * x
        centre = x + y  # Σ p_s (p_s − p_t)
        tl.store(WEIGHT + at, weight, mask=inside)
    elif REVERSE:
        value, centre = finish_kl(sum_s, sum_t, x, y, w, True, MASKED, False)
    else:
        value, centre = finish_kl(sum_t, sum_s, x, y, w, False, MASKED, CROSS)
    if DIV == "logit_mse":
        tl.store(LOSS + at, value, mask=inside)
    else:
        tl.store(LOSS + at, tl.where(alive, value, 0.0), mask=inside)
        tl.store(CENTRE + at, tl.where(alive, centre, 0.0), mask=inside)
        tl.store(LSE_S + at, tl.where(alive, top_s + tl.log2(sum_s), DEAD), mask=inside)
        tl.store(LSE_T + at, tl.where(alive, top_t + tl.log2(tl.maximum(sum_t, TINY)), DEAD), mask=inside)
    if WITH_UNIT:
        if MASKED:  # Σ share · p_s k − Σ_both p_t k
            unit = unit - (1.0 + centre)[:, None] * (unit + unit_t)
        unit = tl.where(alive[:, None], unit * unit_scale, 0.0)
        c = tl.arange(0, BD_S)
        columns = tl.cast(h + c // D_S, tl.int64) * un_h + (c % D_S) * un_d
        start = UNIT + b * un_b + tl.cast(m0, tl.int64) * un_m
        pointers = start + (tl.arange(0, BM)[:, None] * un_m + columns[None, :])  # [BM, BD_S]
        tl.store(pointers, unit.to(UNIT.dtype.element_ty), mask=inside[:, None] & (c < WIDTH_S)[None, :])


@triton.jit
def _fwd_tile(
    a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
    top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, WITH_UNIT: tl.constexpr, FUSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of both maps: the statistics after it."""
    MASKED: tl.constexpr = KIND_S != 0 or KIND_T != 0
    later_s, later_t = 1.0, 1.0
    if FUSE:
        later_s, later_t = factor_s, factor_t
        factor_s, factor_t = 1.0, 1.0
    k_s = a_s
    if WIDTH_S <= BD_S:
        k_s = load_rows(ks, n0, N, 0, D_S, WIDTH_S, BN, BD_S, TAIL)
    s = scores(a_s, k_s, qs, m0, M, ks, n0, N, D_S, WIDTH_S, BM, BN, BD_S, TAIL)
    s = logits(s, factor_s, mask_s, bias_s, m0, M, n0, N, BM, BN, KIND_S, MASK_HEADS_S, True, TAIL)
    k_t = a_t
    if WIDTH_T <= BD_T:
        k_t = load_rows(kt, n0, N, 0, D_T, WIDTH_T, BN, BD_T, TAIL)
    t = scores(a_t, k_t, qt, m0, M, kt, n0, N, D_T, WIDTH_T, BM, BN, BD_T, TAIL)
    t = logits(t, factor_t, mask_t, bias_t, m0, M, n0, N, BM, BN, KIND_T, MASK_HEADS_T, True, TAIL)
    if DIV == "logit_mse":
        gap = gap_of_logits(s, t, MASKED)
        x += tl.sum(gap * gap, 1)
        if MASKED:
            count += tl.sum((shown(s) & shown(t)).to(tl.float32), 1)
    elif DIV == "mse":
        top_s, top_t, sum_s, sum_t, x, y, w, count = online_mse(
            s, t, later_s, later_t, top_s, top_t, sum_s, sum_t, x, y, w, count, MASKED
        )
    elif DIV == "reverse_kl":
        top_s, top_t, sum_s, sum_t, x, y, w, _ew, _ev, _rw, _rv = online_kl(
            s, t, later_s, later_t, top_s, top_t, sum_s, sum_t, x, y, w, MASKED, False
        )
    else:
        old_s = sum_s
        old_t = sum_t
        top_t, top_s, sum_t, sum_s, x, y, w, et, es, shrink_t, shrink_s = online_kl(
            t, s, later_t, later_s, top_t, top_s, sum_t, sum_s, x, y, w, MASKED, DIV == "cross_entropy"
        )
        if WITH_UNIT:
            over_s = 1.0 / sum_s
            over_t = 1.0 / tl.maximum(sum_t, TINY)
            keep_s = old_s * shrink_s * over_s
            keep_t = old_t * shrink_t * over_t
            p_t = et * over_t[:, None]
            gap = es * over_s[:, None] - p_t
            unit = unit * keep_s[:, None] + unit_t * (keep_s - keep_t)[:, None]
            unit_t = unit_t * keep_t[:, None]
            unit = tl.dot(gap.to(k_s.dtype), k_s, unit, input_precision="ieee")
            unit_t = tl.dot(p_t.to(k_s.dtype), k_s, unit_t, input_precision="ieee")
    return top_s, top_t, sum_s, sum_t, x, y, w, count, unit, unit_t
