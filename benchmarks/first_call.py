"""What the first call costs: imports, compilation, and both again when the compilers' caches are warm.

Every measurement is a fresh process with caches of its own, so that nothing compiled earlier helps: once with empty caches and
once with what the first one left. Run as `python -m benchmarks.first_call`, this is such a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.machine import ROOT, use_gpu

CASES = (
    ("cls_row", "ours"),
    ("cls_row", "compile_row"),
    ("cls_row_logsum", "ours"),
    ("whole_map", "ours"),
    ("whole_map", "compile_map"),
    ("attention_rows", "ours"),
)
TIMEOUT_S = 300


def measure_first_calls(
    device: str, shape: str, dtype: str, operations: set[str] | None, smoke: bool
) -> Iterator[dict[str, Any]]:
    """Records with import_s, first_call_s (forward and backward) and second_call_ms, for cold and warm caches.

    A smoke run measures one case on the tiny shape and drops the numbers.
    """
    for operation, implementation in CASES[:1] if smoke else CASES:
        if operations is not None and operation not in operations:
            continue
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for cache in ("cold", "warm"):
                identity = {
                    "operation": operation,
                    "implementation": implementation,
                    "cache": cache,
                    "shape": shape,
                    "dtype": dtype,
                }
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.first_call",
                    operation,
                    implementation,
                    shape,
                    dtype,
                    device,
                ]
                try:
                    done = subprocess.run(
                        command, cwd=ROOT, env=os.environ | caches, capture_output=True, text=True, timeout=TIMEOUT_S
                    )
                except subprocess.TimeoutExpired:
                    yield identity | {"status": "error", "detail": f"no answer within {TIMEOUT_S} s"}
                    continue
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    yield identity | {"status": "error", "detail": last[:200]}
                    continue
                numbers = json.loads(done.stdout.strip().splitlines()[-1])
                yield identity | {"status": "ok"} | ({} if smoke else numbers)


def main(argv: list[str] | None = None) -> int:
    """One process: import, make inputs, call twice, print the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call")
    for name in ("operation", "implementation", "shape", "dtype", "device"):
        parser.add_argument(name)
    args = parser.parse_args(argv)

    import torch

    start = time.perf_counter()
    if args.device == "cpu":
        from attnkd.testing import interpreter

        interpreter.install()
    import attnkd

    attnkd.attention_divergence  # noqa: B018
    import_s = time.perf_counter() - start
    from benchmarks import cases, measure, registry

    device = torch.device("cpu") if args.device == "cpu" else use_gpu(args.device)
    operation = registry.OPERATIONS[args.operation]
    shape = cases.SMOKE if args.shape == cases.SMOKE.name else cases.find_shape(args.shape)
    dtype = getattr(torch, args.dtype)
    inputs = cases.make_inputs(shape, dtype, device, operation.leaves, operation.merged, seed=0)
    implementation = next(i for i in operation.implementations if i.name == args.implementation)
    upstream = [torch.ones(size, device=device) for size in operation.results(shape)]
    measure.synchronize(device)
    calls = []
    run = None
    for _ in range(2):
        start = time.perf_counter()
        run = run or measure.Run(operation, implementation, inputs, measure.Settings(device))
        run.once(upstream)
        measure.synchronize(device)
        calls.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "import_s": round(import_s, 3),
                "first_call_s": round(calls[0], 4),
                "second_call_ms": round(calls[1] * 1e3, 4),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
