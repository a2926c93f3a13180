"""The walk over blocks of (images, heads, query rows) behind ``impl="chunked"``: logits in, rows and gradients out.

All work tensors of a walk are allocated once, at the size of the largest block, and written in place. Queries and keys are
read where they are: any strides, no copy of a [B, H, N, D] tensor in float32 (half precision is widened block by block).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attnkd.chunked_divergence import MergedHeads, Softmax, divergence_, logit_mse_
from attnkd.problem import HIDDEN_BELOW, Problem, Side

CPU_BLOCK = 128 * 1024
"""Logits in a block per CPU thread: float32 buffers of them stay in the second-level cache."""
DEVICE_BLOCK = 16 * 1024 * 1024
"""Logits in a block on any other device: few launches, 64 MiB a buffer."""

Block = tuple[slice, slice, slice]
"""Images, heads and query rows."""


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
    student, teacher, temperature = problem.student, problem.teacher, problem.temperature
    assert student.query is not None and student.key is not None
    batch, heads, num_rows, _ = student.query.shape
    num_keys = student.key.shape[2]
    headwise = problem.merge not in (None, "logsum")
    cost = num_keys * (max(heads, teacher.num_heads) if headwise else 1)
    work = _Workspace(rows)
    need_ds = coefficients is not None or gradients is not None
    for at in blocks(rows.device, (batch, heads, num_rows), cost, split_heads=problem.merge is None):
        work.restart()
        ds, factor = _block(problem, at, need_ds, work, rows)
        if ds is None or factor is None:
            continue
        if coefficients is not None:
            torch.mul(ds, factor, out=clip(coefficients, at))
        if gradients is not None and weight is not None:
            gradients.add(at, ds, clip(weight, at).unsqueeze(-1) * factor)


def _block(
    problem: Problem, at: Block, need_ds: bool, work: _Workspace, rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Write the rows of one block; return ∂row/∂z_s as ds [b, hz, r, N] and a factor [b, ho, r, 1]."""
    merge, kind, temperature = problem.merge, problem.divergence, problem.temperature
    if kind == "logit_mse":
        z_s, z_t = (_logits(side, merge, temperature, at, work) for side in (problem.student, problem.teacher))
        masked = problem.student.mask is not None or problem.teacher.mask is not None
        row, ds, factor = logit_mse_(z_s, z_t, masked)
        merged = None
    else:
        teacher, _ = _softmax(problem.teacher, merge, temperature, at, work)
        student, merged = _softmax(problem.student, merge, temperature, at, work)
        row, ds, factor = divergence_(kind, student, teacher, need_ds)
    clip(rows, at).copy_(row.squeeze(-1))
    return (ds if merged is None or ds is None else merged.backward_(ds, merge)), factor


def _softmax(
    side: Side, merge: str | None, temperature: float, at: Block, work: _Workspace
) -> tuple[Softmax, MergedHeads | None]:
    """The block's rows of one side, and the heads they were merged from where their softmax must be finished first."""
    if side.probs is not None:
        probs = clip(side.probs, at)
        return Softmax.of_probs(probs, work.new(probs.shape), lambda: work.new(probs.shape)), None
    z = _logits(side, merge, temperature, at, work)
    masked = side.mask is not None
    softmax = Softmax(z, lambda: work.new(z.shape), masked)
    if merge is None or merge == "logsum":
        return softmax, None
    heads = MergedHeads(softmax, merge)
    return Softmax(heads.logits, lambda: torch.empty_like(heads.logits), masked), heads


def _logits(side: Side, merge: str | None, temperature: float, at: Block, work: _Workspace) -> Tensor:
    assert side.query is not None and side.key is not None
    if merge is not None:
        at = (at[0], slice(0, side.num_heads), at[2])
    b, h, r = at
    query, key = side.query[b, h, r], side.key[b, h]
    mask = None if side.mask is None else clip(side.mask, at)
    z = work.new((query.shape[0], 1 if merge == "logsum" else query.shape[1], query.shape[2], key.shape[2]))
    logits(query, key, mask, side.scale, temperature, z)
    return z


def logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float, out: Tensor) -> None:
    """out ← (scale · query·key + mask) / temperature, hidden keys −inf.

    query: [b, h, r, D]; key: [b, h, N, D]; mask: broadcastable to [b, h, r, N]; out: [b, h, r, N], or [b, 1, r, N] for the
    sum over heads.
    """
    query, key = query.to(out.dtype), key.to(out.dtype)
    additive = mask is not None and mask.dtype != torch.bool
    summed = out.shape[1] < query.shape[1]
    if additive:
        assert mask is not None
        for head in range(query.shape[1] if summed else 1):
            part = mask if not summed else mask[:, min(head, mask.shape[1] - 1)].unsqueeze(1)
            out.copy_(part) if head == 0 else out.add_(part)
        out.masked_fill_(out <= HIDDEN_BELOW, -math.inf)
    beta, alpha = (1.0 / temperature if additive else 0.0), scale / temperature
    if summed:
        for head in range(query.shape[1]):
            pick = slice(head, head + 1)
            matmul_(out, query[:, pick], key[:, pick].transpose(2, 3), beta=beta if head == 0 else 1.0, alpha=alpha)
    else:
        matmul_(out, query, key.transpose(2, 3), beta=beta, alpha=alpha)
    if mask is not None and mask.dtype == torch.bool:
        out.masked_fill_(~(mask.all(1, keepdim=True) if summed else mask), -math.inf)


