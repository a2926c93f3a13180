"""Divergence of a few attention rows whose keys do not fit one tile: the split form of kl.py.

    loss = Σ_j p_t (log p_t − log p_s)   (or −Σ_j p_t log p_s),   c_j = p_s,j − p_t,j,   unit dq = (scale/T)·Σ_j c_j k_j

1. The keys are cut in S ranges. A program sweeps its range with online statistics *per tile slot* (slot r sees keys r, r + BN,
   …), so the loop has no reduction across warps; its slots are merged at the end of the range.
2. A second launch merges the ranges, and turns the logits that the first one left into coefficients.

The unit dq is the difference of two attention outputs with V = K_s, which nearly cancel once the student is close to its
teacher. So the difference itself is accumulated. With e = 2^(z − top), A_t = Σ e_t k and Δ = Σ (e_s − e_t) k,

    larger maxima (factors a_s, a_t):   Δ ← a_s Δ + (a_s − a_t) A_t,   A_t ← a_t A_t
    at the end:                         unit dq = (scale/T)·(Δ/l_s + A_t (l_t − l_s)/(l_s l_t)),   l = Σ e

Types and limits as in kl.py; forward KL and cross-entropy only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.divergences import lost, more_keys, no_keys, online_loss, relative_to
from attnkd_kernels.language import (
    HIDDEN,
    NO_MASK,
    TINY,
    HeadSpec,
    Side,
    Stats,
    at_head,
    dim_exists,
    load_keys,
    load_query,
    query_elements,
    row_is_dead,
    row_logits,
)

TILE, WIDE_TILE = 4096, 8192  # elements of a K tile, up to 512 padded dims and beyond
WARPS, WIDE_WARPS = 4, 8
JOIN_BLOCK = 1024  # keys of a program of the second launch


@triton.jit
def _row_kl_split_kernel(
    LOGITS_S,  # [B, Ho, M, N], log 2 units; this and LOGITS_T, ACC are None without a gradient
    LOGITS_T,  # [B, Ho, M, N]
    STATS,  # [B, Ho, M, S, 6]: the Stats of a range, and the teacher's weight on keys that the student's mask hides
    ACC,  # [B, Ho, M, S, 2, W]: Δ, A_t of a range
    N,
    M,
    HO,
    splits,
    tiles_per_split,
    student,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, Ho, M, N]
    teacher,  # Side: query [B, Ht, M, Dt], key [B, Ht, N, Dt], mask or given rows [B, Ho, M, N]
    S: tl.constexpr,  # HeadSpec of the student
    T: tl.constexpr,  # and of the teacher
    DIVERGENCE: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    split = tl.program_id(1)
    m = row % M
    h = (row // M) % HO
    b = row // M // HO
    q_s = load_query(student.query, b, h, m, student.factor, S)
    q_t = load_query(teacher.query, b, h, m, teacher.factor, T)
    mask_s = at_head(student.mask, b, h)
    mask_t = at_head(teacher.mask, b, h)
    key_s, key_t = student.key, teacher.key  # Triton 3.6 loses a stride of 1 that a loop takes out of a nested tuple
    stats = no_keys(BN)
    delta = tl.zeros([BN, S.PADDED], tl.float32)
    acc_t = tl.zeros([BN, S.PADDED], tl.float32)
    clash = tl.zeros([BN], tl.float32)
    first = split * tiles_per_split * BN
    last = tl.minimum(first + tiles_per_split * BN, N)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        k_t = load_keys(key_t, b, h, n, N, T)
        k_s = load_keys(key_s, b, h, n, N, S).to(tl.float32)
        t = row_logits(mask_t, teacher.bias, q_t, k_t, m, n, N, T)
        s = row_logits(mask_s, student.bias, q_s, k_s, m, n, N, S)
        if ACC is not None:
            tl.store(LOGITS_S + row * N + n, s, mask=n < N)
            tl.store(LOGITS_T + row * N + n, t, mask=n < N)
        stats, a_s, a_t, e_s, e_t = more_keys(stats, s, t, DIVERGENCE)
        if S.MASK != NO_MASK:
            clash = clash * a_t + lost(s, e_t)
        if ACC is not None:
            delta = delta * a_s[:, None] + acc_t * (a_s - a_t)[:, None] + k_s * (e_s - e_t)[:, None]
            acc_t = acc_t * a_t[:, None] + k_s * e_t[:, None]
    whole = relative_to(stats, tl.max(stats.top_s, 0), tl.max(stats.top_t, 0), DIVERGENCE)
    at = STATS + (row * splits + split) * 6
    tl.store(at, whole.top_s)
    tl.store(at + 1, tl.sum(whole.sum_s, 0))
    tl.store(at + 2, whole.top_t)
    tl.store(at + 3, tl.sum(whole.sum_t, 0))
    tl.store(at + 4, tl.sum(whole.cross, 0))
    if S.MASK != NO_MASK:
        tl.store(at + 5, tl.sum(clash * tl.exp2(stats.top_t - whole.top_t), 0))
    if ACC is not None:
        a_s = tl.exp2(stats.top_s - whole.top_s)
        a_t = tl.exp2(stats.top_t - whole.top_t)
        delta = tl.sum(delta * a_s[:, None] + acc_t * (a_s - a_t)[:, None], 0)
        acc = ACC + (row * splits + split) * 2 * S.WIDTH + tl.arange(0, S.PADDED)
        tl.store(acc, delta, mask=dim_exists(S))
        tl.store(acc + S.WIDTH, tl.sum(acc_t * a_t[:, None], 0), mask=dim_exists(S))


@triton.jit
def _row_kl_join_kernel(
    STATS,  # [B, Ho, M, S, 6]
    ACC,  # [B, Ho, M, S, 2, W]
    LOGITS_T,  # [B, Ho, M, N]
    COEF,  # [B, Ho, M, N]: the student's logits in, coefficients out; None without a gradient
    LOSS,  # [B, Ho, M]
    UNIT_DQ,  # [B, H, M, D]
    dq_mul,  # scale_s/T
    N,
    M,
    splits,
    S: tl.constexpr,  # HeadSpec of the student
    SPLITS: tl.constexpr,  # splits, padded
    DIVERGENCE: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    stats = _stats_of_ranges(STATS, row, splits, SPLITS)
    top_s = tl.max(stats.top_s, 0)
    top_t = tl.max(stats.top_t, 0)
    if S.MASK != NO_MASK:
        i = tl.arange(0, SPLITS)
        clash = tl.load(STATS + (row * splits + i) * 6 + 5, mask=i < splits, other=0.0)
        clash = tl.max(clash * tl.exp2(stats.top_t - top_t), 0)
    stats = relative_to(stats, top_s, top_t, DIVERGENCE)
    l_s = tl.sum(stats.sum_s, 0)
    l_t = tl.sum(stats.sum_t, 0)
    dead = row_is_dead(top_s, l_s, top_t, l_t)
    if block == 0:
        loss = online_loss(Stats(top_s, l_s, top_t, l_t, tl.sum(stats.cross, 0)), DIVERGENCE)
        if S.MASK != NO_MASK:
            loss = tl.where(clash >= TINY, loss + float("inf"), loss)  # NaN stays
        tl.store(LOSS + row, tl.where(dead, 0.0, loss))
    if COEF is not None:
        n = block * BN + tl.arange(0, BN)
        s = tl.load(COEF + row * N + n, mask=n < N, other=HIDDEN)
        t = tl.load(LOGITS_T + row * N + n, mask=n < N, other=HIDDEN)
        c = tl.exp2(s - top_s) / l_s - tl.exp2(t - top_t) / l_t
        tl.store(COEF + row * N + n, tl.where(dead, 0.0, c), mask=n < N)
        if block == 0:
            exists = dim_exists(S)
            delta = tl.zeros([S.PADDED], tl.float32)
            acc_t = tl.zeros([S.PADDED], tl.float32)
            for i in range(splits):
                at = row * splits + i
                a_s = tl.exp2(tl.load(STATS + at * 6) - top_s)
                a_t = tl.exp2(tl.load(STATS + at * 6 + 2) - top_t)
                acc = ACC + at * 2 * S.WIDTH + tl.arange(0, S.PADDED)
                part = tl.load(acc + S.WIDTH, mask=exists, other=0.0)
                delta += a_s * tl.load(acc, mask=exists, other=0.0) + (a_s - a_t) * part
                acc_t += a_t * part
            unit_dq = (delta / l_s + acc_t * ((l_t - l_s) / (l_s * l_t))) * dq_mul
            tl.store(UNIT_DQ + query_elements(row // M, row % M, M, S), tl.where(dead, 0.0, unit_dq), mask=exists)


@triton.jit
def _stats_of_ranges(STATS, row, splits, SPLITS: tl.constexpr):
    """The Stats [SPLITS] of a row's ranges; beyond them, those of no key."""
    i = tl.arange(0, SPLITS)
    at = STATS + (row * splits + i) * 6
    exists = i < splits
    return Stats(
        tl.load(at, mask=exists, other=HIDDEN),
        tl.load(at + 1, mask=exists, other=0.0),
        tl.load(at + 2, mask=exists, other=HIDDEN),
        tl.load(at + 3, mask=exists, other=0.0),
        tl.load(at + 4, mask=exists, other=0.0),
    )


