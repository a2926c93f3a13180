"""Counts the bytes that kernels load and store, per tensor, and proves that no access leaves its tensor.

Under Triton's interpreter every load and store names its addresses, and every pointer knows which tensor it was made
from. :class:`Meter` therefore sees what a profiler cannot: how often each element of each tensor is asked for, and
whether a pointer into one tensor ever reaches a neighbour (in a packed qkv buffer K lies beside Q, and a stray read goes
unnoticed).

    with Meter(student_key=student_key, teacher_key=teacher_key) as meter:
        loss, coef, unit_dq = row_kl_fwd(...)
    meter.loaded("student_key")       # bytes asked for, re-reads included
    meter.loaded("student_key").once  # bytes of the elements that were asked for at all

A *load* here is one `tl.load` of one program: an address that it names twice counts once, since the lanes that share it
share one transaction. What the hardware's caches do with a re-read is not modelled; it counts in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as interp

__all__ = ["Bytes", "Launch", "Meter", "OutOfBounds"]

SECTOR = 32  # bytes; the unit in which GPU memory is moved


class OutOfBounds(IndexError):
    """A kernel loaded or stored an address outside the tensor its pointer was made from."""


class Bytes(int):
    """A number of bytes asked for.

    Attributes:
        once: bytes of the distinct elements asked for; the difference to the total is re-reads (or re-writes).
        sectors: bytes in whole 32-byte sectors touched by each access; more than the total where access is scattered.
    """

    once: int
    sectors: int

    def __new__(cls, total: int, once: int, sectors: int) -> Bytes:
        self = super().__new__(cls, total)
        self.once, self.sectors = int(once), int(sectors)
        return self


class _Counter:
    """How often each element of one tensor argument was accessed, in one direction."""

    def __init__(self, span: int, itemsize: int) -> None:
        self.itemsize = itemsize
        self.counts = np.zeros(span, np.uint32)
        self.sectors = 0

    def add(self, index: np.ndarray, addresses: np.ndarray) -> None:
        self.counts[index] += 1  # buffered: an element named twice by one access counts once
        self.sectors += np.unique(addresses // SECTOR).size * SECTOR

    def bytes(self) -> Bytes:
        total = int(self.counts.sum(dtype=np.int64)) * self.itemsize
        return Bytes(total, np.count_nonzero(self.counts) * self.itemsize, self.sectors)


class _Argument:
    """A tensor as one launch sees it: where its elements lie and how often they were loaded and stored."""

    def __init__(self, label: str, tensor: Tensor) -> None:
        self.label = label
        self.tensor = tensor  # kept alive, so that no later tensor takes its address
        self.base = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        self.elements = _elements(tensor)
        self.loads = _Counter(self.elements.size, self.itemsize)
        self.stores = _Counter(self.elements.size, self.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements (an expanded dimension counts once)."""
        return int(np.count_nonzero(self.elements)) * self.itemsize

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """Which addresses are elements of the tensor."""
        offset = addresses.astype(np.int64) - self.base
        index = offset // self.itemsize
        inside = (index >= 0) & (index < self.elements.size) & (offset % self.itemsize == 0)
        inside[inside] = self.elements[index[inside]]
        return inside


def _elements(tensor: Tensor) -> np.ndarray:
    """Which elements of the memory between a tensor's first and last element belong to it."""
    if tensor.numel() == 0:
        return np.zeros(0, bool)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = torch.zeros(span, dtype=torch.bool)
    elements.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return elements.numpy()


class _Pointer(tl.pointer_type):
    """A pointer type that remembers its tensor. Pointer arithmetic passes the type on, and so the memory of it."""

    def __init__(self, element_type: Any, argument: _Argument) -> None:
        super().__init__(element_type)
        self.argument = argument


