"""Which implementation computes an operation: the one documented rule behind ``impl="auto"``.

* ``triton``: fused kernels. Needs tensors on a CUDA (compute capability 8.0 or later) or ROCm device (or Triton's
  interpreter) and float16, bfloat16 or float32.
* ``chunked``: plain PyTorch with O(N) memory. Any device, any floating point dtype.
* ``reference``: the specification; materialises everything in float64.

``auto`` is ``triton`` where a Triton kernel exists for the call and the tensors are on a GPU, else ``chunked``. An explicit
choice that cannot be honoured raises; it never falls back.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from attnkd.attention.problem import Problem, check_choice

IMPLS = ("auto", "triton", "chunked", "reference")
MAX_ROWS = 16
"""Up to this many query rows the row kernels are used; beyond it the whole-map kernels."""


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """True when Triton's kernels run in its CPU interpreter: its TRITON_INTERPRET=1, set before kernels are imported."""
    return TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason for which Triton kernels cannot run on such tensors, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if dtype == torch.float64:
        return "float64 is not supported by the kernels (use 'chunked' or 'reference')"
    if device.type == "meta" or (device.type != "cuda" and not interpreting()):
        return f"the tensors are on device '{device}', not on a CUDA or ROCm GPU"
    if device.type == "cuda" and too_old(device.index):
        return f"device '{device}' has a compute capability below 8.0 (Ampere), which Triton needs"
    return None


@torch.compiler.assume_constant_result
def too_old(index: int | None) -> bool:
    """Whether the NVIDIA GPU of that index (None: the current one) is one that Triton does not compile for."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) < (8, 0)


def why_not_fused(problem: Problem) -> str | None:
    """The reason for which no fused kernel covers this problem, or None."""
    from attnkd.attention import fused_maps as ops_map  # they need Triton, which the caller knows to be there
    from attnkd.attention import fused_rows as ops_row  # they need Triton, which the caller knows to be there

    return (ops_row if problem.rows_shape[2] <= MAX_ROWS else ops_map).why_not(problem)


def choose(impl: str, problem: Problem) -> str:
    """The implementation for ``problem``: 'triton', 'chunked' or 'reference'.

    Raises:
        ValueError: an unknown ``impl``.
        NotImplementedError: ``impl='triton'`` where it cannot run, with the reason.
    """
    check_choice("impl", impl, IMPLS)
    if impl in ("chunked", "reference"):
        return impl
    query = problem.student.query
    assert query is not None
    dtypes = [t.dtype for t in (query, problem.teacher.query) if t is not None]
    reason = why_not_triton(query.device, torch.float64 if torch.float64 in dtypes else query.dtype)
    if reason is None:
        reason = why_not_fused(problem)
    if impl == "triton":
        if reason:
            raise NotImplementedError(f"impl='triton': {reason}")
        return "triton"
    # Under the interpreter kernels run for proof, not for work: only an explicit choice uses them.
    return "chunked" if reason or query.device.type != "cuda" else "triton"


def choose_rows(impl: str, query: torch.Tensor) -> str:
    """The implementation for :func:`attnkd.attention_rows`; same rule and errors as :func:`choose`."""
    check_choice("impl", impl, IMPLS)
    if impl in ("chunked", "reference"):
        return impl
    reason = why_not_triton(query.device, query.dtype)
    if impl == "triton":
        if reason:
            raise NotImplementedError(f"impl='triton': {reason}")
        return "triton"
    return "chunked" if reason or query.device.type != "cuda" else "triton"
