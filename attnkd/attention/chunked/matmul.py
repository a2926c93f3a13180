"""The matrix products of a block behind ``impl="chunked"``: queries and keys → logits, and derivatives by logits → gradients.

A block's images and heads are one dimension P, that of a batched matmul: P = b · h, or b where the logits are summed over heads.
Queries and keys are read where they are, with any strides; half precision is widened group by group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attnkd.attention.problem import HIDDEN_BELOW, Side


class Group(NamedTuple):
    """Images and heads that are walked together, block of query rows after block of query rows."""

    images: slice
    heads: slice
    rows: list[slice]

    def of(self, x: Tensor) -> Tensor:
        """The group's part of a tensor [B, H, ...], whose B and H may be 1 instead."""
        everything = slice(None)
        return x[self.images if x.shape[0] > 1 else everything, self.heads if x.shape[1] > 1 else everything]


def fold(x: Tensor) -> Tensor:
    """A view: [b, h, ...] → [b · h, ...]."""
    return x.view(-1, *x.shape[2:])


def side_by_side(x: Tensor) -> bool:
    """Whether the heads of a token of x [b, h, ., D] are neighbours in memory."""
    return x.shape[1] == 1 or x.stride(1) == x.shape[3] * x.stride(3)


def add_product_(out: Tensor, a: Tensor, b: Tensor, keep: float, scale: float) -> None:
    """out [P, m, n] ← keep · out + scale · a [P, m, k] · b [P, k, n]."""
    if scale == 0:  # baddbmm would not look at a and b, and 0 · NaN is NaN
        a, scale = a * scale, 1.0
    torch.baddbmm(out, a, b, beta=keep, alpha=scale, out=out)


class Operands:
    """Queries [b, h, M, D] and keys [b, h, N, D] as operands of batched matmuls, without a copy.

    All heads in one matmul where strides allow it, else head by head. ``wide``: logits are summed over heads, which is one
    matmul over h · D dims where a token's heads lie side by side, as they do in a packed projection.
    """

    def __init__(self, query: Tensor, key: Tensor, wide: bool, dtype: torch.dtype) -> None:
        self.batch, self.heads = query.shape[:2]
        self.wide = wide
        if wide:
            self.together = side_by_side(query) and side_by_side(key)
        else:
            self.together = self.heads == 1 or all(
                x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (query, key)
            )
        self.query, self.key = (self.split(x.to(dtype), Tensor.reshape) for x in (query, key))

    def split(self, x: Tensor, reshape: Callable[..., Tensor] = Tensor.view) -> list[Tensor]:
        """[b, h, ., D] → one [b · h, ., D], one [b, ., h · D] if wide, or a [b, ., D] for every head."""
        if not self.together:
            return list(x.unbind(1))
        if self.wide:
            return [reshape(x.transpose(1, 2), (self.batch, x.shape[2], self.heads * x.shape[3]))]
        return [reshape(x, (self.batch * self.heads, *x.shape[2:]))]

    def part(self, z: Tensor, index: int) -> Tensor:
        """What belongs to an operand of [P, ...]."""
        return z if self.together or self.wide else z.unflatten(0, (self.batch, self.heads))[:, index]

    def product_(self, z: Tensor, at: slice, scale: float, keep: float) -> None:
        """z [P, r, N] ← keep · z + scale · q·k (summed over heads if wide)."""
        for i, (query, key) in enumerate(zip(self.query, self.key, strict=True)):
            out = self.part(z, i)
            add_product_(out, query[:, at], key.mT, 1.0 if self.wide and i else keep, scale)


def logits_shape(operands: Operands, at: slice) -> tuple[int, int, int]:
    pairs = operands.batch * (1 if operands.wide else operands.heads)
    return pairs, at.stop - at.start, operands.key[0].shape[1]


