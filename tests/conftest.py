"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before any kernel module is imported."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    from attnkd.testing import interpreter

    interpreter.install()

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
