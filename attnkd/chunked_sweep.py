"""The walk over blocks of (images, heads, query rows) behind ``impl="chunked"``: logits in, rows and gradients out.

A block's images and heads are one dimension P, that of a batched matmul: P = b · h, or b where the logits are summed over heads.
Work tensors are allocated once a walk and written in place; a block's stay in the cache. Queries and keys are read where they
are, with any strides; half precision is widened group by group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnkd.chunked_divergence import MergedHeads, Softmax, divergence_, logit_mse_
from attnkd.problem import HIDDEN_BELOW, Problem, Side

CPU_BLOCK = 256 * 1024
"""Logits in a block per CPU thread: 1 MiB a float32 buffer, of which three or four stay in second and third level caches."""
DEVICE_BLOCK = 16 * 1024 * 1024
"""Logits in a block on any other device: few launches, 64 MiB a buffer."""


class Group(NamedTuple):
    """Images and heads that are walked together, block of query rows after block of query rows."""

    images: slice
    heads: slice
    rows: list[slice]

    def of(self, x: Tensor) -> Tensor:
        """The group's part of a tensor [B, H, ...], whose B and H may be 1 instead."""
        everything = slice(None)
        return x[self.images if x.shape[0] > 1 else everything, self.heads if x.shape[1] > 1 else everything]


