"""Plain attention kernels, only to be compiled: what a (query, key) pair costs where nothing but attention is computed.

Textbook forms with whole tiles and no masks: the counts beside which those of the whole-map kernels stand in docs/kernels/map.md.
D is 64, 16-bit inputs. Nothing launches them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from benchmarks.calls import Call


@triton.jit
def _tile(pointer, row0, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] of a contiguous head."""
    return tl.load(pointer + (row0 + tl.arange(0, ROWS))[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def _plain_forward_kernel(Q, K, V, OUT, LSE, N, factor, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out = softmax(q·k) v, online; factor holds log2(e)."""
    m0 = tl.program_id(0) * BM
    q = _tile(Q, m0, BM, D)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, N, BN):
        z = tl.dot(q, tl.trans(_tile(K, n0, BN, D)))
        new = tl.maximum(top, tl.max(z, 1) * factor)
        p = tl.exp2(z * factor - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), _tile(V, n0, BN, D), acc * shrink[:, None])
        top = new
    m = m0 + tl.arange(0, BM)
    tl.store(LSE + m, top + tl.log2(total))
    tl.store(OUT + m[:, None] * D + tl.arange(0, D)[None, :], (acc / total[:, None]).to(q.dtype))


@triton.jit
def _plain_keys_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, M, factor, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dk and dv of BN keys; delta = Σ out · dout of every row."""
    n0 = tl.program_id(0) * BN
    k, v = _tile(K, n0, BN, D), _tile(V, n0, BN, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        q, do = _tile(Q, m0, BM, D), _tile(DO, m0, BM, D)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * factor - tl.load(LSE + m)[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - tl.load(DELTA + m)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    n = n0 + tl.arange(0, BN)
    tl.store(DK + n[:, None] * D + tl.arange(0, D)[None, :], (dk * factor).to(k.dtype))
    tl.store(DV + n[:, None] * D + tl.arange(0, D)[None, :], dv.to(k.dtype))


@triton.jit
def _plain_queries_kernel(Q, K, V, DO, LSE, DELTA, DQ, N, factor, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dq of BM queries."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    q, do = _tile(Q, tl.program_id(0) * BM, BM, D), _tile(DO, tl.program_id(0) * BM, BM, D)
    norm, delta = tl.load(LSE + m)[:, None], tl.load(DELTA + m)[:, None]
    dq = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, N, BN):
        k = _tile(K, n0, BN, D)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * factor - norm)
        ds = p * (tl.dot(do, tl.trans(_tile(V, n0, BN, D))) - delta)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(DQ + m[:, None] * D + tl.arange(0, D)[None, :], (dq * factor).to(q.dtype))


@dataclass(frozen=True)
class PlainAttention(Call):
    """One head, forward and backward."""

    targets: tuple[str, ...] = ("sm90",)
    name: str = "plain attention 64"  # type: ignore[assignment]
    aligned: bool = True  # type: ignore[assignment]

    def run(self) -> None:
        q, k, v, out, do, dq, dk, dv = (torch.empty(512, 64, dtype=torch.bfloat16) for _ in range(8))
        lse, delta = torch.empty(512), torch.empty(512)
        for kernel, arguments, tiles in (
            (_plain_forward_kernel, (q, k, v, out, lse), {"BM": 128, "BN": 128}),
            (_plain_keys_kernel, (q, k, v, do, lse, delta, dk, dv), {"BM": 64, "BN": 128}),
            (_plain_queries_kernel, (q, k, v, do, lse, delta, dq), {"BM": 128, "BN": 64}),
        ):
            kernel[(4,)](*arguments, 512, 0.18, D=64, **tiles, num_warps=8, num_stages=2)
