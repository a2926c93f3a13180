"""Who looks on while a task trains: the loop reports to a watcher, and knows nothing of bars, logs and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Watcher:
    """Gets reports on a run; this one ignores them."""

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        """``step`` of ``steps`` were done before."""

    def step(self, step: int, parts: Mapping[str, float]) -> None:
        """A step is done; the parts of its loss."""

    def record(self, record: dict[str, Any]) -> None:
        """The means since the last record."""

    def saved(self, step: int) -> None:
        """The state after ``step`` steps is on the disk."""

    def close(self) -> None:
        """The run has ended, or stopped."""


class Watchers(Watcher):
    """Hands every report to several, in their order."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        for watcher in self.watchers:
            watcher.begin(step, steps, steps_per_epoch, batch_size)

    def step(self, step: int, parts: Mapping[str, float]) -> None:
        for watcher in self.watchers:
            watcher.step(step, parts)

    def record(self, record: dict[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.record(record)

    def saved(self, step: int) -> None:
        for watcher in self.watchers:
            watcher.saved(step)

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.close()
