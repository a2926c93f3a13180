"""Tiles of logits and log-probabilities: the part that every whole-map kernel shares.

A kernel walks over tiles [BL, BR] of the map. Its *left* operand stays with the program and its *right* operand streams
past. Queries are the left operand of the forward and of the query gradient (``QUERIES_LEFT``); keys are the left operand
of the key gradient, so that its matrix product needs no transposed registers.

All logits are in units of log2 (``z·log2(e)``), so that ``exp2`` undoes them. Hidden keys hold the finite stand-in
``HIDDEN``; anything above ``VISIBLE`` is visible. A row that sees no key has its normaliser saved as ``DEAD``, which makes
every probability of the row 0 in all later sweeps.

Inside a kernel an operand is the tuple ``(pointer, head stride, row stride, channel stride)`` and a mask the tuple
``(pointer, head stride, query stride, key stride)``, both already moved to their batch entry.

A *wide* head is the concatenation of H heads of D channels (log-sum merging): column c lives in head c // D at channel
c % D, whatever the strides. Heads wider than BD are multiplied BD columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import BOOL_MASK, BOOL_ROW, DEAD, FLOAT_ROW, HIDDEN, NO_MASK, shown


@triton.jit
def at_head(operand, head):
    """The operand (or mask) moved to one head."""
    pointer, s_head, s_row, s_col = operand
    return pointer + tl.cast(head, tl.int64) * s_head, s_head, s_row, s_col


@triton.jit
def load_rows(
    operand,
    row0,
    rows,
    col0,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """[BLOCK, BD]: rows row0.. and columns col0.. of a (wide) head; what lies outside [rows, WIDTH] is 0."""
    pointer, s_head, s_row, s_channel = operand
    r = tl.arange(0, BLOCK)
    c = col0 + tl.arange(0, BD)
    if WIDTH == D:
        columns = c * s_channel
    else:
        columns = tl.cast(c // D, tl.int64) * s_head + (c % D) * s_channel
    pointers = pointer + tl.cast(row0, tl.int64) * s_row + (r[:, None] * s_row + columns[None, :])  # [BLOCK, BD]
    if WIDTH % BD != 0:
        if CHECK:
            tile = tl.load(pointers, mask=(row0 + r < rows)[:, None] & (c < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(c < WIDTH)[None, :], other=0.0)
    else:
        if CHECK:
            tile = tl.load(pointers, mask=(row0 + r < rows)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def scores(
    a,
    b,
    left,
    l0,
    l_rows,
    right,
    r0,
    r_rows,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """[BL, BR] = left · rightᵀ, in fp32. Tiles a [BL, BD] and b [BR, BD] hold all columns unless the head is wide."""
    if WIDTH <= BD:
        product = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        product = tl.zeros([BL, BR], tl.float32)
        for col0 in range(0, WIDTH, BD):
            x = load_rows(left, l0, l_rows, col0, D, WIDTH, BL, BD, True)
            y = load_rows(right, r0, r_rows, col0, D, WIDTH, BR, BD, CHECK)
            product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
    return product


@triton.jit
def load_mask(
    mask,
    bias_factor,
    q0,
    M,
    k0,
    N,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    QUERIES_LEFT: tl.constexpr,
):
    """A mask's tile for :func:`logits`, [BL, BR] or one row of it: what is visible, or what is added in log2 units.

    MASK_HEADS: how many heads' additive masks add up (log-sum merging), starting at the mask's head.

    To be called before the tile's product. Triton gives a tile of logits the register layout of whichever of the two
    comes first; that of the mask spreads a row over a warp, and its reductions then cost more than everything else.
    """
    tile = 0.0
    if KIND != NO_MASK:
        pointer, s_head, s_query, s_key = mask
        if KIND == BOOL_ROW or KIND == FLOAT_ROW:
            q = tl.arange(0, 1)
        else:
            q = tl.arange(0, BQ)
        k = tl.arange(0, BK)
        start = pointer + tl.cast(q0, tl.int64) * s_query + tl.cast(k0, tl.int64) * s_key
        pointers = start + (q[:, None] * s_query + k[None, :] * s_key)  # [BQ or 1, BK]
        inside = (q0 + q < M)[:, None] & (k0 + k < N)[None, :]
        if KIND == BOOL_MASK or KIND == BOOL_ROW:
            tile = tl.load(pointers, mask=inside, other=0)
        else:
            tile = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
            lowest = tile
            if MASK_HEADS > 1:
                for _ in range(1, MASK_HEADS):  # not unrolled: one tile of registers at a time
                    pointers += s_head
                    more = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
                    lowest = tl.minimum(lowest, more)
                    tile += more
            tile = tl.where(lowest <= HIDDEN, HIDDEN, tile * bias_factor)
        if not QUERIES_LEFT:
            tile = tl.trans(tile)
    return tile


@triton.jit
def logits(
    product,
    factor,
    mask,
    k0,
    N,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    QUERIES_LEFT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Scores [BL, BR] → logits (scale · q·k + mask) / T in log2 units; HIDDEN where the mask hides or the key is past N."""
    z = product * factor
    if KIND == BOOL_MASK or KIND == BOOL_ROW:
        z = tl.where(mask != 0, z, HIDDEN)
    elif KIND != NO_MASK:
        z += mask  # HIDDEN swallows any logit below 1e22; asking again what it hides would move the mask's tile twice
    elif TAIL:
        k = k0 + tl.arange(0, BK)
        if QUERIES_LEFT:
            z = tl.where((k < N)[None, :], z, HIDDEN)
        else:
            z = tl.where((k < N)[:, None], z, HIDDEN)
    return z


