"""Launchers of attention with its divergence: allocate, pick the tiles and the grid, launch.

:class:`attnkd_kernels.map.launch.Maps` carries both models; nothing is copied. The divergence "none" makes them a plain attention,
whose teacher is the student.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkd_kernels.attention.forward import _attention_fwd_kernel
from attnkd_kernels.attention.gradients import Known, Outputs, _attention_dkv_kernel, _attention_dq_kernel
from attnkd_kernels.attention.tiles import pick_tile
from attnkd_kernels.launch import cdiv, operand, run
from attnkd_kernels.map import launch as map_launch
from attnkd_kernels.map.launch import Maps, Model
from attnkd_kernels.map.tile import Rows
from attnkd_kernels.map.tiles import Tile


class Saved(NamedTuple):
    """What the forward leaves: output [B, H, M, V] (heads of a token side by side in memory), loss [B, H, M], and for the backward,
    fp32 [B, H, M], the LSEs in units of log 2, centre and weight; those that the divergence does not need are empty, [0]."""

    out: Tensor
    loss: Tensor
    lse_s: Tensor
    lse_t: Tensor
    centre: Tensor
    weight: Tensor


def allocate(maps: Maps, value: Tensor) -> Saved:
    """Empty results of the forward for these inputs (also used to describe them without running)."""
    B, H, M, _ = maps.size

    def fp32(needed: bool) -> Tensor:
        return torch.empty((B, H, M) if needed else (0,), dtype=torch.float32, device=value.device)

    divergence = maps.divergence
    return Saved(
        out=value.new_empty((B, M, H, value.shape[3])).transpose(1, 2),
        loss=fp32(divergence != "none"),
        lse_s=fp32(True),
        lse_t=fp32(divergence not in ("none", "logit_mse")),
        centre=fp32(divergence in ("reverse_kl", "js", "mse")),
        weight=fp32(divergence in ("mse", "logit_mse")),
    )


def attention_fwd(maps: Maps, value: Tensor) -> Saved:
    """The attention's output [B, H, M, V] and the divergence of every row: the teacher's normalisers where they are unknown, then one
    sweep."""
    saved = allocate(maps, value)
    B, H, M, N = maps.size
    if saved.out.numel() == 0:
        return saved
    if saved.lse_t.numel() and maps.teacher.lse is None:
        map_launch.normaliser(maps, maps.teacher, saved.lse_t)
    if maps.divergence in ("js", "mse"):
        map_launch.normaliser(maps, maps.student, saved.lse_s)
    tile = _tile("fwd", maps, value)
    sides, specs = _specs(maps, value, tile, True)
    kept = Rows(*(tensor if tensor.numel() else saved.lse_s for tensor in saved[2:]))
    loss = saved.loss if saved.loss.numel() else saved.lse_s
    run(
        _attention_fwd_kernel, (B * H * cdiv(M, tile.stays),),
        sides[0], operand(value), sides[1], kept, map_launch.given_rows(maps.teacher), operand(saved.out), loss, H, M, N,
        FUSE=sides[0].factor > 1e-15, **specs, **tile.options,
    )  # fmt: skip
    map_launch.check(maps, saved.lse_s, saved.lse_t)
    return saved


def attention_bwd(maps: Maps, value: Tensor, saved: Saved, grad: Tensor, loss_grad: Tensor) -> list[Tensor]:
    """[dqkv [B, N, 3, H, D]] where queries, keys and values have one shape, else [dq, dk, dv].

    grad: [B, H, M, V] of the output; loss_grad: [B, H, M] of the divergence, any strides.
    """
    grads = allocate_grads(maps, value)
    dq, dk, dv = unpacked(grads)
    B, H, M, N = maps.size
    if dq.numel() == 0:
        return [g.zero_() for g in grads]
    rows = torch.empty((2, B, H, M), dtype=torch.float32, device=value.device)
    lse_t, centre, weight = (tensor if tensor.numel() else saved.lse_s for tensor in saved[3:])
    known = Known(saved.lse_s, lse_t, rows[0], rows[1])
    outputs = Outputs(operand(saved.out), operand(grad), operand(loss_grad.unsqueeze(-1)))
    tile = _tile("dq", maps, value)
    sides, specs = _specs(maps, value, tile, True)
    run(
        _attention_dq_kernel, (B * H * cdiv(M, tile.stays),),
        sides[0], operand(value), sides[1], Rows(saved.lse_s, lse_t, centre, weight), outputs, known, operand(dq), H, M, N,
        **specs, **tile.options,
    )  # fmt: skip
    tile = _tile("dkv", maps, value)
    sides, specs = _specs(maps, value, tile, False)
    run(
        _attention_dkv_kernel, (B * H * cdiv(N, tile.stays),),
        sides[0], operand(value), sides[1], outputs.grad, known, operand(dk), operand(dv), H, M, N,
        **specs, **tile.options,
    )  # fmt: skip
    return grads


def allocate_grads(maps: Maps, value: Tensor) -> list[Tensor]:
    """Empty results of the backward."""
    query, key, *_ = maps.student
    if query.shape == key.shape == value.shape:
        B, H, N, D = query.shape
        return [query.new_empty((B, N, 3, H, D))]
    return [torch.empty_like(tensor) for tensor in (query, key, value)]


def unpacked(tensors: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values [B, H, N, D], as views where they are packed [B, N, 3, H, D]."""
    return list(tensors[0].permute(2, 0, 3, 1, 4).unbind(0)) if len(tensors) == 1 else tensors


def plain(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, arch: str) -> Maps:
    """What makes these kernels a plain attention."""
    model = Model(query, key, mask, scale, None)
    return Maps(model, model, None, "none", 1.0, arch)


def _tile(kernel: str, maps: Maps, value: Tensor) -> Tile:
    models = (maps.student,) if maps.divergence == "none" else (maps.student, maps.teacher)
    dtype = torch.promote_types(value.dtype, maps.teacher.query.dtype)
    masks = tuple(map_launch._masks(model) for model in models)
    heavy = maps.divergence == "js" or (kernel == "dkv" and maps.divergence in ("reverse_kl", "mse"))
    extras = 3 if masks == (2, 2) else max(*masks, 1 if heavy else 0)
    width = max(value.shape[3], *(maps.width(model) for model in models))
    return pick_tile(kernel, maps.arch, dtype, width, extras)


def _specs(maps: Maps, value: Tensor, tile: Tile, queries_left: bool) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Both sides, and the compile-time part of a launch."""
    student, teacher, heads, masks = map_launch._sides(maps, tile)
    width = value.shape[3]
    V = map_launch.map_head(width, width, tile)
    return (student, teacher), {**heads, "V": V, **map_launch._sweeps(maps, tile, queries_left, masks)}
