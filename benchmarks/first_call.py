"""What the first call costs: imports, compilation, and both again when the compilers' caches are warm.

Every measurement is a fresh process with caches of its own, so that nothing compiled earlier helps: once with empty caches and
once with what the first one left. Run as `python -m benchmarks.first_call`, this is such a process.
"""

from __future__ import annotations

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
    device: str, shape: str, dtype: str, operations: set[str], smoke: bool
) -> Iterator[dict[str, Any]]:
    """Records with import_s, first_call_s (forward and backward) and second_call_ms, for cold and warm caches.

    A smoke run measures one case on the tiny shape and drops the numbers.
    """
    for operation, implementation in CASES[:1] if smoke else CASES:
        if operation not in operations:
            continue
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for cache in ("cold", "warm"):
                request = {"operation": operation, "implementation": implementation, "shape": shape, "dtype": dtype}
                numbers = _in_fresh_process(request | {"device": device}, os.environ | caches)
                dropped = smoke and numbers["status"] == "ok"
                yield request | {"cache": cache} | ({"status": "ok"} if dropped else numbers)


def _in_fresh_process(request: dict[str, str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.first_call", json.dumps(request)]
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, **options, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"status": "error", "detail": f"no answer within {TIMEOUT_S} s"}
    if done.returncode:
        return {"status": "error", "detail": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {"status": "ok"} | json.loads(done.stdout.strip().splitlines()[-1])


def _measure(request: dict[str, str]) -> dict[str, float]:
    """In a process of its own: import, make the tensors, call twice."""
    import torch

    start = time.perf_counter()
    if request["device"] == "cpu":
        from attnkd.testing import interpreter

        interpreter.install()
    import attnkd

    attnkd.attention_divergence  # noqa: B018
    import_s = time.perf_counter() - start
    from benchmarks import measure, shapes
    from benchmarks.operations import OPERATIONS

    device = torch.device("cpu") if request["device"] == "cpu" else use_gpu(request["device"])
    operation = OPERATIONS[request["operation"]]
    call = operation.call.at(shapes.find_shape(request["shape"]), getattr(torch, request["dtype"]))
    implementation = next(i for i in operation.implementations if i.name == request["implementation"])
    run = measure.Run(call, implementation, measure.Settings(device))
    measure.synchronize(device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run.once()
        measure.synchronize(device)
        seconds.append(time.perf_counter() - start)
    numbers = {"import_s": import_s, "first_call_s": seconds[0], "second_call_ms": seconds[1] * 1e3}
    return {name: round(value, 4) for name, value in numbers.items()}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
