"""Divergence of a few attention rows (the CLS row), each K read once, with the gradients that need K.

    z_j = (scale·q·k_j + mask_j) / T,   p = softmax(z),   loss = Σ_j p_t (log p_t − log p_s)   (or another divergence)
    c_j = ∂loss/∂z_s,j  (= p_s,j − p_t,j for the KL),   unit dq = (scale/T)·Σ_j c_j k_j

The forward leaves c (fp32, 4 bytes a key against 2·D for K) and the unit dq while K_s is on chip, so the backward
(backward.py) reads no K. A head may be all heads as one wide head (``wide``: log-sum merging). Two forms:

* whole (this file): a head's keys fit one tile. Any divergence; one launch. One program handles all query rows of a head, whose
  keys it holds.
* split (kl_split.py): the keys of a row are cut in ranges. Forward KL and cross-entropy only, since the other coefficients are no
  sums of e^{z_s} and e^{z_t} (see merge.py for those); two launches. Several rows would read the keys once each, so they go to merge.py
  too, up to the keys that it takes without spilling.

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
from attnkd_kernels.language import NO_MASK, at_head, dim_exists, load_keys, load_query, query_elements, row_logits
from attnkd_kernels.row.kl_split import row_kl_split

ONE_SWEEP = ("forward_kl", "cross_entropy")
MAX_WIDTH = 2048
WHOLE_TILE = 65536  # bytes of a K tile up to which a row can be handled whole: 512 keys of 64 dims in 16 bits
SHARED_PROCESSOR = 16384  # elements of a K tile up to which a processor holds two programs
WAVES = 4  # programs a processor gets, up to which one launch of lone programs beats two launches


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
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    h = group % HO
    b = group // HO
    mask_s = at_head(student.mask, b, h)
    mask_t = at_head(teacher.mask, b, h)
    query_s, query_t = (
        student.query,
        teacher.query,
    )  # Triton 3.6 loses a stride of 1 that a loop takes out of a nested tuple
    n = tl.arange(0, BN)
    k_s = load_keys(student.key, b, h, n, N, S)
    k_t = load_keys(teacher.key, b, h, n, N, T)  # both tiles are asked for before the first is used
    for m in range(M):
        row = group * M + m
        q_t = load_query(query_t, b, h, m, teacher.factor, T)
        q_s = load_query(query_s, b, h, m, student.factor, S)
        t = row_logits(mask_t, teacher.bias, q_t, k_t, m, n, N, T)
        s = row_logits(mask_s, student.bias, q_s, k_s, m, n, N, S)
        loss, c = row_divergence(s, t, S.MASK != NO_MASK, DIVERGENCE)
        tl.store(LOSS + row, loss)
        if COEF is not None:
            tl.store(COEF + row * N + n, c, mask=n < N)
            unit_dq = tl.sum(k_s.to(tl.float32) * c[:, None], 0) * dq_mul
            tl.store(UNIT_DQ + query_elements(group, m, M, S), unit_dq, mask=dim_exists(S))


def fits_whole(num_keys: int, *keys: tuple[int, int]) -> bool:
    """Whether a row is handled whole, and with it whether every divergence is covered.

    Args:
        keys: width and bytes of an element of the keys of each side that has any.
    """
    widest, largest = (max(sizes) for sizes in zip(*keys, strict=True))
    return launch.padded(num_keys) * launch.padded(widest) * largest <= WHOLE_TILE


def _warps(elements: int) -> int:
    return 4 if elements <= 4096 else 8 if elements <= 16384 else 16


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
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row loss [B, Ho, M], coefficients [B, Ho, M, N] and unit dq [B, H, M, D], all fp32 (the last two empty without grad).

    The unit dq is ``factor`` times that of the loss: a reduction's divisor costs nothing here. Masks and probabilities are [B, Ho, M, N] views. Shapes and dtypes are the caller's responsibility.
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
    keys = [(S.WIDTH.value, student_key.element_size())]
    if teacher_key is not None:
        keys.append((T.WIDTH.value, teacher_key.element_size()))
    c_out, unit_dq_out = (coef, unit_dq) if need_grad else (None, None)
    dq_mul = factor * student_scale / temperature
    BN = launch.padded(N)
    elements = BN * max(S.PADDED.value, T.PADDED.value)
    lone = M == 1 and elements > SHARED_PROCESSOR and B * HO > WAVES * launch.num_processors(loss.device)
    if not fits_whole(N, *keys) or (lone and divergence in ONE_SWEEP):
        assert divergence in ONE_SWEEP, divergence
        row_kl_split(student, teacher, loss, c_out, unit_dq_out, dq_mul, N, S, T, divergence)
        return loss, coef, unit_dq
    launch.run(
        _row_kl_fwd_kernel, (B * HO,),
        loss, c_out, unit_dq_out, dq_mul, N, M, HO, student, teacher,
        S=S, T=T, DIVERGENCE=divergence, BN=BN, num_warps=_warps(elements),
    )  # fmt: skip
    return loss, coef, unit_dq
