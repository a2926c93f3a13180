"""The processes of a run, as torchrun starts them: who they are, and what they decide together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class World:
    """This process among those of a run. One process alone is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Every number's maximum over all processes. All of them must call it."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return values.tolist()

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Every number's sum over all processes. All of them must call it."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return values.tolist()

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Every number's mean over all processes. All of them must call it."""
        return [number / self.size for number in self.sum(numbers)]

    def wait(self) -> None:
        """Until all processes are here. All of them must call it."""
        self.largest([0])

    def share(self, count: int) -> range:
        """Which of ``count`` things are this process's: every ``size``-th one. Never none, so that all processes do the same: where
        there are too few things the first one is done again, and :meth:`together` leaves the copy out."""
        return range(self.rank, count, self.size) or range(min(1, count))

    def together(self, rows: Tensor, count: int, at_once: int = 8192) -> Tensor:
        """What the processes made of their shares of ``count`` things, in the order of these. All of them must call it.

        Args:
            rows: [n, ...], on any device: one row for each of this process's things.
            at_once: rows of a process that are sent at a time, through the memory of the device.

        Returns:
            [count, ...] on the CPU.
        """
        if self.size == 1:
            return rows.cpu()[:count]
        most = math.ceil(count / self.size)
        found = torch.empty(most, self.size, *rows.shape[1:], dtype=rows.dtype)
        for start in range(0, most, at_once):
            sent = rows.new_zeros(min(at_once, most - start), *rows.shape[1:], device=self.device)
            mine = rows[start : start + len(sent)]
            sent[: len(mine)] = mine.to(self.device)
            parts = [torch.empty_like(sent) for _ in range(self.size)]
            distributed.all_gather(parts, sent)
            found[start : start + len(sent)] = torch.stack(parts, 1).cpu()
        return found.flatten(0, 1)[:count]


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world of this process: a process group that exists, torchrun's where its variables are set, else this process alone.

    Args:
        device: where to compute; 'cuda' becomes the GPU with this process's local rank.
    """
    if distributed.is_initialized():
        yield World(device, distributed.get_rank(), distributed.get_world_size())
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
