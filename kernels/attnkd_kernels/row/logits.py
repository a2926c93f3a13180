"""Logits of a few query rows, K read once; and the way back from their gradient.

    z_mj = (scale·q_m·k_j + mask_mj) / T           (−inf where the key is hidden)
    backward, with upstream u = ∂L/∂z:   dq_m = (scale/T)·Σ_j u_mj k_j,   dk_j = (scale/T)·Σ_m u_mj q_m,   dmask = u/T

The first and last launches of everything that needs finished rows: attention_rows, mean/max/min merging, and the divergences
whose coefficients are no sums of exponentials. ``wide`` sums the heads' scores (log-sum merging is one wide head).

dk is the rank-M outer product that row_kl's backward writes, so that kernel (row_kl_bwd) is used; dq reads K a second time.
Any strides; fp16, bf16, fp32; fp32 accumulation. Limits: W ≤ 2048.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.row.common import ALIVE, load_keys, masked_logits, wide_offsets
from attnkd_kernels.row.kl_bwd import row_kl_bwd

TILE = 8192  # elements of a K tile, forward
DQ_TILE = 2048  # and in the dq sweep, which holds an accumulator of that size
WARPS = 4


@triton.jit
def _row_logits_fwd_kernel(
    Q,  # [B, H, M, D]
    K,  # [B, H, N, D]
    MASK,  # [B, Ho, M, N]
    Z,  # [B, Ho, M, N], nats
    score_mul,  # scale/T
    mask_mul,  # 1/T
    N,
    M,
    HO,
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    m_b, m_h, m_m, m_n,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WP: tl.constexpr,
    MASK_KIND: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)  # b·Ho + h
    h = group % HO
    b = group // HO
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_valid = n < N
    k_off, w_valid = wide_offsets(k_h, k_d, HEADS, D, WP)
    q_off, _ = wide_offsets(q_h, q_d, HEADS, D, WP)
    k = load_keys(K + b * k_b + h * k_h, n, n_valid, k_n, k_off, w_valid, HEADS * D == WP).to(tl.float32)
    for m in range(M):
        q = tl.load(Q + b * q_b + h * q_h + m * q_m + q_off, mask=w_valid, other=0.0).to(tl.float32) * score_mul
        z = tl.sum(k * q[None, :], 1)
        z = masked_logits(z, MASK + b * m_b + h * m_h + m * m_m, n, n_valid, m_n, mask_mul, MASK_KIND)
        tl.store(Z + (group * M + m) * N + n, tl.where(z <= ALIVE, -float("inf"), z), mask=n_valid)


@triton.jit
def _row_logits_dq_kernel(
    U,  # [B, Ho, M, N] gradient of the logits, contiguous fp32
    K,  # [B, H, N, D]
    DQ,  # [B, H, M, D], contiguous
    dq_mul,  # scale/T
    N,
    M,
    HO,
    k_b, k_h, k_n, k_d,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (b·Ho + h)·M + m
    m = row % M
    group = row // M
    h = group % HO
    b = group // HO
    k_off, w_valid = wide_offsets(k_h, k_d, HEADS, D, WP)
    acc = tl.zeros([BN, WP], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        n_valid = n < N
        u = tl.load(U + row * N + n, mask=n_valid, other=0.0)
        k = load_keys(K + b * k_b + h * k_h, n, n_valid, k_n, k_off, w_valid, HEADS * D == WP)
        acc += k.to(tl.float32) * u[:, None]
    w = tl.arange(0, WP)
    dq = tl.sum(acc, 0) * dq_mul
    tl.store(DQ + ((group * HEADS + w // D) * M + m) * D + w % D, dq.to(DQ.dtype.element_ty), mask=w_valid)


def row_logits_fwd(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float, wide: bool
) -> Tensor:
    """Logits [B, Ho, M, N] in fp32; ``mask`` is a [B, Ho, M, N] view or None."""
    B, H, M, D = query.shape
    N = key.shape[2]
    HO, heads = (1, H) if wide else (H, 1)
    WP = launch.padded(heads * D)
    logits = torch.empty((B, HO, M, N), dtype=torch.float32, device=query.device)
    if logits.numel() == 0:
        return logits
    mask, kind, strides = launch.mask_argument(mask, logits)
    BN = min(TILE // WP, launch.padded(N))
    with launch.on_device(query):
        _row_logits_fwd_kernel[(B * HO, triton.cdiv(N, BN))](
            query, key, mask, logits, scale / temperature, 1.0 / temperature, N, M, HO,
            *query.stride(), *key.stride(), *strides,
            HEADS=heads, D=D, WP=WP, MASK_KIND=kind, BN=BN, num_warps=WARPS, **launch.OPTIONS,
        )  # fmt: skip
    return logits


def row_logits_bwd(
    grad: Tensor, query: Tensor, key: Tensor, scale: float, temperature: float, wide: bool,
    need_dq: bool, need_dk: bool, need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, H, M, D], dk [B, H, N, D] and dmask [B, Ho, M, N] from ``grad`` [B, Ho, M, N]; empty where not needed."""
    B, H, M, D = query.shape
    N = key.shape[2]
    HO, heads = (1, H) if wide else (H, 1)
    WP = launch.padded(heads * D)
    grad = grad.contiguous()
    one = torch.ones((), dtype=torch.float32, device=grad.device).expand(B, HO, M)
    _, dk, dmask = row_kl_bwd(one, grad, grad, query, key, scale, temperature, wide, False, need_dk, need_dmask)
    dq = torch.empty((B, H, M, D) if need_dq else (0,), dtype=query.dtype, device=grad.device)
    if dq.numel():
        BN = max(min(DQ_TILE // WP, launch.padded(N)), 1)
        with launch.on_device(query):
            _row_logits_dq_kernel[(B * HO * M,)](
                grad, key, dq, scale / temperature, N, M, HO, *key.stride(),
                HEADS=heads, D=D, WP=WP, BN=BN, num_warps=WARPS, **launch.OPTIONS,
            )  # fmt: skip
    return dq, dk, dmask
