"""The correctness gate in front of every time: results and gradients against float64, on the device, every element.

An element may be off by a fraction of its own size plus that of its neighbours, the root mean square over its head (the last two
dimensions). The fraction is a few roundings of the input's precision for the package, and eight times that for other
implementations: rounding scores to bfloat16 makes a baseline inexact, not wrong, and its error is printed beside its time.
Gradients that are zero, scaled, permuted, or wrong in a single head or key do not pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Inputs, Shape
from benchmarks.registry import Implementation, Operation

FRACTION = {torch.float32: 5e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
LOSS_FRACTION = 1e-4  # sums are accumulated in fp32 whatever the input
SLACK = 8.0  # of what is not ours
CHUNK = 1 << 25  # attention elements that are computed in float64 at a time


@dataclass
class Truth:
    """Float64 results, the gradients of them that were sent back (of the student's results), and the leaves' gradients."""

    outputs: list[Tensor]
    upstream: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Verdict:
    """error: the largest element's error as the gate measures it; detail: what was wrong, '' when nothing was."""

    error: float
    detail: str

    @property
    def ok(self) -> bool:
        return not self.detail


def truth(operation: Operation, inputs: Inputs) -> Truth:
    """The operation in float64 on the same rounded inputs, in slices that fit into memory."""
    shape, rows = inputs.shape, operation.rows(inputs.shape)
    leaves = list((named := inputs.leaves(operation.leaves, rows)).values())
    tensors = operation.tensors(named, inputs, rows)
    leaf_of = {i: j for i, tensor in enumerate(tensors) for j, leaf in enumerate(leaves) if leaf is tensor}
    gradients = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    results = [torch.zeros(size, dtype=torch.float64, device=leaves[0].device) for size in operation.results(shape)]
    upstream = [_upstream(result, shape) for result in results]
    for images, queries in _slices(operation, inputs):
        of_queries = (images, slice(None), queries)
        cut = [of_queries if operation.by_rows and i in (0, 2) else (images,) for i in range(len(tensors))]
        held = [tensor.detach()[where].double() for tensor, where in zip(tensors, cut, strict=True)]
        for i in leaf_of:
            held[i].requires_grad_()
        found = list(operation.reference(*held))
        sent = []
        for k, result in enumerate(found):
            if result.ndim == 0:  # a sum over rows; the operation divides it by the batch size
                results[k] += result.detach() / shape.batch
                sent.append(upstream[k] / shape.batch)
            else:
                results[k][images] = result.detach()
                sent.append(upstream[k][images])
        grads = differentiate(found, sent, [held[i] for i in leaf_of])
        for (i, j), grad in zip(leaf_of.items(), grads, strict=True):
            gradients[j][cut[i]] += grad
    return Truth(results, upstream, gradients)


def differentiate(
    results: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of the leaves; results that need none (a teacher's) are passed over."""
    needed = [(x, g.to(x.dtype)) for x, g in zip(results, upstream, strict=True) if x.requires_grad]
    return torch.autograd.grad([x for x, _ in needed], leaves, [g for _, g in needed])


def judge(
    operation: Operation,
    implementation: Implementation,
    dtype: torch.dtype,
    expected: Truth,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Verdict:
    """Compare results and gradients; an implementation that needs all queries may only have touched the compared rows."""
    strict = implementation.ours and operation.exact
    fraction = FRACTION[dtype] * (1.0 if strict else SLACK)
    worst = 0.0
    for index, (actual, oracle) in enumerate(zip(outputs, expected.outputs, strict=True)):
        name = f"result {index}"
        if actual.shape != oracle.shape:
            return Verdict(float("inf"), f"{name}: shape {tuple(actual.shape)} instead of {tuple(oracle.shape)}")
        if oracle.ndim == 0:
            # Rounded scores leave a loss as far off as they leave its terms.
            allowed = LOSS_FRACTION if strict else max(LOSS_FRACTION, SLACK * FRACTION[dtype])
        else:
            # What is computed and returned in fp32 is exact in fp32, whatever the inputs are.
            allowed = FRACTION[torch.float32] if strict and actual.dtype == torch.float32 else fraction
        error, share = element_error(actual, oracle, allowed)
        worst = max(worst, error)
        if share > 0:
            return Verdict(error, f"{name}: error {error:.2g}, allowed {allowed:.2g}")
    for leaf, actual, oracle in zip(operation.leaves, gradients, expected.gradients, strict=False):
        if implementation.all_queries and leaf == "query":
            compared = oracle.shape[2]
            if bool(actual[:, :, compared:].count_nonzero()):
                return Verdict(float("inf"), "dquery: rows that are not compared have a gradient")
            actual = actual[:, :, :compared]
        error, share = element_error(actual, oracle, fraction)
        worst = max(worst, error)
        if share > operation.outliers:
            return Verdict(error, f"d{leaf}: error {error:.2g}, allowed {fraction:.2g}, in {share:.2%} of the elements")
    return Verdict(worst, "")


def element_error(actual: Tensor, oracle: Tensor, allowed: float) -> tuple[float, float]:
    """The largest |a − o| / (|o| + rms of its head), and the share of elements in which it exceeds ``allowed``.

    One image at a time, since the tensors may be large; NaN and infinity count as infinitely wrong.
    """
    if actual.shape != oracle.shape:
        return float("inf"), 1.0
    worst, beyond = 0.0, 0
    pairs = [(actual, oracle)] if oracle.ndim == 0 else zip(actual.unbind(0), oracle.unbind(0), strict=True)
    totals = []
    for a, o in pairs:
        size = o.abs()
        if o.ndim:
            size = size + o.square().mean((-2, -1), keepdim=True).sqrt()
        # A head whose truth is zero must be zero.
        error = (a.double() - o).abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
        error = torch.where(error.isfinite(), error, torch.inf)
        totals.append(torch.stack([error.max(), (error > allowed).sum().double()]))
    for largest, count in torch.stack(totals).tolist() if totals else []:
        worst, beyond = max(worst, largest), beyond + int(count)
    return worst, beyond / max(oracle.numel(), 1)


def _upstream(result: Tensor, shape: Shape) -> Tensor:
    """Random, of the size that makes gradients of order one, as a loss scaler does: float16 could not hold them otherwise.

    Representable in every dtype, so that all implementations get the same.
    """
    lift = 2.0 ** round(math.log2(shape.tokens))
    if result.ndim == 0:
        return torch.full_like(result, 1.625 * lift * 2.0 ** round(math.log2(shape.batch)))
    generator = torch.Generator(result.device).manual_seed(shape.tokens)
    noise = torch.randn(result.shape, generator=generator, dtype=torch.float32, device=result.device)
    return (noise * lift).bfloat16().double() if result.shape[-1] == shape.tokens else noise.bfloat16().double()


def _slices(operation: Operation, inputs: Inputs) -> Iterator[tuple[slice, slice]]:
    """(images, query rows) that cover everything, about CHUNK attention elements at a time."""
    shape = inputs.shape
    heads = max(shape.heads, shape.teacher_heads)
    rows = 1 if operation.one_row else shape.tokens
    # A class-token row is cheap in scores, but its keys in float64 are not.
    per_row = heads * shape.tokens * (shape.head_dim if operation.one_row else 1)
    query_step = min(rows, max(1, CHUNK // per_row)) if operation.by_rows else rows
    image_step = max(1, CHUNK // (per_row * query_step))
    for image in range(0, shape.batch, image_step):
        for query in range(0, rows, query_step):
            yield slice(image, image + image_step), slice(query, query + query_step)
