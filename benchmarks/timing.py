"""Timing: median and percentiles of repeated calls, on a GPU with events or on the CPU with a clock.

On a GPU every sample is one call between two events. Before it a buffer larger than the last cache is read, so that no call finds
its inputs there (overwriting it would leave dirty lines that are written back inside the sample), and the device is kept busy
until the host has had the time to enqueue the whole call: a sample is the time the *device* needs. What the host needs is another number (:func:`host_us`), since in a training loop the host runs
ahead of the device and its time is hidden.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

MIN_SAMPLES, MAX_SAMPLES = 20, 500
WARM_UP_MS = 25.0
HOST_ROUND_S = 0.05


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile, and of how many samples."""

    median: float
    p20: float
    p80: float
    samples: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock(Protocol):
    def samples(self, count: int, call: Callable[[Any], Any], setup: Callable[[], Any]) -> list[float]:
        """Milliseconds of ``count`` runs of ``call(setup())``, of which only the call is timed."""
        ...


class HostClock:
    """Times calls that have finished when they return."""

    def samples(self, count: int, call: Callable[[Any], Any], setup: Callable[[], Any]) -> list[float]:
        found = []
        for _ in range(count):
            argument = setup()
            start = time.perf_counter()
            call(argument)
            found.append((time.perf_counter() - start) * 1e3)
        return found


class GpuClock:
    """Times calls on a CUDA or ROCm device.

    Args:
        device: where the calls run; it must be the current device.
        flush: what clears the cache before every sample: 'read', 'write' (for comparison) or None.
        ahead: keep the device busy before a sample while the host enqueues the call; see :meth:`stay_ahead`.
    """

    def __init__(self, device: torch.device, flush: str | None = "read", ahead: bool = True) -> None:
        self.device, self.flush, self.ahead_ms = device, flush, 0.2 if ahead else 0.0
        self._cache = torch.zeros(_cache_bytes(device) // 4 if flush else 0, device=device)
        self._sum = torch.zeros((), device=device)
        _warm_up(device)
        self._cycles_per_ms = _cycles_per_ms()

    def stay_ahead(self, host_us: float) -> None:
        """Be told what the host needs for one sample, so that the device waits at least that long. The device is warm now."""
        self.ahead_ms = min(max(0.2, 1.5e-3 * host_us), 20.0)
        self._cycles_per_ms = _cycles_per_ms()

    def _clear_cache(self) -> None:
        if self.flush == "read":
            torch.sum(self._cache, 0, out=self._sum)
        elif self.flush == "write":
            self._cache.zero_()

    def samples(self, count: int, call: Callable[[Any], Any], setup: Callable[[], Any]) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            argument = setup()
            self._clear_cache()
            if self.ahead_ms:
                torch.cuda._sleep(int(self.ahead_ms * self._cycles_per_ms))
            start.record()
            call(argument)
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]


def measure(
    call: Callable[[Any], Any],
    setup: Callable[[], Any] = lambda: None,
    *,
    clock: Clock,
    budget_ms: float = 200.0,
    min_samples: int = MIN_SAMPLES,
) -> Timing:
    """Time ``call(setup())`` for about ``budget_ms``, after a warm-up; ``setup`` is not timed.

    Args:
        call: what is timed; gets what ``setup`` returned.
        setup: runs before every sample, such as the forward of a backward.
        clock: :class:`GpuClock` or :class:`HostClock`.
        budget_ms: how long the timed calls may take together; ``min_samples`` comes first.
        min_samples: never fewer samples than this.
    """
    enabled = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is not the call's time
    try:
        estimate = statistics.median(clock.samples(3, call, setup))
        warm_ups = min(int(WARM_UP_MS / max(estimate, 1e-3)), MAX_SAMPLES)
        if warm_ups:
            estimate = statistics.median(clock.samples(warm_ups, call, setup))
        count = max(min_samples, min(int(budget_ms / max(estimate, 1e-3)), MAX_SAMPLES))
        return summarise(clock.samples(count, call, setup))
    finally:
        if enabled:
            gc.enable()


def summarise(samples: list[float]) -> Timing:
    """Median, p20 and p80 (linear interpolation between the sorted samples)."""
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return Timing(*(round(quantile(share), 6) for share in (0.5, 0.2, 0.8)), len(ordered))


def host_us(call: Callable[[], Any], synchronize: Callable[[], Any], rounds: int = 5, calls: int = 10) -> float:
    """Microseconds the host needs to issue one call: the median over rounds, which are short so that no queue fills up."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    calls = max(1, min(calls, int(HOST_ROUND_S / (time.perf_counter() - start))))
    found = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    synchronize()
    return statistics.median(found)


def _cache_bytes(device: torch.device) -> int:
    """Twice the last cache and at least 256 MiB (512 where a memory-side cache is not reported)."""
    least = (512 if torch.version.hip else 256) << 20
    return max(least, 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def _warm_up(device: torch.device, seconds: float = 0.3) -> None:
    """Work until the clocks have risen from where an idle device keeps them."""
    a = torch.zeros(2048, 2048, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)
        torch.cuda.synchronize(device)


def _cycles_per_ms() -> float:
    """How many cycles of torch.cuda._sleep last one millisecond at the device's present clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / start.elapsed_time(end)
