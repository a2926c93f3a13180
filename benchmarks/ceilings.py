"""What the device itself reaches in the same run: bandwidth of a large copy, rate of a large matrix product."""

from __future__ import annotations

import torch

from benchmarks.timing import GpuClock, measure

COPY_BYTES = 1 << 30
SMALL_COPY_BYTES = 16 << 20  # of which a cache holds a good part
MATMUL_SIZE = 8192


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, float]:
    """{'copy_gb_s': …, 'small_copy_gb_s_flushed_by_read': …, '…_write': …, 'matmul_tflop_s_bfloat16': …, …}; random data, since zeros move and multiply faster."""
    clock = GpuClock(device)
    found = {"copy_gb_s": _copy_gb_s(device, clock)}
    for flush in ("read", "write"):  # what the dirty lines of an overwritten cache cost the call that follows
        rate = _copy_gb_s(device, GpuClock(device, flush), SMALL_COPY_BYTES)
        found[f"small_copy_gb_s_flushed_by_{flush}"] = rate
    for dtype in dtypes:
        found[f"matmul_tflop_s_{str(dtype)[6:]}"] = _matmul_tflop_s(device, dtype, clock)
    torch.cuda.empty_cache()
    return {name: round(value, 3) for name, value in found.items()}


def _copy_gb_s(device: torch.device, clock: GpuClock, size: int = COPY_BYTES) -> float:
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda _: target.copy_(source), clock=clock)
    return 2 * size / timing.median / 1e6


def _matmul_tflop_s(device: torch.device, dtype: torch.dtype, clock: GpuClock) -> float:
    size = MATMUL_SIZE if dtype.itemsize == 2 else MATMUL_SIZE // 2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure(lambda _: torch.mm(a, b, out=out), clock=clock)
    return 2 * size**3 / timing.median / 1e9
