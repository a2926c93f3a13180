"""Logits of a few query rows, K read once; and the way back from their gradient.

    z_mj = (scale·q_m·k_j + mask_mj) / T           (−inf where the key is hidden)
    backward, with upstream u = ∂L/∂z:   dq_m = (scale/T)·Σ_j u_mj k_j,   dk_j = (scale/T)·Σ_m u_mj q_m,   dmask = u/T

The first and last launches of everything that needs finished rows: attention_rows, mean/max/min merging, and the divergences
whose coefficients are no sums of exponentials. ``wide`` sums the heads' scores (log-sum merging is one wide head).

dk and dmask are what backward.py writes, with u for the coefficients; dq reads K a second time, once for up to 16 rows: it is a product of
all rows' u with a tile of keys, on the matrix units. 16-bit keys are exact in the tf32 of those units; u is cut in two parts that are
(8 bits, and the rest), so that its rounding is 2⁻¹⁸ where that of one part would be 2⁻¹⁰. fp32 keys take IEEE products.
Any strides; fp16, bf16, fp32; fp32 accumulation. Limits: W ≤ 2048.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import language, launch
from attnkd_kernels.language import (
    at_head,
    hidden,
    load_keys,
    load_query,
    row_logits,
)
from attnkd_kernels.row.backward import row_kl_bwd

TILE = 8192  # elements of a K tile, forward
DQ_TILE, DQ_KEYS = 4096, 128  # and in the dq sweep, of at most so many keys
DQ_ROWS = 16  # rows of a program there: the fewest that a product can have
DQ_COLUMNS = 128  # dims of a program there, at most
WARPS = 4


@triton.jit
def _row_logits_fwd_kernel(
    Z,  # [B, Ho, M, N], nats
    N,
    M,
    HO,
    side,  # Side in nats: query [B, H, M, D], key [B, H, N, D], mask [B, Ho, M, N]
    SPEC: tl.constexpr,  # HeadSpec of the side
    BN: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    h = group % HO
    b = group // HO
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = at_head(side.mask, b, h)
    k = load_keys(side.key, b, h, n, N, SPEC).to(tl.float32)
    query = side.query  # Triton 3.6 loses a stride of 1 that a loop takes out of a nested tuple
    for m in range(M):
        q = load_query(query, b, h, m, side.factor, SPEC)
        z = row_logits(mask, side.bias, q, k, m, n, N, SPEC)
        tl.store(Z + (group * M + m) * N + n, tl.where(hidden(z), -float("inf"), z), mask=n < N)


@triton.jit
def _row_logits_dq_kernel(
    U,  # [B, Ho, M, N] gradient of the logits, contiguous fp32
    DQ,  # [B, H, M, D], contiguous
    dq_mul,  # scale/T
    N,
    M,
    HO,
    K,  # Operand [B, H, N, D]
    SPEC: tl.constexpr,  # HeadSpec of the side
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # dims of the (wide) head
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    keys = at_head(K, group // HO, group % HO)
    dims = (w // SPEC.DIM).to(tl.int64) * K.head + (w % SPEC.DIM) * K.column
    rows = U + (group * M + m)[:, None] * N
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        exists = (n < N)[:, None]
        if SPEC.WIDTH % COLUMNS != 0:
            exists = exists & (w < SPEC.WIDTH)[None, :]
        k = tl.load(keys.pointer + n.to(tl.int64)[:, None] * keys.row + dims[None, :], mask=exists, other=0.0)
        u = tl.load(rows + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        if K.pointer.dtype.element_ty == tl.float32 or tl.target_info.is_hip():
            acc = tl.dot(u, k.to(tl.float32), acc, input_precision="ieee")
        else:
            first = u.to(tl.bfloat16).to(tl.float32)
            k = k.to(tl.float32)
            acc = tl.dot(first, k, acc, input_precision="tf32")
            acc = tl.dot(u - first, k, acc, input_precision="tf32")
    to = ((group * SPEC.HEADS + w // SPEC.DIM)[None, :] * M + m[:, None]) * SPEC.DIM + (w % SPEC.DIM)[None, :]
    tl.store(DQ + to, (acc * dq_mul).to(DQ.dtype.element_ty), mask=(m < M)[:, None] & (w < SPEC.WIDTH)[None, :])


def row_logits_fwd(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float, wide: bool
) -> Tensor:
    """Logits [B, Ho, M, N] in fp32; ``mask`` is a [B, Ho, M, N] view or None."""
    B, H, M, _ = query.shape
    N = key.shape[2]
    HO = 1 if wide else H
    logits = torch.empty((B, HO, M, N), dtype=torch.float32, device=query.device)
    if logits.numel() == 0:
        return logits
    side, SPEC = launch.row_side(query, key, mask, scale, temperature, wide, unit=1.0)
    BN = min(TILE // SPEC.PADDED.value, launch.padded(N))
    grid = B * HO, launch.cdiv(N, BN)
    launch.run(_row_logits_fwd_kernel, grid, logits, N, M, HO, side, SPEC=SPEC, BN=BN, num_warps=WARPS)
    return logits


def row_logits_bwd(
    grad: Tensor, query: Tensor, key: Tensor, scale: float, temperature: float, wide: bool,
    need_dq: bool, need_dk: bool, need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, H, M, D], dk [B, H, N, D] and dmask [B, Ho, M, N] from ``grad`` [B, Ho, M, N]; empty where not needed."""
    B, H, M, D = query.shape
    N = key.shape[2]
    HO = 1 if wide else H
    grad = grad.contiguous()
    _, dk, dmask = row_kl_bwd(None, grad, grad, query, key, scale, temperature, wide, False, need_dk, need_dmask)
    dq = torch.empty((B, H, M, D) if need_dq else (0,), dtype=query.dtype, device=grad.device)
    if dq.numel():
        SPEC = launch.head_spec(H if wide else 1, D, language.NO_MASK.value)
        columns = min(SPEC.PADDED.value, DQ_COLUMNS)
        BN = min(DQ_TILE // columns, DQ_KEYS, launch.padded(N))
        launch.run(
            _row_logits_dq_kernel, (B * HO, launch.cdiv(SPEC.WIDTH.value, columns), launch.cdiv(M, DQ_ROWS)),
            grad, dq, scale / temperature, N, M, HO, launch.operand(key),
            SPEC=SPEC, ROWS=DQ_ROWS, COLUMNS=columns, BN=BN, num_warps=WARPS, num_stages=3,
        )  # fmt: skip
    return dq, dk, dmask
