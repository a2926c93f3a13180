"""Whole-map divergence, backward: the gradient of the student's learnable bias.

    dbias = 1/T · Σ dz over every (image, head, query, key) that one bias entry was broadcast to

A program owns one tile of the *stored* bias [Bb, Hb, Mb, Nb] (each size 1 or full) and walks over what it was broadcast to,
recomputing the tile of dz each time: two products and two exponentials per (row, key), no [B, H, M, N] buffer, no atomics.
A small bias gives few programs, so the walk can be cut in SPLITS parts that leave partial sums, added in a fixed order.

OUT [SPLITS, Bb, Hb, Mb, Nb] fp32. Saved and recomputed: as in gradient.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import side_at
from attnkd_kernels.map.gradient import at_row, dz_tile, given_at, upstream_values
from attnkd_kernels.map.tile import At, at_tile, load_left, load_whole_right


class Bias(NamedTuple):
    """The stored bias's sizes, and over how many images, heads, tiles of queries and tiles of keys one entry was broadcast."""

    images: Any
    heads: Any
    queries: Any
    keys: Any
    sum_images: Any
    sum_heads: Any
    sum_queries: Any
    sum_keys: Any


@triton.jit
def _map_bias_kernel(
    student,  # Side: query [B, H, M, D_s], key [B, H, N, D_s], mask [B, H, M, N]
    teacher,  # Side: the same with Ht, D_t
    kept,  # Rows: lse_s, centre [B, Hs, M], lse_t [B, Ht', M], weight [B, Ho, M]
    upstream,  # RowValues [B, Ho, M] fp32
    OUT,  # [SPLITS, Bb, Hb, Mb, Nb] fp32
    out_scale,  # 1/T, divided by the averaged heads
    bias,  # Bias
    splits,
    HS, M, N,
    OVER_M: tl.constexpr, OVER_N: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(bias.queries, SWEEP.BQ)
    tiles_n = tl.cdiv(bias.keys, SWEEP.BK)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    split = tl.program_id(0) // (tiles_n * tiles_m) % splits
    bias_row = tl.program_id(0) // (tiles_n * tiles_m * splits)  # of [Bb, Hb]
    acc = tl.zeros([SWEEP.BQ, SWEEP.BK], tl.float32)
    todo = bias.sum_images * bias.sum_heads * bias.sum_queries * bias.sum_keys
    each = tl.cdiv(todo, splits)
    student, teacher = (
        side_at(student, 0, 0),
        side_at(teacher, 0, 0),
    )  # Triton 3.6 loses strides of 1 of an argument's parts in a loop
    for i in range(split * each, tl.minimum(split * each + each, todo)):
        k0 = (tile_n + i % bias.sum_keys) * SWEEP.BK
        q0 = (tile_m + i // bias.sum_keys % bias.sum_queries) * SWEEP.BQ
        image_head = i // (bias.sum_keys * bias.sum_queries)
        h = tl.cast(bias_row % bias.heads + image_head % bias.sum_heads, tl.int64)
        b = tl.cast(bias_row // bias.heads + image_head // bias.sum_heads, tl.int64)
        at = At(q0, k0, M, N)
        one, other, given = at_row(student, teacher, kept, upstream, b, h, HS, M, S, T)
        one, other, given = at_tile(one, at), at_tile(other, at), given_at(given, q0)
        left = load_left(one, at, S, SWEEP), load_left(other, at, T, SWEEP)
        right = load_whole_right(one, left[0], at, S, SWEEP), load_whole_right(other, left[1], at, T, SWEEP)
        dz = dz_tile(one, other, given, left, right, at, S, T, SWEEP)
        acc += dz * upstream_values(given, at, SWEEP)

    acc = acc * out_scale
    out = OUT + (tl.cast(split, tl.int64) * bias.images * bias.heads + bias_row) * bias.queries * bias.keys
    m = tile_m * SWEEP.BQ + tl.arange(0, SWEEP.BQ)
    n = tile_n * SWEEP.BK + tl.arange(0, SWEEP.BK)
    if OVER_M and OVER_N:
        tl.store(out, tl.sum(tl.sum(acc, 1), 0))
    elif OVER_M:
        tl.store(out + n, tl.sum(acc, 0), mask=n < bias.keys)
    elif OVER_N:
        tl.store(out + m, tl.sum(acc, 1), mask=m < bias.queries)
    else:
        pointers = out + tl.cast(m, tl.int64)[:, None] * bias.keys + n[None, :]  # [BQ, BK]
        tl.store(pointers, acc, mask=(m < bias.queries)[:, None] & (n < bias.keys)[None, :])
