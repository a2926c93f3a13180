"""pytest-benchmark's view of the same cases: `pytest benchmarks`, `pytest benchmarks --benchmark-compare`.

Host time of one synchronised call, launches included. `python -m benchmarks run` measures the device's time and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, judge, measure, registry

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16
SHAPES = [cases.SHAPES[name] for name in ("deit_small", "vit_base_384")] if HAS_GPU else [cases.SMOKE]
OPERATIONS = [operation for operation in registry.OPERATIONS.values() if operation.headline]
CASES = [
    pytest.param(
        shape, operation, implementation, mode, id=f"{operation.name}-{shape.name}-{mode}-{implementation.name}"
    )
    for shape in SHAPES
    for operation in OPERATIONS
    for mode in cases.MODES
    for implementation in operation.implementations
    if HAS_GPU or not implementation.compiled
]


@pytest.mark.parametrize("shape, operation, implementation, mode", CASES)
def test_operation(benchmark: Any, shape: Any, operation: Any, implementation: Any, mode: str) -> None:
    settings = measure.Settings(DEVICE)
    inputs = cases.make_inputs(shape, DTYPE, DEVICE, operation.leaves, operation.merged, seed=0)
    expected = judge.truth(operation, inputs)
    try:
        run = measure.Run(operation, implementation, inputs, settings)
        verdict = judge.judge(operation, implementation, DTYPE, expected, *run.once(expected.upstream))
    except Exception as error:
        status, detail = measure.failure(error, implementation.ours, DEVICE)
        if status in ("OOM", "unsupported"):
            pytest.skip(f"{status} {detail}")
        raise
    assert verdict.ok, verdict.detail
    del expected
    call, setup = run.mode(mode)

    def synchronised(argument: Any) -> None:
        call(argument)
        measure.synchronize(DEVICE)

    def prepare() -> tuple[tuple[Any], dict]:
        argument = setup()
        measure.synchronize(DEVICE)
        return (argument,), {}

    benchmark.group = f"{operation.name} {mode}, {shape.label}"
    benchmark.extra_info |= {"dims": shape.dims(), "dtype": str(DTYPE), "error": verdict.error}
    benchmark.pedantic(synchronised, setup=prepare, rounds=30 if HAS_GPU else 1, warmup_rounds=5 if HAS_GPU else 0)
