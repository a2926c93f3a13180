"""Launchers of the whole-map kernels: allocate, pick the tiles and the grid, launch.

A :class:`Side` carries views with any strides; nothing is copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnkd_kernels.launch import LOG2E, OPTIONS, mask_kind, mask_operand, on_device
from attnkd_kernels.map.backward import _map_bwd_kernel
from attnkd_kernels.map.bias import _map_bias_kernel
from attnkd_kernels.map.forward import _map_fwd_kernel
from attnkd_kernels.map.lse import _map_lse_kernel
from attnkd_kernels.map.tiles import Tile, pick_tile
from attnkd_kernels.map.value import _map_value_kernel


class Side(NamedTuple):
    """query [B, H, M, D], key [B, H, N, D], mask broadcastable 4-D [B|1, H|1, M|1, N|1] or None, the scale of the scores."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float


class Saved(NamedTuple):
    """What the forward leaves: loss [B, Ho, M], LSEs [B, H', M] in log2 units, centre and weight.

    H' counts the heads whose softmax is taken: all of a side's with a mean, else Ho.
    """

    loss: Tensor
    lse_s: Tensor
    lse_t: Tensor
    centre: Tensor
    weight: Tensor


def needs_value_sweep(divergence: str, merge: str | None) -> bool:
    """True when the forward needs finished normalisers: js, and every mean."""
    return divergence == "js" or merge == "mean"


def allocate(student: Side, teacher: Side, merge: str | None, divergence: str) -> Saved:
    """Empty outputs of the forward for these inputs (also used to describe them without running)."""
    q = student.query
    B, H, M, _ = q.shape
    outer = H if merge is None else 1
    heads_s = H if merge == "mean" else outer
    heads_t = teacher.query.shape[1] if merge == "mean" else outer
    weighted = divergence in ("mse", "logit_mse")

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    return Saved(
        loss=fp32(B, outer, M),
        lse_s=fp32(B, heads_s, M),
        lse_t=fp32(B, heads_t, M),
        centre=fp32(B, heads_s, M),
        weight=fp32(B, outer, M) if weighted else fp32(0),
    )


def wide_width(side: Side, merge: str | None) -> int:
    _, H, _, D = side.query.shape
    return H * D if merge == "logsum" else D


def map_fwd(student: Side, teacher: Side, merge: str | None, divergence: str, temperature: float, arch: str) -> Saved:
    """The divergence of every row and what the backward needs."""
    saved = allocate(student, teacher, merge, divergence)
    if saved.loss.numel():
        with on_device(student.query):
            _fill(saved, student, teacher, merge, divergence, temperature, arch)
    return saved


def _fill(
    saved: Saved, student: Side, teacher: Side, merge: str | None, divergence: str, temperature: float, arch: str
) -> None:
    B, H, M, _ = student.query.shape
    N = student.key.shape[2]
    outer = H if merge is None else 1
    widths = wide_width(student, merge), wide_width(teacher, merge)
    if not needs_value_sweep(divergence, merge):
        tile = pick_tile("fwd", arch, *_kind(student, teacher, merge, divergence))
        arguments = {
            "LOSS": saved.loss, "LSE_S": saved.lse_s, "LSE_T": saved.lse_t, "CENTRE": saved.centre,
            "WEIGHT": saved.weight if saved.weight.numel() else saved.loss,
            **_sides(student, teacher, merge, temperature),
            "HO": outer, "M": M, "N": N,
            **_widths(tile, widths), "DIV": divergence, "FUSE": _can_fuse(student, teacher, divergence, temperature), "BM": tile.queries, "BN": tile.keys,
        }  # fmt: skip
        _map_fwd_kernel[(B * outer * triton.cdiv(M, tile.queries),)](**arguments, **tile.options, **OPTIONS)
        return

    log_sums = torch.empty_like(saved.lse_s), torch.empty_like(saved.lse_t)
    for side, top, log_sum, width in zip((student, teacher), (saved.lse_s, saved.lse_t), log_sums, widths, strict=True):
        tile = pick_tile("lse", arch, side.query.dtype, width, _masks(side), False)
        heads = top.shape[1]
        arguments = {
            "TOP": top, "LOG_SUM": log_sum, **_side("", side, merge, temperature), "HO": heads, "M": M, "N": N,
            "WIDTH": width, "BM": tile.queries, "BN": tile.keys, "BD": tile.columns(width),
        }  # fmt: skip
        _map_lse_kernel[(B * heads * triton.cdiv(M, tile.queries),)](**arguments, **tile.options, **OPTIONS)
    tile = pick_tile("value", arch, *_kind(student, teacher, merge, divergence))
    heads_s, heads_t = _mean_heads(student, teacher, merge)
    arguments = {
        "LOSS": saved.loss, "LSE_S": saved.lse_s, "LSE_T": saved.lse_t, "LOG_SUM_S": log_sums[0], "LOG_SUM_T": log_sums[1],
        "CENTRE": saved.centre, "WEIGHT": saved.weight if saved.weight.numel() else saved.loss,
        **_sides(student, teacher, merge, temperature), "HO": outer, "M": M, "N": N,
        "HEADS_S": heads_s, "HEADS_T": heads_t, "BH": triton.next_power_of_2(heads_s),
        **_widths(tile, widths), "DIV": divergence, "BM": tile.queries, "BN": tile.keys,
    }  # fmt: skip
    _map_value_kernel[(B * outer * triton.cdiv(M, tile.queries),)](**arguments, **tile.options, **OPTIONS)