@dataclass
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the kernel's name.
        grid: the number of programs in each dimension.
        tensors: the launch's tensor arguments by parameter name.
    """

    kernel: str
    grid: tuple[int, int, int] = (0, 0, 0)
    tensors: dict[str, _Argument] = field(default_factory=dict)

    def loaded(self, parameter: str) -> Bytes:
        """Bytes that this launch loaded through one of its pointer parameters."""
        return self.tensors[parameter].loads.bytes()

    def stored(self, parameter: str) -> Bytes:
        """Bytes that this launch stored through one of its pointer parameters."""
        return self.tensors[parameter].stores.bytes()


class Meter:
    """Context manager that counts what all launches inside it load and store, and checks every address.

    Args:
        tensors: the tensors to report under their own names. A launch's argument counts for the registered tensor whose
            elements it starts on (so a slice of a registered tensor counts for it); every other argument is reported
            under the name of the kernel's parameter, ``student.key`` for the field ``key`` of a NamedTuple ``student``.

    Raises:
        RuntimeError: on entry, if ``TRITON_INTERPRET`` was not set when Triton was imported.
        triton.runtime.errors.InterpreterError: from the launch, carrying :class:`OutOfBounds`, before an access outside
            the tensor is made.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.launches: list[Launch] = []
        self._named = {name: _Argument(name, tensor) for name, tensor in tensors.items()}
        self._arguments: dict[int, _Argument] = {}  # by id of the tensor, which its argument keeps alive
        self._originals: list[tuple[Any, str, Any]] = []

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all tensors that were launched with, in order of appearance."""
        return list(dict.fromkeys(argument.label for argument in self._all()))

    def loaded(self, name: str | None = None) -> Bytes:
        """Bytes that all launches loaded from one tensor, or from all of them."""
        return self._sum("loads", name)

    def stored(self, name: str | None = None) -> Bytes:
        """Bytes that all launches stored to one tensor, or to all of them."""
        return self._sum("stores", name)

    def _all(self) -> Iterator[_Argument]:
        for launch in self.launches:
            yield from launch.tensors.values()

    def _sum(self, direction: str, name: str | None) -> Bytes:
        if name is not None and name not in self.names and name not in self._named:
            raise KeyError(f"no launch had a tensor {name!r}; there were {self.names}")
        total = sectors = 0
        touched: dict[tuple[Any, ...], np.ndarray] = {}
        itemsize = {}
        for argument in self._all():
            if name is not None and argument.label != name:
                continue
            counter: _Counter = getattr(argument, direction)
            total += counter.bytes()
            sectors += counter.sectors
            where = (argument.base, argument.tensor.dtype, argument.tensor.shape, argument.tensor.stride())
            touched[where] = touched.get(where, False) | (counter.counts > 0)
            itemsize[where] = argument.itemsize
        once = sum(int(np.count_nonzero(seen)) * itemsize[where] for where, seen in touched.items())
        return Bytes(total, once, sectors)

    # --- hooks --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Meter:
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Meter counts in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
        builder = interp.InterpreterBuilder
        self._replace(interp.GridExecutor, "_init_args_hst", self._on_launch)
        self._replace(builder, "set_grid_dim", self._on_grid)
        self._replace(interp, "_implicit_cvt", self._on_convert)
        self._replace(builder, "create_masked_load", self._on_masked("loads"))
        self._replace(builder, "create_masked_store", self._on_masked("stores"))
        self._replace(builder, "create_atomic_rmw", self._on_atomic_rmw)
        self._replace(builder, "create_atomic_cas", self._on_atomic_cas)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    def _replace(self, owner: Any, name: str, make: Any) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))
        setattr(owner, name, make(original))

    def _on_launch(self, original: Any) -> Any:
        def init_args(executor: Any, args: Any, kwargs: Any) -> Any:
            host_args, host_kwargs = original(executor, args, kwargs)
            launch = Launch(executor.fn.__name__)
            self.launches.append(launch)
            given = [*zip(executor.arg_names, args, host_args, strict=False)]
            given += [(name, kwargs[name], host) for name, host in host_kwargs.items()]
            for name, argument, host in given:
                self._register(launch, name, argument, host)
            return host_args, host_kwargs

        return init_args

    def _register(self, launch: Launch, name: str, given: Any, host: Any) -> None:
        if isinstance(given, tuple):
            fields = getattr(given, "_fields", range(len(given)))  # of a NamedTuple, which may hold others
            for at, each, each_host in zip(fields, given, host, strict=True):
                self._register(launch, f"{name}.{at}", each, each_host)
        elif isinstance(given, interp.TensorDescriptor):
            self._register(launch, name, given.base, host.base)
        elif isinstance(given, Tensor):
            owner = next((n for n, t in self._named.items() if _starts_on(given, t)), name)
            self._arguments[id(host)] = launch.tensors[name] = _Argument(owner, host)

    def _on_grid(self, original: Any) -> Any:
        def set_grid_dim(builder: Any, *grid: int) -> None:
            self.launches[-1].grid = grid  # type: ignore[assignment]
            original(builder, *grid)

        return set_grid_dim

    def _on_convert(self, original: Any) -> Any:
        def convert(value: Any) -> Any:
            result = original(value)
            if isinstance(value, Tensor) and id(value) in self._arguments:
                result.handle.dtype = _Pointer(result.handle.dtype.element_ty, self._arguments[id(value)])
            return result

        return convert

    def _on_masked(self, direction: str) -> Any:
        position = {"loads": 0, "stores": 1}[direction]  # of the mask among the arguments after the pointers

        def make(original: Any) -> Any:
            def access(builder: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
                mask = args[position] if len(args) > position else kwargs["mask"]
                self._count(direction, pointers, np.asarray(getattr(mask, "data", mask)))
                return original(builder, pointers, *args, **kwargs)

            return access

        return make

    def _on_atomic_rmw(self, original: Any) -> Any:
        def atomic(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            for direction in ("loads", "stores"):
                self._count(direction, pointers, np.asarray(mask.data))
            return original(builder, operation, pointers, value, mask, *args)

        return atomic

    def _on_atomic_cas(self, original: Any) -> Any:
        def atomic(builder: Any, pointers: Any, *args: Any) -> Any:
            for direction in ("loads", "stores"):
                self._count(direction, pointers, np.ones_like(pointers.data, dtype=bool))
            return original(builder, pointers, *args)

        return atomic

    def _count(self, direction: str, pointers: Any, mask: np.ndarray) -> None:
        addresses = pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)]
        if addresses.size == 0:
            return
        launch = self.launches[-1]
        argument = getattr(pointers.dtype, "argument", None) or self._containing(launch, addresses)
        outside = addresses[~argument.contains(addresses)]
        if outside.size:
            program = interp.interpreter_builder.grid_idx
            parameter = next(name for name, each in launch.tensors.items() if each is argument)
            offset = (int(outside[0]) - argument.base) / argument.itemsize
            raise OutOfBounds(
                f"{launch.kernel}, program {program}: {parameter} {direction[:-1]} of {outside.size} of "
                f"{addresses.size} elements outside its tensor, the first at element {offset:g}; "
                f"shape {tuple(argument.tensor.shape)}, strides {argument.tensor.stride()}"
            )
        index = (addresses.astype(np.int64) - argument.base) // argument.itemsize
        getattr(argument, direction).add(index, addresses)

    def _containing(self, launch: Launch, addresses: np.ndarray) -> _Argument:
        """The argument an address lies in, for a pointer that a cast (of a bool tensor's, say) robbed of its memory."""
        for argument in launch.tensors.values():
            if argument.contains(addresses[:1]).all():
                return argument
        raise OutOfBounds(f"{launch.kernel}: address {int(addresses[0]):#x} lies in none of {sorted(launch.tensors)}")


def _starts_on(tensor: Tensor, named: _Argument) -> bool:
    """Whether a tensor's first element is one of a registered tensor's."""
    if tensor.numel() == 0 or tensor.device != named.tensor.device:
        return False
    return bool(named.contains(np.array([tensor.data_ptr()], np.uint64)).all())
