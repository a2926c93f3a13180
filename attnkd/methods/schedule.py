"""Numbers that change during training: weights that warm up, fade or stop, and temperatures; by epoch or by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from attnkd.attention.checks import integer

SHAPES = ("linear", "cosine")
UNITS = ("epoch", "step")


@dataclass(frozen=True)
class Schedule:
    """A number as a function of time t, counted in epochs or in optimizer steps.

    ``start`` → ``value`` over the first ``warmup``, then ``value``, then → ``end`` over the last ``decay`` before
    ``stop``, and ``end`` from t = ``stop`` on. The rise is linear, the fall linear or half a cosine.

    Args:
        value: in force after the warm-up.
        warmup: how long the linear rise takes; 0 for none.
        start: at t = 0 if there is a warm-up.
        stop: from here on the number is ``end``. None: never.
        decay: how long the fall before ``stop`` takes; 0 is a sudden stop.
        end: the number from ``stop`` on.
        shape: of the fall, 'linear' or 'cosine'.
        unit: what t counts, 'epoch' (fractions allowed) or 'step'.

    Raises:
        ValueError: an option out of range, or a warm-up and a fall that overlap.

    Example::

        Schedule(0.1, stop=100)                              # SSTA: 0.1 for 100 epochs, then 0
        Schedule(10.0, start=1.0, warmup=1000, unit="step")  # a temperature that rises for 1000 steps
    """

    value: float
    warmup: float = 0.0
    start: float = 0.0
    stop: float | None = None
    decay: float = 0.0
    end: float = 0.0
    shape: str = "linear"
    unit: str = "epoch"

    def __post_init__(self) -> None:
        for name in ("value", "start", "end"):
            _check_number(name, getattr(self, name))
        for name in ("warmup", "decay"):
            _check_number(name, getattr(self, name), minimum=0.0)
        if self.stop is not None:
            _check_number("stop", self.stop, minimum=0.0)
        for name, choices in (("shape", SHAPES), ("unit", UNITS)):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name}: expected one of {listed}, got {getattr(self, name)!r}")
        if self.stop is None and self.decay:
            raise ValueError(f"decay: needs stop, the time at which the fall ends, got decay={self.decay} without one")
        if self.stop is not None and self.warmup + self.decay > self.stop:
            raise ValueError(
                f"stop: expected at least warmup + decay = {self.warmup + self.decay}, got {self.stop}; the rise and the "
                "fall would overlap"
            )

    def at(self, t: float) -> float:
        """The number at time ``t`` >= 0."""
        if self.stop is not None and t >= self.stop:
            return self.end
        if t < self.warmup:
            return self.start + (self.value - self.start) * t / self.warmup
        if self.stop is not None and self.decay and t > self.stop - self.decay:
            done = 1.0 - (self.stop - t) / self.decay
            if self.shape == "cosine":
                done = 0.5 - 0.5 * math.cos(math.pi * done)
            return self.value + (self.end - self.value) * done
        return self.value

    @property
    def constant(self) -> bool:
        return not self.warmup and self.stop is None

    @property
    def reached(self) -> tuple[float, ...]:
        """The numbers it moves between: it takes them all, and none outside their range."""
        starts = (self.start,) if self.warmup else ()
        return (*starts, self.value, *(() if self.stop is None else (self.end,)))

    @property
    def off(self) -> bool:
        """0 at all times."""
        return not any(self.reached)

    def __str__(self) -> str:
        return f"{self.value:g}" if self.constant else repr(self)


class Schedules:
    """The scheduled numbers of a training task by name, and the time at which they are read.

    Plain numbers are constants. A number that changes cannot be read before the time was set: forgetting
    :meth:`set_epoch` is an error, not a weight that never stops.

    Example::

        weights = Schedules(alpha=1.0, beta=Schedule(0.1, stop=100))
        weights.set_epoch(99)
        weights["beta"]                     # 0.1
        weights.set_epoch(100)
        weights["beta"]                     # 0.0
    """

    def __init__(self, **numbers: float | Schedule) -> None:
        self.numbers: dict[str, Schedule] = {}
        for name, number in numbers.items():
            if not isinstance(number, Schedule):
                _check_number(name, number)
                number = Schedule(float(number))
            self.numbers[name] = number
        self.time: dict[str, float | None] = dict.fromkeys(UNITS)

    def __getitem__(self, name: str) -> float:
        schedule = self.numbers[name]
        if schedule.constant:
            return schedule.value
        time = self.time[schedule.unit]
        if time is None:
            raise RuntimeError(
                f"{name}: changes by {schedule.unit}, but set_{schedule.unit}() was never called; call it with the "
                f"current {schedule.unit} (0 at the start) before the first forward"
            )
        return schedule.at(time)

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch: 0 in the first, 1.5 in the middle of the second."""
        self._set("epoch", epoch)

    def set_step(self, step: int) -> None:
        """Tell the number of optimizer steps done so far."""
        self._set("step", step)

    @property
    def constant(self) -> bool:
        """Whether no number changes, so that no time is needed."""
        return all(number.constant for number in self.numbers.values())

    def __str__(self) -> str:
        return ", ".join(f"{name}={number}" for name, number in self.numbers.items())

    def values(self) -> dict[str, float]:
        """All numbers now, for logs."""
        return {name: self[name] for name in self.numbers}

    def state_dict(self) -> dict[str, Any]:
        """The time alone: what the numbers are at which time belongs to the configuration."""
        return dict(self.time)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            KeyError: a state without 'epoch' or 'step'.
        """
        self.time = {unit: state[unit] for unit in UNITS}

    def _set(self, unit: str, time: float) -> None:
        _check_number(unit, time, minimum=0.0)
        whole = integer(time)  # a checkpoint holds Python's numbers, not NumPy's
        self.time[unit] = float(time) if whole is None else whole


def _check_number(name: str, number: object, minimum: float = -math.inf) -> None:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not math.isfinite(number) or number < minimum:
        at_least = "" if minimum == -math.inf else f" >= {minimum:g}"
        raise ValueError(f"{name}: expected a finite number{at_least}, got {number}")
