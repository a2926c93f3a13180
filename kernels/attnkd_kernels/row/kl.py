"""Divergence of a few attention rows (the CLS row), each K read once, forward and backward.

    z_j = (scale·q·k_j + mask_j) / T,   p = softmax(z),   loss = Σ_j p_t (log p_t − log p_s)   (or another divergence)
    c_j = ∂loss/∂z_s,j  (= p_s,j − p_t,j for the KL),   unit dq = (scale/T)·Σ_j c_j k_j
    backward, with upstream g:   dq = g · unit dq,   dk_j = (scale/T) · Σ_m g_m c_mj q_m,   dmask_j = g·c_j / T

The forward emits c (fp32, 4 bytes a key against 2·D for K) and the unit dq while K_s is on chip, so the backward reads no K.

One program handles one query row and W = D dims of one head, or W = H·D dims of all heads (``wide``: log-sum merging is one
wide head). Two forms:

* whole: the row fits one tile. Any divergence; one launch.
* split: the keys are cut in S ranges. A program sweeps its range with online statistics *per tile slot*, so the loop has no
  reduction across warps; a second launch merges the slots' statistics. Forward KL and cross-entropy only, since the other
  coefficients are no sums of e^{z_s} and e^{z_t} (see row_merge for those).
  The unit dq is the difference of two attention outputs with V = K_s, which nearly cancel once the student is close to its
  teacher. So the difference itself is accumulated: with A_t = Σ e_t k and Δ = Σ (e_s − e_t) k, growing maxima (factors a_s, a_t)
  turn Δ into a_s Δ + (a_s − a_t) A_t, and unit dq ∝ Δ/l_s + A_t (l_t − l_s)/(l_s l_t).

Saved: c [B, Ho, M, N], unit dq [B, H, M, D], both fp32. Any strides; fp16, bf16, fp32; fp32 accumulation.
Limits: W ≤ 2048 for each side (a tile holds whole tokens).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.row.common import (
    HIDDEN,
    IMPOSSIBLE,
    LN2,
    load_keys,
    masked_logits,
    row_divergence,
    row_is_dead,
    wide_offsets,
)

ONE_SWEEP = ("forward_kl", "cross_entropy")
MAX_WIDTH = 2048
WHOLE_TILE = 16384  # elements of a K tile up to which a row is handled whole
SPLIT_TILE = {1024: 8192, 2048: 8192}  # elements of a K tile in the split form, by padded width
SPLIT_TILE_DEFAULT = 4096


@triton.jit
def _row_kl_fwd_kernel(
    QS,  # [B, H, M, D]
    KS,  # [B, H, N, D]
    MS,  # [B, Ho, M, N] mask
    QT,  # [B, Ht, M, Dt]
    KT,  # [B, Ht, N, Dt]
    MT,  # [B, Ho, M, N] mask or probabilities
    LOSS,  # [B, Ho, M]
    COEF,  # [B, Ho, M, N]; the split form leaves s here
    DQ,  # [B, H, M, D]
    LOGITS_T,  # [B, Ho, M, N]; split form only
    STATS,  # [B, Ho, M, S, 5]: m_s, l_s, m_t, l_t, c; split form only
    ACC,  # [B, Ho, M, S, 2, W]: Δ, A_t; split form only
    score_mul_s,  # scale_s·log2(e)/T
    score_mul_t,
    mask_mul,  # log2(e)/T
    dq_mul,  # scale_s/T
    N,
    M,
    HO,
    num_splits,
    tiles_per_split,
    qs_b, qs_h, qs_m, qs_d,
    ks_b, ks_h, ks_n, ks_d,
    ms_b, ms_h, ms_m, ms_n,
    qt_b, qt_h, qt_m, qt_d,
    kt_b, kt_h, kt_n, kt_d,
    mt_b, mt_h, mt_m, mt_n,
    HEADS_S: tl.constexpr,
    D_S: tl.constexpr,
    WP_S: tl.constexpr,
    HEADS_T: tl.constexpr,
    D_T: tl.constexpr,
    WP_T: tl.constexpr,
    MASK_S: tl.constexpr,
    MASK_T: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    h = (row // M) % HO
    b = row // M // HO
    W: tl.constexpr = HEADS_S * D_S
    off_s, valid_s = wide_offsets(ks_h, ks_d, HEADS_S, D_S, WP_S)
    q_off_s, _ = wide_offsets(qs_h, qs_d, HEADS_S, D_S, WP_S)
    q_s = tl.load(QS + b * qs_b + h * qs_h + m * qs_m + q_off_s, mask=valid_s, other=0.0).to(tl.float32)
    q_s *= score_mul_s
    keys_s = KS + b * ks_b + h * ks_h
    mask_s = MS + b * ms_b + h * ms_h + m * ms_m
    mask_t = MT + b * mt_b + h * mt_h + m * mt_m
    if MASK_T != 3:
        off_t, valid_t = wide_offsets(kt_h, kt_d, HEADS_T, D_T, WP_T)
        q_off_t, _ = wide_offsets(qt_h, qt_d, HEADS_T, D_T, WP_T)
        q_t = tl.load(QT + b * qt_b + h * qt_h + m * qt_m + q_off_t, mask=valid_t, other=0.0).to(tl.float32)
        q_t *= score_mul_t
        keys_t = KT + b * kt_b + h * kt_h

    if WHOLE:
        n = tl.arange(0, BN)
        n_valid = n < N
        k_s = load_keys(keys_s, n, n_valid, ks_n, off_s, valid_s, W == WP_S)
        if MASK_T != 3:  # both tiles are asked for before the first is used
            k_t = load_keys(keys_t, n, n_valid, kt_n, off_t, valid_t, HEADS_T * D_T == WP_T)
            scores_t = tl.sum(k_t.to(tl.float32) * q_t[None, :], 1)
        else:
            scores_t = tl.zeros([BN], tl.float32)
        t = masked_logits(scores_t, mask_t, n, n_valid, mt_n, mask_mul, MASK_T)
        s = tl.sum(k_s.to(tl.float32) * q_s[None, :], 1)
        s = masked_logits(s, mask_s, n, n_valid, ms_n, mask_mul, MASK_S)
        loss, coef = row_divergence(s, t, KIND)
        tl.store(LOSS + row, loss)
        if NEED_GRAD:
            tl.store(COEF + row * N + n, coef, mask=n_valid)
            dq = tl.sum(k_s.to(tl.float32) * coef[:, None], 0) * dq_mul
            w = tl.arange(0, WP_S)
            # DQ is contiguous: head w//D of the row starts M·D further.
            head = (b * HO + h) * HEADS_S + w // D_S
            tl.store(DQ + (head * M + m) * D_S + w % D_S, dq, mask=valid_s)
    else:
        split = tl.program_id(1)
        m_s = tl.full([BN], HIDDEN, tl.float32)
        m_t = tl.full([BN], HIDDEN, tl.float32)
        l_s = tl.zeros([BN], tl.float32)
        l_t = tl.zeros([BN], tl.float32)
        c = tl.zeros([BN], tl.float32)
        delta = tl.zeros([BN, WP_S], tl.float32)
        acc_t = tl.zeros([BN, WP_S], tl.float32)
        first = split * tiles_per_split * BN
        last = tl.minimum(first + tiles_per_split * BN, N)
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            n_valid = n < N
            k_s = load_keys(keys_s, n, n_valid, ks_n, off_s, valid_s, W == WP_S).to(tl.float32)
            if MASK_T != 3:
                k_t = load_keys(keys_t, n, n_valid, kt_n, off_t, valid_t, HEADS_T * D_T == WP_T)
                scores_t = tl.sum(k_t.to(tl.float32) * q_t[None, :], 1)
            else:
                scores_t = tl.zeros([BN], tl.float32)
            t = masked_logits(scores_t, mask_t, n, n_valid, mt_n, mask_mul, MASK_T)
            s = tl.sum(k_s * q_s[None, :], 1)
            s = masked_logits(s, mask_s, n, n_valid, ms_n, mask_mul, MASK_S)
            if NEED_GRAD:
                tl.store(COEF + row * N + n, s, mask=n_valid)
                tl.store(LOGITS_T + row * N + n, t, mask=n_valid)
            new_s = tl.maximum(m_s, s)
            new_t = tl.maximum(m_t, t)
            a_s = tl.exp2(m_s - new_s)
            a_t = tl.exp2(m_t - new_t)
            e_s = tl.exp2(s - new_s)
            e_t = tl.exp2(t - new_t)
            c = rescaled(c, l_t, m_s - new_s, m_t - new_t, a_t, KIND)
            if KIND == 0:
                c += e_t * ((t - new_t) - (s - new_s))
            else:
                c -= e_t * (s - new_s)
            l_s = l_s * a_s + e_s
            l_t = l_t * a_t + e_t
            if NEED_GRAD:
                delta = delta * a_s[:, None] + acc_t * (a_s - a_t)[:, None] + k_s * (e_s - e_t)[:, None]
                acc_t = acc_t * a_t[:, None] + k_s * e_t[:, None]
            m_s = new_s
            m_t = new_t
        top_s = tl.max(m_s, 0)
        top_t = tl.max(m_t, 0)
        a_s = tl.exp2(m_s - top_s)
        a_t = tl.exp2(m_t - top_t)
        stats = STATS + (row * num_splits + split) * 5
        tl.store(stats, top_s)
        tl.store(stats + 1, tl.sum(l_s * a_s, 0))
        tl.store(stats + 2, top_t)
        tl.store(stats + 3, tl.sum(l_t * a_t, 0))
        tl.store(stats + 4, tl.sum(rescaled(c, l_t, m_s - top_s, m_t - top_t, a_t, KIND), 0))
        if NEED_GRAD:
            w = tl.arange(0, WP_S)
            acc = ACC + (row * num_splits + split) * 2 * W + w
            tl.store(acc, tl.sum(delta * a_s[:, None] + acc_t * (a_s - a_t)[:, None], 0), mask=valid_s)
            tl.store(acc + W, tl.sum(acc_t * a_t[:, None], 0), mask=valid_s)


@triton.jit
def rescaled(c, l_t, drop_s, drop_t, a_t, KIND: tl.constexpr):
    """c = Σ e^{t−m_t}·Δ after the maxima grew: drop = old − new maximum (≤ 0), a_t = 2^drop_t, l_t the old sum.

    Δ is (t−m_t) − (s−m_s) for the forward KL and −(s−m_s) for cross-entropy.
    """
    shift = drop_t - drop_s if KIND == 0 else -drop_s
    return a_t * (c + l_t * shift)


@triton.jit
def _row_kl_merge_kernel(
    STATS,  # [B, Ho, M, S, 5]
    ACC,  # [B, Ho, M, S, 2, W]
    LOGITS_T,  # [B, Ho, M, N]
    COEF,  # [B, Ho, M, N]: s in, coefficients out
    LOSS,  # [B, Ho, M]
    DQ,  # [B, H, M, D]
    dq_mul,
    N,
    M,
    num_splits,
    HEADS_S: tl.constexpr,
    D_S: tl.constexpr,
    WP_S: tl.constexpr,
    SP: tl.constexpr,
    KIND: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    W: tl.constexpr = HEADS_S * D_S
    split = tl.arange(0, SP)
    exists = split < num_splits
    stats = STATS + (row * num_splits + split) * 5
    m_s = tl.load(stats, mask=exists, other=HIDDEN)
    l_s = tl.load(stats + 1, mask=exists, other=0.0)
    m_t = tl.load(stats + 2, mask=exists, other=HIDDEN)
    l_t = tl.load(stats + 3, mask=exists, other=0.0)
    c = tl.load(stats + 4, mask=exists, other=0.0)
    top_s = tl.max(m_s, 0)
    top_t = tl.max(m_t, 0)
    a_s = tl.exp2(m_s - top_s)
    a_t = tl.exp2(m_t - top_t)
    c = tl.sum(rescaled(c, l_t, m_s - top_s, m_t - top_t, a_t, KIND), 0)
    l_s = tl.sum(l_s * a_s, 0)
    l_t = tl.sum(l_t * a_t, 0)
    dead = row_is_dead(top_s, l_s, top_t, l_t)
    if block == 0:
        loss = c / l_t + tl.log2(l_s)
        if KIND == 0:
            loss -= tl.log2(l_t)
        loss = tl.where(loss > IMPOSSIBLE, float("inf"), loss * LN2)
        tl.store(LOSS + row, tl.where(dead, 0.0, loss))
    if NEED_GRAD:
        n = block * BN + tl.arange(0, BN)
        s = tl.load(COEF + row * N + n, mask=n < N, other=HIDDEN)
        t = tl.load(LOGITS_T + row * N + n, mask=n < N, other=HIDDEN)
        coef = tl.exp2(s - top_s) / l_s - tl.exp2(t - top_t) / l_t
        tl.store(COEF + row * N + n, tl.where(dead, 0.0, coef), mask=n < N)
        if block == 0:
            w = tl.arange(0, WP_S)
            delta = tl.zeros([WP_S], tl.float32)
            acc_t = tl.zeros([WP_S], tl.float32)
            for i in range(num_splits):
                one = STATS + (row * num_splits + i) * 5
                f_s = tl.exp2(tl.load(one) - top_s)
                f_t = tl.exp2(tl.load(one + 2) - top_t)
                acc = ACC + (row * num_splits + i) * 2 * W + w
                part = tl.load(acc + W, mask=w < W, other=0.0)
                delta += f_s * tl.load(acc, mask=w < W, other=0.0) + (f_s - f_t) * part
                acc_t += f_t * part
            dq = delta / l_s + acc_t * ((l_t - l_s) / (l_s * l_t))
            head = (row // M) * HEADS_S + w // D_S
            dq = tl.where(dead, 0.0, dq * dq_mul)
            tl.store(DQ + (head * M + row % M) * D_S + w % D_S, dq, mask=w < W)


def fits_whole(num_keys: int, width_s: int, width_t: int) -> bool:
    """Whether a row is handled whole, and with it whether every divergence is covered."""
    return launch.padded(num_keys) * launch.padded(max(width_s, width_t)) <= WHOLE_TILE


def _warps(elements: int) -> int:
    return 8 if elements > 4096 else 4


def row_kl_fwd(
    student_query: Tensor,
    student_key: Tensor,
    student_mask: Tensor | None,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    teacher_mask: Tensor | None,
    teacher_probs: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    temperature: float,
    wide: bool,
    divergence: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row loss [B, Ho, M], coefficients [B, Ho, M, N] and unit dq [B, H, M, D], all fp32 (the last two empty without grad).

    Masks and probabilities are [B, Ho, M, N] views. Shapes and dtypes are the caller's responsibility.
    """
    B, H, M, D = student_query.shape
    N = student_key.shape[2]
    HO, heads = (1, H) if wide else (H, 1)
    WP = launch.padded(heads * D)
    new = student_query.new_empty
    loss = new((B, HO, M), dtype=torch.float32)
    coef = new((B, HO, M, N) if need_grad else (0,), dtype=torch.float32)
    dq = new((B, H, M, D) if need_grad else (0,), dtype=torch.float32)
    if loss.numel() == 0:
        return loss, coef, dq

    mask_s, kind_s, strides_s = launch.mask_argument(student_mask, loss)
    if teacher_probs is not None:
        mask_t, kind_t, strides_t = teacher_probs, launch.MASK_PROBS, teacher_probs.stride()
        query_t, key_t, heads_t, D_t, WP_t = student_query, student_key, 1, 1, 16
    else:
        assert teacher_query is not None and teacher_key is not None
        mask_t, kind_t, strides_t = launch.mask_argument(teacher_mask, loss)
        query_t, key_t = teacher_query, teacher_key
        heads_t, D_t = (teacher_query.shape[1] if wide else 1), teacher_query.shape[3]
        WP_t = launch.padded(heads_t * D_t)

    whole = fits_whole(N, WP, WP_t)
    kind = launch.DIVERGENCES[divergence]
    rows = B * HO * M
    if whole:
        BN, splits, tiles = launch.padded(N), 1, 1
        logits_t = stats = acc = loss
    else:
        assert divergence in ONE_SWEEP, divergence
        BN = max(SPLIT_TILE.get(max(WP, WP_t), SPLIT_TILE_DEFAULT) // max(WP, WP_t), 1)
        splits, tiles = _split(triton.cdiv(N, BN), rows, launch.num_processors(student_query.device))
        logits_t = torch.empty_like(coef)
        stats = new((rows, splits, 5), dtype=torch.float32)
        acc = new((rows, splits, 2, heads * D) if need_grad else (0,), dtype=torch.float32)
    with launch.on_device(student_query):
        _row_kl_fwd_kernel[(rows, splits)](
            student_query, student_key, mask_s, query_t, key_t, mask_t, loss, coef, dq, logits_t, stats, acc,
            student_scale * launch.LOG2E / temperature, teacher_scale * launch.LOG2E / temperature,
            launch.LOG2E / temperature, student_scale / temperature,
            N, M, HO, splits, tiles,
            *student_query.stride(), *student_key.stride(), *strides_s,
            *query_t.stride(), *key_t.stride(), *strides_t,
            HEADS_S=heads, D_S=D, WP_S=WP, HEADS_T=heads_t, D_T=D_t, WP_T=WP_t, MASK_S=kind_s, MASK_T=kind_t,
            KIND=kind, WHOLE=whole, NEED_GRAD=need_grad, BN=BN, num_warps=_warps(BN * max(WP, WP_t)), **launch.OPTIONS,
        )  # fmt: skip
        if not whole:
            block = 1024
            _row_kl_merge_kernel[(rows, triton.cdiv(N, block) if need_grad else 1)](
                stats, acc, logits_t, coef, loss, dq, student_scale / temperature, N, M, splits,
                HEADS_S=heads, D_S=D, WP_S=WP, SP=launch.padded(splits), KIND=kind, NEED_GRAD=need_grad, BN=block,
                num_warps=4, **launch.OPTIONS,
            )  # fmt: skip
    return loss, coef, dq


def _split(tiles: int, rows: int, processors: int) -> tuple[int, int]:
    """(splits, tiles a split): enough programs for four a processor, never less than two tiles each."""
    splits = max(1, min(triton.cdiv(4 * processors, rows), tiles // 2))
    per_split = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, per_split), per_split
