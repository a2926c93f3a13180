"""The language that the kernels share: what they are given, the constants, the masks, and the parts of a query row.

A kernel is given one :class:`Side` per model (its tensors, strides and factors: known at run time) and one :class:`HeadSpec`
(what the code depends on: known when it is compiled). ``launch.py`` makes both from tensors. Sides and operands stand behind
the numbers in a kernel's list of parameters: the compiler orders the factors of a product by it, and with that its registers.

Logits are kept in units of log 2, so that an exponential is a single ``exp2``. A hidden key holds ``HIDDEN``, a finite
stand-in for −inf, so that differences of two such logits are numbers.

A *wide* head is ``HEADS`` heads of ``DIM`` dims side by side (log-sum merging): its dim w is dim w % DIM of head w // DIM,
whatever the strides. With HEADS = 1 it is an ordinary head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # the logit of a hidden key
VISIBLE = tl.constexpr(-1e29)  # logits up to this belong to hidden keys
DEAD = tl.constexpr(1e30)  # the normaliser of a row that sees no key: it makes every probability 0
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
WRONG = tl.constexpr(float("inf"))  # a normaliser that is none: its probabilities do not sum to 1
LSE_ERROR = tl.constexpr(1e-3)  # a given normaliser, in nats, may be off by this + LSE_RELATIVE_ERROR · its size
LSE_RELATIVE_ERROR = tl.constexpr(1e-6)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# What a side's mask is. The one enumeration of masks: launch.mask_kind names a tensor's, kernels compare with these.
NO_MASK = tl.constexpr("none")
BOOL_MASK = tl.constexpr("bool")  # [M, N] bytes; 0 hides the key
FLOAT_MASK = tl.constexpr("float")  # [M, N], added to the scores; −inf (anything up to HIDDEN) hides the key
BOOL_ROW = tl.constexpr("bool row")  # one row [N] for every query
FLOAT_ROW = tl.constexpr("float row")  # one row [N] for every query
GIVEN_ROWS = tl.constexpr("given rows")  # [M, N] finished probabilities in place of scores and mask


class Operand(NamedTuple):
    """A tensor [B, H, rows, columns]: its pointer and its strides, in elements."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Side(NamedTuple):
    """One model's part of a row's logits z = factor · q·k + bias · mask."""

    query: Operand  # [B, H, M, D]
    key: Operand  # [B, H, N, D]
    mask: Operand  # [B, Ho, M, N]: the mask or the given rows; unused with NO_MASK
    factor: Any  # scale/T, in the unit of the logits
    bias: Any  # 1/T, in the unit of the logits


class Stats(NamedTuple):
    """What is known of rows of which some keys were seen: sums relative to the largest logit so far, of both sides."""

    top_s: Any  # max s
    sum_s: Any  # Σ 2^(s − top_s)
    top_t: Any  # max t
    sum_t: Any  # Σ 2^(t − top_t)
    cross: Any  # Σ 2^(t − top_t) · difference of the two logits (divergences.py)


@dataclass(frozen=True, eq=False)  # one object a spec (launch.head_spec), so its identity tells it apart
class HeadSpec:
    """What the code depends on: the shape of a side's (wide) head and the kind of its mask. Made by launch.head_spec."""

    HEADS: tl.constexpr
    DIM: tl.constexpr
    WIDTH: tl.constexpr  # HEADS · DIM
    PADDED: tl.constexpr  # WIDTH up to the next power of two
    MASK: tl.constexpr


@triton.jit
def hidden(z):
    """Which logits belong to hidden keys. NaN does not, so that it reaches the loss."""
    return z <= VISIBLE


@triton.jit
def shown(z):
    """Which logits (or log-probabilities) are visible; NaN is."""
    return (z <= VISIBLE) == 0


@triton.jit
def row_is_dead(top_s, sum_s, top_t, sum_t):
    """No key visible on one of the sides. Maxima skip NaN, so the sums decide that a row with NaN is not dead."""
    return (hidden(top_s) | hidden(top_t)) & (sum_s == sum_s) & (sum_t == sum_t)


@triton.jit
def at_head(operand, b, h):
    """The operand moved to image b and head h (int64); a wide head starts at head 0."""
    pointer = operand.pointer + b * operand.batch + h * operand.head
    return Operand(pointer, operand.batch, operand.head, operand.row, operand.column)


