"""Correctness before timing: a call's results and gradients against float64, on the device, under the package's one tolerance.

:mod:`attnkd.testing.tolerance` decides. The oracle is the reference in float64 on the same rounded inputs. What rounding alone
explains is the reference's error in float32 (for results that the package computes and returns in float32) and in the input's own
precision (for the rest). Implementations that are not the package's are held to the second, :data:`SLACK` times over and never
beyond the tolerance's cap: rounding scores to bfloat16 makes a baseline inexact, not wrong, and its error is printed next to its time.
Large calls are computed in slices that fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkd.testing.tolerance import Result, compare
from benchmarks.calls import Attention, Block, Call, Relation
from benchmarks.operations import Implementation

SLACK = 4.0  # of what is not ours
TIES = 0.02  # share of gradient elements that may belong to another head, where max or min meet two heads equal up to rounding
CHUNK = 1 << 25  # attention elements that are computed in float64 at a time


@dataclass
class Truth:
    """What a call should give.

    Attributes:
        upstream: of the results that need a gradient, float64.
        results: (oracle, in float32, in the input's precision) of each. The last two of a loss are as far off as if the
            errors of all its rows had one sign, because the errors of a correct sum cancel by chance.
        gradients: (oracle, in the input's precision) by tensor.
    """

    call: Call
    upstream: list[Tensor]
    results: list[tuple[Tensor, Tensor, Tensor]]
    gradients: dict[str, tuple[Tensor, Tensor]]

    def judge(self, implementation: Implementation, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Result]:
        """One verdict for each result and gradient; no gradients where only the forward is judged."""
        found = []
        for index, (actual, (oracle, single, eager)) in enumerate(zip(outputs, self.results, strict=True)):
            if not (implementation.ours and actual.dtype == torch.float32):
                single = self._allowed(implementation, oracle, eager)
            scale = self.call.scale if oracle.ndim == 0 else 0.0
            found.append(compare(f"result {index}", actual, oracle, single.to(actual.dtype), scale=scale))
        for (name, (oracle, eager)), grad in zip(self.gradients.items(), grads if grads else [], strict=False):
            if implementation.all_queries and "query" in name:
                grad, others = grad[:, :, : oracle.shape[2]], grad[:, :, oracle.shape[2] :]
                if bool(others.count_nonzero()):
                    why = "rows that are not compared have a gradient:"
                    found.append(Result(f"d{name}", math.inf, 0.0, math.inf, False, why))
            if isinstance(self.call, Attention) and self.call.merge in ("max", "min"):
                grad = _without_ties(grad, oracle)
            eager = self._allowed(implementation, oracle, eager).to(grad.dtype)
            found.append(compare(f"d{name}", grad, oracle, eager))
        return found

    @staticmethod
    def _allowed(implementation: Implementation, oracle: Tensor, eager: Tensor) -> Tensor:
        return eager if implementation.ours else oracle + SLACK * (eager.double() - oracle)


def truth(call: Call, device: torch.device | str = "cpu", seed: int = 0) -> Truth:
    """The call's results and gradients on the tensors of that seed."""
    tensors = call.tensors(device, seed)
    trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
    given = {name: tensor.detach() for name, tensor in tensors.items()}
    own = given["student_key" if "student_key" in given else "student_features"].dtype
    upstream: list[Tensor] = []
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    grads = {
        n: (torch.zeros_like(given[n], dtype=torch.float64), torch.zeros_like(given[n], dtype=torch.float64))
        for n in trained
    }
    for images, queries in _slices(call):
        cut = {n: (images, slice(None), queries) if "query" in n else (images,) for n in given}
        found, slopes = {}, {}
        for precision in dict.fromkeys((torch.float64, torch.float32, own)):
            held = {n: x[cut[n]].to(precision).requires_grad_(n in trained) for n, x in given.items()}
            outputs = call.reference(held, precision)
            if not upstream:
                upstream = [_upstream(x, call) for x in outputs if x.requires_grad]
            found[precision] = [x.detach() for x in outputs]
            if precision in (torch.float64, own):
                needed = [x for x in outputs if x.requires_grad]
                sent = [
                    (g / call.batch).expand_as(x) if g.ndim == 0 else g[images]
                    for x, g in zip(needed, upstream, strict=True)
                ]
                leaves = [held[n] for n in trained]
                slopes[precision] = torch.autograd.grad(
                    needed, leaves, [g.to(x.dtype) for g, x in zip(sent, needed, strict=True)]
                )
        results = results or [_empty(x, call) for x in found[torch.float64]]
        for kept, oracle, *rounded in zip(
            results, *(found[p] for p in (torch.float64, torch.float32, own)), strict=True
        ):
            if kept[0].ndim:
                for whole, part in zip(kept, (oracle, *rounded), strict=True):
                    whole[images] = part
            else:
                off = [(x.double() - oracle).abs().sum() / call.batch for x in rounded]
                for whole, part in zip(kept, (oracle.sum() / call.batch, *off), strict=True):
                    whole += part
        for i, name in enumerate(trained):
            for whole, precision in zip(grads[name], (torch.float64, own), strict=True):
                whole[cut[name]] += slopes[precision][i]
    results = [(o, s, e) if o.ndim else (o, o + s, o + e) for o, s, e in results]
    return Truth(call, upstream, results, {n: (o, e.to(own)) for n, (o, e) in grads.items()})


def _empty(result: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Room for a result of all images: itself, or a loss's batch mean."""
    size = (call.batch, *result.shape[1:]) if result.ndim == 4 else ()
    one, two, three = (torch.zeros(size, dtype=torch.float64, device=result.device) for _ in range(3))
    return one, two, three


def _upstream(result: Tensor, call: Call) -> Tensor:
    """Random, of the size that makes gradients of order one, as a loss scaler does: float16 could not hold them otherwise.

    Representable in every dtype, so that all implementations get the same.
    """
    tokens = call.tokens if isinstance(call, Relation) else call.keys  # type: ignore[attr-defined]
    lift = 2.0 ** round(math.log2(tokens))
    if result.ndim < 4:
        size = 1.625 * lift * 2.0 ** round(math.log2(call.batch))
        return torch.full((), size, dtype=torch.float64, device=result.device)
    generator = torch.Generator(result.device).manual_seed(tokens)
    noise = torch.randn((call.batch, *result.shape[1:]), generator=generator, dtype=torch.float32, device=result.device)
    return (noise * (lift if result.shape[-1] == tokens else 1.0)).bfloat16().double()


def _without_ties(actual: Tensor, oracle: Tensor) -> Tensor:
    """The gradient with those few of its elements that are furthest off made right."""
    if actual.shape != oracle.shape:
        return actual
    error = (actual.double() - oracle).abs().nan_to_num(nan=-1.0).flatten()  # NaN stays and fails
    worst = error.topk(int(TIES * error.numel())).indices
    repaired = actual.detach().flatten().clone()
    repaired[worst] = oracle.flatten()[worst].to(actual.dtype)
    return repaired.view(oracle.shape)


def _slices(call: Call) -> Iterator[tuple[slice, slice]]:
    """(images, query rows) that cover everything, about CHUNK attention elements at a time."""
    if isinstance(call, Relation):
        rows, per_row = 1, call.tokens * max(call.channels, call.teacher_channels)
    else:
        assert isinstance(call, Attention)
        heads = max(call.heads, call.teacher_heads or 0)
        rows = call.keys if isinstance(call, Block) else call.rows or call.keys
        per_row = heads * call.keys * (call.dim if rows == 1 else 1)  # a row is cheap in scores, its keys are not
    whole = isinstance(call, Attention) and call.rows == 0 and not (isinstance(call, Block) or call.one_model)
    query_step = min(rows, max(1, CHUNK // per_row)) if whole else rows
    image_step = max(1, CHUNK // (per_row * query_step))
    for image in range(0, call.batch, image_step):
        for query in range(0, rows, query_step):
            yield slice(image, image + image_step), slice(query, query + query_step)