def groups(device: torch.device, shape: Sequence[int], cost: int, split_heads: bool) -> Iterator[Group]:
    """Cut a [B, H, M] grid of rows, each of ``cost`` logits, into blocks that fit the budget of the device."""
    batch, heads, num_rows = shape
    if num_rows == 0:
        return
    threads, budget = 1, DEVICE_BLOCK
    if device.type == "cpu":
        threads = torch.get_num_threads()
        budget = threads * CPU_BLOCK
    rows_step = _even(num_rows, budget // (threads * cost))
    pairs = budget // (rows_step * cost)
    pairs = max(pairs - pairs % threads, 1)  # a batched matmul gives whole matrices to its threads
    heads_step = _even(heads, pairs) if split_heads else heads
    batch_step = _even(batch, pairs // heads_step if split_heads else pairs)
    rows = [slice(r, min(r + rows_step, num_rows)) for r in range(0, num_rows, rows_step)]
    for b in range(0, batch, batch_step):
        for h in range(0, heads, heads_step):
            yield Group(slice(b, min(b + batch_step, batch)), slice(h, min(h + heads_step, heads)), rows)


def _even(size: int, step: int) -> int:
    """The step that covers ``size`` in as few steps as ``step``, but evenly."""
    count = max(-(-size // max(step, 1)), 1)
    return max(-(-size // count), 1)


def fold(x: Tensor) -> Tensor:
    """A view: [b, h, ...] → [b · h, ...]."""
    return x.view(-1, *x.shape[2:])


def side_by_side(x: Tensor) -> bool:
    """Whether the heads of a token of x [b, h, ., D] are neighbours in memory."""
    return x.shape[1] == 1 or x.stride(1) == x.shape[3] * x.stride(3)


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
            torch.baddbmm(out, query[:, at], key.mT, beta=1.0 if self.wide and i else keep, alpha=scale, out=out)


class _Rows:
    """One side of a group: makes a block's logits and softmax."""

    def __init__(self, side: Side, problem: Problem, group: Group, work: Workspace) -> None:
        self.side, self.merge, self.temperature, self.work = side, problem.merge, problem.temperature, work
        self.probs = None if side.probs is None else group.of(side.probs)
        self.mask = None if side.mask is None else group.of(side.mask)
        if side.query is not None and side.key is not None:
            if self.merge is not None:
                group = group._replace(heads=slice(0, side.num_heads))
            query, key = side.query[group.images, group.heads], side.key[group.images, group.heads]
            self.operands = Operands(query, key, self.merge == "logsum", work.dtype)

    @property
    def merges_softmax(self) -> bool:
        """Whether every head has a softmax of its own before it is merged."""
        return self.merge not in (None, "logsum")

    def logits(self, at: slice) -> Tensor:
        """[P, r, N]; hidden keys are −inf."""
        z = self.work.new(logits_shape(self.operands, at))
        fill_logits_(z, self.operands, self.mask, at, self.side.scale, self.temperature)
        return z

    def softmax(self, at: slice) -> Softmax:
        """[P, r, N], or [b, r, N] of merged heads."""
        if self.probs is not None:
            probs = self.probs[:, :, at].flatten(0, 1)
            return Softmax.of_probs(probs, self.work.new(probs.shape), lambda: self.work.new(probs.shape))
        z, masked = self.logits(at), self.mask is not None
        softmax = Softmax(z, lambda: self.work.new(z.shape), masked)
        if not self.merges_softmax:
            return softmax
        self.merged = MergedHeads(softmax, self.merge, self.operands.heads)
        return Softmax(self.merged.logits, lambda: torch.empty_like(self.merged.logits), masked)

    def unmerge_(self, ds: Tensor) -> Tensor:
        """Derivatives by the logits of merged rows [b, r, N] → by each head's logits [P, r, N]."""
        return self.merged.backward_(ds) if self.merges_softmax else ds


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
        by_head.add_(mask[:, [head if mask.shape[1] > 1 else 0]])
    z.masked_fill_(z <= HIDDEN_BELOW, -math.inf)
    operands.product_(z, at, scale / temperature, keep=1.0 / temperature)


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
                torch.baddbmm(dq, part, key, beta=0.0, alpha=self.scale, out=dq)
            if self.key is not None:
                dk = self.key[i]
                torch.baddbmm(dk, part.mT, query[:, at], beta=1.0 if at.start else 0.0, alpha=self.scale, out=dk)
        if self.mask is not None:
            into = self.mask[:, :, at] if self.mask.shape[2] > 1 else self.mask
            by_head = ds.unflatten(0, (operands.batch, -1)).expand(-1, operands.heads, -1, -1)
            into.add_(by_head.sum_to_size(into.shape), alpha=1.0 / self.temperature)


class Workspace:
    """Work tensors by the order in which a block asks for them; a smaller block takes the front of what a larger one left."""

    def __init__(self, like: Tensor) -> None:
        self.dtype, self._like, self._flat, self._next = like.dtype, like, list[Tensor](), 0

    def restart(self) -> None:
        """The next block begins: everything handed out so far may be overwritten."""
        self._next = 0

    def new(self, shape: Sequence[int]) -> Tensor:
        numel = math.prod(shape)
        if self._next == len(self._flat):
            self._flat.append(self._like.new_empty(numel))
        elif self._flat[self._next].numel() < numel:
            self._flat[self._next] = self._like.new_empty(numel)
        self._next += 1
        return self._flat[self._next - 1][:numel].view(shape)


def sweep(
    problem: Problem,
    rows: Tensor,
    coefficients: Tensor | None = None,
    weight: Tensor | None = None,
    gradients: Gradients | None = None,
) -> None:
    """Write the divergence of every row to ``rows`` [B, Ho, M].

    coefficients: [B, Hz, M, N] receives ∂row/∂z_s (Hz = 1 for merge "logsum", else H).
    weight: [B, Ho, M], and gradients: receive the gradients of Σ weight · rows.
    """
    student, teacher = problem.student, problem.teacher
    need_ds = coefficients is not None or gradients is not None
    heads, cost = student.num_heads, problem.num_keys
    if problem.merge not in (None, "logsum"):
        cost *= max(heads, teacher.num_heads)
    work = Workspace(rows)
    grid = (rows.shape[0], heads, rows.shape[2])
    for group in groups(rows.device, grid, cost, split_heads=problem.merge is None):
        s, t = _Rows(student, problem, group, work), _Rows(teacher, problem, group, work)
        out = fold(group.of(rows)).unsqueeze(-1)
        all_ds = None if coefficients is None else fold(group.of(coefficients))
        upstream = None if weight is None else group.of(weight).flatten(0, 1).unsqueeze(-1)
        into = None if gradients is None else gradients.of(group, s.operands)
        for at in group.rows:
            work.restart()
            if problem.divergence == "logit_mse":
                masked = student.mask is not None or teacher.mask is not None
                row, ds, factor = logit_mse_(s.logits(at), t.logits(at), masked)
            else:
                target = t.softmax(at)
                row, ds, factor = divergence_(problem.divergence, s.softmax(at), target, need_ds)
            out[:, at] = row
            if ds is None or factor is None or not need_ds:
                continue
            ds = s.unmerge_(ds.mul_(factor if upstream is None else factor * upstream[:, at]))
            if all_ds is not None:
                all_ds[:, at] = ds
            if into is not None:
                into.add(at, ds)


def contract(ds: Tensor, weight: Tensor, side: Side, gradients: Gradients) -> None:
    """The gradients of Σ weight · ds · logits: ds [B, Hz, M, N] with Hz = 1 for logits summed over heads, weight [B, H or 1, M]."""
    assert side.query is not None and side.key is not None
    wide = ds.shape[1] < side.num_heads
    weight = weight.expand(ds.shape[:3])
    work = Workspace(ds)
    for group in groups(ds.device, side.query.shape[:3], ds.shape[3], split_heads=True):
        operands = Operands(group.of(side.query), group.of(side.key), wide, ds.dtype)
        into = gradients.of(group, operands)
        group_ds, upstream = group.of(ds).flatten(0, 1), group.of(weight).flatten(0, 1).unsqueeze(-1)
        for at in group.rows:
            work.restart()
            part = group_ds[:, at]
            into.add(at, torch.mul(part, upstream[:, at], out=work.new(part.shape)))


def all_logits(side: Side, temperature: float, out: Tensor) -> None:
    """Logits of every row, [B, H, M, N], as in :func:`fill_logits_`."""
    assert side.query is not None and side.key is not None
    for group in groups(out.device, side.query.shape[:3], out.shape[3], split_heads=True):
        operands = Operands(group.of(side.query), group.of(side.key), False, out.dtype)
        mask, z = None if side.mask is None else group.of(side.mask), fold(group.of(out))
        for at in group.rows:
            fill_logits_(z[:, at], operands, mask, at, side.scale, temperature)
