"""Whole-map divergence, second forward sweep: the value from finished normalisers (lse.py).

Two cases cannot be summed online. Jensen–Shannon takes the log of p_s + p_t, which is not a sum of terms that rescale; and
the mean over heads, p = (1/H) Σ_h p^h, weighs every head by its own normaliser. With the normalisers at hand both are plain
sums over the keys. Mean-merged sides add their heads in the log domain, tile by tile, so nothing underflows.

    loss[b, h, i] = Σ_j value_j,   centre[b, h', i] = Σ_j term^h'_j    (forms.py)

h' runs over the student's heads when they are merged (then [B, H, M]), else it is h. Products per (row, key): one for every
head of both sides, and one more per student head when the student is merged. Exponentials: js 2 and one logarithm; a mean
over H heads 2 and one logarithm a head.
The maxima of lse.py are replaced by LSEs, which is what the backward reads; rows that are dead on either side are worth 0
and get DEAD on both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, NO_MASK, shown
from attnkd_kernels.map.common import at_head, load_rows, log_probs, row_values
from attnkd_kernels.map.forms import terms, value_terms


@triton.jit
def _map_value_kernel(
    QS,  # [B, H, M, D_S]
    KS,  # [B, H, N, D_S]
    MASK_S,  # [B, H, M, N] any strides, or unused
    QT,  # [B, Ht, M, D_T]
    KT,  # [B, Ht, N, D_T]
    MASK_T,  # [B, Ht, M, N]
    LOSS,  # [B, Ho, M] fp32
    LSE_S,  # [B, Hs, M] fp32: the row maxima, replaced by the LSEs; Hs = student heads with a mean, else Ho
    LSE_T,  # [B, Ht', M] fp32
    LOG_SUM_S,  # [B, Hs, M] fp32
    LOG_SUM_T,  # [B, Ht', M] fp32
    CENTRE,  # [B, Hs, M] fp32
    WEIGHT,  # [B, Ho, M] fp32 (mse)
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    factor_s, bias_s, factor_t, bias_t,
    HO, M, N,
    HEADS_S: tl.constexpr, HEADS_T: tl.constexpr, BH: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr,
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
    at_s = tl.cast(row, tl.int64) * HEADS_S * M
    at_t = tl.cast(row, tl.int64) * HEADS_T * M
    lse_s = LSE_S + at_s
    lse_t = LSE_T + at_t
    log_sum_s = LOG_SUM_S + at_s
    log_sum_t = LOG_SUM_T + at_t

    a_s = load_rows(qs, m0, M, 0, D_S, WIDTH_S, BM, BD_S, True)  # [BM, BD_S], unused when wide or merged
    a_t = load_rows(qt, m0, M, 0, D_T, WIDTH_T, BM, BD_T, True)
    top_s = row_values(lse_s, m0, M, DEAD, BM, True, True)
    top_t = row_values(lse_t, m0, M, DEAD, BM, True, True)
    for head in range(1, HEADS_S):  # a row that some head cannot see at all is dead
        top_s = tl.maximum(top_s, row_values(lse_s + head * M, m0, M, DEAD, BM, True, True))
    for head in range(1, HEADS_T):
        top_t = tl.maximum(top_t, row_values(lse_t + head * M, m0, M, DEAD, BM, True, True))
    log_s = row_values(log_sum_s, m0, M, 0.0, BM, True, True)
    log_t = row_values(log_sum_t, m0, M, 0.0, BM, True, True)
    value = tl.zeros([BM], tl.float32)
    clash = tl.zeros([BM], tl.float32)
    count = tl.zeros([BM], tl.float32)
    centre = tl.zeros([BM, BH], tl.float32)
    last = ((N - 1) // BN) * BN
    for n0 in range(0, last, BN):
        value, clash, count, centre = _value_tile(
            a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
            top_s, log_s, lse_s, log_sum_s, top_t, log_t, lse_t, log_sum_t, value, clash, count, centre,
            HEADS_S, HEADS_T, BH, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
            DIV, BM, BN, BD_S, BD_T, False,
        )  # fmt: skip
    value, clash, count, centre = _value_tile(
        a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, last, M, N, factor_s, bias_s, factor_t, bias_t,
        top_s, log_s, lse_s, log_sum_s, top_t, log_t, lse_t, log_sum_t, value, clash, count, centre,
        HEADS_S, HEADS_T, BH, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
        DIV, BM, BN, BD_S, BD_T, True,
    )  # fmt: skip

    m = m0 + tl.arange(0, BM)
    inside = m < M
    at = tl.cast(row, tl.int64) * M + m
    alive = (tl.sum(top_s, 1) < DEAD) & (tl.sum(top_t, 1) < DEAD)
    if DIV == "mse":
        if KIND_S == NO_MASK and KIND_T == NO_MASK:
            count += N
        weight = 2.0 / tl.maximum(count, 1.0)
        value = 0.5 * weight * value
        tl.store(WEIGHT + at, weight, mask=inside)
    value = tl.where(clash > 0.0, float("inf"), value)
    tl.store(LOSS + at, tl.where(alive, value, 0.0), mask=inside)
    tl.debug_barrier()  # every warp has read the maxima that are replaced now
    for head in range(0, HEADS_S):
        mine = tl.sum(tl.where((tl.arange(0, BH) == head)[None, :], centre, 0.0), 1)
        tl.store(CENTRE + at_s + head * M + m, tl.where(alive, mine, 0.0), mask=inside)
        _finish_lse(lse_s + head * M + m, log_sum_s + head * M + m, inside, alive)
    for head in range(0, HEADS_T):
        _finish_lse(lse_t + head * M + m, log_sum_t + head * M + m, inside, alive)


@triton.jit
def _finish_lse(lse, log_sum, inside, alive):
    """The maxima at ``lse`` become LSEs, or DEAD."""
    total = tl.load(lse, mask=inside, other=0.0) + tl.load(log_sum, mask=inside, other=0.0)
    tl.store(lse, tl.where(alive, total, DEAD), mask=inside)


@triton.jit
def _value_tile(
    a_s, a_t, qs, ks, mask_s, qt, kt, mask_t, m0, n0, M, N, factor_s, bias_s, factor_t, bias_t,
    top_s, log_s, lse_s, log_sum_s, top_t, log_t, lse_t, log_sum_t, value, clash, count, centre,
    HEADS_S: tl.constexpr, HEADS_T: tl.constexpr, BH: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = KIND_S != NO_MASK or KIND_T != NO_MASK
    k_s = a_s
    if WIDTH_S <= BD_S and HEADS_S == 1:
        k_s = load_rows(ks, n0, N, 0, D_S, WIDTH_S, BN, BD_S, TAIL)
    k_t = a_t
    if WIDTH_T <= BD_T and HEADS_T == 1:
        k_t = load_rows(kt, n0, N, 0, D_T, WIDTH_T, BN, BD_T, TAIL)
    ls = log_probs(
        a_s, qs, m0, M, k_s, ks, n0, N, factor_s, mask_s, bias_s, m0, M, n0, N, top_s, log_s, lse_s, log_sum_s,
        HEADS_S, D_S, WIDTH_S, BM, BN, BD_S, BM, BN, KIND_S, MASK_HEADS_S, True, True, TAIL,
    )  # fmt: skip
    lt = log_probs(
        a_t, qt, m0, M, k_t, kt, n0, N, factor_t, mask_t, bias_t, m0, M, n0, N, top_t, log_t, lse_t, log_sum_t,
        HEADS_T, D_T, WIDTH_T, BM, BN, BD_T, BM, BN, KIND_T, MASK_HEADS_T, True, True, TAIL,
    )  # fmt: skip
    ps = tl.exp2(ls)
    pt = tl.exp2(lt)
    value += tl.sum(value_terms(ps, pt, ls, lt, DIV, MASKED), 1)
    if MASKED:
        if DIV == "mse":
            count += tl.sum((shown(ls) & shown(lt)).to(tl.float32), 1)
        elif DIV == "reverse_kl":
            clash += tl.sum(tl.where(shown(ls) & (shown(lt) == 0), ps, 0.0), 1)
        elif DIV != "js":
            clash += tl.sum(tl.where(shown(lt) & (shown(ls) == 0), pt, 0.0), 1)
    if HEADS_S > 1:
        for head in range(0, HEADS_S):
            qs_h = at_head(qs, head)
            ks_h = at_head(ks, head)
            x = a_s
            y = k_s
            if D_S <= BD_S:
                x = load_rows(qs_h, m0, M, 0, D_S, WIDTH_S, BM, BD_S, True)
                y = load_rows(ks_h, n0, N, 0, D_S, WIDTH_S, BN, BD_S, TAIL)
            top = row_values(lse_s + head * M, m0, M, DEAD, BM, True, True)
            log_sum = row_values(log_sum_s + head * M, m0, M, 0.0, BM, True, True)
            lh = log_probs(
                x, qs_h, m0, M, y, ks_h, n0, N, factor_s, at_head(mask_s, head), bias_s, m0, M, n0, N, top, log_sum,
                lse_s, log_sum_s, 1, D_S, WIDTH_S, BM, BN, BD_S, BM, BN, KIND_S, 1, True, True, TAIL,
            )  # fmt: skip
            term, _p = terms(lh, ls, lt, DIV, MASKED, True)
            centre += tl.where((tl.arange(0, BH) == head)[None, :], tl.sum(term, 1)[:, None], 0.0)
    else:
        term, _p = terms(ls, ls, lt, DIV, MASKED, False)
        centre += tl.where((tl.arange(0, BH) == 0)[None, :], tl.sum(term, 1)[:, None], 0.0)
    return value, clash, count, centre
