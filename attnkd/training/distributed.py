"""The processes of a run, as torchrun starts them: who they are, and what they decide together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


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

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """Every number's mean over all processes. All of them must call it."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return (values / self.size).tolist()


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
