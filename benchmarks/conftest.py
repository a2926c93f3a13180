"""`pytest benchmarks`: on a GPU the cases are timed; without one each runs once, tiny, to see that it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.run import prepare_interpreter

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    prepare_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_GPU:
        config.option.benchmark_disable = True  # the interpreter's times mean nothing


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """GPU, driver, toolkit and versions of torch, triton and the rest, beside what pytest-benchmark knows of the CPU."""
    from benchmarks.machine import describe

    machine_info |= describe(torch.device("cuda" if HAS_GPU else "cpu"))
