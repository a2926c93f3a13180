"""The way back from a few query rows' coefficients, without reading a key.

    dk_j = (scale/T) · Σ_m g_m c_mj q_m,   dq_m = g_m · unit dq_m,   dmask_mj = g_m c_mj / T

c are the coefficients ∂loss/∂z that the forward left (row_kl, or row_merge with g = 1), g the upstream gradient of each row. dk is
a rank-M outer product, so all it takes are rows: one launch writes dk once and reads 1/D of its size.

Any strides; fp16, bf16, fp32 outputs from fp32 coefficients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.row.common import wide_offsets

TILE = 8192  # elements of a dk tile
WARPS = 4


@triton.jit
def _row_kl_bwd_kernel(
    G,  # [B, Ho, M] upstream gradient, any strides
    COEF,  # [B, Ho, M, N]
    UNIT_DQ,  # [B, H, M, D]
    Q,  # [B, H, M, D]
    DQ,  # [B, H, M, D], contiguous
    DK,  # [B, H, N, D]
    DMASK,  # [B, Ho, M, N]
    dk_mul,  # scale/T
    mask_mul,  # 1/T
    N,
    M,
    HO,
    g_b, g_h, g_m,
    q_b, q_h, q_m, q_d,
    dk_b, dk_h, dk_n, dk_d,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WP: tl.constexpr,
    NEED_DQ: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DMASK: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    block = tl.program_id(1)
    h = group % HO
    b = group // HO
    q_off, w_valid = wide_offsets(q_h, q_d, HEADS, D, WP)
    n = block * BN + tl.arange(0, BN)
    n_valid = n < N
    w = tl.arange(0, WP)
    dk = tl.zeros([BN, WP], tl.float32)
    for m in range(M):
        g = tl.load(G + b * g_b + h * g_h + m * g_m).to(tl.float32)
        row = group * M + m
        coef = tl.load(COEF + row * N + n, mask=n_valid, other=0.0) * g
        if NEED_DMASK:
            tl.store(DMASK + row * N + n, coef * mask_mul, mask=n_valid)
        if NEED_DK:
            q = tl.load(Q + b * q_b + h * q_h + m * q_m + q_off, mask=w_valid, other=0.0).to(tl.float32) * dk_mul
            dk += coef[:, None] * q[None, :]
        if NEED_DQ:
            if block == 0:
                index = ((group * HEADS + w // D) * M + m) * D + w % D
                unit = tl.load(UNIT_DQ + index, mask=w_valid, other=0.0)
                tl.store(DQ + index, (unit * g).to(DQ.dtype.element_ty), mask=w_valid)
    if NEED_DK:
        k_off, _ = wide_offsets(dk_h, dk_d, HEADS, D, WP)
        pointers = DK + b * dk_b + h * dk_h + n.to(tl.int64)[:, None] * dk_n + k_off[None, :]
        if HEADS * D == WP:
            tl.store(pointers, dk.to(DK.dtype.element_ty), mask=n_valid[:, None])
        else:
            tl.store(pointers, dk.to(DK.dtype.element_ty), mask=n_valid[:, None] & w_valid[None, :])


def row_kl_bwd(
    grad: Tensor,
    coef: Tensor,
    unit_dq: Tensor,
    student_query: Tensor,
    student_key: Tensor,
    student_scale: float,
    temperature: float,
    wide: bool,
    need_dq: bool,
    need_dk: bool,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, M, D], dk [B, H, N, D] in the input dtype and dmask [B, Ho, M, N] fp32; empty where not needed.

    ``student_key`` lends its shape, dtype and layout only: no key is read.
    """
    B, H, M, D = student_query.shape
    N = student_key.shape[2]
    HO, heads = (1, H) if wide else (H, 1)
    WP = launch.padded(heads * D)
    empty = grad.new_empty(0)
    dq = torch.empty((B, H, M, D), dtype=student_query.dtype, device=grad.device) if need_dq else empty
    dk = torch.empty_like(student_key) if need_dk else empty
    dmask = torch.empty_like(coef) if need_dmask else empty
    if B * M == 0:
        return dq, dk.zero_(), dmask
    BN = max(TILE // WP, 1) if need_dk else 256
    with launch.on_device(student_query):
        _row_kl_bwd_kernel[(B * HO, triton.cdiv(N, BN))](
            grad, coef, unit_dq, student_query, dq, dk, dmask, student_scale / temperature, 1.0 / temperature, N, M, HO,
            *grad.stride(), *student_query.stride(), *(dk.stride() if need_dk else (0, 0, 0, 0)),
            HEADS=heads, D=D, WP=WP, NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DMASK=need_dmask, BN=BN, num_warps=WARPS, **launch.OPTIONS,
        )  # fmt: skip
    return dq, dk, dmask
