"""Launchers of the whole-map kernels: allocate, pick the tiles and the grid, launch.

:class:`Maps` carries views with any strides; nothing is copied.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from attnkd_kernels.language import BOOL_ROW, FLOAT_MASK, FLOAT_ROW, NO_MASK, Operand, Side
from attnkd_kernels.launch import LOG2E, cdiv, mask_kind, mask_operand, operand, padded, row_strides, run
from attnkd_kernels.map.bias import Bias, _map_bias_kernel
from attnkd_kernels.map.check import _map_check_kernel
from attnkd_kernels.map.given import Given
from attnkd_kernels.map.gradient import _map_gradient_kernel
from attnkd_kernels.map.normaliser import _map_normaliser_kernel
from attnkd_kernels.map.tile import MapHead, Rows, RowValues, Sweep
from attnkd_kernels.map.tiles import Tile, pick_tile
from attnkd_kernels.map.value import _map_value_kernel

ONE_SWEEP = ("forward_kl", "cross_entropy", "logit_mse")
"""Divergences whose gradient needs nothing of a row's end: the value's sweep emits the unit query gradient."""

LEAST = 16
"""Rows of the narrowest tile: a matrix unit multiplies no fewer. Most ViTs have a class token beside k·64 patches, or little more."""

CHECKS = {"debug": True, "sanitize_overflow": False}
"""Compiler options of a kernel with a ``tl.device_assert``, and of no other check."""


class Model(NamedTuple):
    """query [B, H, M, D], key [B, H, N, D], mask broadcastable 4-D [B|1, H|1, M|1, N|1] or None, the scale of the scores, and the
    normalisers [B, H, M] in nats where they are known (no merge, temperature 1), any strides, else None."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    lse: Tensor | None


class Maps(NamedTuple):
    """What is compared, and how; the last names the architecture that the tiles are for."""

    student: Model
    teacher: Model
    merge: str | None
    divergence: str
    temperature: float
    arch: str

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, H, M, N of the student."""
        B, H, M, _ = self.student.query.shape
        return B, H, M, self.student.key.shape[2]

    @property
    def outer(self) -> int:
        """Ho: rows of the loss per image and query."""
        return self.size[1] if self.merge is None else 1

    def heads(self, model: Model) -> int:
        """Heads whose softmax is taken: all of a model's with a mean, else Ho."""
        return model.query.shape[1] if self.merge == "mean" else self.outer

    def width(self, model: Model) -> int:
        """Channels of a (wide) head."""
        _, H, _, D = model.query.shape
        return H * D if self.merge == "logsum" else D

    def tile(self, kernel: str) -> Tile:
        """The tile of a launch that computes both maps."""
        models = self.student, self.teacher
        dtype = torch.promote_types(self.student.query.dtype, self.teacher.query.dtype)
        masks = tuple(_masks(model) for model in models)
        extras = 3 if masks == (2, 2) else max(*masks, 1 if self.divergence == "js" else 0)
        return pick_tile(kernel, self.arch, dtype, max(map(self.width, models)), extras, self.merge == "mean")

    @property
    def emits_dq(self) -> bool:
        """Whether the value's sweep can emit the unit query gradient: it must hold a whole row of it."""
        if self.divergence not in ONE_SWEEP or self.merge == "mean":
            return False
        tile, width = self.tile("unit"), self.width(self.student)
        return width <= tile.columns_out(width)


class Saved(NamedTuple):
    """What the forward leaves: loss [B, Ho, M] and, for the backward, the LSEs [B, H', M] in units of log 2, centre [B, Hs, M],
    weight [B, Ho, M] and the unit query gradient [B, H, M, D]; those that the divergence does not need are empty, [0]."""

    loss: Tensor
    lse_s: Tensor
    lse_t: Tensor
    centre: Tensor
    weight: Tensor
    unit_dq: Tensor

    @property
    def rows(self) -> Rows:
        return Rows(*(tensor if tensor.numel() else self.loss for tensor in self[1:5]))


def allocate(maps: Maps, need_dq: bool) -> Saved:
    """Empty outputs of the forward for these inputs (also used to describe them without running)."""
    query = maps.student.query
    B, H, M, _ = maps.size
    outer, heads_s, heads_t = maps.outer, maps.heads(maps.student), maps.heads(maps.teacher)

    def fp32(needed: bool, *shape: int) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=torch.float32, device=query.device)

    softmax = maps.divergence != "logit_mse"
    unit_dq = fp32(False)
    if need_dq and maps.emits_dq:  # fp16 could not hold a gradient before it meets its loss scale
        unit_dq = torch.empty_like(query, dtype=torch.float32 if query.dtype == torch.float16 else query.dtype)
    return Saved(
        loss=fp32(True, B, outer, M),
        lse_s=fp32(softmax, B, heads_s, M),
        lse_t=fp32(softmax, B, heads_t, M),
        centre=fp32(maps.divergence in ("reverse_kl", "js", "mse") or heads_s > outer, B, heads_s, M),
        weight=fp32(maps.divergence in ("mse", "logit_mse"), B, outer, M),
        unit_dq=unit_dq,
    )


