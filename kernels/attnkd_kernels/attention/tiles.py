"""The table of launch configurations of attention with its divergence: by kernel, architecture and problem.

Found like that of the map kernels (map/tiles.py): compiled ahead of time with Triton 3.8; of the tiles without register spills the one that issues
the fewest instructions (docs/kernels/one_pass.md). No autotuning.
"""

from __future__ import annotations

import torch

from attnkd_kernels.map.tiles import Tile

_INTERPRETER = Tile(64, 32, 16, 4, 1)

_PLAIN = {  # no masks
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
_HEAVY = {  # masks, and js
    ("fwd", "sm90"): Tile(64, 32, 32, 4, 2),
    ("dq", "sm90"): Tile(64, 32, 32, 4, 2),
    ("dkv", "sm90"): Tile(64, 32, 32, 4, 2),
}


def pick_tile(kernel: str, arch: str, dtype: torch.dtype, width: int, extras: int) -> Tile:
    """The entry for one kernel: 'fwd', 'dq' or 'dkv', and heads of up to 64 channels.

    extras: as in :func:`attnkd_kernels.map.tiles.pick_tile`.
    """
    if arch == "cpu":
        return _INTERPRETER
    keys = (kernel, arch), (kernel, "sm80")
    tables = [_HEAVY, _PLAIN] if extras else [_PLAIN]
    return next(table[key] for key in keys for table in tables if key in table)