def fill_logits_(
    z: Tensor, operands: Operands, mask: Tensor | None, at: slice, scale: float, temperature: float
) -> None:
    """z [P, r, N] ← (scale · q·k + mask) / temperature, hidden keys −inf; mask: [b, h, M, N], sizes of 1 broadcast."""
    if mask is None:
        return operands.product_(z, at, scale / temperature, keep=0.0)
    by_head = z.unflatten(0, (operands.batch, -1))
    mask = mask[:, :, at] if mask.shape[2] > 1 else mask
    if mask.dtype == torch.bool:
        operands.product_(z, at, scale / temperature, keep=0.0)
        by_head.masked_fill_(~(mask.all(1, keepdim=True) if operands.wide else mask), -math.inf)
        return
    by_head.copy_(mask[:, :1] if operands.wide else mask)
    for head in range(1, operands.heads if operands.wide else 1):
        by_head.add_(mask[:, head : head + 1] if mask.shape[1] > 1 else mask)
    operands.product_(z, at, scale / temperature, keep=1.0 / temperature)
    hidden = mask <= HIDDEN_BELOW
    # After the product, which makes NaN of −inf where a hidden key is itself infinite or NaN.
    by_head.masked_fill_(hidden.any(1, keepdim=True) if operands.wide else hidden, -math.inf)


class Gradients:
    """dq [B, H, M, D], dk [B, H, N, D] and dmask (the mask's shape: summed where that is 1), added up block by block.

    Those that are not needed are empty.
    """

    def __init__(
        self, side: Side, temperature: float, dtype: torch.dtype, wide: bool, query: bool, key: bool, mask: bool
    ) -> None:
        assert side.query is not None and side.key is not None
        self.temperature, self.scale = temperature, side.scale
        none = side.query.new_empty(0, dtype=dtype)
        self.query = self._new(side.query, dtype, wide) if query else none
        self.key = self._new(side.key, dtype, wide) if key else none.clone()
        self.mask = none.new_zeros(side.mask.shape) if mask and side.mask is not None else none.clone()
        self.needs = query, key, mask
        if side.query.shape[2] == 0:  # no block will write it
            self.key.zero_()

    @staticmethod
    def _new(x: Tensor, dtype: torch.dtype, wide: bool) -> Tensor:
        """Dense, and splits as x does in :class:`Operands`."""
        if wide and side_by_side(x):
            return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype=dtype).transpose(1, 2)
        return x.new_empty(x.shape, dtype=dtype)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.mask

    def of(self, group: Group, operands: Operands) -> GroupGradients:
        return GroupGradients(self, group, operands)


class GroupGradients:
    """A group's part of :class:`Gradients`."""

    def __init__(self, total: Gradients, group: Group, operands: Operands) -> None:
        self.operands, self.temperature, self.scale = operands, total.temperature, total.scale / total.temperature
        needs_query, needs_key, needs_mask = total.needs
        self.query = operands.split(group.of(total.query)) if needs_query else None
        self.key = operands.split(group.of(total.key)) if needs_key else None
        self.mask = group.of(total.mask) if needs_mask else None

    def add(self, at: slice, ds: Tensor) -> None:
        """ds: [P, r, N], ∂loss/∂logits."""
        operands = self.operands
        for i, (query, key) in enumerate(zip(operands.query, operands.key, strict=True)):
            part = operands.part(ds, i)
            if self.query is not None:
                dq = self.query[i][:, at]
                add_product_(dq, part, key, 0.0, self.scale)
            if self.key is not None:
                dk = self.key[i]
                add_product_(dk, part.mT, query[:, at], 1.0 if at.start else 0.0, self.scale)
        if self.mask is not None:
            into = self.mask[:, :, at] if self.mask.shape[2] > 1 else self.mask
            by_head = ds.unflatten(0, (operands.batch, -1)).expand(-1, operands.heads, -1, -1)
            into.add_(by_head.sum_to_size(into.shape), alpha=1.0 / self.temperature)