class Gradients:
    """dq [B, H, M, D], dk [B, H, N, D] and dmask (the mask's shape: summed where that is 1), added up block by block.

    Those that are not needed are empty.
    """

    def __init__(self, side: Side, temperature: float, dtype: torch.dtype, query: bool, key: bool, mask: bool) -> None:
        assert side.query is not None and side.key is not None
        self.side, self.temperature = side, temperature
        self.query = side.query.new_empty(side.query.shape if query else (0,), dtype=dtype)
        self.key = side.key.new_zeros(side.key.shape if key else (0,), dtype=dtype)
        self.mask = side.query.new_zeros(side.mask.shape if mask and side.mask is not None else (0,), dtype=dtype)
        self.needs_query, self.needs_key, self.needs_mask = query, key, mask

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.mask

    def add(self, at: Block, ds: Tensor, weight: Tensor) -> None:
        """ds: [b, h or 1, r, N], ∂row/∂z_s; weight: [b, h or 1, r, 1], ∂loss/∂row."""
        assert self.side.query is not None and self.side.key is not None
        b, h, r = at
        factor = weight * (self.side.scale / self.temperature)
        query = self.side.query[at]
        shared = ds.expand(-1, query.shape[1], -1, -1)
        if self.needs_query:
            grad = self.query[at]
            matmul_(grad, shared, self.side.key[b, h].to(ds.dtype))
            grad.mul_(factor)
        if self.needs_key:
            matmul_(self.key[b, h], shared.transpose(2, 3), query * factor, beta=1.0)
        if self.needs_mask:
            into = clip(self.mask, at)
            into.add_((shared * (weight / self.temperature)).sum_to_size(into.shape))


def blocks(device: torch.device, shape: tuple[int, int, int], cost: int, split_heads: bool) -> Iterator[Block]:
    """Blocks of a [B, H, M] grid of rows, ``cost`` logits a row; all rows of some heads before the next heads."""
    batch, heads, num_rows = shape
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    budget = threads * CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    rows_step = _even(num_rows, budget // (threads * cost))
    pairs = budget // max(rows_step * cost, 1)
    pairs = max(pairs - pairs % threads, 1)  # a batched matmul gives whole heads to its threads
    heads_step = _even(heads, pairs) if split_heads else heads
    batch_step = _even(batch, pairs // heads_step if split_heads else pairs)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, heads_step):
            for r in range(0, num_rows, rows_step):
                yield (
                    slice(b, min(b + batch_step, batch)),
                    slice(h, min(h + heads_step, heads)),
                    slice(r, min(r + rows_step, num_rows)),
                )


def _even(size: int, step: int) -> int:
    """The step that covers ``size`` in as many, but even, steps."""
    count = -(-size // max(step, 1))
    return max(-(-size // max(count, 1)), 1)


def clip(x: Tensor, at: Block) -> Tensor:
    """The block of a tensor [B, H, M, ...] whose dimensions may be 1 instead."""
    if 1 in x.shape[:3]:
        at = tuple(slice(None) if size == 1 else s for size, s in zip(x.shape, at))  # type: ignore[assignment]
    return x[at]


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out ← beta · out + alpha · a @ b in four dimensions, without copying operands that only look like four.

    One batched matmul where both leading dimensions fold into one, else one for every index of the smaller of them.
    """
    batch, heads = out.shape[:2]
    if batch > 1 and heads > 1 and all(x.stride(0) == heads * x.stride(1) for x in (out, a, b)):
        out, a, b = out.view(1, -1, *out.shape[2:]), a.flatten(0, 1).unsqueeze(0), b.flatten(0, 1).unsqueeze(0)
        batch = 1
    dim = 0 if batch < heads else 1
    for o, x, y in zip(out.unbind(dim), a.unbind(dim), b.unbind(dim)):
        torch.baddbmm(o, x, y, beta=beta, alpha=alpha, out=o)


class _Workspace:
    """Work tensors by the order in which a block asks for them; a smaller block takes the front of what a larger one left."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._flat, self._next = like, list[Tensor](), 0

    def restart(self) -> None:
        """The next block begins: everything handed out so far may be overwritten."""
        self._next = 0

    def new(self, shape: tuple[int, ...]) -> Tensor:
        numel = math.prod(shape)
        if self._next == len(self._flat):
            self._flat.append(self._like.new_empty(numel))
        elif self._flat[self._next].numel() < numel:
            self._flat[self._next] = self._like.new_empty(numel)
        self._next += 1
        return self._flat[self._next - 1][:numel].view(shape)
