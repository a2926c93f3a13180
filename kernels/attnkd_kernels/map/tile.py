"""Tiles of logits and log-probabilities: the part that every whole-map kernel shares.

A kernel walks over tiles [BL, BR] of the map. Its *left* operand stays with the program and its *right* operand streams
past. Queries are on the left for the value and the query gradient (``QUERIES_LEFT``); keys are on the left for the key
gradient, so that its matrix product needs no transposed registers.

Logits are in units of log 2, and normalisers are known: z − LSE is the log-probability, with no maximum to carry along.
A row that sees no key has the normaliser ``DEAD``, which makes every probability of the row 0.

A *wide* head is the concatenation of H heads of DIM channels (log-sum merging): column c lives in head c // DIM at channel
c % DIM, whatever the strides. A head of a few columns more than BLOCK has a second, narrower tile for the REST: 72 and 80 are
64 + 16, 96 is 64 + 32, where one tile would be 128 wide. Heads wider than that are multiplied BLOCK columns at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import (
    BOOL_MASK,
    BOOL_ROW,
    DEAD,
    FLOAT_ROW,
    HIDDEN,
    NO_MASK,
    Operand,
    Side,
    hidden,
    log2_of_normal,
    shown,
    side_at,
)


class At(NamedTuple):
    """Where a tile starts, and the size of the whole map."""

    q0: Any
    k0: Any
    M: Any
    N: Any


class Rows(NamedTuple):
    """What is kept of every query row: pointers to [B, H', M] fp32, or to one head's M rows."""

    lse_s: Any
    lse_t: Any
    centre: Any  # Σ term of the gradient (forms.py); unused by divergences that know it
    weight: Any  # 2 / count, of the two MSEs


class RowValues(NamedTuple):
    """One number per query row, [B, H', M] with any strides: the gradient that comes from above, or normalisers that are given."""

    pointer: Any
    batch: Any
    head: Any
    row: Any


@dataclass(frozen=True, eq=False)  # one object a spec (launch.py), so its identity tells it apart
class MapHead:
    """What the code depends on, of one side: its (wide) head, its mask, and how many heads are averaged."""

    DIM: tl.constexpr
    WIDTH: tl.constexpr  # DIM, or H · DIM of a wide head
    BLOCK: tl.constexpr  # columns multiplied at a time
    REST: tl.constexpr  # columns of the second tile, or 0
    WHOLE: tl.constexpr  # whether those hold the whole head
    MASK: tl.constexpr
    MASK_HEADS: tl.constexpr  # heads whose additive masks add up
    MEAN: tl.constexpr  # heads whose probabilities are averaged; 1 without a mean


@dataclass(frozen=True, eq=False)  # one object a spec (launch.py), so its identity tells it apart
class Sweep:
    """What the code depends on, of one loop of a launch. A launch has two: first the narrow tiles that need checks (masks, the
    last few rows), then the wide ones that need none. In this order no accumulator leaves a loop for a lone product, which
    would serialise the matrix instructions."""

    DIVERGENCE: tl.constexpr
    QUERIES_LEFT: tl.constexpr
    BQ: tl.constexpr  # queries of a tile
    BK: tl.constexpr  # keys of a tile
    BL: tl.constexpr  # BQ or BK: what stays
    BR: tl.constexpr  # the other: what streams
    CHECK: tl.constexpr  # whether tiles may reach past the end and hold hidden keys
    MASKS: tl.constexpr  # "none", "keys" (boolean, one row for all queries: some tiles need no check) or "any"
    OUT: tl.constexpr  # columns of a gradient that a program writes; 0 where the value's sweep emits none
    LANES: tl.constexpr  # partial sums of a row, so that none crosses threads inside the loop


class Parts(NamedTuple):
    """The tiles [rows, BLOCK] and [rows, REST] of a head with a REST, where other heads have one tile."""

    first: Any
    rest: Any


@triton.jit
def load_rows(
    operand, row0, rows, col0, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr
):
    """[ROWS, COLUMNS]: rows row0.. and columns col0.. of a (wide) head, whose pointer is at row row0; what lies outside
    [rows, WIDTH] is 0."""
    r = tl.arange(0, ROWS)
    c = col0 + tl.arange(0, COLUMNS)
    pointers = operand.pointer + (r[:, None] * operand.row + head_columns(operand, c, HEAD)[None, :])  # [ROWS, COLUMNS]
    SHORT: tl.constexpr = (HEAD.REST == 0 and HEAD.WIDTH % COLUMNS != 0) or (
        COLUMNS == HEAD.REST and HEAD.WIDTH < HEAD.BLOCK + HEAD.REST
    )
    if SHORT:
        if CHECK:
            tile = tl.load(pointers, mask=(row0 + r < rows)[:, None] & (c < HEAD.WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(c < HEAD.WIDTH)[None, :], other=0.0)
    else:
        if CHECK:
            tile = tl.load(pointers, mask=(row0 + r < rows)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(operand, tile, row0, rows, col0, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes [ROWS, COLUMNS] where :func:`load_rows` would read it, in the operand's dtype."""
    r = tl.arange(0, ROWS)
    c = col0 + tl.arange(0, COLUMNS)
    pointers = operand.pointer + (r[:, None] * operand.row + head_columns(operand, c, HEAD)[None, :])  # [ROWS, COLUMNS]
    inside = (row0 + r < rows)[:, None] & (c < HEAD.WIDTH)[None, :]
    tl.store(pointers, tile.to(operand.pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_head(operand, row0, rows, HEAD: tl.constexpr, ROWS: tl.constexpr, CHECK: tl.constexpr):
    """All columns of the rows, [ROWS, BLOCK] or Parts."""
    tile = load_rows(operand, row0, rows, 0, HEAD, ROWS, HEAD.BLOCK, CHECK)
    if HEAD.REST > 0:
        tile = Parts(tile, load_rows(operand, row0, rows, HEAD.BLOCK, HEAD, ROWS, HEAD.REST, CHECK))
    return tile


@triton.jit
def no_gradient(HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros to add a gradient up in: [ROWS, COLUMNS] or Parts, fp32."""
    if HEAD.REST > 0:
        acc = Parts(tl.zeros([ROWS, HEAD.BLOCK], tl.float32), tl.zeros([ROWS, HEAD.REST], tl.float32))
    else:
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    return acc


@triton.jit
def add_gradient(acc, dz, tile, HEAD: tl.constexpr):
    """acc + dz · tile, of all columns that ``acc`` has."""
    if HEAD.REST > 0:
        dz = dz.to(tile.first.dtype)
        first = tl.dot(dz, tile.first, acc.first, input_precision="ieee")
        acc = Parts(first, tl.dot(dz, tile.rest, acc.rest, input_precision="ieee"))
    else:
        acc = tl.dot(dz.to(tile.dtype), tile, acc, input_precision="ieee")
    return acc


@triton.jit
def product(a, b, HEAD: tl.constexpr):
    """a [A, channels] · b [B, channels]ᵀ, [A, B] fp32, of tiles or Parts that hold all columns."""
    if HEAD.REST > 0:
        result = tl.dot(a.first, tl.trans(b.first), input_precision="ieee")
        result = tl.dot(a.rest, tl.trans(b.rest), result, input_precision="ieee")
    else:
        result = tl.dot(a, tl.trans(b), input_precision="ieee")
    return result


@triton.jit
def without_rows(acc, dead, HEAD: tl.constexpr):
    """acc, 0 in the rows that are dead [ROWS]."""
    if HEAD.REST > 0:
        acc = Parts(tl.where(dead[:, None], 0.0, acc.first), tl.where(dead[:, None], 0.0, acc.rest))
    else:
        acc = tl.where(dead[:, None], 0.0, acc)
    return acc


@triton.jit
def times_rows(acc, factor, HEAD: tl.constexpr):
    """acc · factor [rows, 1]."""
    if HEAD.REST > 0:
        acc = Parts(acc.first * factor, acc.rest * factor)
    else:
        acc = acc * factor
    return acc


@triton.jit
def row_products(a, b, HEAD: tl.constexpr):
    """[rows, 1] fp32: Σ a · b over the columns of each row."""
    if HEAD.REST > 0:
        result = tl.sum(a.first.to(tl.float32) * b.first.to(tl.float32), 1)
        result += tl.sum(a.rest.to(tl.float32) * b.rest.to(tl.float32), 1)
    else:
        result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    return result[:, None]


@triton.jit
def store_gradient(
    operand, acc, factor, row0, rows, col0, HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes acc · factor; factor: a number or [ROWS, 1]."""
    if HEAD.REST > 0:
        store_rows(operand, acc.first * factor, row0, rows, 0, HEAD, ROWS, HEAD.BLOCK)
        store_rows(operand, acc.rest * factor, row0, rows, HEAD.BLOCK, HEAD, ROWS, HEAD.REST)
    else:
        store_rows(operand, acc * factor, row0, rows, col0, HEAD, ROWS, COLUMNS)


@triton.jit
def head_columns(operand, c, HEAD: tl.constexpr):
    """Offsets of columns c of a (wide) head within one row."""
    if HEAD.WIDTH == HEAD.DIM:
        offsets = c * operand.column
    else:
        offsets = tl.cast(c // HEAD.DIM, tl.int64) * operand.head + (c % HEAD.DIM) * operand.column
    return offsets


@triton.jit
def at_rows(operand, row):
    """The operand moved down to row ``row``."""
    pointer = operand.pointer + tl.cast(row, tl.int64) * operand.row
    return Operand(pointer, operand.batch, operand.head, operand.row, operand.column)


@triton.jit
def at_tile(side, at):
    """The side with its query and key moved to the first row and key of a tile."""
    return Side(at_rows(side.query, at.q0), at_rows(side.key, at.k0), side.mask, side.factor, side.bias)


@triton.jit
def skip_rows(side, rows, SWEEP: tl.constexpr):
    """The side of a tile, its right operand moved on. (Inside a loop adding is cheaper than multiplying.)"""
    query, key = side.query, side.key
    if SWEEP.QUERIES_LEFT:
        key = at_rows(key, rows)
    else:
        query = at_rows(query, rows)
    return Side(query, key, side.mask, side.factor, side.bias)


@triton.jit
def load_left(side, at, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """[BL, BLOCK] or Parts: what stays with the program; unused when the head is wider."""
    if SWEEP.QUERIES_LEFT:
        tile = load_head(side.query, at.q0, at.M, HEAD, SWEEP.BL, True)
    else:
        tile = load_head(side.key, at.k0, at.N, HEAD, SWEEP.BL, True)
    return tile


@triton.jit
def load_right(side, at, col0, HEAD: tl.constexpr, SWEEP: tl.constexpr, COLUMNS: tl.constexpr):
    """[BR, COLUMNS]: what streams past."""
    if SWEEP.QUERIES_LEFT:
        tile = load_rows(side.key, at.k0, at.N, col0, HEAD, SWEEP.BR, COLUMNS, SWEEP.CHECK)
    else:
        tile = load_rows(side.query, at.q0, at.M, col0, HEAD, SWEEP.BR, COLUMNS, SWEEP.CHECK)
    return tile


@triton.jit
def load_whole_right(side, stand_in, at, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """[BR, BLOCK] or Parts: what streams past, of a head that is no wider; else ``stand_in``."""
    tile = stand_in
    if HEAD.WHOLE:
        if SWEEP.QUERIES_LEFT:
            tile = load_head(side.key, at.k0, at.N, HEAD, SWEEP.BR, SWEEP.CHECK)
        else:
            tile = load_head(side.query, at.q0, at.M, HEAD, SWEEP.BR, SWEEP.CHECK)
    return tile


@triton.jit
def row_values(pointer, at, outside, SWEEP: tl.constexpr):
    """One value per query row of the tile, [BQ, 1] or [1, BQ]; ``outside`` beyond row M."""
    q = at.q0 + tl.arange(0, SWEEP.BQ)
    if SWEEP.QUERIES_LEFT or SWEEP.CHECK:
        value = tl.load(pointer + q, mask=q < at.M, other=outside)
    else:
        value = tl.load(pointer + q)
    if SWEEP.QUERIES_LEFT:
        value = value[:, None]
    else:
        value = value[None, :]
    return value


@triton.jit
def load_mask(side, at, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """A mask's tile for :func:`logits`, [BL, BR] or one row of it: what is visible, or what is added in units of log 2.

    To be called before the tile's product. Triton gives a tile of logits the register layout of whichever of the two
    comes first; that of the mask spreads a row over a warp, and its reductions then cost more than everything else.
    """
    tile = 0.0
    if HEAD.MASK != NO_MASK and SWEEP.CHECK:
        mask = side.mask
        if HEAD.MASK == BOOL_ROW or HEAD.MASK == FLOAT_ROW:
            q = tl.arange(0, 1)
        else:
            q = tl.arange(0, SWEEP.BQ)
        k = tl.arange(0, SWEEP.BK)
        start = mask.pointer + tl.cast(at.q0, tl.int64) * mask.row + tl.cast(at.k0, tl.int64) * mask.column
        pointers = start + (q[:, None] * mask.row + k[None, :] * mask.column)  # [BQ or 1, BK]
        inside = (at.q0 + q < at.M)[:, None] & (at.k0 + k < at.N)[None, :]
        if HEAD.MASK == BOOL_MASK or HEAD.MASK == BOOL_ROW:
            tile = tl.load(pointers, mask=inside, other=0)
        else:
            tile = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
            lowest = tile
            if HEAD.MASK_HEADS > 1:
                for _ in range(1, HEAD.MASK_HEADS):  # not unrolled: one tile of registers at a time
                    pointers += mask.head
                    more = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
                    lowest = tl.minimum(lowest, more)
                    tile += more
            tile = tl.where(lowest <= HIDDEN, HIDDEN, tile * side.bias)
        if not SWEEP.QUERIES_LEFT:
            tile = tl.trans(tile)
    return tile


@triton.jit
def logits(side, a, b, at, factor, norm, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """[BL, BR]: factor · q·k + bias · mask − norm; HIDDEN (or less) where the mask hides, or the key is past N on the right.

    Tiles a [BL, BLOCK] and b [BR, BLOCK], or Parts, hold all columns unless the head is wider.
    """
    mask = load_mask(side, at, HEAD, SWEEP)
    if HEAD.WHOLE:
        score = product(a, b, HEAD)
    else:
        score = tl.zeros([SWEEP.BL, SWEEP.BR], tl.float32)
        for col0 in range(0, HEAD.WIDTH, HEAD.BLOCK):
            if SWEEP.QUERIES_LEFT:
                x = load_rows(side.query, at.q0, at.M, col0, HEAD, SWEEP.BL, HEAD.BLOCK, True)
            else:
                x = load_rows(side.key, at.k0, at.N, col0, HEAD, SWEEP.BL, HEAD.BLOCK, True)
            y = load_right(side, at, col0, HEAD, SWEEP, HEAD.BLOCK)
            score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
    if HEAD.MASK == NO_MASK or not SWEEP.CHECK:
        z = score * factor - norm
        if SWEEP.CHECK and SWEEP.QUERIES_LEFT:
            z = tl.where((at.k0 + tl.arange(0, SWEEP.BK) < at.N)[None, :], z, HIDDEN)
    elif HEAD.MASK == BOOL_MASK or HEAD.MASK == BOOL_ROW:
        z = tl.where(mask != 0, score * factor - norm, HIDDEN)
    else:  # a hidden key's product may be NaN. Whether it is hidden is asked of the difference: of the mask, whose tile would move twice
        z = mask - norm
        z = tl.where(hidden(z), z, score * factor + z)
    return z


@triton.jit
def log_probs(side, lse, norm, a, b, at, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """[BL, BR]: log2 of one side's probabilities: of one (wide) head, or of the mean of MEAN > 1.

    norm: the rows' LSEs as :func:`row_values` gives them, for one head; a mean reads those of head h at ``lse + h·M``.
    """
    if HEAD.MEAN == 1:
        result = logits(side, a, b, at, side.factor, norm, HEAD, SWEEP)
    else:
        total = tl.full([SWEEP.BL, SWEEP.BR], HIDDEN, tl.float32)
        for head in range(0, HEAD.MEAN):
            total = log2_add(total, head_log_probs(side, lse, head, at, HEAD, SWEEP))
        result = tl.where(shown(total), total - tl.log2(HEAD.MEAN * 1.0), HIDDEN)
    return result


@triton.jit
def head_log_probs(side, lse, head, at, HEAD: tl.constexpr, SWEEP: tl.constexpr):
    """[BL, BR]: log2 of the probabilities of one head of a mean; ``side`` and ``lse`` are those of its first head."""
    one = move_head(side, head)
    a = 0.0
    if HEAD.WHOLE:
        a = load_left(one, at, HEAD, SWEEP)
    b = load_whole_right(one, 0.0, at, HEAD, SWEEP)
    norm = row_values(lse + tl.cast(head, tl.int64) * at.M, at, DEAD, SWEEP)
    return logits(one, a, b, at, side.factor, norm, HEAD, SWEEP)


@triton.jit
def move_head(side, head):
    """The side ``head`` heads further."""
    return side_at(side, tl.cast(0, tl.int64), tl.cast(head, tl.int64))


@triton.jit
def log2_add(x, y):
    """log2(2^x + 2^y), safe for the stand-ins."""
    top = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return top + log2_of_normal(1.0 + tl.exp2(tl.minimum(x, y) - top))


@triton.jit
def key_span(student, teacher, k0, k1, S: tl.constexpr, T: tl.constexpr, KEYS: tl.constexpr):
    """Of the keys [k0, k1): the first that some side hides, and one past the last that some side sees."""
    first = k1
    stop = k0
    for start in range(k0, k1, KEYS):
        k = start + tl.arange(0, KEYS)
        seen_s = k < k1
        seen_t = seen_s
        if S.MASK == BOOL_ROW:
            seen_s = (
                tl.load(student.mask.pointer + tl.cast(k, tl.int64) * student.mask.column, mask=k < k1, other=0) != 0
            )
        if T.MASK == BOOL_ROW:
            seen_t = (
                tl.load(teacher.mask.pointer + tl.cast(k, tl.int64) * teacher.mask.column, mask=k < k1, other=0) != 0
            )
        first = tl.minimum(first, tl.min(tl.where(seen_s & seen_t, k1, k), 0))
        stop = tl.maximum(stop, tl.max(tl.where(seen_s | seen_t, k + 1, k0), 0))
    return first, stop


@triton.jit
def without_checks(student, teacher, at, S: tl.constexpr, T: tl.constexpr, SWEEP: tl.constexpr):
    """(clear, stop): of the right rows, those up to ``clear`` need no check, and those from ``stop`` on change nothing."""
    stop = at.N if SWEEP.QUERIES_LEFT else at.M
    clear = stop // SWEEP.BR * SWEEP.BR
    if SWEEP.MASKS == "any":
        clear = 0
    elif SWEEP.MASKS == "keys":
        if SWEEP.QUERIES_LEFT:
            first, stop = key_span(student, teacher, 0, at.N, S, T, 1024)
            clear = first // SWEEP.BR * SWEEP.BR
        else:  # the keys stay: all of their tiles are clear, or none is
            beyond = tl.minimum(at.k0 + SWEEP.BL, at.N)
            first, end = key_span(student, teacher, at.k0, beyond, S, T, SWEEP.BL)
            clear = tl.where(first == beyond, clear, 0)
            stop = tl.where(end == at.k0, 0, stop)
    return clear, stop


@triton.jit
def fold(x, SWEEP: tl.constexpr):
    """[BL, LANES]: partial sums over the keys of a tile [BL, BR] whose queries are on the left.

    In the layouts of the matrix units a thread holds the same columns of every eighth, so these sums cross no threads; they do
    once, after the last tile.
    """
    return tl.sum(tl.reshape(x, (SWEEP.BL, SWEEP.BR // SWEEP.LANES, SWEEP.LANES)), 1)
