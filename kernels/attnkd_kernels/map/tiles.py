"""The table of launch configurations of the whole-map kernels: by kernel, architecture, dtype, head width and problem.

Chosen by compiling candidates ahead of time with Triton 3.6 and 3.9, largest first, and keeping the first without register
spills in the calls that need most of them, within the target's shared memory (docs/kernels/map.md). No autotuning.

Stages of a pipeline are worth less than a second resident program: where three leave room for one program, two are taken.

What decides: sm_80 and sm_120 give 16 rows of the left operand to a warp, so 64 rows make four; eight would compute every row
twice. sm_90 and sm_100 have matrix instructions of 64 rows for four warps. gfx942 gives a program of four warps twice
the registers that one of eight gets. A problem that keeps more values alive (``extras``) streams narrower tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnkd_kernels.launch import padded


@dataclass(frozen=True)
class Tile:
    """What a program computes at a time. Heads of more than ``whole`` channels are streamed, ``chunk`` channels at a time, but for
    those of up to ``split`` channels: they are two tiles, of 64 channels and of the rest.

    Attributes:
        stays: queries (the key gradient: keys) that a program owns.
        streams: keys (the key gradient: queries) of a step of the loop without checks.
        narrow: the same for the loop with checks: masks, and the last few rows.
        out_columns: channels of a streamed head's gradient that one program writes.
        maxnreg: registers a thread may use. NVIDIA's assembler sometimes spills a few below 255 to have one more program resident.
        lanes: partial sums that a row's threads keep of a sum over its keys.
    """

    stays: int
    streams: int
    narrow: int
    warps: int
    stages: int
    whole: int = 128
    split: int = 0
    chunk: int = 64
    out_columns: int = 128
    maxnreg: int | None = None
    lanes: int = 8

    def rest(self, width: int) -> int:
        """Channels of a head's second tile, 0 without."""
        return padded(width - 64) if 64 < width <= self.split else 0

    def columns(self, width: int) -> int:
        """Channels of a head that are multiplied at a time, but for the second tile's."""
        if self.rest(width):
            return 64
        return padded(width) if width <= self.whole else self.chunk

    def columns_out(self, width: int) -> int:
        """Channels of a gradient that one program writes."""
        if self.rest(width):
            return 64 + self.rest(width)
        return padded(width) if width <= self.whole else self.out_columns

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


_INTERPRETER = Tile(64, 32, 16, 4, 1, whole=64, split=96, chunk=32, out_columns=64)
# IEEE products have no matrix unit on NVIDIA: operands live in registers, and the assembler must be told to use them.
_FP32 = Tile(32, 16, 16, 4, 2, whole=16, chunk=16, out_columns=64, maxnreg=255)
_FP32_OF = {
    ("dq", "sm90"): replace(_FP32, maxnreg=None),
    ("dk", "sm80"): replace(_FP32, stays=16, streams=32, stages=1),
    ("dk", "sm90"): replace(_FP32, stays=16, streams=32),
    ("dk", "sm120"): replace(_FP32, stays=16, streams=32),
    ("dq", "sm100"): replace(_FP32, stages=3),
    ("dk", "sm100"): replace(_FP32, stays=16, streams=32),
    ("dq", "sm120"): replace(_FP32, stages=3),
}
_FP32_GFX942 = Tile(32, 32, 32, 4, 2, whole=32, chunk=32, out_columns=64)

Pair = tuple[Tile, Tile]  # up to 64 channels, beyond