def map_fwd(maps: Maps, need_dq: bool) -> Saved:
    """The divergence of every row and what the backward needs: the normalisers of each side where they are unknown, then the value."""
    saved = allocate(maps, need_dq)
    if saved.loss.numel():
        if maps.divergence != "logit_mse":
            for model, lse in ((maps.student, saved.lse_s), (maps.teacher, saved.lse_t)):
                if model.lse is None:
                    normaliser(maps, model, lse)
        _value(maps, saved)
        check(maps, saved.lse_s, saved.lse_t)
    return saved


def normaliser(maps: Maps, model: Model, lse: Tensor) -> None:
    """Fills ``lse`` [B, H', M] with the LSEs of one side, in units of log 2."""
    B, _, M, N = maps.size
    heads = lse.shape[1]
    tile = pick_tile("normaliser", maps.arch, model.query.dtype, maps.width(model), _masks(model), False)
    side, head = _side(model, maps.merge, maps.temperature, tile, 1)
    run(
        _map_normaliser_kernel, (B * heads * cdiv(M, tile.stays),),
        side, lse, heads, M, N, FUSE=side.factor > 1e-15, HEAD=head, **_sweeps(maps, tile, True, _tiles_masked(head)),
        **tile.options,
    )  # fmt: skip


def _value(maps: Maps, saved: Saved) -> None:
    """Loss, centre, weight and the unit query gradient from the LSEs."""
    B, _, M, N = maps.size
    emit = saved.unit_dq.ndim == 4
    tile = maps.tile("unit" if emit else "value")
    student, teacher, heads, masks = _sides(maps, tile)
    columns = tile.columns_out(maps.width(maps.student)) if emit else 0
    given = Given(given_rows(maps.student), given_rows(maps.teacher))
    run(
        _map_value_kernel, (B * maps.outer * cdiv(M, tile.stays),),
        student, teacher, saved.rows, given, saved.loss, operand(saved.unit_dq) if emit else student.query,
        maps.student.scale / maps.temperature, maps.outer, M, N, BH=padded(heads["S"].MEAN.value, 1),
        **heads, **_sweeps(maps, tile, True, masks, columns), **tile.options,
    )  # fmt: skip


def given_rows(model: Model) -> RowValues | None:
    """The normalisers that the caller has, as a kernel takes them."""
    return None if model.lse is None else RowValues(model.lse, *model.lse.stride())


def check(maps: Maps, lse_s: Tensor, lse_t: Tensor) -> None:
    """Stops where a given normaliser is none, as the sweep judged that left them at ``lse_s`` and ``lse_t`` [B, H, M]."""
    kept = [lse if model.lse is not None else None for model, lse in ((maps.student, lse_s), (maps.teacher, lse_t))]
    if any(lse is not None for lse in kept):
        rows, block = math.prod(maps.size[:3]), 1024
        run(_map_check_kernel, (cdiv(rows, block),), *kept, rows, BLOCK=block, **CHECKS)


def map_bwd(maps: Maps, saved: Saved, grad: Tensor, queries_left: bool) -> Tensor:
    """dq [B, H, M, D] (``queries_left``) or dk [B, H, N, D], for the upstream gradient ``grad`` [B, Ho, M] or []."""
    out = torch.empty_like(maps.student.query if queries_left else maps.student.key)
    if queries_left and saved.unit_dq.ndim == 4:
        return torch.mul(saved.unit_dq, grad.unsqueeze(-1) if grad.ndim else grad, out=out)
    B, H, M, N = maps.size
    heads = 1 if maps.merge == "logsum" else H
    tile = maps.tile("dq" if queries_left else "dk")
    student, teacher, specs, masks = _sides(maps, tile)
    width = maps.width(maps.student)
    columns = tile.columns_out(width)
    programs = B * heads * cdiv(M if queries_left else N, tile.stays) * cdiv(width, columns)
    if programs:
        run(
            _map_gradient_kernel, (programs,),
            student, teacher, saved.rows, RowValues(grad, *row_strides(grad)), operand(out),
            maps.student.scale / maps.temperature / (H if maps.merge == "mean" else 1), heads, M, N,
            **specs, **_sweeps(maps, tile, queries_left, masks, columns), **tile.options,
        )  # fmt: skip
    return out