def map_bwd(
    student: Side,
    teacher: Side,
    merge: str | None,
    divergence: str,
    temperature: float,
    saved: Saved,
    grad: Tensor,
    queries_left: bool,
    arch: str,
) -> Tensor:
    """dq [B, H, M, D] (``queries_left``) or dk [B, H, N, D], for the upstream gradient ``grad`` [B, Ho, M]."""
    B, H, M, _ = student.query.shape
    N = student.key.shape[2]
    out = torch.empty_like(student.query if queries_left else student.key)
    heads = 1 if merge == "logsum" else H
    widths = wide_width(student, merge), wide_width(teacher, merge)
    tile = pick_tile("dq" if queries_left else "dk", arch, *_kind(student, teacher, merge, divergence))
    left, right = tile.left_right(queries_left)
    heads_s, heads_t = _mean_heads(student, teacher, merge)
    columns = tile.columns(widths[0])
    chunk = columns if widths[0] <= columns else tile.out_columns
    arguments = {
        "GRAD": grad, "LSE_S": saved.lse_s, "LSE_T": saved.lse_t, "CENTRE": saved.centre,
        "WEIGHT": saved.weight if saved.weight.numel() else saved.centre, "OUT": out,
        **_sides(student, teacher, merge, temperature), **_strides("out", out, "bhrd"), **_strides("g", grad, "bhm"),
        "out_scale": student.scale / temperature / (H if merge == "mean" else 1), "HP": heads, "M": M, "N": N,
        "MEAN": merge == "mean", "HEADS_S": heads_s, "HEADS_T": heads_t, **_widths(tile, widths),
        "DIV": divergence, "QUERIES_LEFT": queries_left, "BL": left, "BR": right, "BO": chunk,
    }  # fmt: skip
    rows = M if queries_left else N
    programs = B * heads * triton.cdiv(rows, left) * triton.cdiv(widths[0], chunk)
    if programs:
        with on_device(grad):
            _map_bwd_kernel[(programs,)](**arguments, **tile.options, **OPTIONS)
    return out