def _stages(student_key: Tensor) -> int:
    """How many tiles of a side are in use or on their way to shared memory: three of 16-bit keys on NVIDIA GPUs, else one.

    An fp32 tile has the bytes of two, and its program the registers of no more; AMD's compiler would keep tiles that are on their
    way in registers, so that fewer programs run side by side.
    """
    return 3 if student_key.element_size() == 2 and launch.architecture(student_key.device) != "gfx942" else 1


def row_kl_split(
    student: Side,
    teacher: Side,
    loss: Tensor,
    coef: Tensor | None,
    unit_dq: Tensor | None,
    dq_mul: float,
    num_keys: int,
    S: HeadSpec,
    T: HeadSpec,
    divergence: str,
) -> None:
    """Fills ``loss`` [B, Ho, M] and, unless they are None, ``coef`` [B, Ho, M, N] and ``unit_dq`` [B, H, M, D]."""
    _, HO, M = loss.shape
    rows = loss.numel()
    widest = max(S.PADDED.value, T.PADDED.value)
    tile, warps = (TILE, WARPS) if widest <= 512 else (WIDE_TILE, WIDE_WARPS)
    BN = tile // widest
    splits, tiles = launch.split(launch.cdiv(num_keys, BN), rows, launch.num_processors(loss.device))
    stats = loss.new_empty((rows, splits, 6))
    logits_t = None if coef is None else torch.empty_like(coef)
    acc = None if coef is None else loss.new_empty((rows, splits, 2, S.WIDTH.value))
    launch.run(
        _row_kl_split_kernel, (rows, splits),
        coef, logits_t, stats, acc, num_keys, M, HO, splits, tiles, student, teacher,
        S=S, T=T, DIVERGENCE=divergence, BN=BN, STAGES=_stages(student.key.pointer), num_warps=warps,
    )  # fmt: skip
    launch.run(
        _row_kl_join_kernel, (rows, 1 if coef is None else launch.cdiv(num_keys, JOIN_BLOCK)),
        stats, acc, logits_t, coef, loss, unit_dq, dq_mul, num_keys, M, splits,
        S=S, SPLITS=launch.padded(splits), DIVERGENCE=divergence, BN=JOIN_BLOCK, num_warps=4,
    )  # fmt: skip
