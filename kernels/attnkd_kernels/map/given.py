"""Normalisers that the caller has: read in nats, judged by the sums of their probabilities, and left for the backward in units of log 2.

Every function takes the normalisers of one side as given, or None where the sweep of normaliser.py left them at ``lse``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import DEAD, LOG2E, LSE_ERROR, LSE_RELATIVE_ERROR, VISIBLE
from attnkd_kernels.map.tile import row_values


class Given(NamedTuple):
    """Normalisers in nats that the caller has, [B, H, M] fp32 a side, or None where the sweep of normaliser.py left them in ``kept``."""

    student: Any  # RowValues or None
    teacher: Any


@triton.jit
def normalisers(given, lse, b, h, at, SWEEP: tl.constexpr):
    """[BL, 1]: log2 of the rows' sums. A given −inf (no visible key) becomes VISIBLE: no hidden key can reach that."""
    if given is None:
        norm = row_values(lse, at, DEAD, SWEEP)
    else:
        q = at.q0 + tl.arange(0, SWEEP.BQ)
        pointers = given.pointer + b * given.batch + h * given.head + tl.cast(q, tl.int64) * given.row
        nats = tl.load(pointers, mask=q < at.M, other=0.0).to(tl.float32)
        norm = tl.where(nats == float("-inf"), VISIBLE, nats * LOG2E)[:, None]
    return norm


@triton.jit
def wrong_rows(given, norm, sums):
    """[BL]: where a given normaliser is none: its probabilities, added up in ``sums`` [BL, LANES], do not sum to 1."""
    total = tl.sum(sums, 1)
    wrong = total != total
    if given is None:
        wrong = wrong & False
    else:
        norm = tl.reshape(norm, total.shape)
        error = tl.abs(tl.log2(total)) - LSE_RELATIVE_ERROR * tl.abs(norm)
        wrong = (error > LSE_ERROR * LOG2E) & ((norm > VISIBLE) | (total > 0.0))
    return wrong


@triton.jit
def dead_rows(given, norm, lse, m, M, HEADS: tl.constexpr):
    """Which rows see no key, or cannot be seen by some of the heads."""
    dead = m >= M
    if given is None:
        for head in range(HEADS):
            dead = dead | (tl.load(lse + tl.cast(head, tl.int64) * M + m, mask=m < M, other=DEAD) >= DEAD)
    else:
        dead = dead | (tl.reshape(norm, dead.shape) <= VISIBLE)
    return dead


@triton.jit
def keep_normalisers(given, norm, lse, dead, m, M, MASKED: tl.constexpr, HEADS: tl.constexpr):
    """Leaves at ``lse`` what the backward needs: DEAD for dead rows; given normalisers are not there yet."""
    if given is not None:
        tl.store(lse + m, tl.where(dead, DEAD, tl.reshape(norm, dead.shape)), mask=m < M)
    elif MASKED:
        for head in range(HEADS):
            tl.store(lse + tl.cast(head, tl.int64) * M + m, DEAD, mask=(m < M) & dead)
