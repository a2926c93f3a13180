"""The way back from a few query rows' coefficients, without reading a key.

    dk_j = (scale/T) · Σ_m g_m c_mj q_m,   dq_m = g_m · unit dq_m,   dmask_mj = g_m c_mj / T

c are the coefficients ∂loss/∂z that the forward left (kl.py; or a gradient of logits, with g = 1: logits.py), g the upstream
gradient of each row. dk is a rank-M outer product, so all it takes are rows: one launch writes dk once and reads 1/D of its size.

Any strides; fp16, bf16, fp32 outputs from fp32 coefficients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import language, launch
from attnkd_kernels.language import at_head, dim_exists, head_dims, load_query, query_elements

TILE = 8192  # elements of a dk tile
WARPS = 4


@triton.jit
def _row_kl_bwd_kernel(
    COEF,  # [B, Ho, M, N]
    UNIT_DQ,  # [B, H, M, D]
    DQ,  # [B, H, M, D], contiguous; None where not needed
    DMASK,  # [B, Ho, M, N]; None where not needed
    dk_mul,  # scale/T
    mask_mul,  # 1/T
    N,
    M,
    HO,
    G,  # Operand [B, Ho, M, 1]: upstream gradient
    Q,  # Operand [B, H, M, D]
    DK,  # Operand [B, H, N, D]; None where not needed
    SPEC: tl.constexpr,  # HeadSpec of the student
    BN: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    block = tl.program_id(1)
    h = group % HO
    b = group // HO
    g_rows = at_head(G, b, h)
    n = block * BN + tl.arange(0, BN)
    dk = tl.zeros([BN, SPEC.PADDED], tl.float32)
    for m in range(M):
        g = tl.load(g_rows.pointer + m * g_rows.row).to(tl.float32)
        at = (group * M + m) * N + n
        gc = tl.load(COEF + at, mask=n < N, other=0.0) * g
        if DMASK is not None:
            tl.store(DMASK + at, gc * mask_mul, mask=n < N)
        if DK is not None:
            q = load_query(Q, b, h, m, dk_mul, SPEC)
            dk += gc[:, None] * q[None, :]
        if DQ is not None:
            if block == 0:
                element = query_elements(group, m, M, SPEC)
                unit_dq = tl.load(UNIT_DQ + element, mask=dim_exists(SPEC), other=0.0)
                tl.store(DQ + element, (unit_dq * g).to(DQ.dtype.element_ty), mask=dim_exists(SPEC))
    if DK is not None:
        out = at_head(DK, b, h)
        pointers = out.pointer + n.to(tl.int64)[:, None] * out.row + head_dims(out, SPEC)[None, :]
        dk = dk.to(out.pointer.dtype.element_ty)
        if SPEC.WIDTH == SPEC.PADDED:
            tl.store(pointers, dk, mask=(n < N)[:, None])
        else:
            tl.store(pointers, dk, mask=(n < N)[:, None] & dim_exists(SPEC)[None, :])


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
    HO = 1 if wide else H
    SPEC = launch.head_spec(H if wide else 1, D, language.NO_MASK.value)
    empty = grad.new_empty(0)
    dq = torch.empty((B, H, M, D), dtype=student_query.dtype, device=grad.device) if need_dq else empty
    dk = torch.empty_like(student_key) if need_dk else empty
    dmask = torch.empty_like(coef) if need_dmask else empty
    if B * M == 0:
        return dq, dk.zero_(), dmask
    BN = max(TILE // SPEC.PADDED.value, 1) if need_dk else 256
    launch.run(
        _row_kl_bwd_kernel, (B * HO, launch.cdiv(N, BN)),
        coef, unit_dq, dq if need_dq else None, dmask if need_dmask else None,
        student_scale / temperature, 1.0 / temperature, N, M, HO,
        launch.operand(grad.unsqueeze(-1)), launch.operand(student_query), launch.operand(dk) if need_dk else None,
        SPEC=SPEC, BN=BN, num_warps=WARPS,
    )  # fmt: skip
    return dq, dk, dmask
