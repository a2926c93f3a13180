"""Whole-map divergence, backward: one sweep per gradient, tiles recomputed from the saved normalisers.

    dz_ij = upstream_i · weight_i · (term_ij − p_s,ij · centre_i)       (forms.py)
    dq_i  = scale/T · Σ_j dz_ij k_j          QUERIES_LEFT: a program owns BM queries and walks over the keys
    dk_j  = scale/T · Σ_i dz_ij q_i          otherwise:    a program owns BN keys and walks over the queries

The same kernel computes either: the operand that stays is *left*, the one that streams is *right*, and the result is
Σ dz · right. No program writes what another one writes: no atomics, bitwise reproducible. Three products and two exponentials
per (row, key). A wide head (log-sum merging) is written BO columns at a time, each program recomputing the logits. With a
mean over the student's H heads the gradient of one head needs the mean of all, so every head recomputes all of them.

GRAD [B, Ho, M] any strides (0 included) fp32; OUT like the left operand, in its dtype; products in the operands' dtype with
fp32 accumulation. Nothing is saved for a second derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, NO_MASK
from attnkd_kernels.map.common import at_head, load_rows, log_probs, row_values
from attnkd_kernels.map.forms import gap_of_logits, terms


@triton.jit
def _map_bwd_kernel(
    QS,  # [B, H, M, D_S]
    KS,  # [B, H, N, D_S]
    MASK_S,  # [B, H, M, N] any strides, or unused
    QT,  # [B, Ht, M, D_T]
    KT,  # [B, Ht, N, D_T]
    MASK_T,  # [B, Ht, M, N]
    GRAD,  # [B, Ho, M] fp32
    LSE_S,  # [B, HP, M] fp32
    LSE_T,  # [B, Ht', M] fp32
    CENTRE,  # [B, HP, M] fp32
    WEIGHT,  # [B, Ho, M] fp32 (the two MSEs)
    OUT,  # [B, H, M or N, D_S]: gradient of the left operand
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    out_b, out_h, out_r, out_d,
    g_b, g_h, g_m,
    factor_s, bias_s, factor_t, bias_t, out_scale,
    HP, M, N,
    MEAN: tl.constexpr, HEADS_S: tl.constexpr, HEADS_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, QUERIES_LEFT: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    if QUERIES_LEFT:
        left_rows = M
        right_rows = N
    else:
        left_rows = N
        right_rows = M
    CHUNKS: tl.constexpr = (WIDTH_S + BO - 1) // BO
    tiles = tl.cdiv(left_rows, BL)
    row = tl.program_id(0) // (tiles * CHUNKS)  # of [B, HP]
    l0 = (tl.program_id(0) // CHUNKS % tiles) * BL
    o0 = (tl.program_id(0) % CHUNKS) * BO
    b = tl.cast(row // HP, tl.int64)
    h = row % HP
    ho = h
    if MEAN:
        ho = 0
    if QUERIES_LEFT:
        all_ls = (QS + b * qs_b, qs_h, qs_m, qs_d)  # every student head
        all_rs = (KS + b * ks_b, ks_h, ks_n, ks_d)
        left_t = at_head((QT + b * qt_b, qt_h, qt_m, qt_d), ho)
        right_t = at_head((KT + b * kt_b, kt_h, kt_n, kt_d), ho)
    else:
        all_ls = (KS + b * ks_b, ks_h, ks_n, ks_d)
        all_rs = (QS + b * qs_b, qs_h, qs_m, qs_d)
        left_t = at_head((KT + b * kt_b, kt_h, kt_n, kt_d), ho)
        right_t = at_head((QT + b * qt_b, qt_h, qt_m, qt_d), ho)
    all_ms = (MASK_S + b * ms_b, ms_h, ms_m, ms_n)
    left_s = at_head(all_ls, h)
    right_s = at_head(all_rs, h)
    mask_s = at_head(all_ms, h)
    mask_t = at_head((MASK_T + b * mt_b, mt_h, mt_m, mt_n), ho)
    lse_s = LSE_S + tl.cast(row, tl.int64) * M
    all_lse_s = LSE_S + b * HP * M
    lse_t = LSE_T + tl.cast(row, tl.int64) * M
    weight = WEIGHT + tl.cast(row, tl.int64) * M
    if MEAN:
        lse_t = LSE_T + b * HEADS_T * M
        weight = WEIGHT + b * M
    centre = CENTRE + tl.cast(row, tl.int64) * M
    grad = GRAD + b * g_b + tl.cast(ho, tl.int64) * g_h

    a_s = load_rows(left_s, l0, left_rows, 0, D_S, WIDTH_S, BL, BD_S, True)  # [BL, BD_S], unused when wide
    a_t = load_rows(left_t, l0, left_rows, 0, D_T, WIDTH_T, BL, BD_T, True)
    acc = tl.zeros([BL, BO], tl.float32)
    last = ((right_rows - 1) // BR) * BR
    for r0 in range(0, last, BR):
        acc = _bwd_tile(
            acc, a_s, a_t, all_ls, all_rs, all_ms, left_s, right_s, mask_s, left_t, right_t, mask_t,
            l0, left_rows, r0, right_rows, o0, M, N, factor_s, bias_s, factor_t, bias_t,
            lse_s, all_lse_s, lse_t, centre, weight, grad, g_m,
            HEADS_S, HEADS_T, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
            DIV, QUERIES_LEFT, BL, BR, BD_S, BD_T, BO, False,
        )  # fmt: skip
    acc = _bwd_tile(
        acc, a_s, a_t, all_ls, all_rs, all_ms, left_s, right_s, mask_s, left_t, right_t, mask_t,
        l0, left_rows, last, right_rows, o0, M, N, factor_s, bias_s, factor_t, bias_t,
        lse_s, all_lse_s, lse_t, centre, weight, grad, g_m,
        HEADS_S, HEADS_T, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
        DIV, QUERIES_LEFT, BL, BR, BD_S, BD_T, BO, True,
    )  # fmt: skip

    r = tl.arange(0, BL)
    c = o0 + tl.arange(0, BO)
    acc = acc * out_scale
    if QUERIES_LEFT:
        upstream = tl.load(grad + tl.cast(l0 + r, tl.int64) * g_m, mask=l0 + r < M, other=0.0)
        if DIV == "mse" or DIV == "logit_mse":
            upstream = upstream * tl.load(weight + l0 + r, mask=l0 + r < M, other=0.0)
        acc = acc * upstream[:, None]
    columns = tl.cast(c // D_S, tl.int64) * out_h + (c % D_S) * out_d
    start = OUT + b * out_b + tl.cast(h, tl.int64) * out_h + tl.cast(l0, tl.int64) * out_r
    pointers = start + (r[:, None] * out_r + columns[None, :])  # [BL, BO]
    tl.store(pointers, acc.to(OUT.dtype.element_ty), mask=(l0 + r < left_rows)[:, None] & (c < WIDTH_S)[None, :])


@triton.jit
def _bwd_tile(
    acc, a_s, a_t, all_ls, all_rs, all_ms, left_s, right_s, mask_s, left_t, right_t, mask_t,
    l0, left_rows, r0, right_rows, o0, M, N, factor_s, bias_s, factor_t, bias_t,
    lse_s, all_lse_s, lse_t, centre, weight, grad, g_m,
    HEADS_S: tl.constexpr, HEADS_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, QUERIES_LEFT: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, BO: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    b_s = a_s
    if WIDTH_S <= BD_S:
        b_s = load_rows(right_s, r0, right_rows, 0, D_S, WIDTH_S, BR, BD_S, TAIL)
    b_t = a_t
    if WIDTH_T <= BD_T and HEADS_T == 1:
        b_t = load_rows(right_t, r0, right_rows, 0, D_T, WIDTH_T, BR, BD_T, TAIL)
    dz = gradient_tile(
        a_s, b_s, a_t, b_t, all_ls, all_rs, all_ms, left_s, right_s, mask_s, left_t, right_t, mask_t,
        l0, left_rows, r0, right_rows, M, N, factor_s, bias_s, factor_t, bias_t,
        lse_s, all_lse_s, lse_t, centre,
        HEADS_S, HEADS_T, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
        DIV, QUERIES_LEFT, BL, BR, BD_S, BD_T, TAIL,
    )  # fmt: skip
    if not QUERIES_LEFT:
        r = tl.arange(0, BR)
        if TAIL:
            upstream = tl.load(grad + tl.cast(r0, tl.int64) * g_m + r * g_m, mask=r0 + r < M, other=0.0)
        else:
            upstream = tl.load(grad + tl.cast(r0, tl.int64) * g_m + r * g_m)
        dz = dz * upstream[None, :]
        if DIV == "mse" or DIV == "logit_mse":
            dz = dz * row_values(weight, r0, M, 0.0, BR, False, TAIL)
    if WIDTH_S > BD_S:
        b_s = load_rows(right_s, r0, right_rows, o0, D_S, WIDTH_S, BR, BO, TAIL)
    return tl.dot(dz.to(b_s.dtype), b_s, acc, input_precision="ieee")


@triton.jit
def gradient_tile(
    a_s, b_s, a_t, b_t, all_ls, all_rs, all_ms, left_s, right_s, mask_s, left_t, right_t, mask_t,
    l0, left_rows, r0, right_rows, M, N, factor_s, bias_s, factor_t, bias_t,
    lse_s, all_lse_s, lse_t, centre,
    HEADS_S: tl.constexpr, HEADS_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, QUERIES_LEFT: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """[BL, BR]: term_ij − p_s,ij · centre_i, the gradient of the row's value with respect to a head's logits, but for weight."""
    MASKED: tl.constexpr = KIND_S != NO_MASK or KIND_T != NO_MASK
    LOGITS: tl.constexpr = DIV == "logit_mse"
    if QUERIES_LEFT:
        BQ: tl.constexpr = BL
        BK: tl.constexpr = BR
        q0 = l0
        k0 = r0
    else:
        BQ: tl.constexpr = BR
        BK: tl.constexpr = BL
        q0 = r0
        k0 = l0
    row_lse_s = 0.0
    row_lse_t = 0.0
    CHECK: tl.constexpr = QUERIES_LEFT or TAIL
    if not LOGITS:
        row_lse_s = row_values(lse_s, q0, M, DEAD, BQ, QUERIES_LEFT, CHECK)
        if HEADS_T == 1:
            row_lse_t = row_values(lse_t, q0, M, DEAD, BQ, QUERIES_LEFT, CHECK)
    lh = log_probs(
        a_s, left_s, l0, left_rows, b_s, right_s, r0, right_rows, factor_s, mask_s, bias_s, q0, M, k0, N,
        row_lse_s, 0.0, lse_s, lse_s,
        1, D_S, WIDTH_S, BL, BR, BD_S, BQ, BK, KIND_S, MASK_HEADS_S, False, QUERIES_LEFT, TAIL,
    )  # fmt: skip
    lt = log_probs(
        a_t, left_t, l0, left_rows, b_t, right_t, r0, right_rows, factor_t, mask_t, bias_t, q0, M, k0, N,
        row_lse_t, 0.0, lse_t, lse_t,
        HEADS_T, D_T, WIDTH_T, BL, BR, BD_T, BQ, BK, KIND_T, MASK_HEADS_T, False, QUERIES_LEFT, TAIL,
    )  # fmt: skip
    if LOGITS:
        dz = gap_of_logits(lh, lt, MASKED)
    else:
        ls = lh
        if HEADS_S > 1:
            ls = log_probs(
                a_s, all_ls, l0, left_rows, b_s, all_rs, r0, right_rows, factor_s, all_ms, bias_s, q0, M, k0, N,
                row_lse_s, 0.0, all_lse_s, all_lse_s,
                HEADS_S, D_S, WIDTH_S, BL, BR, BD_S, BQ, BK, KIND_S, 1, False, QUERIES_LEFT, TAIL,
            )  # fmt: skip
        term, p = terms(lh, ls, lt, DIV, MASKED, HEADS_S > 1)
        if (DIV == "forward_kl" or DIV == "cross_entropy") and not MASKED and HEADS_S == 1:
            dz = term + p  # centre = −1
        else:
            dz = term - p * row_values(centre, q0, M, 0.0, BQ, QUERIES_LEFT, CHECK)
    return dz
