"""One operation on one shape: every implementation checked first, then timed."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from triton.errors import TritonError

from attnkd.testing.tolerance import Result
from benchmarks import judge, shapes
from benchmarks.calls import Call, gradients
from benchmarks.machine import DeviceLost
from benchmarks.operations import Implementation, Operation
from benchmarks.shapes import Shape
from benchmarks.timing import Clock, GpuClock, host_us, measure


@dataclass(frozen=True)
class Settings:
    """How to measure.

    clock: None where times would mean nothing (kernels in the interpreter): cases are checked only.
    report: whether measured numbers go into the records; a smoke run measures and drops them.
    """

    device: torch.device
    modes: tuple[str, ...] = shapes.MODES
    clock: Clock | None = None
    report: bool = True
    budget_ms: float = 200.0
    compile_mode: str = "default"
    compile_backend: str = "inductor"
    count_launches: bool = True


class Run:
    """An implementation of a call, as functions to time; every implementation gets the same random tensors."""

    def __init__(self, call: Call, implementation: Implementation, settings: Settings, train: bool = True) -> None:
        options: dict[str, Any] = {"backward": train} | ({"rows": 0} if implementation.all_queries else {})
        self.given = replace(call, **options).tensors(settings.device)
        self.function = implementation.function
        self.upstream: list[Tensor] | None = None
        if implementation.compiled:
            torch._dynamo.reset()  # every case is compiled for its own sizes
            how: dict[str, Any] = {"backend": settings.compile_backend}
            if settings.compile_backend == "inductor":
                how["mode"] = settings.compile_mode
            self.function = torch.compile(self.function, fullgraph=True, dynamic=False, **how)

    def forward(self) -> tuple[Tensor, ...]:
        found = self.function(**self.given)
        return found if isinstance(found, tuple) else (found,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return gradients(outputs, self.given, self.upstream)

    def once(self, upstream: list[Tensor] | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Results and gradients. Keeps the upstream in the results' dtypes, so that no conversion is timed later."""
        outputs = self.forward()
        if upstream is not None:
            needed = [x for x in outputs if x.requires_grad]
            self.upstream = [g.to(x.dtype) for x, g in zip(needed, upstream, strict=True)]
        return outputs, self.backward(outputs)

    def mode(self, name: str) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        """(what is timed, what prepares it)."""
        if name == "fwd":
            return lambda _: self.forward(), lambda: None
        if name == "bwd":
            return self.backward, self.forward
        return lambda _: self.backward(self.forward()), lambda: None