_PLAIN: dict[tuple[str, str], Pair] = {  # no extras, up to 128 channels
    ("value", "sm80"): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2, whole=64)),
    ("unit", "sm80"): (Tile(64, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2, whole=64, chunk=32)),
    ("unit", "sm120"): (Tile(64, 64, 32, 4, 3, maxnreg=255), Tile(64, 32, 32, 4, 1, whole=64)),
    ("dq", "sm80"): (Tile(64, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2, whole=64)),
    ("dq", "sm120"): (Tile(64, 64, 32, 4, 3, maxnreg=255), Tile(64, 32, 32, 4, 1, whole=64)),
    ("dk", "sm80"): (Tile(64, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2, whole=64)),
    ("value", "sm120"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("value", "sm90"): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2)),
    ("unit", "sm90"): (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 2)),
    ("dq", "sm90"): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2)),
    ("dk", "sm90"): (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 2)),
    ("value", "sm100"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)),
    ("dq", "sm100"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("dk", "sm100"): (Tile(64, 64, 32, 8, 2, maxnreg=255), Tile(64, 64, 32, 8, 2)),
    ("value", "gfx942"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2)),
    ("dq", "gfx942"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2)),
    ("dk", "gfx942"): (Tile(64, 32, 32, 2, 2), Tile(64, 32, 32, 4, 2)),
}  # fmt: skip
_SPLIT: dict[tuple[str, str], Tile] = {  # no extras, 65 to 96 channels: 64 and the rest
    ("normaliser", "sm80"): Tile(64, 32, 32, 4, 2, split=96),
    ("value", "sm80"): Tile(64, 32, 32, 4, 2, split=96),
    ("dq", "sm80"): Tile(64, 32, 32, 4, 2, split=96),
    ("dk", "sm80"): Tile(64, 32, 32, 4, 2, split=96),
    ("normaliser", "sm90"): Tile(64, 128, 32, 4, 2, split=96),
    ("value", "sm90"): Tile(64, 64, 32, 4, 2, split=96),
    ("unit", "sm90"): Tile(64, 32, 32, 4, 3, split=96),
    ("dq", "sm90"): Tile(64, 64, 32, 4, 2, split=96),
    ("dk", "sm90"): Tile(64, 64, 32, 4, 3, split=96),
    ("normaliser", "sm100"): Tile(64, 64, 32, 4, 2, split=96),
    ("value", "sm100"): Tile(64, 64, 32, 4, 2, split=96),
    ("unit", "sm100"): Tile(64, 32, 32, 4, 2, split=96),
    ("dq", "sm100"): Tile(64, 64, 32, 4, 2, split=96),
    ("dk", "sm100"): Tile(64, 32, 32, 4, 2, split=96),
    ("normaliser", "gfx942"): Tile(64, 64, 32, 4, 2, split=96),
    ("value", "gfx942"): Tile(64, 32, 32, 4, 2, split=96),
    ("dq", "gfx942"): Tile(64, 32, 32, 4, 2, split=96),
    ("dk", "gfx942"): Tile(64, 32, 32, 4, 2, split=96),
}  # fmt: skip
_HEAVY: dict[tuple[str, str], Pair] = {  # js or boolean masks of keys; and beyond 128 channels
    ("value", "sm80"): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("dq", "sm80"): (Tile(64, 32, 32, 4, 1), Tile(64, 32, 32, 4, 2, whole=64)),
    ("dk", "sm80"): (Tile(64, 32, 32, 4, 2, maxnreg=255), Tile(64, 32, 32, 4, 2, whole=64, out_columns=64)),
    ("dq", "sm120"): (Tile(64, 32, 32, 4, 1), Tile(64, 32, 32, 4, 2, whole=64, chunk=32, out_columns=64)),
    ("dk", "sm120"): (Tile(64, 32, 32, 4, 1), Tile(64, 16, 16, 4, 2, whole=64, out_columns=64)),
    ("normaliser", "sm80"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("normaliser", "sm120"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64, maxnreg=255)),
    ("value", "sm90"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2, whole=64)),
    ("dq", "sm90"): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 8, 2, whole=64)),
    ("dk", "sm90"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 8, 2, whole=64)),
    ("normaliser", "sm90"): (Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 8, 2, whole=64)),
    ("value", "sm100"): (Tile(64, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2, whole=64)),
    ("dq", "sm100"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 8, 2, whole=64, maxnreg=255)),
    ("unit", "sm100"): (Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2, whole=64, maxnreg=255)),
    ("dk", "sm100"): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2, whole=64)),
    ("normaliser", "sm100"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2, whole=64, maxnreg=255)),
    ("value", "gfx942"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2, whole=64)),
    ("dq", "gfx942"): (Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("dk", "gfx942"): (Tile(64, 64, 32, 4, 1), Tile(64, 32, 32, 4, 1, whole=64)),
    ("normaliser", "gfx942"): (Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2, whole=64)),
}  # fmt: skip
# A wide head's additive mask, summed over its heads, beside an accumulator of 64 rows.
_CROWDED = Tile(64, 16, 16, 4, 1, whole=64, chunk=32, out_columns=64)
_ADDED: dict[tuple[str, str], Pair] = {  # masks of query and key, and additive ones; what is not here is as heavy
    ("value", "sm80"): (Tile(64, 32, 32, 4, 2), _CROWDED),
    ("value", "sm120"): (Tile(64, 32, 32, 4, 2, maxnreg=255), _CROWDED),
    ("dq", "sm80"): (Tile(64, 16, 16, 4, 2), _CROWDED),
    ("dk", "sm80"): (Tile(64, 16, 16, 4, 2), Tile(64, 16, 16, 4, 1, whole=64, chunk=32, out_columns=64)),
    ("bias", "sm80"): (Tile(64, 16, 16, 4, 2), _CROWDED),
    ("bias", "sm120"): (Tile(64, 16, 16, 4, 2), replace(_CROWDED, maxnreg=255)),
    ("normaliser", "sm80"): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("value", "sm90"): (Tile(64, 32, 32, 4, 2), Tile(64, 64, 64, 8, 2, whole=64)),
    # One stage: with more, a gradient's products are serialised beside such masks (ptxas note C7515).
    ("dq", "sm90"): (Tile(64, 32, 32, 4, 1), Tile(64, 64, 64, 8, 2, whole=64)),
    ("dk", "sm90"): (Tile(64, 32, 32, 4, 1), Tile(64, 32, 32, 8, 2, whole=64)),
    ("bias", "sm90"): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2, whole=64)),
    ("value", "sm100"): (Tile(64, 32, 32, 4, 2, maxnreg=255), Tile(64, 32, 32, 8, 2, whole=64)),
    ("dq", "sm100"): (Tile(64, 32, 32, 4, 2, maxnreg=255), Tile(64, 32, 32, 8, 2, whole=64)),
    ("dk", "sm100"): (Tile(64, 32, 32, 8, 2, maxnreg=255), Tile(64, 32, 32, 8, 2, whole=64)),
    ("bias", "sm100"): (Tile(64, 64, 64, 8, 2), Tile(64, 32, 32, 8, 2, whole=64)),
    ("dk", "gfx942"): (Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
    ("bias", "gfx942"): (Tile(64, 64, 64, 4, 2), Tile(64, 32, 32, 4, 2, whole=64)),
}  # fmt: skip
_BOTH: dict[tuple[str, str], Pair] = {  # such masks on both sides; what is not here is as _ADDED
    ("value", "sm80"): (Tile(64, 16, 16, 4, 2), _CROWDED),
    ("dq", "sm80"): (Tile(32, 16, 16, 2, 1, whole=32, chunk=32, out_columns=64), _CROWDED),
    ("dk", "sm80"): (Tile(64, 16, 16, 4, 1), Tile(32, 16, 16, 4, 1, whole=64, chunk=32, out_columns=64)),
    ("bias", "sm80"): (Tile(64, 16, 16, 4, 2), replace(_CROWDED, stays=32)),
    ("dq", "sm120"): (Tile(64, 16, 16, 8, 1), replace(_CROWDED, stays=32)),
    ("bias", "sm120"): (Tile(64, 16, 16, 4, 2), replace(_CROWDED, whole=32)),
    ("value", "sm90"): (Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2, whole=64)),
    ("dq", "sm90"): (Tile(64, 32, 32, 8, 1), Tile(64, 32, 32, 8, 2, whole=64)),
    ("dk", "sm90"): (Tile(64, 32, 32, 8, 1), Tile(64, 32, 32, 8, 1, whole=32, chunk=32, out_columns=64, maxnreg=255)),
    ("value", "sm100"): (Tile(64, 32, 32, 4, 2, maxnreg=255), Tile(64, 32, 32, 8, 2, whole=32, chunk=32, out_columns=64)),
    ("unit", "sm100"): (Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2, whole=32, chunk=32, out_columns=64)),
    ("dq", "sm100"): (Tile(64, 32, 32, 4, 2, maxnreg=255), Tile(64, 32, 32, 8, 2, whole=32, chunk=32, out_columns=64)),
}  # fmt: skip
_MEAN: dict[tuple[str, str], Tile] = {  # one map of every head is alive beside the merged ones; wide heads are streamed
    ("value", "sm80"): Tile(32, 32, 32, 4, 2, whole=64),
    ("value", "sm120"): Tile(64, 16, 16, 4, 1, whole=64, maxnreg=255),
    ("dq", "sm80"): Tile(32, 32, 32, 4, 1, whole=64),
    ("dk", "sm80"): Tile(32, 32, 32, 4, 1, whole=64),
    ("bias", "sm80"): Tile(64, 16, 16, 4, 1, whole=64),
    ("value", "sm90"): Tile(64, 32, 32, 4, 2, whole=64),
    ("dq", "sm90"): Tile(64, 32, 32, 4, 2, whole=64),
    ("dk", "sm90"): Tile(64, 32, 32, 4, 2, whole=64),
    ("bias", "sm90"): Tile(64, 32, 32, 4, 2, whole=64),
    ("value", "sm100"): Tile(64, 32, 32, 8, 1, whole=32, chunk=32, out_columns=64, maxnreg=255),
    ("dq", "sm100"): Tile(64, 32, 32, 8, 2, whole=32, chunk=32, out_columns=64, maxnreg=255),
    ("dk", "sm100"): Tile(64, 32, 32, 8, 2, whole=32, chunk=32, out_columns=64, maxnreg=255),
    ("bias", "sm100"): Tile(64, 32, 32, 8, 2, whole=64),
    ("value", "gfx942"): Tile(64, 32, 32, 4, 2, whole=64),
    ("dq", "gfx942"): Tile(64, 32, 32, 4, 2, whole=64),
    ("dk", "gfx942"): Tile(64, 32, 32, 4, 2, whole=64),
    ("bias", "gfx942"): Tile(64, 32, 32, 4, 2, whole=64),
}  # fmt: skip
_MEAN_BOTH: dict[tuple[str, str], Tile] = {  # a mean with such masks on both sides; what is not here is as _MEAN
    ("dq", "sm80"): Tile(32, 16, 16, 4, 1, whole=64),
    ("dk", "sm80"): Tile(32, 16, 16, 4, 1, whole=32, chunk=32, out_columns=64),
    ("value", "sm90"): Tile(64, 32, 32, 8, 2, whole=64),
    ("dq", "sm90"): Tile(64, 32, 32, 8, 2, whole=64),
    ("dk", "sm90"): Tile(64, 16, 16, 8, 2, whole=64),
    ("bias", "sm90"): Tile(64, 32, 32, 8, 2, whole=64),
    ("dk", "sm100"): Tile(64, 16, 16, 8, 2, whole=64),
}  # fmt: skip


