"""Divergence of a few attention rows (the CLS row), each K read once, with the gradients that need K.

    z_j = (scale·q·k_j + mask_j) / T,   p = softmax(z),   loss = Σ_j p_t (log p_t − log p_s)   (or another divergence)
    c_j = ∂loss/∂z_s,j  (= p_s,j − p_t,j for the KL),   unit dq = (scale/T)·Σ_j c_j k_j

The forward leaves c (fp32, 4 bytes a key against 2·D for K) and the unit dq while K_s is on chip, so the backward
(backward.py) reads no K. One program handles one query row of one head, or of all heads as one wide head (``wide``: log-sum
merging). Two forms:

* whole (this file): the row fits one tile. Any divergence; one launch.
* split (kl_split.py): the keys are cut in ranges. Forward KL and cross-entropy only, since the other coefficients are no sums
  of e^{z_s} and e^{z_t} (see merge.py for those); two launches.

Saved: c [B, Ho, M, N], unit dq [B, H, M, D], both fp32. Any strides; fp16, bf16, fp32; fp32 accumulation.
Limits: W = D (or H·D) ≤ 2048 for each side (a tile holds whole tokens).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.divergences import row_divergence
from attnkd_kernels.language import at_head, dim_exists, load_keys, load_query, query_elements, row_logits
from attnkd_kernels.row.kl_split import row_kl_split

ONE_SWEEP = ("forward_kl", "cross_entropy")
MAX_WIDTH = 2048
WHOLE_TILE = 16384  # elements of a K tile up to which a row is handled whole


@triton.jit
def _row_kl_fwd_kernel(
    LOSS,  # [B, Ho, M]
    COEF,  # [B, Ho, M, N]: c; None without a gradient
    UNIT_DQ,  # [B, H, M, D]; None without a gradient
    dq_mul,  # scale_s/T
    N,
    M,
    HO,
    student,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, Ho, M, N]
    teacher,  # Side: query [B, Ht, M, Dt], key [B, Ht, N, Dt], mask or given rows [B, Ho, M, N]
    S: tl.constexpr,  # HeadSpec of the student
    T: tl.constexpr,  # and of the teacher
    DIVERGENCE: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    h = (row // M) % HO
    b = row // M // HO
    # The order of the loads and addresses saves registers.
    q_s = load_query(student.query, b, h, m, student.factor, S)
    mask_s = at_head(student.mask, b, h)
    mask_t = at_head(teacher.mask, b, h)
    q_t = load_query(teacher.query, b, h, m, teacher.factor, T)
    n = tl.arange(0, BN)
    k_s = load_keys(student.key, b, h, n, N, S)
    k_t = load_keys(teacher.key, b, h, n, N, T)  # both tiles are asked for before the first is used
    t = row_logits(mask_t, teacher.bias, q_t, k_t, m, n, N, T)
    s = row_logits(mask_s, student.bias, q_s, k_s, m, n, N, S)
    loss, c = row_divergence(s, t, DIVERGENCE)
    tl.store(LOSS + row, loss)
    if COEF is not None:
        tl.store(COEF + row * N + n, c, mask=n < N)
        unit_dq = tl.sum(k_s.to(tl.float32) * c[:, None], 0) * dq_mul
        tl.store(UNIT_DQ + query_elements(b * HO + h, m, M, S), unit_dq, mask=dim_exists(S))


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
    HO = 1 if wide else H
    new = student_query.new_empty
    loss = new((B, HO, M), dtype=torch.float32)
    coef = new((B, HO, M, N) if need_grad else (0,), dtype=torch.float32)
    unit_dq = new((B, H, M, D) if need_grad else (0,), dtype=torch.float32)
    if loss.numel() == 0:
        return loss, coef, unit_dq

    student, S = launch.row_side(student_query, student_key, student_mask, student_scale, temperature, wide)
    if teacher_probs is not None:
        teacher, T = launch.given_rows(teacher_probs)
    else:
        assert teacher_query is not None and teacher_key is not None
        teacher, T = launch.row_side(teacher_query, teacher_key, teacher_mask, teacher_scale, temperature, wide)
    widest = max(S.PADDED.value, T.PADDED.value)
    c_out, unit_dq_out = (coef, unit_dq) if need_grad else (None, None)
    dq_mul = student_scale / temperature
    if not fits_whole(N, widest, widest):
        assert divergence in ONE_SWEEP, divergence
        row_kl_split(student, teacher, loss, c_out, unit_dq_out, dq_mul, N, S, T, divergence)
        return loss, coef, unit_dq
    BN = launch.padded(N)
    launch.run(
        _row_kl_fwd_kernel, (loss.numel(),),
        loss, c_out, unit_dq_out, dq_mul, N, M, HO, student, teacher,
        S=S, T=T, DIVERGENCE=divergence, BN=BN, num_warps=_warps(BN * widest),
    )  # fmt: skip
    return loss, coef, unit_dq