def measure_case(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
    implementations: tuple[str, ...] | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of every implementation and mode, ours first."""
    identity = {"operation": operation.name, **shapes.describe(shape, dtype)}
    chosen = [i for i in operation.implementations if implementations is None or i.name in implementations]
    call = operation.call.at(shape, dtype)
    try:
        expected = judge.truth(call, settings.device)
    except (RuntimeError, MemoryError) as error:
        status, detail = failure(error, ours=True, device=settings.device)
        for implementation in chosen:
            for mode in settings.modes:
                names = {"mode": mode, "implementation": implementation.name}
                yield identity | names | {"status": status, "detail": f"the float64 check itself: {detail}"}
        return
    floors, flops = call.floors(), call.flops()
    for implementation in chosen:
        for record in _measure_implementation(call, implementation, expected, settings):
            passes = [p for p, mode in (("forward", "fwd"), ("backward", "bwd")) if record["mode"] in (mode, "both")]
            work = {"floor_bytes": sum(floors[p] for p in passes), "flops": sum(flops[p] for p in passes)}
            yield identity | {"implementation": implementation.name} | record | work
        release(settings.device)


def _measure_implementation(
    call: Call, implementation: Implementation, expected: judge.Truth, settings: Settings
) -> Iterator[dict[str, Any]]:
    modes = list(settings.modes)
    try:
        run = Run(call, implementation, settings)
        synchronize(settings.device)
        start = time.perf_counter()
        outputs, grads = run.once(expected.upstream)
        synchronize(settings.device)
        first_ms = (time.perf_counter() - start) * 1e3
    except Exception as error:
        status, detail = failure(error, implementation.ours, settings.device)
        if status == "unsupported" and "fwd" in modes:
            record = _forward_only(call, implementation, expected, settings)
            if record is not None:
                yield {"mode": "fwd"} | record
                modes.remove("fwd")
        for mode in modes:
            yield {"mode": mode, "status": status, "detail": detail}
        return
    checked = verdict(expected.judge(implementation, outputs, grads))
    del outputs, grads
    if settings.clock is not None and settings.report:
        checked["first_call_ms"] = round(first_ms, 3)
    for mode in modes:
        record = {"mode": mode} | checked
        if checked["status"] == "ok" and settings.clock is not None:
            try:
                numbers = _numbers(run, mode, settings)
                record |= numbers if settings.report else {}
            except Exception as error:
                status, detail = failure(error, implementation.ours, settings.device)
                record |= {"status": status, "detail": detail}
        yield record


def _forward_only(
    call: Call, implementation: Implementation, expected: judge.Truth, settings: Settings
) -> dict[str, Any] | None:
    """Of an implementation that has no backward on this device: whether its forward is right. It gets no time."""
    try:
        outputs = Run(call, implementation, settings, train=False).forward()
    except Exception as error:
        failure(error, implementation.ours, settings.device)
        return None
    return {"detail": "no backward on this device"} | verdict(expected.judge(implementation, outputs, ()))


def verdict(results: list[Result]) -> dict[str, Any]:
    """Status and error of a record: the error that came closest to what is allowed, and all that are beyond it."""
    worst = max(results, key=lambda result: result.ratio)
    error = float(f"{worst.error:.3g}") if math.isfinite(worst.error) else None
    wrong = "; ".join(str(result) for result in results if not result.ok)
    return {"status": "FAIL", "error": error, "detail": wrong} if wrong else {"status": "ok", "error": error}


def _numbers(run: Run, mode: str, settings: Settings) -> dict[str, Any]:
    call, setup = run.mode(mode)
    assert settings.clock is not None
    found: dict[str, Any] = {}
    host = host_us(lambda: call(setup()), lambda: synchronize(settings.device))
    if mode != "bwd":
        found["host_us"] = round(host, 1)
    if isinstance(settings.clock, GpuClock):
        settings.clock.stay_ahead(host)
    found["ms"] = measure(call, setup, clock=settings.clock, budget_ms=settings.budget_ms).as_dict()
    if settings.device.type == "cuda":
        if mode != "bwd":
            found |= graph_ms(call, setup, settings)
        found["peak_bytes"] = peak_bytes(call, setup, settings.device)
        if settings.count_launches:
            found |= count_launches(call, setup, settings.device)
    return found


def graph_ms(call: Callable[[Any], Any], setup: Callable[[], Any], settings: Settings) -> dict[str, Any]:
    """The call replayed as one CUDA graph: the device's time without anything that the host does between two kernels."""
    assert settings.clock is not None
    beside = torch.cuda.Stream(settings.device)  # a capture wants its warm-up on another stream
    beside.wait_stream(torch.cuda.current_stream(settings.device))
    with torch.cuda.stream(beside):
        for _ in range(3):
            call(setup())
    torch.cuda.current_stream(settings.device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call(setup())
    except RuntimeError as error:
        return {"graph": f"not captured: {str(error).splitlines()[0][:120]}"}
    return {"graph_ms": measure(lambda _: graph.replay(), clock=settings.clock, budget_ms=settings.budget_ms).as_dict()}


def peak_bytes(call: Callable[[Any], Any], setup: Callable[[], Any], device: torch.device) -> int:
    """Device memory at the peak of the call beyond what was allocated before ``setup``, results included."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    argument = setup()
    torch.cuda.reset_peak_memory_stats(device)
    result = call(argument)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def count_launches(call: Callable[[Any], Any], setup: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Kernels, copies and fills that one call puts on the device; empty where the profiler sees nothing."""
    argument = setup()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call(argument)
        synchronize(device)
    events = [e for e in recorded.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    names: dict[str, int] = {}
    for event in events:
        short = event.name.split("(")[0][-80:]
        names[short] = names.get(short, 0) + 1
    return {"launches": len(events), "kernels": names} if events else {}


def failure(error: BaseException, ours: bool, device: torch.device) -> tuple[str, str]:
    """(status, first line of the message) of a case that raised.

    Raises:
        DeviceLost: the device does not answer any more.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    detail = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower()
    error.__traceback__ = None  # it holds the tensors of the failed call
    try:
        release(device)
    except Exception as lost:
        raise DeviceLost(f"{detail}; then {type(lost).__name__}: {str(lost).splitlines()[0]}") from None
    if out_of_memory:
        return "OOM", ""
    # The package refuses with NotImplementedError what it does not offer; anything else that it raises is a bug. Of other
    # libraries, what they and their compilers raise is a limit of theirs, but a slip in this suite must not pass for one.
    limits = (NotImplementedError,) if ours else (RuntimeError, TritonError)
    return ("unsupported" if isinstance(error, limits) else "error"), detail


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