@triton.jit
def side_at(side, b, h):
    """The side moved to image b and head h."""
    return Side(
        at_head(side.query, b, h), at_head(side.key, b, h), at_head(side.mask, b, h), side.factor, side.bias
    )  # fmt: skip


@triton.jit
def head_dims(operand, SPEC: tl.constexpr):
    """[PADDED]: offsets of a (wide) head's dims within one row of the operand."""
    w = tl.arange(0, SPEC.PADDED)
    if SPEC.HEADS == 1:
        offsets = w * operand.column
    else:
        offsets = (w // SPEC.DIM).to(tl.int64) * operand.head + (w % SPEC.DIM) * operand.column
    return offsets


@triton.jit
def dim_exists(SPEC: tl.constexpr):
    """[PADDED]: which dims are no padding."""
    return tl.arange(0, SPEC.PADDED) < SPEC.WIDTH


@triton.jit
def query_elements(group, m, M, SPEC: tl.constexpr):
    """[PADDED]: where row m of (wide) head ``group`` = b·Ho + h lies in a contiguous tensor [B, H, M, D]."""
    w = tl.arange(0, SPEC.PADDED)
    return ((group * SPEC.HEADS + w // SPEC.DIM) * M + m) * SPEC.DIM + w % SPEC.DIM


@triton.jit
def load_query(query, b, h, m, factor, SPEC: tl.constexpr):
    """[PADDED] fp32: query row m of (wide) head h of image b, times ``factor``; 0 in padding. Given rows have no query."""
    if SPEC.MASK == GIVEN_ROWS:
        q = 0.0
    else:
        dims = head_dims(query, SPEC)
        row = at_head(query, b, h).pointer + m * query.row
        q = tl.load(row + dims, mask=dim_exists(SPEC), other=0.0).to(tl.float32) * factor
    return q


@triton.jit
def load_keys(key, b, h, n, N, SPEC: tl.constexpr):
    """[BN, PADDED] in the keys' own dtype: keys n of the head; 0 where a key or a dim does not exist. Given rows have no keys."""
    if SPEC.MASK == GIVEN_ROWS:
        k = 0.0
    else:
        exists = (n < N)[:, None]
        pointers = at_head(key, b, h).pointer + n.to(tl.int64)[:, None] * key.row + head_dims(key, SPEC)[None, :]
        if SPEC.WIDTH == SPEC.PADDED:
            k = tl.load(pointers, mask=exists, other=0.0)
        else:
            k = tl.load(pointers, mask=exists & dim_exists(SPEC)[None, :], other=0.0)
    return k


@triton.jit
def row_logits(mask, bias, q, k, m, n, N, SPEC: tl.constexpr):
    """[BN]: z = factor · q·k + bias · mask of row m at keys n; HIDDEN where hidden or no key. ``q`` holds the factor, ``mask``
    is at its head."""
    MASK: tl.constexpr = SPEC.MASK
    if MASK != GIVEN_ROWS:
        z = tl.sum(k.to(tl.float32) * q[None, :], 1)
    at = mask.pointer + m * mask.row + n.to(tl.int64) * mask.column
    if MASK == GIVEN_ROWS:
        z = log2_of_probs(tl.load(at, mask=n < N, other=0.0).to(tl.float32))
    elif MASK == FLOAT_MASK or MASK == FLOAT_ROW:
        added = tl.load(at, mask=n < N, other=0.0).to(tl.float32)
        z = tl.where(added <= HIDDEN, HIDDEN, z + added * bias)  # NaN must not pass for hidden
    elif MASK != NO_MASK:
        visible = tl.load(at, mask=n < N, other=0)
        z = tl.where(visible != 0, z, HIDDEN)
    return tl.where(n < N, z, HIDDEN)


@triton.jit
def log2_of_normal(x):
    """log2 of numbers between 1/2 and 2 to within 2^-22 (of other normal ones 2 ulp), by the GPU's own instruction.

    On NVIDIA GPUs ``tl.log2`` is software: about 26 instructions more, for an ulp and for subnormal numbers.
    """
    if tl.target_info.is_cuda() and not INTERPRETED:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def log2_of_probs(p):
    """log2 p, HIDDEN where p is 0; NaN and negative ones stay visible as NaN. A GPU's logarithm takes subnormal p for 0."""
    subnormal = p < TINY
    log_p = tl.log2(tl.where(subnormal, p * 18446744073709551616.0, p)) - tl.where(subnormal, 64.0, 0.0)  # 2^64
    return tl.where(p == 0.0, HIDDEN, log_p)