def pick_tile(kernel: str, arch: str, dtype: torch.dtype, width: int, extras: int, mean: bool) -> Tile:
    """The entry for one kernel and a head of ``width`` channels: 'normaliser', 'value', 'unit' (the value with the unit query
    gradient; what has no entry is as 'dq'), 'dq', 'dk' or 'bias'.

    extras: 0 for two plain maps, 1 with js or a boolean mask of keys, 2 with any other mask, 3 with such masks on both sides;
        mean: heads are averaged.
    """
    if arch == "cpu":
        return _INTERPRETER
    if dtype == torch.float32:
        if arch == "gfx942":
            return _FP32_GFX942
        return replace(_FP32, stages=1) if mean or extras >= 2 else _FP32_OF.get((kernel, arch), _FP32)
    # sm_120 has sm_80's matrix instructions; the tiles fit the shared memory of either.
    arches = dict.fromkeys((arch, "sm80" if arch == "sm120" else arch))
    keys = [(k, a) for k in (("unit", "dq") if kernel == "unit" else (kernel,)) for a in arches]
    if mean:
        tiles = {**_MEAN, **_MEAN_BOTH} if extras == 3 else _MEAN
        return next(tiles[key] for key in keys if key in tiles)
    if extras == 0 and 64 < width <= 96:
        split = next((_SPLIT[key] for key in keys if key in _SPLIT), None)
        if split is not None:
            return split
    tables = [_PLAIN, _HEAVY] if width <= 128 else [_HEAVY], [_HEAVY], [_ADDED, _HEAVY], [_BOTH, _ADDED, _HEAVY]
    narrow, wide = next(table[key] for table in tables[extras] for key in keys if key in table)
    return narrow if width <= 64 else wide
