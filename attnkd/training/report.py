"""What a run shows and writes while it trains: a progress bar and a log of JSON lines, which others may get too."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkd import files
from attnkd.training.trackers import Tracker
from attnkd.training.watchers import Watcher

LOG = "log.jsonl"


class Report(Watcher):
    """Progress on the screen and in the run's folder.

    Args:
        folder: of the run.
        device: whose memory is shown.
        trackers: get every record too.
        shown: on the screen too.
    """

    def __init__(
        self, folder: Path, device: torch.device, trackers: Sequence[Tracker] = (), shown: bool = True
    ) -> None:
        self.path, self.device, self.bar, self.trackers = folder / LOG, device, None, trackers
        self.shown = shown

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        from tqdm.auto import tqdm

        self._forget_after(step)
        self.steps, self.per_epoch, self.batch_size = steps, steps_per_epoch, batch_size
        self.since, self.at = time.monotonic(), step
        hide = None if self.shown else True  # None: only where standard error is no terminal
        self.bar = tqdm(
            total=steps * batch_size, initial=step * batch_size, unit="img", unit_scale=True, disable=hide, leave=False
        )

    def step(self, step: int, parts: Mapping[str, float]) -> None:
        assert self.bar is not None
        self.bar.set_description(f"epoch {step / self.per_epoch:.2f}", refresh=False)
        self.bar.set_postfix_str("  ".join(f"{name} {value:.4g}" for name, value in parts.items()), refresh=False)
        self.bar.update(self.batch_size)

    def record(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record["step"]
        speed = (step - self.at) * self.batch_size / max(now - self.since, 1e-9)
        self.since, self.at = now, step
        record = {**record, "images_per_second": round(speed, 1), **self._memory()}
        with files.named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.write({name: value for name, value in record.items() if name != "step"}, step)
        if self.shown and self.bar is not None and self.bar.disable:  # no terminal: a line for each record
            left = (self.steps - step) * self.batch_size / speed
            shown = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("step", "images_per_second"))
            print(f"step {step}/{self.steps}  {shown}  {speed:.0f} img/s  {_duration(left)} left", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def _memory(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"gpu_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)}

    def _forget_after(self, step: int) -> None:
        """Records of steps that a kill undid, and a line that it cut, go."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            files.write_text(self.path, "".join(kept))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
