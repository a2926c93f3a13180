"""Divergence of finished rows, heads merged by mean, max or min (or not at all), with the gradient of every head's logits.

    log p^h = z^h − lse^h,   a_j = log mean_h p_j^h   (or max_h, min_h of log p_j^h),   A = softmax(a)
    u_j = ∂loss(A_s, A_t)/∂a_j                      (row_common.row_divergence)
    r_j^h = ∂a_j/∂log p_j^h:   p_j^h / Σ_h p_j^h for the mean; 1/#ties at the max or min, else 0
    ∂loss/∂z_j^h = u_j r_j^h − p_j^h Σ_k u_k r_k^h

The rows are 1/D of K, so they are read twice (once for a, once for the gradients) and recomputed instead of stored. One
program holds one whole row of N keys and loops over the heads.

Logits are fp32 nats with −inf at hidden keys. Limits: N ≤ 65,536.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.launch import LOG2E
from attnkd_kernels.row.common import ALIVE, HIDDEN, log2_of_probs, row_divergence

MERGES = {None: 0, "mean": 1, "max": 2, "min": 3}
MAX_KEYS = 65536
KEYS_PER_WARP = 32
LOG2E_ = tl.constexpr(LOG2E)


@triton.jit
def _head_logits(Z, row, N, n, n_valid):
    """z [BN] of one head in units of log 2; HIDDEN where the key is hidden. ``row`` (int64) counts rows of N."""
    z = tl.load(Z + row * N + n, mask=n_valid, other=-float("inf")) * LOG2E_
    return tl.where(z <= ALIVE, HIDDEN, z)


@triton.jit
def _head_log_probs(Z, row, N, n, n_valid):
    """log2 p [BN] of one head; HIDDEN where the key is hidden."""
    z = _head_logits(Z, row, N, n, n_valid)
    top = tl.max(z, 0)
    log_p = z - top - tl.log2(tl.sum(tl.exp2(z - top), 0))
    return tl.where(z <= ALIVE, HIDDEN, log_p)


@triton.jit
def _visible_keys(log_p):
    """How many keys the row sees; NaN counts, so that it reaches the loss."""
    return tl.sum(((log_p <= ALIVE) == 0).to(tl.int32), 0)


@triton.jit
def _merged(Z, first_row, M, N, n, n_valid, HEADS: tl.constexpr, MERGE: tl.constexpr):
    """a [BN]: the merged row's logits in units of log 2; all hidden where some head sees no key.

    A key that a head hides has p^h = 0 there: hidden from the min, and from the mean and the max if all heads hide it.
    """
    if HEADS == 1:  # the softmax that follows normalises, and logit MSE wants the logits as they are
        a = _head_logits(Z, first_row, N, n, n_valid)
    else:
        a = _head_log_probs(Z, first_row, N, n, n_valid)
        seen = _visible_keys(a)
        for h in range(1, HEADS):
            log_p = _head_log_probs(Z, first_row + h * M, N, n, n_valid)
            seen = tl.minimum(seen, _visible_keys(log_p))
            if MERGE == 1:
                top = tl.maximum(a, log_p)
                a = top + tl.log2(tl.exp2(a - top) + tl.exp2(log_p - top))
            elif MERGE == 2:
                a = tl.maximum(a, log_p, propagate_nan=tl.PropagateNan.ALL)
            else:
                a = tl.minimum(a, log_p, propagate_nan=tl.PropagateNan.ALL)
        a = tl.where((a <= ALIVE) | (seen == 0), HIDDEN, a)
    return a


@triton.jit
def _row_merge_kernel(
    ZS,  # [B, Ho·Hs, M, N] student logits
    ZT,  # [B, Ho·Ht, M, N] teacher logits, or [B, Ho, M, N] probabilities
    LOSS,  # [B, Ho, M]
    U,  # [B, Ho·Hs, M, N] gradient of ZS
    N,
    M,
    HO,
    t_b, t_h, t_m, t_n,
    HEADS_S: tl.constexpr,
    HEADS_T: tl.constexpr,
    PROBS: tl.constexpr,
    MERGE: tl.constexpr,
    KIND: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    group = row // M
    n = tl.arange(0, BN)
    n_valid = n < N
    first_s = group * HEADS_S * M + m
    a_s = _merged(ZS, first_s, M, N, n, n_valid, HEADS_S, MERGE)
    if PROBS:
        p = tl.load(
            ZT + (group // HO) * t_b + (group % HO) * t_h + m * t_m + n.to(tl.int64) * t_n, mask=n_valid, other=0.0
        )
        a_t = log2_of_probs(p.to(tl.float32))
    else:
        a_t = _merged(ZT, group * HEADS_T * M + m, M, N, n, n_valid, HEADS_T, MERGE)
    loss, u = row_divergence(a_s, a_t, KIND)
    tl.store(LOSS + row, loss)
    if NEED_GRAD:
        if HEADS_S == 1:
            # One head: a is z up to a constant, so u is the gradient already.
            tl.store(U + first_s * N + n, u, mask=n_valid)
        else:
            ties = tl.zeros([BN], tl.float32)
            if MERGE != 1:
                for h in range(HEADS_S):
                    ties += (_head_log_probs(ZS, first_s + h * M, N, n, n_valid) == a_s).to(tl.float32)
            for h in range(HEADS_S):
                log_p = _head_log_probs(ZS, first_s + h * M, N, n, n_valid)
                if MERGE == 1:
                    share = tl.exp2(log_p - a_s)
                else:
                    share = tl.where(log_p == a_s, 1.0 / tl.maximum(ties, 1.0), 0.0)
                share = tl.where(a_s <= ALIVE, 0.0, share * u)
                p_h = tl.where(log_p <= ALIVE, 0.0, tl.exp2(log_p))
                tl.store(U + (first_s + h * M) * N + n, share - p_h * tl.sum(share, 0), mask=n_valid)


def row_merge(
    student_logits: Tensor, teacher_logits: Tensor | None, teacher_probs: Tensor | None, merge: str | None,
    divergence: str, need_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per-row loss [B, Ho, M] and the gradient of the student's logits [B, Hs, M, N] (empty without grad), fp32.

    Args:
        student_logits: [B, Hs, M, N] contiguous fp32.
        teacher_logits: [B, Ht, M, N] contiguous fp32, or None.
        teacher_probs: [B, Ho, M, N] any strides, or None.
    """
    B, HS, M, N = student_logits.shape
    assert N <= MAX_KEYS, N
    HO, heads_s = (HS, 1) if merge is None else (1, HS)
    teacher = teacher_logits if teacher_probs is None else teacher_probs
    assert teacher is not None
    heads_t = 1 if merge is None or teacher_probs is not None else teacher.shape[1]
    loss = torch.empty((B, HO, M), dtype=torch.float32, device=student_logits.device)
    grad = torch.empty_like(student_logits) if need_grad else student_logits.new_empty(0)
    if loss.numel():
        BN = launch.padded(N)
        with launch.on_device(student_logits):
            _row_merge_kernel[(B * HO * M,)](
                student_logits, teacher, loss, grad, N, M, HO, *teacher.stride(),
                HEADS_S=heads_s, HEADS_T=heads_t, PROBS=teacher_probs is not None, MERGE=MERGES[merge],
                KIND=launch.DIVERGENCES[divergence], NEED_GRAD=need_grad, BN=BN,
                num_warps=min(max(BN // KEYS_PER_WARP, 4), 16), **launch.OPTIONS,
            )  # fmt: skip
    return loss, grad
