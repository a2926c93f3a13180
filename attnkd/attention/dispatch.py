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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnkd.attention.checks import check_choice

IMPLS = ("auto", "triton", "chunked", "reference")
MAX_ROWS = 16
"""Up to this many query rows the row kernels are used; beyond it the whole-map kernels."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile calls the function while it compiles, and keeps the result. As ``torch.compiler.assume_constant_result``, but that imports
    the compiler, which takes longer than ``import torch``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def interpreting() -> bool:
    """True when Triton's kernels run in its CPU interpreter: its TRITON_INTERPRET=1, set before kernels are imported."""
    return TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@_constant
def interpreter_is_exact() -> bool:
    """Whether :func:`attnkd.testing.interpreter.install` made Triton's interpreter compute bfloat16; it leaves this mark."""
    from triton.runtime import interpreter

    return getattr(interpreter, "bfloat16_is_exact", False)


def why_not_triton(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """The reason for which Triton kernels cannot run on tensors of these dtypes, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if torch.float64 in dtypes:
        return "float64 is not supported by the kernels (use 'chunked' or 'reference')"
    if device.type == "meta" or (device.type != "cuda" and not interpreting()):
        return f"the tensors are on device '{device}', not on a CUDA or ROCm GPU"
    if device.type != "cuda" and torch.bfloat16 in dtypes and not interpreter_is_exact():
        return (
            "Triton's interpreter computes garbage in bfloat16; call attnkd.testing.interpreter.install() before, which "
            "makes it exact, or use float32 or impl='chunked'"
        )
    if device.type == "cuda" and too_old(device.index):
        return f"device '{device}' has a compute capability below 8.0 (Ampere), which Triton needs"
    return None


@_constant
def too_old(index: int | None) -> bool:
    """Whether the NVIDIA GPU of that index (None: the current one) is one that Triton does not compile for."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) < (8, 0)


def choose(
    impl: str,
    inputs: Sequence[Tensor | None],
    beside: Sequence[Tensor | None] = (),
    why_not_fused: Callable[[], str | None] = lambda: None,
) -> str:
    """The implementation of an operation: 'triton', 'chunked' or 'reference'.

    Args:
        impl: what the user asked for.
        inputs: the queries, keys or features, all on one device.
        beside: masks and probabilities, which the kernels read in any dtype.
        why_not_fused: the reason for which the operation has no kernel for this call, or None. Asked last, only where Triton
            can run.

    Raises:
        ValueError: an unknown ``impl``.
        NotImplementedError: ``impl='triton'`` where it cannot run, or forward-mode differentiation, with the reason.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "reference":
        return impl
    tensors = [tensor for tensor in (*inputs, *beside) if tensor is not None]
    if not torch.compiler.is_compiling():
        _refuse_transforms(impl, tensors)
    if impl == "chunked":
        return impl
    device = tensors[0].device
    dtypes = [tensor.dtype for tensor in inputs if tensor is not None]
    dtypes += [tensor.dtype for tensor in beside if tensor is not None and tensor.dtype != torch.float64]
    reason = why_not_triton(device, *dtypes) or why_not_fused()
    if impl == "triton":
        if reason:
            raise NotImplementedError(f"impl='triton': {reason}")
        return impl
    # Under the interpreter kernels run for proof, not for work: only an explicit choice uses them.
    return "chunked" if reason or device.type != "cuda" else "triton"


def transforming() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is under way. A tensor that is left from one counts as its value."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_transforms(impl: str, tensors: list[Tensor]) -> None:
    """Hand-written backwards take part neither in forward-mode differentiation nor in torch.func's."""
    if not transforming():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"impl={impl!r}: forward-mode automatic differentiation (torch.func.jvp, jacfwd) has no implementation but "
            "impl='reference'"
        )
    functorch = torch._C._functorch
    if any(functorch.is_gradtrackingtensor(x) or (functorch.is_batchedtensor(x) and x.requires_grad) for x in tensors):
        raise NotImplementedError(
            f"impl={impl!r}: gradients by torch.func (grad, jacrev, vmap of what requires grad) have no implementation but "
            "impl='reference'; use torch.autograd.grad or backward"
        )
