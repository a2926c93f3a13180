"""How a run is carried out on this machine or these."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(4, CORES)
"""More processes than cores only disturb each other."""


@dataclass(frozen=True)
class Carrying:
    """How a run is carried out. What it ends with does not depend on it, but for rounding.

    Args:
        at_once: images that each process computes at a time; None is its whole share of a batch. Gradients of the parts are
            added up.
        workers: processes that read and augment images, for each training process.
        precision: 'fp32', 'bf16' or 'fp16' autocast.
        compile: compile student and teachers.
        shard: each of several processes keeps a share of the student's weights, gradients and optimizer state in place of all of
            them (FSDP2).
        checkpointing: the student keeps each block's input alone for the backward, and runs the block again there: less memory,
            more time, the same gradients.
        save_minutes: time between checkpoints.
        save_steps: steps between checkpoints, besides; None for none.
        log_steps: steps between records of the log.
        nonfinite_limit: so many steps in a row whose gradient is not finite stop the run. Each is left out.
        profile: so many steps are profiled: profile.json says what share of a step each part takes, trace.json.gz has all.
    """

    at_once: int | None = None
    workers: int = WORKERS
    precision: str = "fp32"
    compile: bool = False
    shard: bool = False
    checkpointing: bool = False
    save_minutes: float = 10.0
    save_steps: int | None = None
    log_steps: int = 50
    nonfinite_limit: int = 20
    profile: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for name in ("at_once", "save_steps", "log_steps", "nonfinite_limit", "profile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.shard and self.compile:
            raise ValueError("shard, compile: not both; a compiled student cannot be spread over processes yet")
        if self.workers < 0 or not self.save_minutes > 0:
            raise ValueError(f"workers, save_minutes: expected >= 0 and > 0, got {self.workers}, {self.save_minutes}")
