"""The walk over blocks of (images, heads, query rows) behind ``impl="chunked"``: logits in, rows and gradients out.

A group of images and heads is walked block of query rows after block of query rows. A block holds whole rows of logits, few
enough for the cache. Work tensors are allocated once a walk and written in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnkd.attention.checks import check_lse
from attnkd.attention.chunked.divergence import MergedHeads, Softmax, divergence_, logit_mse_
from attnkd.attention.chunked.matmul import Gradients, Group, Operands, fill_logits_, fold, logits_shape
from attnkd.attention.problem import Problem, Side

CPU_BLOCK = 256 * 1024
"""Logits in a block per CPU thread: 1 MiB a float32 buffer, of which three or four stay in second and third level caches."""
DEVICE_BLOCK = 16 * 1024 * 1024
"""Logits in a block on any other device: few launches, 64 MiB a buffer."""


def logits_in_a_block(device: torch.device) -> int:
    """How many logits a block may hold (more only where a single row has more)."""
    return torch.get_num_threads() * CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def groups(device: torch.device, shape: Sequence[int], cost: int, split_heads: bool) -> Iterator[Group]:
    """Cut a [B, H, M] grid of rows, each of ``cost`` logits, into blocks that fit the budget of the device."""
    batch, heads, num_rows = shape
    if num_rows == 0:
        return
    threads, budget = torch.get_num_threads() if device.type == "cpu" else 1, logits_in_a_block(device)
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


class _Rows:
    """One side of a group: makes a block's logits and softmax."""

    def __init__(self, side: Side, problem: Problem, group: Group, work: Workspace) -> None:
        self.side, self.merge, self.temperature, self.work = side, problem.merge, problem.temperature, work
        if self.merge is not None:  # the sides may have different numbers of heads
            group = group._replace(heads=slice(0, side.num_heads))
        self.probs = None if side.probs is None else group.of(side.probs)
        self.lse = None if side.lse is None else group.of(side.lse)
        self.mask = None if side.mask is None else group.of(side.mask)
        if side.query is not None and side.key is not None:
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
        lse = None if self.lse is None else self.lse[:, :, at].flatten(0, 1).unsqueeze(-1)
        softmax = Softmax(z, lambda: self.work.new(z.shape), masked, lse)
        if not self.merges_softmax:
            return softmax
        self.merged = MergedHeads(softmax, self.merge, self.operands.heads)
        return Softmax(self.merged.logits, lambda: torch.empty_like(self.merged.logits), masked)

    def check_lse(self, name: str, at: slice, softmax: Softmax) -> None:
        """Refuse given normalisers that are not those of the logits, once the divergence has summed their exponentials."""
        if self.lse is not None:
            check_lse(name, self.lse[:, :, at].flatten(0, 1).unsqueeze(-1), softmax.found_lse())

    def unmerge_(self, ds: Tensor) -> Tensor:
        """Derivatives by the logits of merged rows [b, r, N] → by each head's logits [P, r, N]."""
        return self.merged.backward_(ds) if self.merges_softmax else ds


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
                target, own = t.softmax(at), s.softmax(at)
                row, ds, factor = divergence_(problem.divergence, own, target, need_ds)
                s.check_lse("student_lse", at, own)
                t.check_lse("teacher_lse", at, target)
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
