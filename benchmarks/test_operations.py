"""pytest-benchmark's view of the same cases: `pytest benchmarks`, `pytest benchmarks --benchmark-compare`.

Host time of one synchronised call, launches included. `python -m benchmarks run` measures the device's time and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import judge, measure, shapes
from benchmarks.operations import OPERATIONS as ALL

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16
SHAPES = [shapes.SHAPES[name] for name in ("deit_small", "vit_base_384")] if HAS_GPU else [shapes.SMOKE]
OPERATIONS = [operation for operation in ALL.values() if operation.headline]
CASES = [
    pytest.param(
        shape, operation, implementation, mode, id=f"{operation.name}-{shape.name}-{mode}-{implementation.name}"
    )
    for shape in SHAPES
    for operation in OPERATIONS
    for mode in shapes.MODES
    for implementation in operation.implementations
    if HAS_GPU or not implementation.compiled
]


@pytest.mark.parametrize("shape, operation, implementation, mode", CASES)
def test_operation(benchmark: Any, shape: Any, operation: Any, implementation: Any, mode: str) -> None:
    call = operation.call.at(shape, DTYPE)
    expected = judge.truth(call, DEVICE)
    try:
        run = measure.Run(call, implementation, measure.Settings(DEVICE))
        verdict = measure.verdict(expected.judge(implementation, *run.once(expected.upstream)))
    except Exception as error:
        status, detail = measure.failure(error, implementation.ours, DEVICE)
        if status in ("OOM", "unsupported"):
            pytest.skip(f"{status} {detail}")
        raise
    assert verdict["status"] == "ok", verdict
    del expected
    timed, setup = run.mode(mode)

    def synchronised(argument: Any) -> None:
        timed(argument)
        measure.synchronize(DEVICE)

    def prepare() -> tuple[tuple[Any], dict]:
        argument = setup()
        measure.synchronize(DEVICE)
        return (argument,), {}

    benchmark.group = f"{operation.name} {mode}, {shape.label}"
    benchmark.extra_info |= {"dims": shape.dims(), "dtype": str(DTYPE), "error": verdict["error"]}
    benchmark.pedantic(synchronised, setup=prepare, rounds=30 if HAS_GPU else 1, warmup_rounds=5 if HAS_GPU else 0)
