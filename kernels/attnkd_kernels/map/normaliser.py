"""The row normalisers of one side, where the model's own attention did not hand them over.

    lse[b, h, i] = log2 Σ_j 2^z_ij       (z in units of log 2)

One sweep, online: one product and one exponential per (row, key). A row that sees no key gets DEAD.
LSE [B, Ho, M] fp32. Types: fp16, bf16, fp32 (IEEE products).
FUSE leaves the products unscaled until the maximum is subtracted: one fused multiply-add in place of two operations. It needs
a positive factor, and acts where no mask is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, HIDDEN, NO_MASK, shown, side_at
from attnkd_kernels.map.tile import At, at_tile, load_left, load_whole_right, logits, skip_rows, without_checks


@triton.jit
def _map_normaliser_kernel(
    side,  # Side: query [B, H, M, D], key [B, H, N, D], mask [B, H, M, N]
    LSE,  # [B, Ho, M] fp32
    HO, M, N,
    FUSE: tl.constexpr, HEAD: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, WIDE.BL)
    row = tl.cast(tl.program_id(0) // tiles, tl.int64)  # of [B, Ho]
    at = At((tl.program_id(0) % tiles) * WIDE.BL, 0, M, N)
    side = at_tile(side_at(side, row // HO, row % HO), at)
    a = load_left(side, at, HEAD, WIDE)
    clear, stop = without_checks(side, side, at, HEAD, HEAD, WIDE)
    stats = tl.full([WIDE.BL], HIDDEN, tl.float32), tl.zeros([WIDE.BL], tl.float32)
    stats = _more_keys(stats, side, a, at, (clear, stop), FUSE, HEAD, NARROW)
    if WIDE.MASKS != "any":
        stats = _more_keys(stats, side, a, at, (0, clear), FUSE, HEAD, WIDE)
    top, total = stats
    m = at.q0 + tl.arange(0, WIDE.BL)
    alive = shown(top) | (total != total)  # NaN is no dead row
    tl.store(LSE + row * M + m, tl.where(alive, top + tl.log2(total), DEAD), mask=m < M)


@triton.jit
def _more_keys(stats, side, a, at, span, FUSE: tl.constexpr, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """The largest logit of each row so far and Σ 2^(z − largest), after the keys of ``span`` (first, end)."""
    top, total = stats
    side = skip_rows(side, span[0], SWEEP)
    for k0 in range(span[0], span[1], SWEEP.BR):
        here = At(at.q0, k0, at.M, at.N)
        b = load_whole_right(side, a, here, HEAD, SWEEP)
        if FUSE and (HEAD.MASK == NO_MASK or not SWEEP.CHECK):
            z = logits(side, a, b, here, 1.0, 0.0, HEAD, SWEEP)
            new = tl.maximum(top, tl.max(z, 1) * side.factor)
            e = tl.exp2(z * side.factor - new[:, None])
        else:
            z = logits(side, a, b, here, side.factor, 0.0, HEAD, SWEEP)
            new = tl.maximum(top, tl.max(z, 1))
            e = tl.exp2(z - new[:, None])
        total = total * tl.exp2(top - new) + tl.sum(e, 1)
        top = new
        side = skip_rows(side, SWEEP.BR, SWEEP)
    return top, total
