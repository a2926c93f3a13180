"""The row normalisers of one side, for the divergences and merges that need them before their own sweep (value.py).

    top[b, h, i] = max_j z_ij,   log_sum[b, h, i] = log2 Σ_j 2^(z_ij − top_i)       (z in log2 units)

One product and one exponential per (row, key). A row that sees no key gets top = DEAD. The two numbers are kept apart
because their sum would lose the log-sum's digits when logits are large.
TOP, LOG_SUM [B, Ho, M] fp32. Types: fp16, bf16, fp32 (IEEE products).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, HIDDEN, shown
from attnkd_kernels.map.common import at_head, load_mask, load_rows, logits, scores


@triton.jit
def _map_lse_kernel(
    Q,  # [B, H, M, D]
    K,  # [B, H, N, D]
    MASK,  # [B, H, M, N] any strides, or unused
    TOP,  # [B, Ho, M] fp32
    LOG_SUM,  # [B, Ho, M] fp32
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    m_b, m_h, m_m, m_n,
    factor, bias,
    HO, M, N,
    D: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, MASK_HEADS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM)
    row = tl.program_id(0) // tiles
    m0 = (tl.program_id(0) % tiles) * BM
    b = tl.cast(row // HO, tl.int64)
    h = row % HO
    q = at_head((Q + b * q_b, q_h, q_m, q_d), h)
    k = at_head((K + b * k_b, k_h, k_n, k_d), h)
    mask = at_head((MASK + b * m_b, m_h, m_m, m_n), h)
    a = load_rows(q, m0, M, 0, D, WIDTH, BM, BD, True)  # [BM, BD], unused when wide
    top = tl.full([BM], HIDDEN, tl.float32)
    total = tl.zeros([BM], tl.float32)
    last = ((N - 1) // BN) * BN
    for n0 in range(0, last, BN):
        top, total = _lse_tile(
            a, q, k, mask, m0, n0, M, N, factor, bias, top, total, D, WIDTH, KIND, MASK_HEADS, BM, BN, BD, False
        )
    top, total = _lse_tile(
        a, q, k, mask, m0, last, M, N, factor, bias, top, total, D, WIDTH, KIND, MASK_HEADS, BM, BN, BD, True
    )
    m = m0 + tl.arange(0, BM)
    at = tl.cast(row, tl.int64) * M + m
    alive = shown(top) | (total != total)  # NaN is no dead row
    tl.store(TOP + at, tl.where(alive, top, DEAD), mask=m < M)
    tl.store(LOG_SUM + at, tl.where(alive, tl.log2(total), 0.0), mask=m < M)


@triton.jit
def _lse_tile(
    a, q, k, mask, m0, n0, M, N, factor, bias, top, total,
    D: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, MASK_HEADS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    b = a
    if WIDTH <= BD:
        b = load_rows(k, n0, N, 0, D, WIDTH, BN, BD, TAIL)
    added = load_mask(mask, bias, m0, M, n0, N, BM, BN, KIND, MASK_HEADS, True)
    z = scores(a, b, q, m0, M, k, n0, N, D, WIDTH, BM, BN, BD, TAIL)
    z = logits(z, factor, added, n0, N, BN, KIND, True, TAIL)
    new = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp2(top - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
    return new, total
