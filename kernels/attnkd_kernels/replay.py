"""From the third call of a kind on: what a launcher did for tensors of the same shapes and layouts is done again, and not worked out again.

What a launcher allocates, and which kernels it launches with which grids, strides and constants, depends on no more than the shapes, strides,
dtypes and alignment of its tensors, its other arguments and the device. So the second call of a kind is recorded, every operation of
PyTorch and every launch in order, and from then on a function written from that record takes its place. (Not the first: a temperature that
changes in every step makes every call the first of its kind, and a record takes longer than a call.) It is a straight line:

    t0 = empty((2, 6, 1), (6, 1, 1), …)
    launch(t0, 197, 1, 6, (a0, 384, 64, 64, 1), …)
    return t0

A launcher whose course depends on the values in a tensor gets no such function, since a value was read or a shape depended on them, and is
called as before. (``tolist`` and ``numpy`` read unseen: no launcher may use them.) Triton's own settings are read when a kernel is recorded:
whoever changes them, or what a launcher reads besides its arguments, calls :func:`forget`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_plans: dict[tuple, Callable[..., Any] | None] = {}
"""What is called in place of a launcher; None where the next call is to be recorded."""
_MOST_PLANS = 4096
_recording = True
_HIP = torch.version.hip is not None
_this_thread = threading.local()
_CONSTANTS = (float, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


def replayed(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a launcher of tensors, on one device, and of what can be a key: numbers, words, None. It is called without keywords, and a
    parameter that is no tensor always has the same type, which an operator's schema makes sure of."""
    if triton.knobs.runtime.interpret:  # nothing is compiled
        return launcher

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        kind: list[Any] = [launcher]
        device = -1
        for arg in args:
            if isinstance(arg, Tensor):
                device = arg.get_device()  # -1 on the CPU
                kind += (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16)
                if _HIP:  # its compiler has other instructions for tensors up to 2 GiB
                    kind.append(arg.untyped_storage().nbytes() >> 31)
            else:
                kind.append(arg)
        kind.append(device)
        key = tuple(kind)
        run = _plans.get(key) or _next(key)
        if device < 0 or device == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return call


def forget() -> None:
    """The next call of every kind is its first again."""
    _plans.clear()


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Every launcher is called itself, and nothing is recorded: for whoever replaces what launchers call."""
    global _recording
    forget()
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before
        forget()


def launched(kernel: Callable[..., Any] | None, args: tuple, constants: tuple) -> None:
    """To be told of every launch: of the compiled kernel, bound to its grid, with these arguments and compile-time constants, which hold no
    tensor; None if it was not compiled."""
    record = getattr(_this_thread, "record", None)
    if record is not None:
        record.complete = record.complete and kernel is not None
        record.lines.append(f"{record.constant(kernel)}(*{record.source(args)}, *{record.constant(constants)})")


def _next(key: tuple) -> Callable[..., Any]:
    """The launcher, the first of the key, for the first call of a kind; with a record for the second."""
    if not _recording:
        return key[0]
    if key in _plans:
        return functools.partial(_record, key)
    if len(_plans) >= _MOST_PLANS:  # sizes that never come twice
        _plans.clear()
    _plans[key] = None
    return key[0]


def _record(key: tuple, *args: Any) -> Any:
    """Calls the launcher and keeps the record."""
    record = _Record(args)
    outer, _this_thread.record = getattr(_this_thread, "record", None), record
    try:
        with record:
            results = key[0](*record.args)
    finally:
        _this_thread.record = outer
    if outer is None:
        _plans[key] = record.plan(results) or key[0]
    return results


class _Record(TorchDispatchMode):
    """The lines of a function of a0, a1, … that does what is done while this mode is on."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.complete = True
        self.names: dict[int, str] = {}  # of tensors, by their ids
        self.held: list[Any] = []  # alive, so that no other tensor gets the id of one of them
        self.constants: dict[str, Any] = {}
        self.args: list[Any] = []
        for i, arg in enumerate(args):
            again = isinstance(arg, Tensor) and id(arg) in self.names
            self.args.append(arg.detach() if again else arg)  # what is given twice need not be the same the next time
            self.name(self.args[-1], f"a{i}")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch else wraps the method below in a call that imports the compiler, for seconds, and keeps the tensors of that call alive."""
        return False

    def name(self, value: Any, name: str) -> None:
        self.held.append(value)
        if isinstance(value, Tensor):
            self.names[id(value)] = name
        elif isinstance(value, (tuple, list)):
            for i, each in enumerate(value):
                self.name(each, f"{name}[{i}]")

    def source(self, value: Any) -> str:
        if isinstance(value, Tensor):
            self.complete = self.complete and id(value) in self.names
            return self.names.get(id(value), "")
        if isinstance(value, (tuple, list)):
            inside = "".join(f"{self.source(each)}, " for each in value)
            return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        self.complete = self.complete and isinstance(value, _CONSTANTS)  # anything else may hold a pointer
        return self.constant(value)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:  # what PyTorch makes of an allocation that this mode saw
            self.name(result, self.source(args[0]))
            return result
        if isinstance(result, (bool, int, float)):  # a value that was read, if not one of types alone
            self.complete = self.complete and not any(isinstance(arg, Tensor) for arg in args)
            return result
        self.complete = self.complete and torch.Tag.dynamic_output_shape not in func.tags
        if func in _ALLOCATIONS:
            func, args = torch.empty_strided, (tuple(result.shape), result.stride())
            kwargs = {"dtype": result.dtype, "device": result.device}
        given = [self.source(arg) for arg in args] + [f"{name}={self.source(arg)}" for name, arg in kwargs.items()]
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {self.constant(func)}({', '.join(given)})")
        self.name(result, name)
        return result

    def plan(self, results: Any) -> Callable[..., Any] | None:
        """The function, or None where the record is not the whole of what was done."""
        lines = [*self.lines, f"return {self.source(results)}"]
        if not self.complete:
            return None
        head = f"def plan({', '.join(f'a{i}' for i in range(len(self.args)))}):"
        exec("\n    ".join([head, *lines]), self.constants)
        return self.constants["plan"]
