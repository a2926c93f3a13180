"""The way back from a few query rows' coefficients, without reading a key.

    dk_j = (scale/T) · Σ_m g_m c_mj q_m,   dq_m = g_m · unit dq_m,   dmask_mj = g_m c_mj / T

c are the coefficients ∂loss/∂z that the forward left (kl.py; or a gradient of logits, with g = 1: logits.py), g the upstream
gradient of each row. dk is a rank-M outer product, so all it takes are rows: one launch writes dk once and reads 1/D of its size.
With ADD it adds to the gradients that are there: the attention's own, of which dk is then read and written once.

Any strides; fp16, bf16, fp32 outputs from fp32 coefficients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import language, launch
from attnkd_kernels.language import Operand, at_head, dim_exists, head_dims, load_query, query_elements

TILE = 8192  # elements of a dk tile
WARPS = 4


@triton.jit
def _row_kl_bwd_kernel(
    COEF,  # [B, Ho, M, N]
    UNIT_DQ,  # [B, H, M, D]
    DMASK,  # [B, Ho, M, N]; None where not needed
    dk_mul,  # scale/T
    mask_mul,  # 1/T
    N,
    M,
    HO,
    G,  # Operand [B, Ho, M, 1]: upstream gradient; None for 1
    Q,  # Operand [B, H, M, D]
    DQ,  # Operand [B, H, M, D]; None where not needed
    DK,  # Operand [B, H, N, D]; None where not needed
    SPEC: tl.constexpr,  # HeadSpec of the student
    BN: tl.constexpr,
    ADD: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    block = tl.program_id(1)
    h = group % HO
    b = group // HO
    n = block * BN + tl.arange(0, BN)
    dk = tl.zeros([BN, SPEC.PADDED], tl.float32)
    for m in range(M):
        g = 1.0
        if G is not None:
            g_rows = at_head(G, b, h)
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
                exists = dim_exists(SPEC)
                dq = tl.load(UNIT_DQ + query_elements(group, m, M, SPEC), mask=exists, other=0.0) * g
                to = at_head(DQ, b, h).pointer + m * DQ.row + head_dims(DQ, SPEC)
                if ADD:
                    dq += tl.load(to, mask=exists, other=0.0).to(tl.float32)
                tl.store(to, dq.to(DQ.pointer.dtype.element_ty), mask=exists)
    if DK is not None:
        out = at_head(DK, b, h)
        pointers = out.pointer + n.to(tl.int64)[:, None] * out.row + head_dims(out, SPEC)[None, :]
        exists = (n < N)[:, None]
        if SPEC.WIDTH != SPEC.PADDED:
            exists = exists & dim_exists(SPEC)[None, :]
        if ADD:
            dk += tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
        tl.store(pointers, dk.to(out.pointer.dtype.element_ty), mask=exists)


def row_kl_bwd(
    grad: Tensor | None,
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

    ``grad`` is [B, Ho, M] or, the same for all rows, []; None is 1.
    ``student_key`` lends its shape, dtype and layout only: no key is read.
    """
    B, H, M, D = student_query.shape
    N = student_key.shape[2]
    empty = coef.new_empty(0)
    dq = torch.empty((B, H, M, D), dtype=student_query.dtype, device=coef.device) if need_dq else empty
    dk = torch.empty_like(student_key) if need_dk else empty
    dmask = torch.empty_like(coef) if need_dmask else empty
    if B * M == 0:
        return dq, dk.zero_(), dmask
    given = grad, coef, unit_dq, student_query, student_scale, temperature, wide
    _backward(*given, dq if need_dq else None, dk if need_dk else None, dmask if need_dmask else None, N, add=False)
    return dq, dk, dmask


def row_kl_add(
    dq: Tensor,
    dk: Tensor,
    grad: Tensor,
    coef: Tensor,
    unit_dq: Tensor,
    student_query: Tensor,
    student_scale: float,
    temperature: float,
    wide: bool,
) -> None:
    """Adds the gradients of ``row_kl_bwd`` to ``dq`` [B, H, M, D] and ``dk`` [B, H, N, D], in place, any strides."""
    if dq.numel():
        _backward(
            grad, coef, unit_dq, student_query, student_scale, temperature, wide, dq, dk, None, dk.shape[2], add=True
        )


def _backward(
    grad: Tensor | None,
    coef: Tensor,
    unit_dq: Tensor,
    query: Tensor,
    scale: float,
    temperature: float,
    wide: bool,
    dq: Tensor | None,
    dk: Tensor | None,
    dmask: Tensor | None,
    num_keys: int,
    add: bool,
) -> None:
    B, H, M, D = query.shape
    HO = 1 if wide else H
    SPEC = launch.head_spec(H if wide else 1, D, language.NO_MASK.value)
    BN = max(TILE // SPEC.PADDED.value, 1) if dk is not None else 256
    launch.run(
        _row_kl_bwd_kernel, (B * HO, launch.cdiv(num_keys, BN)),
        coef, unit_dq, dmask, scale / temperature, 1.0 / temperature, num_keys, M, HO,
        None if grad is None else Operand(grad, *launch.row_strides(grad), 1), launch.operand(query),
        *(None if x is None else launch.operand(x) for x in (dq, dk)),
        SPEC=SPEC, BN=BN, ADD=add, num_warps=WARPS,
    )  # fmt: skip
