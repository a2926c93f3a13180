"""Where the time of a step goes: reading, teachers, student, losses, backward, update. PyTorch's profiler measures it.

The device is waited for at the end of every part, so that the parts add up to the step. A run that is not profiled overlaps them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from attnkd import files

TABLE, TRACE = "profile.json", "trace.json.gz"
WARM_UP = 5
"""Steps before, in which memory is found, kernels are compiled and workers fill their queues."""
LOSSES, STUDENT, STEP = "losses", "student", "step"


class Profile:
    """Profiles a few steps of a task, and writes their table and trace into a folder.

    Args:
        task: a training task; its ``teachers`` and ``trainable_module`` are told from the rest of its forward.
        device: that computes.
        steps: how many to measure.
        folder: for profile.json and trace.json.gz (chrome://tracing, Perfetto).
    """

    def __init__(self, task: Any, device: torch.device, steps: int, folder: Path) -> None:
        self.device, self.steps, self.folder = device, steps, folder
        self.found: dict[str, Any] | None = None
        """What profile.json has, once it is measured."""
        modules = {STUDENT: getattr(task, "trainable_module", task), **getattr(task, "teachers", {})}
        self.names = list(modules)
        self._seen = WARM_UP + steps
        self._open: list[Any] = []
        self._hooks = [hook for name, module in modules.items() for hook in self._watched(module, name)]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = profile(activities=activities)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything in the block counts for this part of the step."""
        with record_function(name):
            yield
            self._wait()

    def step_done(self) -> None:
        """Count a step; the first of them start the profiler, the last ends it and writes what it found."""
        self._seen -= 1
        if self._seen == self.steps:
            self._profiler.start()
        elif self._seen == 0:
            self._profiler.stop()
            self._write()
            self.close()

    def close(self) -> None:
        """Take the hooks off the models."""
        for hook in self._hooks:
            hook.remove()
        if 0 < self._seen < self.steps:  # the run ended before
            self._profiler.stop()
            self._seen = 0

    def __str__(self) -> str:
        if self.found is None:
            return "profile: the run ended before enough steps were done"
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.found["shares"].items())
        return (
            f"profile: a step takes {self.found['milliseconds_per_step']:.1f} ms: {shares}. Our operations, the attention losses, forward and backward: "
            f"{100 * self.found['attention_loss']:.1f} %. The trace is {self.folder / TRACE}"
        )

    def _watched(self, module: nn.Module, name: str) -> list[Any]:
        @torch.compiler.disable
        def begin(*_: Any) -> None:
            self._open.append(self.part(name))
            self._open[-1].__enter__()

        @torch.compiler.disable
        def end(*_: Any) -> None:
            if self._open:
                self._open.pop().__exit__(None, None, None)

        return [
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        ]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self) -> None:
        events = self._profiler.events() or []
        sums: dict[str, float] = {}
        own, ours = _own(torch.autograd.Function), 0.0
        for event in events:
            if _is(event, own) and not _inside(event, own):
                ours += event.device_time_total if self.device.type == "cuda" else event.cpu_time_total
            elif event.device_type == torch.autograd.DeviceType.CPU:
                sums[event.name] = sums.get(event.name, 0.0) + event.cpu_time_total
        whole = sums[STEP]
        named = {name: sums.get(name, 0.0) for name in ("data", *self.names, "forward", "backward", "update")}
        named[LOSSES] = named.pop("forward") - sum(named[name] for name in self.names)
        named["rest"] = whole - sum(named.values())
        self.found = {
            "steps": self.steps,
            "device": str(self.device),
            "milliseconds_per_step": round(whole / self.steps / 1e3, 3),
            "shares": {name: round(time / whole, 4) for name, time in named.items()},
            "attention_loss": round(ours / whole, 4),
        }
        files.write_json(self.folder / TABLE, self.found)
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            self._profiler.export_chrome_trace(f"{made}/{TRACE}")
            files.write_bytes(self.folder / TRACE, Path(made, TRACE).read_bytes())


def _own(of: type) -> set[str]:
    """Names of the package's autograd functions, and of their backwards, as the profiler writes them."""
    kinds: list[type] = of.__subclasses__()
    found = {kind.__name__ for kind in kinds if kind.__module__.startswith("attnkd.")}
    return found.union({f"{name}Backward" for name in found}, *map(_own, kinds))


def _is(event: Any, own: set[str]) -> bool:
    return event.name in own or event.name.startswith("attnkd::")


def _inside(event: Any, own: set[str]) -> bool:
    above = event.cpu_parent
    while above is not None:
        if _is(above, own):
            return True
        above = above.cpu_parent
    return False
