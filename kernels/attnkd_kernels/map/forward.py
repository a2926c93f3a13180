"""Whole-map divergence, forward: one sweep over the keys with online statistics of both sides.

    loss[b, h, i] = Div(softmax_j z_t[b, h, i, j] ‖ softmax_j z_s[b, h, i, j]),   z = (scale · q_i·k_j + mask_ij) / T

for forward_kl, reverse_kl, cross_entropy, mse and logit_mse; per head, or over one wide head (log-sum merging). Two matrix
products and two exponentials per (row, key); no [M, N] tensor. js and the mean merge need finished normalisers: value.py.

Saved for the backward: LSE_S, LSE_T [B, Ho, M] (log2 units), CENTRE [B, Ho, M] (forms.py),
WEIGHT [B, Ho, M] (2 / count; the two MSEs), all fp32. Recomputed there: the logits.
FUSE leaves the products unscaled until the maximum is subtracted: one fused multiply-add in place of two operations. It needs
positive scales and no masks.
Types: queries and keys fp16, bf16 or fp32 (IEEE products), teacher and student independently; statistics fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, HIDDEN, NO_MASK, TINY, shown
from attnkd_kernels.map.common import at_head, load_mask, load_rows, logits, scores
from attnkd_kernels.map.forms import finish_kl, gap_of_logits, online_kl, online_mse


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
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    factor_s, bias_s, factor_t, bias_t,
    HO, M, N,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, FUSE: tl.constexpr,
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
    MASKED: tl.constexpr = KIND_S != NO_MASK or KIND_T != NO_MASK
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

    last = ((N - 1) // BN) * BN
    for n0 in range(0, last, BN):
        top_s, top_t, sum_s, sum_t, x, y, w, count = _fwd_tile(
            a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
            top_s, top_t, sum_s, sum_t, x, y, w, count,
            D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
            DIV, FUSE, BM, BN, BD_S, BD_T, False,
        )  # fmt: skip
    top_s, top_t, sum_s, sum_t, x, y, w, count = _fwd_tile(
        a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, last, M, N, factor_s, bias_s, factor_t, bias_t,
        top_s, top_t, sum_s, sum_t, x, y, w, count,
        D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
        DIV, FUSE, BM, BN, BD_S, BD_T, True,
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


@triton.jit
def _fwd_tile(
    a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
    top_s, top_t, sum_s, sum_t, x, y, w, count,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, FUSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of both maps: the statistics after it."""
    MASKED: tl.constexpr = KIND_S != NO_MASK or KIND_T != NO_MASK
    later_s, later_t = 1.0, 1.0
    if FUSE:
        later_s, later_t = factor_s, factor_t
        factor_s, factor_t = 1.0, 1.0
    k_s = a_s
    if WIDTH_S <= BD_S:
        k_s = load_rows(ks, n0, N, 0, D_S, WIDTH_S, BN, BD_S, TAIL)
    m_s = load_mask(mask_s, bias_s, m0, M, n0, N, BM, BN, KIND_S, MASK_HEADS_S, True)
    s = scores(a_s, k_s, qs, m0, M, ks, n0, N, D_S, WIDTH_S, BM, BN, BD_S, TAIL)
    s = logits(s, factor_s, m_s, n0, N, BN, KIND_S, True, TAIL)
    k_t = a_t
    if WIDTH_T <= BD_T:
        k_t = load_rows(kt, n0, N, 0, D_T, WIDTH_T, BN, BD_T, TAIL)
    m_t = load_mask(mask_t, bias_t, m0, M, n0, N, BM, BN, KIND_T, MASK_HEADS_T, True)
    t = scores(a_t, k_t, qt, m0, M, kt, n0, N, D_T, WIDTH_T, BM, BN, BD_T, TAIL)
    t = logits(t, factor_t, m_t, n0, N, BN, KIND_T, True, TAIL)
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
        top_s, top_t, sum_s, sum_t, x, y, w = online_kl(
            s, t, later_s, later_t, top_s, top_t, sum_s, sum_t, x, y, w, MASKED, False
        )
    else:
        top_t, top_s, sum_t, sum_s, x, y, w = online_kl(
            t, s, later_t, later_s, top_t, top_s, sum_t, sum_s, x, y, w, MASKED, DIV == "cross_entropy"
        )
    return top_s, top_t, sum_s, sum_t, x, y, w, count