def map_bias_bwd(
    student: Side,
    teacher: Side,
    merge: str | None,
    divergence: str,
    temperature: float,
    saved: Saved,
    grad: Tensor,
    arch: str,
    processors: int = 1,
) -> Tensor:
    """The gradient [Bb, Hb, Mb, Nb] fp32 of the student's additive mask in its stored shape; Hb = 1 for merged heads."""
    assert student.mask is not None
    B, H, M, _ = student.query.shape
    N = student.key.shape[2]
    heads = 1 if merge == "logsum" else H
    widths = wide_width(student, merge), wide_width(teacher, merge)
    tile = pick_tile("bias", arch, *_kind(student, teacher, merge, divergence))
    bb, hb, mb, nb = student.mask.shape
    hb = 1 if merge == "logsum" else hb
    sums = (
        1 if bb == B else B,
        1 if hb == heads else heads,
        1 if mb == M else triton.cdiv(M, tile.queries),
        1 if nb == N else triton.cdiv(N, tile.keys),
    )
    tiles = bb * hb * triton.cdiv(mb, tile.queries) * triton.cdiv(nb, tile.keys)
    todo = sums[0] * sums[1] * sums[2] * sums[3]
    splits = max(1, min(todo, 2 * processors // max(tiles, 1)))
    out = torch.empty((splits, bb, hb, mb, nb), dtype=torch.float32, device=grad.device)
    heads_s, heads_t = _mean_heads(student, teacher, merge)
    arguments = {
        "GRAD": grad, "LSE_S": saved.lse_s, "LSE_T": saved.lse_t, "CENTRE": saved.centre,
        "WEIGHT": saved.weight if saved.weight.numel() else saved.centre, "OUT": out,
        **_sides(student, teacher, merge, temperature), **_strides("g", grad, "bhm"),
        "out_scale": 1.0 / temperature / (H if merge == "mean" else 1), "HP": heads, "M": M, "N": N,
        "BB": bb, "HB": hb, "MB": mb, "NB": nb,
        "SUM_B": sums[0], "SUM_H": sums[1], "SUM_M": sums[2], "SUM_N": sums[3], "SPLITS": splits,
        "MEAN": merge == "mean", "HEADS_S": heads_s, "HEADS_T": heads_t, **_widths(tile, widths),
        "DIV": divergence, "OVER_M": mb != M, "OVER_N": nb != N, "BM": tile.queries, "BN": tile.keys,
    }  # fmt: skip
    if tiles * splits == 0:
        return out.new_zeros(out.shape[1:])
    with on_device(grad):
        _map_bias_kernel[(tiles * splits,)](**arguments, **tile.options, **OPTIONS)
    return out.sum(0)


def _kind(student: Side, teacher: Side, merge: str | None, divergence: str) -> tuple[torch.dtype, int, int, bool]:
    """What the tile depends on: the wider dtype, the wider head, the extras (tiles.py), and whether heads are averaged."""
    dtype = torch.promote_types(student.query.dtype, teacher.query.dtype)
    width = max(wide_width(student, merge), wide_width(teacher, merge))
    masks = _masks(student), _masks(teacher)
    extras = 3 if masks == (2, 2) else max(*masks, 1 if divergence == "js" else 0)
    return dtype, width, extras, merge == "mean"


def _masks(side: Side) -> int:
    """0 without a mask, 1 with one boolean row for all queries, 2 with any other."""
    if side.mask is None:
        return 0
    return 1 if side.mask.dtype == torch.bool and side.mask.shape[2] == 1 else 2


def _can_fuse(student: Side, teacher: Side, divergence: str, temperature: float) -> bool:
    """Products may wait for their scale when nothing is added to them and the scale keeps their order."""
    if student.mask is not None or teacher.mask is not None or divergence == "logit_mse":
        return False
    return min(student.scale, teacher.scale) / temperature > 1e-15


def _mean_heads(student: Side, teacher: Side, merge: str | None) -> tuple[int, int]:
    return (student.query.shape[1], teacher.query.shape[1]) if merge == "mean" else (1, 1)


def _widths(tile: Tile, widths: tuple[int, int]) -> dict[str, int]:
    return {
        "WIDTH_S": widths[0], "WIDTH_T": widths[1],
        "BD_S": tile.columns(widths[0]), "BD_T": tile.columns(widths[1]),
    }  # fmt: skip


def _sides(student: Side, teacher: Side, merge: str | None, temperature: float) -> dict[str, Any]:
    return {**_side("s", student, merge, temperature), **_side("t", teacher, merge, temperature)}


def _side(letter: str, side: Side, merge: str | None, temperature: float) -> dict[str, Any]:
    """Pointers, strides and factors of one side, named as the kernels name them (``letter`` 's', 't', or '' for one side)."""
    heads, repeat = 1, 1
    mask, strides = side.query, (0, 0, 0, 0)
    if side.mask is not None:
        mask, *strides = mask_operand(side.mask)
        if merge == "logsum" and side.mask.dtype != torch.bool:  # the wide head's bias is the sum over heads
            heads, repeat = (mask.shape[1], 1) if mask.shape[1] > 1 else (1, side.query.shape[1])
    upper, end = letter.upper(), f"_{letter}" if letter else ""
    END = end.upper()
    return {
        f"Q{upper}": side.query, f"K{upper}": side.key, f"MASK{END}": mask,
        **_strides(f"q{letter}", side.query), **_strides(f"k{letter}", side.key, "bhnd"),
        **{f"m{letter}_{x}": stride for x, stride in zip("bhmn", strides, strict=True)},
        f"factor{end}": side.scale * LOG2E / temperature, f"bias{end}": repeat * LOG2E / temperature,
        f"D{END}": side.query.shape[3], f"KIND{END}": mask_kind(side.mask), f"MASK_HEADS{END}": heads,
    }  # fmt: skip


def _strides(name: str, tensor: Tensor, letters: str = "bhmd") -> dict[str, int]:
    return {f"{name}_{letter}": stride for letter, stride in zip(letters, tensor.stride(), strict=True)}
