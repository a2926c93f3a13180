"""What the device itself reaches in the same run: bandwidth of a large copy, rate of a large matrix product."""

from __future__ import annotations

import torch

from benchmarks.timing import GpuClock, measure

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, float]:
    """{'copy_gb_s': …, 'matmul_tflop_s_bfloat16': …, …}; random data, since zeros move and multiply faster."""
    clock = GpuClock(device)
    source = torch.randint(-128, 127, (COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda _: target.copy_(source), clock=clock)
    found = {"copy_gb_s": 2 * COPY_BYTES / copy.median / 1e6}
    del source, target
    for dtype in dtypes:
        size = MATMUL_SIZE if dtype.itemsize == 2 else MATMUL_SIZE // 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = measure(lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out), clock=clock)
        found[f"matmul_tflop_s_{str(dtype)[6:]}"] = 2 * size**3 / product.median / 1e9
    return {name: round(value, 3) for name, value in found.items()}