@triton.jit
def row_values(pointer, q0, M, outside, BQ: tl.constexpr, QUERIES_LEFT: tl.constexpr, CHECK: tl.constexpr):
    """One value per query row, [BQ, 1] or [1, BQ]; ``outside`` beyond row M (CHECK)."""
    q = tl.arange(0, BQ)
    if CHECK:
        value = tl.load(pointer + q0 + q, mask=q0 + q < M, other=outside)
    else:
        value = tl.load(pointer + q0 + q)
    if QUERIES_LEFT:
        value = value[:, None]
    else:
        value = value[None, :]
    return value


@triton.jit
def log2_add(x, y):
    """log2(2^x + 2^y), safe for the stand-ins."""
    top = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return top + tl.log2(1.0 + tl.exp2(tl.minimum(x, y) - top))


@triton.jit
def mean_log_probs(
    left,
    l0,
    l_rows,
    right,
    r0,
    r_rows,
    factor,
    mask,
    bias_factor,
    q0,
    M,
    k0,
    N,
    lse,
    log_sum,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERIES_LEFT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """[BL, BR]: log2 of the mean over heads of the probabilities, summed in the log domain so that nothing underflows."""
    total = tl.full([BL, BR], HIDDEN, tl.float32)
    for head in range(0, HEADS):
        left_h = at_head(left, head)
        right_h = at_head(right, head)
        x = 0.0
        y = 0.0
        if D <= BD:
            x = load_rows(left_h, l0, l_rows, 0, D, D, BL, BD, True)
            y = load_rows(right_h, r0, r_rows, 0, D, D, BR, BD, TAIL)
        bias = load_mask(at_head(mask, head), bias_factor, q0, M, k0, N, BQ, BK, KIND, 1, QUERIES_LEFT)
        product = scores(x, y, left_h, l0, l_rows, right_h, r0, r_rows, D, D, BL, BR, BD, TAIL)
        z = logits(product, factor, bias, k0, N, BK, KIND, QUERIES_LEFT, TAIL)
        z -= row_values(lse + tl.cast(head, tl.int64) * M, q0, M, DEAD, BQ, QUERIES_LEFT, True)
        if PAIRS:
            z -= row_values(log_sum + tl.cast(head, tl.int64) * M, q0, M, 0.0, BQ, QUERIES_LEFT, True)
        total = log2_add(total, z)
    return tl.where(shown(total), total - tl.log2(HEADS * 1.0), HIDDEN)


@triton.jit
def log_probs(
    a,
    left,
    l0,
    l_rows,
    b,
    right,
    r0,
    r_rows,
    factor,
    mask,
    bias_factor,
    q0,
    M,
    k0,
    N,
    row_lse,
    row_log_sum,
    lse,
    log_sum,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERIES_LEFT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """[BL, BR]: log2 of one side's probabilities: of one (wide) head, or of the mean of HEADS > 1.

    The normaliser is the row's LSE or, with PAIRS, its maximum and the log2 of its sum. One head takes them as the tiles
    ``row_lse`` and ``row_log_sum``; a mean reads those of head h at ``lse + h·M`` and ``log_sum + h·M``.
    """
    if HEADS > 1:
        result = mean_log_probs(
            left, l0, l_rows, right, r0, r_rows, factor, mask, bias_factor, q0, M, k0, N, lse, log_sum,
            HEADS, D, BL, BR, BD, BQ, BK, KIND, PAIRS, QUERIES_LEFT, TAIL,
        )  # fmt: skip
    else:
        bias = load_mask(mask, bias_factor, q0, M, k0, N, BQ, BK, KIND, MASK_HEADS, QUERIES_LEFT)
        z = scores(a, b, left, l0, l_rows, right, r0, r_rows, D, WIDTH, BL, BR, BD, TAIL)
        z = logits(z, factor, bias, k0, N, BK, KIND, QUERIES_LEFT, TAIL and QUERIES_LEFT)
        result = z - row_lse
        if PAIRS:
            result -= row_log_sum
    return result
