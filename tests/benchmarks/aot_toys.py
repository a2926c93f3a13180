"""Calls that launch one small kernel each, right or wrong on purpose. Importable by the gate's spawned processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(X, Y, x_m, x_n, y_m, y_n, M, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    tile = tl.load(X + m[:, None] * x_m + n[None, :] * x_n, mask=(m < M)[:, None], other=0.0)
    tl.store(Y + m[:, None] * y_m + n[None, :] * y_n, tile * 2, mask=(m < M)[:, None])


@triton.jit
def _dot_kernel(A, B, C, M: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * M + m[None, :])
    tl.store(C + m[:, None] * M + m[None, :], tl.dot(a, b, input_precision="ieee"))


@dataclass(frozen=True)
class Toy:
    name: str
    aligned: bool = True

    def run(self) -> None:
        getattr(self, self.name)()

    def _copy(self, source: torch.Tensor, BM: int = 256, BN: int = 64, **options: int) -> None:
        target = torch.empty(source.shape, dtype=source.dtype)
        _copy_kernel[(1,)](source, target, *source.stride(), *target.stride(), 197, BM=BM, BN=BN, **options)

    def honest(self) -> None:
        self._copy(torch.empty(256, 64, dtype=torch.bfloat16), num_warps=4)

    def small(self) -> None:
        self._copy(torch.empty(32, 16, dtype=torch.bfloat16), BM=32, BN=16, num_warps=4)

    def strided(self) -> None:
        self._copy(torch.empty(256, 128, dtype=torch.bfloat16)[:, ::2], num_warps=4)

    def misaligned(self) -> None:
        self._copy(torch.empty(256 * 64 + 1, dtype=torch.bfloat16)[1:].view(256, 64), num_warps=4)

    def spilling(self) -> None:
        self._copy(torch.empty(256, 64, dtype=torch.float32), num_warps=1)

    def dot(self) -> None:
        a = torch.empty(64, 64, dtype=torch.bfloat16)
        _dot_kernel[(1,)](a, a, torch.empty(64, 64), M=64, K=64, num_warps=4)

    def dot_of_fp32(self) -> None:
        a = torch.empty(64, 64)
        _dot_kernel[(1,)](a, a, a, M=64, K=64, num_warps=8)

    def not_compiling(self) -> None:
        a = torch.empty(64, 8, dtype=torch.bfloat16)
        _dot_kernel[(1,)](a, a, torch.empty(64, 64), M=64, K=8)

    def raising(self) -> None:
        raise ValueError("the launcher itself")

    def crashing(self) -> None:
        os._exit(3)

    def launching_nothing(self) -> None:
        pass
