"""Whole-map divergence, backward: the gradient of the student's learnable bias.

    dbias = 1/T · Σ dz over every (image, head, query, key) that one bias entry was broadcast to

A program owns one tile of the *stored* bias [Bb, Hb, Mb, Nb] (each size 1 or full) and walks over what it was broadcast to,
recomputing the tile of dz each time: two products and two exponentials per (row, key), no [B, H, M, N] buffer, no atomics.
A small bias gives few programs, so the walk can be cut in SPLITS parts that leave partial sums, added in a fixed order.

OUT [SPLITS, Bb, Hb, Mb, Nb] fp32. Saved and recomputed: as in backward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.map.backward import gradient_tile
from attnkd_kernels.map.common import at_head, load_rows


@triton.jit
def _map_bias_kernel(
    QS,  # [B, H, M, D_S]
    KS,  # [B, H, N, D_S]
    MASK_S,  # [B, H, M, N] any strides
    QT,  # [B, Ht, M, D_T]
    KT,  # [B, Ht, N, D_T]
    MASK_T,  # [B, Ht, M, N] or unused
    GRAD,  # [B, Ho, M] fp32
    LSE_S,  # [B, HP, M] fp32
    LSE_T,  # [B, Ht', M] fp32
    CENTRE,  # [B, HP, M] fp32
    WEIGHT,  # [B, Ho, M] fp32 (the two MSEs)
    OUT,  # [SPLITS, Bb, Hb, Mb, Nb] fp32
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    g_b, g_h, g_m,
    factor_s, bias_s, factor_t, bias_t, out_scale,
    HP, M, N,
    BB, HB, MB, NB, SUM_B, SUM_H, SUM_M, SUM_N, SPLITS,
    MEAN: tl.constexpr, HEADS_S: tl.constexpr, HEADS_T: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
    KIND_S: tl.constexpr, KIND_T: tl.constexpr, MASK_HEADS_S: tl.constexpr, MASK_HEADS_T: tl.constexpr,
    DIV: tl.constexpr, OVER_M: tl.constexpr, OVER_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD_S: tl.constexpr, BD_T: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(MB, BM)
    tiles_n = tl.cdiv(NB, BN)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    split = tl.program_id(0) // (tiles_n * tiles_m) % SPLITS
    bias_row = tl.program_id(0) // (tiles_n * tiles_m * SPLITS)  # of [Bb, Hb]
    bb = bias_row // HB
    hb = bias_row % HB
    acc = tl.zeros([BM, BN], tl.float32)
    todo = SUM_B * SUM_H * SUM_M * SUM_N
    each = tl.cdiv(todo, SPLITS)
    for i in range(split * each, tl.minimum(split * each + each, todo)):
        n0 = (tile_n + i % SUM_N) * BN
        m0 = (tile_m + i // SUM_N % SUM_M) * BM
        h = hb + i // (SUM_N * SUM_M) % SUM_H
        b = tl.cast(bb + i // (SUM_N * SUM_M * SUM_H), tl.int64)
        row = b * HP + h
        ho = h
        lse_t = LSE_T + row * M
        weight = WEIGHT + row * M
        if MEAN:
            ho = h * 0
            lse_t = LSE_T + b * HEADS_T * M
            weight = WEIGHT + b * M
        all_qs = (QS + b * qs_b, qs_h, qs_m, qs_d)
        all_ks = (KS + b * ks_b, ks_h, ks_n, ks_d)
        all_ms = (MASK_S + b * ms_b, ms_h, ms_m, ms_n)
        qs = at_head(all_qs, h)
        ks = at_head(all_ks, h)
        qt = at_head((QT + b * qt_b, qt_h, qt_m, qt_d), ho)
        kt = at_head((KT + b * kt_b, kt_h, kt_n, kt_d), ho)
        mask_t = at_head((MASK_T + b * mt_b, mt_h, mt_m, mt_n), ho)
        dz = gradient_tile(
            load_rows(qs, m0, M, 0, D_S, WIDTH_S, BM, BD_S, True), load_rows(ks, n0, N, 0, D_S, WIDTH_S, BN, BD_S, True),
            load_rows(qt, m0, M, 0, D_T, WIDTH_T, BM, BD_T, True), load_rows(kt, n0, N, 0, D_T, WIDTH_T, BN, BD_T, True),
            all_qs, all_ks, all_ms, qs, ks, at_head(all_ms, h), qt, kt, mask_t,
            m0, M, n0, N, M, N, factor_s, bias_s, factor_t, bias_t,
            LSE_S + row * M, LSE_S + b * HP * M, lse_t, CENTRE + row * M,
            HEADS_S, HEADS_T, D_S, D_T, WIDTH_S, WIDTH_T, KIND_S, KIND_T, MASK_HEADS_S, MASK_HEADS_T,
            DIV, True, BM, BN, BD_S, BD_T, True,
        )  # fmt: skip
        m = m0 + tl.arange(0, BM)
        upstream = tl.load(
            GRAD + b * g_b + tl.cast(ho, tl.int64) * g_h + tl.cast(m, tl.int64) * g_m, mask=m < M, other=0.0
        )
        if DIV == "mse" or DIV == "logit_mse":
            upstream = upstream * tl.load(weight + m, mask=m < M, other=0.0)
        acc += dz * upstream[:, None]

    acc = acc * out_scale
    out = OUT + (tl.cast(split, tl.int64) * BB * HB + bias_row) * MB * NB
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    if OVER_M and OVER_N:
        tl.store(out, tl.sum(tl.sum(acc, 1), 0))
    elif OVER_M:
        tl.store(out + n, tl.sum(acc, 0), mask=n < NB)
    elif OVER_N:
        tl.store(out + m, tl.sum(acc, 1), mask=m < MB)
    else:
        pointers = out + tl.cast(m, tl.int64)[:, None] * NB + n[None, :]  # [BM, BN]
        tl.store(pointers, acc, mask=(m < MB)[:, None] & (n < NB)[None, :])
