"""Logits of a few query rows, K read once; and the way back from their gradient.

    z_mj = (scale·q_m·k_j + mask_mj) / T           (−inf where the key is hidden)
    backward, with upstream u = ∂L/∂z:   dq_m = (scale/T)·Σ_j u_mj k_j,   dk_j = (scale/T)·Σ_m u_mj q_m,   dmask = u/T

The first and last launches of everything that needs finished rows: attention_rows, mean/max/min merging, and the divergences
whose coefficients are no sums of exponentials. ``wide`` sums the heads' scores (log-sum merging is one wide head).

dk and dmask are what backward.py writes, with u for the coefficients; dq reads K a second time.
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
    dim_exists,
    hidden,
    load_keys,
    load_query,
    query_elements,
    row_logits,
)
from attnkd_kernels.row.backward import row_kl_bwd

TILE = 8192  # elements of a K tile, forward
DQ_TILE = 2048  # and in the dq sweep, which holds an accumulator of that size
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
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    group = row // M
    h = group % HO
    b = group // HO
    acc = tl.zeros([BN, SPEC.PADDED], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        u = tl.load(U + row * N + n, mask=n < N, other=0.0)
        acc += load_keys(K, b, h, n, N, SPEC).to(tl.float32) * u[:, None]
    dq = tl.sum(acc, 0) * dq_mul
    tl.store(DQ + query_elements(group, m, M, SPEC), dq.to(DQ.dtype.element_ty), mask=dim_exists(SPEC))


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
    one = torch.ones((), dtype=torch.float32, device=grad.device).expand(B, HO, M)
    _, dk, dmask = row_kl_bwd(one, grad, grad, query, key, scale, temperature, wide, False, need_dk, need_dmask)
    dq = torch.empty((B, H, M, D) if need_dq else (0,), dtype=query.dtype, device=grad.device)
    if dq.numel():
        SPEC = launch.head_spec(H if wide else 1, D, language.NO_MASK.value)
        BN = max(min(DQ_TILE // SPEC.PADDED.value, launch.padded(N)), 1)
        launch.run(
            _row_logits_dq_kernel, (B * HO * M,),
            grad, dq, scale / temperature, N, M, HO, launch.operand(key), SPEC=SPEC, BN=BN, num_warps=WARPS,
        )  # fmt: skip
    return dq, dk, dmask