def map_bias_bwd(maps: Maps, saved: Saved, grad: Tensor, processors: int = 1) -> Tensor:
    """The gradient [Bb, Hb, Mb, Nb] fp32 of the student's additive mask in its stored shape; Hb = 1 for merged heads."""
    assert maps.student.mask is not None
    B, H, M, N = maps.size
    heads = 1 if maps.merge == "logsum" else H
    tile = maps.tile("bias")
    bb, hb, mb, nb = maps.student.mask.shape
    hb = 1 if maps.merge == "logsum" else hb
    sums = (
        1 if bb == B else B,
        1 if hb == heads else heads,
        1 if mb == M else cdiv(M, tile.stays),
        1 if nb == N else cdiv(N, tile.narrow),
    )
    tiles = bb * hb * cdiv(mb, tile.stays) * cdiv(nb, tile.narrow)
    todo = sums[0] * sums[1] * sums[2] * sums[3]
    splits = max(1, min(todo, 2 * processors // max(tiles, 1)))
    out = torch.empty((splits, bb, hb, mb, nb), dtype=torch.float32, device=grad.device)
    if tiles * splits == 0:
        return out.new_zeros(out.shape[1:])
    student, teacher, specs, _ = _sides(maps, tile)
    run(
        _map_bias_kernel, (tiles * splits,),
        student, teacher, saved.rows, RowValues(grad, *row_strides(grad)), out,
        1.0 / maps.temperature / (H if maps.merge == "mean" else 1), Bias(bb, hb, mb, nb, *sums), splits, heads, M, N,
        OVER_M=mb != M, OVER_N=nb != N, **specs, SWEEP=_sweeps(maps, tile, True, "any")["NARROW"],
        **tile.options,
    )  # fmt: skip
    return out.sum(0)


def _sweeps(maps: Maps, tile: Tile, queries_left: bool, masks: str, out: int = 0) -> dict[str, Sweep]:
    """The compile-time part of a launch's two loops: over narrow tiles with checks, and over wide ones without."""
    left_over = maps.size[3 if queries_left else 2] % tile.streams
    narrow = LEAST if masks == "none" and left_over <= LEAST else tile.narrow
    both = {}
    for name, streams in (("NARROW", narrow), ("WIDE", tile.streams)):
        queries, keys = (tile.stays, streams) if queries_left else (streams, tile.stays)
        both[name] = _constant(
            Sweep, maps.divergence, queries_left, queries, keys, tile.stays, streams, name == "NARROW", masks, out, tile.lanes
        )  # fmt: skip
    return both


@cache
def _constant(kind: type, *values: Any) -> Any:
    return kind(*map(tl.constexpr, values))


def _masks(model: Model) -> int:
    """0 without a mask, 1 with one boolean row for all queries, 2 with any other."""
    if model.mask is None:
        return 0
    return 1 if model.mask.dtype == torch.bool and model.mask.shape[2] == 1 else 2


def _tiles_masked(*heads: MapHead) -> str:
    """Which tiles need a mask: "none"; "keys" where keys are hidden from all queries alike; else "any"."""
    kinds = {head.MASK.value for head in heads}
    if kinds == {NO_MASK.value}:
        return "none"
    return "keys" if kinds <= {BOOL_ROW.value, NO_MASK.value} else "any"


def _sides(maps: Maps, tile: Tile) -> tuple[Side, Side, dict[str, MapHead], str]:
    """Both sides, their compile-time parts by the kernels' names, and which tiles need a mask."""
    heads = [model.query.shape[1] if maps.merge == "mean" else 1 for model in (maps.student, maps.teacher)]
    student, S = _side(maps.student, maps.merge, maps.temperature, tile, heads[0])
    teacher, T = _side(maps.teacher, maps.merge, maps.temperature, tile, heads[1])
    return student, teacher, {"S": S, "T": T}, _tiles_masked(S, T)


def _side(model: Model, merge: str | None, temperature: float, tile: Tile, mean: int) -> tuple[Side, MapHead]:
    """What a kernel is given of one model; logits in units of log 2."""
    query, key, mask, scale, _ = model
    _, H, _, D = query.shape
    kind = mask_kind(mask)
    heads, repeat = 1, 1
    if merge == "logsum" and mask is not None and kind in (FLOAT_MASK.value, FLOAT_ROW.value):
        heads, repeat = (
            (mask.shape[1], 1) if mask.shape[1] > 1 else (1, H)
        )  # the wide head's bias is the sum over heads
    masked = Operand(query, 0, 0, 0, 0) if mask is None else mask_operand(mask)
    width = H * D if merge == "logsum" else D
    side = Side(operand(query), operand(key), masked, scale * LOG2E / temperature, repeat * LOG2E / temperature)
    return side, map_head(D, width, tile, kind, heads, mean)


def map_head(
    dim: int, width: int, tile: Tile, mask: str = NO_MASK.value, mask_heads: int = 1, mean: int = 1
) -> MapHead:
    """The compile-time part of a (wide) head."""
    columns, rest = tile.columns(width), tile.rest(width)
    return _constant(MapHead, dim, width, columns, rest, width <= columns + rest, mask, mask_heads, mean)
