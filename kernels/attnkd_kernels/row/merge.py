"""Divergence of finished rows, heads merged by mean, max or min (or not at all), with the gradient of every head's logits.

    log p^h = z^h − lse^h,   a_j = log mean_h p_j^h   (or max_h, min_h of log p_j^h),   A = softmax(a)
    u_j = ∂loss(A_s, A_t)/∂a_j                      (divergences.row_divergence)
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
from attnkd_kernels.divergences import row_divergence
from attnkd_kernels.language import HIDDEN, LOG2E, at_head, hidden, log2_of_probs, shown

MAX_KEYS = 65536
KEYS_IN_REGISTERS = 16384  # beyond, a row spills
KEYS_PER_WARP = 32


@triton.jit
def _row_merge_kernel(
    ZS,  # [B, Ho·Hs, M, N] student logits, contiguous
    LOSS,  # [B, Ho, M]
    U,  # [B, Ho·Hs, M, N] gradient of ZS; None where not needed
    N,
    M,
    HO,
    TEACHER,  # Operand: teacher logits [B, Ho·Ht, M, N], contiguous, or given rows [B, Ho, M, N]
    HEADS_S: tl.constexpr,
    HEADS_T: tl.constexpr,
    GIVEN: tl.constexpr,  # whether the teacher comes as given rows
    MERGE: tl.constexpr,  # "mean", "max" or "min"; None with one head
    DIVERGENCE: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    group = row // M
    n = tl.arange(0, BN)
    first_s = group * HEADS_S * M + m
    a_s = _merged(ZS, first_s, M, n, N, HEADS_S, MERGE)
    if GIVEN:
        rows = at_head(TEACHER, group // HO, group % HO)
        p = tl.load(rows.pointer + m * rows.row + n.to(tl.int64) * rows.column, mask=n < N, other=0.0)
        a_t = log2_of_probs(p.to(tl.float32))
    else:
        a_t = _merged(TEACHER.pointer, group * HEADS_T * M + m, M, n, N, HEADS_T, MERGE)
    loss, u = row_divergence(a_s, a_t, True, DIVERGENCE)
    tl.store(LOSS + row, loss)
    if U is not None:
        if HEADS_S == 1:
            # One head: a is z up to a constant, so u is the gradient already.
            tl.store(U + first_s * N + n, u, mask=n < N)
        else:
            ties = tl.zeros([BN], tl.float32)
            if MERGE != "mean":
                for h in range(HEADS_S):
                    ties += (_head_log_probs(ZS, first_s + h * M, n, N) == a_s).to(tl.float32)
            for h in range(HEADS_S):
                log_p = _head_log_probs(ZS, first_s + h * M, n, N)
                if MERGE == "mean":
                    share = tl.exp2(log_p - a_s)
                else:
                    share = tl.where(log_p == a_s, 1.0 / tl.maximum(ties, 1.0), 0.0)
                ur = tl.where(hidden(a_s), 0.0, share * u)
                p_h = tl.where(hidden(log_p), 0.0, tl.exp2(log_p))
                tl.store(U + (first_s + h * M) * N + n, ur - p_h * tl.sum(ur, 0), mask=n < N)


@triton.jit
def _merged(Z, first_row, M, n, N, HEADS: tl.constexpr, MERGE: tl.constexpr):
    """a [BN]: the merged row's logits in units of log 2; all hidden where some head sees no key.

    A key that a head hides has p^h = 0 there: hidden from the min, and from the mean and the max if all heads hide it.
    """
    if HEADS == 1:  # the softmax that follows normalises, and logit MSE wants the logits as they are
        a = _head_logits(Z, first_row, n, N)
    else:
        a = _head_log_probs(Z, first_row, n, N)
        seen = _visible_keys(a)
        for h in range(1, HEADS):
            log_p = _head_log_probs(Z, first_row + h * M, n, N)
            seen = tl.minimum(seen, _visible_keys(log_p))
            if MERGE == "mean":
                top = tl.maximum(a, log_p)
                a = top + tl.log2(tl.exp2(a - top) + tl.exp2(log_p - top))
            elif MERGE == "max":
                a = tl.maximum(a, log_p, propagate_nan=tl.PropagateNan.ALL)
            else:
                tl.static_assert(MERGE == "min")
                a = tl.minimum(a, log_p, propagate_nan=tl.PropagateNan.ALL)
        a = tl.where(hidden(a) | (seen == 0), HIDDEN, a)
    return a


@triton.jit
def _head_logits(Z, row, n, N):
    """z [BN] of one head in units of log 2; HIDDEN where the key is hidden. ``row`` (int64) counts rows of N."""
    z = tl.load(Z + row * N + n, mask=n < N, other=-float("inf")) * LOG2E
    return tl.where(hidden(z), HIDDEN, z)


@triton.jit
def _head_log_probs(Z, row, n, N):
    """log2 p [BN] of one head; HIDDEN where the key is hidden."""
    z = _head_logits(Z, row, n, N)
    top = tl.max(z, 0)
    log_p = z - top - tl.log2(tl.sum(tl.exp2(z - top), 0))
    return tl.where(hidden(z), HIDDEN, log_p)


@triton.jit
def _visible_keys(log_p):
    """How many keys the row sees; NaN counts, so that it reaches the loss."""
    return tl.sum(shown(log_p).to(tl.int32), 0)


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
    given = teacher_probs is not None
    teacher = teacher_probs if given else teacher_logits
    assert teacher is not None
    heads_t = 1 if merge is None or given else teacher.shape[1]
    loss = torch.empty((B, HO, M), dtype=torch.float32, device=student_logits.device)
    grad = torch.empty_like(student_logits) if need_grad else student_logits.new_empty(0)
    if loss.numel():
        BN = launch.padded(N)
        launch.run(
            _row_merge_kernel, (B * HO * M,),
            student_logits, loss, grad if need_grad else None, N, M, HO, launch.operand(teacher),
            HEADS_S=heads_s, HEADS_T=heads_t, GIVEN=given, MERGE=merge, DIVERGENCE=divergence, BN=BN,
            num_warps=min(max(BN // KEYS_PER_WARP, 4), 16),
        )  # fmt: skip
    return loss, grad
