"""The table of launch configurations of the whole-map kernels: by kernel, architecture, dtype and head width.

Chosen by compiling candidates ahead of time, largest first, and keeping the first without register spills and within the
target's shared memory (docs/kernels/map.md has the counts). No autotuning.

A *heavy* problem (masks, a mean over heads, Jensen–Shannon's software logarithm) keeps far more values alive than a plain one,
so it has its own entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkd_kernels.launch import padded


@dataclass(frozen=True)
class Tile:
    """queries × keys of the map per step. Heads of more than ``whole`` channels are streamed, ``chunk`` channels at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    whole: int = 128
    chunk: int = 64
    out_columns: int = 128

    def columns(self, width: int) -> int:
        return padded(width) if width <= self.whole else self.chunk

    def left_right(self, queries_left: bool) -> tuple[int, int]:
        return (self.queries, self.keys) if queries_left else (self.keys, self.queries)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


_INTERPRETER = Tile(64, 32, 4, 1, whole=64, chunk=32, out_columns=64)
# IEEE products have no matrix unit: operands live in registers.
_FP32 = Tile(32, 16, 4, 2, whole=16, chunk=16, out_columns=64)
_FP32_OF = {
    ("dq", "sm100"): Tile(32, 16, 8, 2, whole=16, chunk=16, out_columns=64),
    ("bias", "sm120"): Tile(32, 16, 4, 1, whole=16, chunk=16),
}
_STREAMED = Tile(64, 64, 8, 2, whole=64)

_MEAN = Tile(64, 32, 8, 2, whole=32, chunk=32, out_columns=64)  # one map of every head is alive beside the merged ones
_MEAN_SMALL = Tile(32, 32, 8, 1, whole=32, chunk=32, out_columns=64)
_MEAN_KEYS_LEFT = Tile(32, 64, 8, 2, whole=32, chunk=32, out_columns=64)

_PLAIN = {  # (kernel, architecture): tile up to 64 channels, tile up to 128
    ("fwd", "sm80"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("dq", "sm80"): (Tile(64, 64, 4, 3), _STREAMED),
    ("dk", "sm80"): (Tile(64, 64, 4, 2), _STREAMED),
    ("fwd", "sm120"): (Tile(64, 64, 8, 2), _STREAMED),
    ("fwd", "sm90"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("dq", "sm90"): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("dk", "sm90"): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    ("fwd", "sm100"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("dq", "sm100"): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2, whole=64)),
    ("dk", "sm100"): (Tile(32, 64, 4, 2), _STREAMED),
    ("fwd", "gfx942"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("dq", "gfx942"): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("dk", "gfx942"): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
}  # fmt: skip
_HEAVY = {  # (kernel, architecture): tile up to 64 channels, tile beyond
    ("fwd", "sm80"): (Tile(64, 64, 8, 2), _STREAMED),
    ("dq", "sm80"): (Tile(32, 32, 4, 2), _STREAMED),
    ("dk", "sm80"): (Tile(32, 64, 8, 2), _STREAMED),
    ("value", "sm80"): (Tile(64, 32, 8, 2, whole=32, chunk=32), _STREAMED),
    ("bias", "sm80"): (Tile(64, 64, 8, 2), _STREAMED),
    ("fwd", "sm90"): (Tile(64, 64, 4, 3), _STREAMED),
    ("dq", "sm90"): (Tile(64, 64, 4, 3), _STREAMED),
    ("dk", "sm90"): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2, whole=64)),
    ("bias", "sm90"): (Tile(64, 64, 4, 3), _STREAMED),
    ("dq", "sm100"): (_STREAMED, Tile(64, 32, 8, 2, whole=64)),
    ("dk", "sm100"): (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2, whole=64)),
    ("dq", "sm120"): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2, whole=64)),
    ("dk", "sm120"): (Tile(32, 32, 8, 2), _STREAMED),
    ("bias", "sm120"): (Tile(32, 64, 8, 2), _STREAMED),
    ("fwd", "gfx942"): (Tile(64, 64, 8, 2), _STREAMED),
    ("dq", "gfx942"): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1, whole=64, chunk=32, out_columns=64)),
    ("dk", "gfx942"): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1, whole=64, chunk=32, out_columns=64)),
    ("value", "gfx942"): (Tile(64, 64, 8, 2), _STREAMED),
    ("bias", "gfx942"): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1, whole=64, chunk=32)),
}  # fmt: skip


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


def pick_tile(kernel: str, arch: str, dtype: torch.dtype, width: int, heavy: bool, mean: bool) -> Tile:
    """The entry for one kernel ('fwd', 'lse', 'value', 'dq', 'dk', 'bias') and a head of ``width`` channels.

    heavy: masks or js; mean: heads are averaged.
    """
    if arch == "cpu":
        return _INTERPRETER
    # sm_120 has sm_80's matrix instructions; the tiles fit the shared memory of either.
    family = "sm80" if arch == "sm120" else arch
    if dtype == torch.float32:
        return _FP32_OF.get((kernel, arch), _FP32)
    if kernel == "lse":
        return Tile(64, 64, 4, 2) if width <= 64 else _STREAMED
    if mean and (family == "gfx942" or (family == "sm80" and kernel in ("dk", "value"))):
        return _MEAN_SMALL
    if mean:
        return _MEAN_KEYS_LEFT if kernel == "dk" else _MEAN
    table = _PLAIN if not heavy and width <= 128 else _HEAVY
    narrow, wide = table.get((kernel, arch)) or table.get((kernel, family)) or (_STREAMED, _STREAMED)
    return narrow if width <= 64 else wide
