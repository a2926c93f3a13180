"""The table of launch configurations of attention with its divergence: by kernel, architecture and problem.

Found like that of the map kernels (map/tiles.py): compiled ahead of time with Triton 3.8; of the tiles without register spills the one that issues
the fewest instructions (docs/kernels/one_pass.md). No autotuning.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnkd_kernels.map.tiles import Tile

WIDEST = 96
"""Channels of a head, at most; those beyond 64 are a second tile. Queries, keys, values and two accumulators of them stay on chip: with 128
the last kernel spills, or computes exponentials twice (docs/kernels/one_pass.md)."""

_INTERPRETER = Tile(64, 32, 16, 4, 1)

Table = dict[tuple[str, str], Tile]

_PLAIN: Table = {  # no masks
    ("fwd", "sm80"): Tile(64, 32, 32, 4, 2),
    ("dq", "sm80"): Tile(64, 32, 32, 4, 2),
    ("dkv", "sm80"): Tile(64, 32, 32, 4, 2),
    ("fwd", "sm90"): Tile(128, 128, 64, 8, 2),
    ("dq", "sm90"): Tile(128, 64, 32, 8, 2),
    ("dkv", "sm90"): Tile(64, 64, 32, 4, 2),
    ("fwd", "gfx942"): Tile(64, 64, 32, 4, 2),
    ("dq", "gfx942"): Tile(64, 64, 32, 4, 2),
    ("dkv", "gfx942"): Tile(64, 32, 32, 4, 1),
}
_HEAVY: Table = {  # masks, and js
    ("fwd", "sm90"): Tile(64, 32, 32, 4, 2),
    ("dq", "sm90"): Tile(64, 32, 32, 4, 2),
    ("dkv", "sm90"): Tile(64, 32, 32, 4, 2),
    ("fwd", "sm100"): Tile(64, 32, 32, 8, 2),
    ("dkv", "sm120"): Tile(64, 32, 32, 8, 2),
}
_SPLIT: Table = {  # no masks, 65 to 96 channels
    ("fwd", "sm80"): Tile(64, 32, 32, 4, 2),
    ("dq", "sm80"): Tile(64, 32, 32, 4, 2),
    ("dkv", "sm80"): Tile(64, 16, 16, 4, 2),
    ("fwd", "sm90"): Tile(128, 64, 32, 8, 2),
    ("dq", "sm90"): Tile(128, 64, 32, 8, 2),
    ("dkv", "sm90"): Tile(128, 32, 32, 8, 2),
    ("dkv", "sm100"): Tile(64, 32, 32, 4, 2),
    ("fwd", "gfx942"): Tile(64, 64, 32, 4, 2),
    ("dq", "gfx942"): Tile(64, 64, 32, 4, 2),
    ("dkv", "gfx942"): Tile(64, 32, 32, 4, 1),
}
_SPLIT_HEAVY: Table = {  # the same with masks, and js
    ("dkv", "sm90"): Tile(64, 16, 16, 4, 2),
    ("fwd", "sm100"): Tile(64, 32, 16, 8, 2),
    ("dq", "sm100"): Tile(64, 32, 32, 8, 2),
    ("fwd", "sm120"): Tile(64, 32, 16, 8, 2),
    ("dq", "sm120"): Tile(64, 32, 32, 8, 2),
}


def pick_tile(kernel: str, arch: str, dtype: torch.dtype, width: int, extras: int) -> Tile:
    """The entry for one kernel: 'fwd', 'dq' or 'dkv', and heads of up to :data:`WIDEST` channels.

    extras: as in :func:`attnkd_kernels.map.tiles.pick_tile`.
    """
    split = width > 64
    if arch == "cpu":
        tile = _INTERPRETER
    else:
        keys = (kernel, arch), (kernel, "sm80")
        plain, heavy = (_SPLIT, _SPLIT_HEAVY) if split else (_PLAIN, _HEAVY)
        tables = [heavy, plain] if extras else [plain]
        tile = next(table[key] for key in keys for table in tables if key in table)
    return replace(tile, split=WIDEST) if split else tile
