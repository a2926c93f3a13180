"""Checks of arguments that all operations share. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, rank: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {kind(value)}")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor {layout}, got a {'nested' if value.is_nested else 'sparse'} one"
        )
    if value.ndim != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected a floating point dtype (float16, bfloat16, float32 or float64), got {value.dtype}"
        )


def integer(value: object) -> int | None:
    """The Python int of an integer, NumPy's included; None for anything else, booleans and tensors among it."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """The Python float of a number, NumPy's included; None for anything else, booleans and tensors among it."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def check_choice(name: str, value: object, choices: tuple) -> None:
    if not (value is None or isinstance(value, (str, Integral))) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """A Python (or NumPy) number. A tensor is refused: its gradient would be lost, and reading it makes a GPU wait."""
    if isinstance(value, Tensor):
        what, remedy = "a tensor", "take its value with float(...)"
        if value.requires_grad:
            what = "a tensor that requires grad, which would get no gradient"
            remedy = "multiply the student's query with it and pass a number here"
        raise TypeError(f"{name}: expected a number, got {what}; {remedy}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {kind(value)} {value!r}") from None


def check_device(device: object) -> torch.device:
    """A device that is named or given, which PyTorch can compute on here.

    Raises:
        ValueError: it cannot; the message says what there is.
    """
    try:
        found = torch.device(device)  # type: ignore[call-overload]
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        here = [torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else []
        names = " or ".join(f"'{name}'" for name in (*here, "cpu"))
        raise ValueError(
            f"device: expected a device PyTorch can use here, {names}, got {device!r} ({str(error).splitlines()[0]})"
        ) from None
    return found


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")


LSE_ERROR, LSE_RELATIVE_ERROR = 1e-3, 1e-6
"""How far a given LSE may be off: LSE_ERROR + LSE_RELATIVE_ERROR · |LSE|. A float32 one of the right tensors is off by less than a tenth of it."""


def check_lse(name: str, given: Tensor, actual: Tensor) -> None:
    """Refuse an LSE that is not that of its logits: at once on a CPU, from within the kernel on a GPU, which does not wait.

    given, actual: any one shape; −inf in rows that see no key.
    """
    error = (
        given - actual
    ).abs()  # NaN where both are infinite: right; or where the logits are NaN, which the loss shows
    allowed = LSE_ERROR + LSE_RELATIVE_ERROR * given.abs().clamp(max=1e30)
    right = ~((error > allowed) | (given.isnan() & ~actual.isnan()))
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(right.all()):
            worst = int(right.logical_not().flatten().long().argmax())
            raise ValueError(
                f"{name}: expected log Σ_j exp(scale · q·k_j + mask_j) of every row, of the same query, key, scale and mask, got "
                f"{given.flatten()[worst]:.6g} where it is {actual.flatten()[worst]:.6g}; leave it out to have it computed"
            )
    else:
        torch._assert_async(right.all(), f"{name}: expected the log Σ_j exp(scale · q·k_j + mask_j) of every row")


def kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else ("None" if value is None else type(value).__name__)
