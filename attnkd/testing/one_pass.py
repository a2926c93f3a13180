"""Runs one call of ``attention_with_divergence`` against the float64 oracle: output, divergence and every gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkd.attention.call import AttentionCall
from attnkd.attention.one_pass import attention_with_divergence
from attnkd.testing import oracle, proof
from attnkd.testing.tolerance import Result, compare

RESULTS = ("output", "divergence")


def prove_one_pass(
    impl: str, *, value: Tensor, upstream: tuple[str, ...] = RESULTS, seed: int = 0, **arguments: Any
) -> list[Result]:
    """Compare ``attention_with_divergence(..., impl=impl)`` and its gradients with the oracle.

    Both results get a random upstream gradient, or those that ``upstream`` names, the others 0. Oracle and tolerance are those of
    :func:`attnkd.testing.proof.prove`.

    Args:
        impl: the implementation to judge.
        value: [B, H, N, Dv].
        arguments: those of :func:`attnkd.attention_divergence`, which name both models' queries, keys, scales and masks; ``reduction``
            is 'none' unless given. A floating point ``student_mask`` is differentiated too.

    Returns:
        A result for the output, the divergence and every gradient.
    """
    arguments = {"reduction": "none"} | arguments
    given = arguments | {"value": value}
    names = tuple(n for n in ("student_query", "student_key", "value") if isinstance(given.get(n), Tensor))
    mask = given.get("student_mask")
    if isinstance(mask, Tensor) and mask.is_floating_point():
        names += ("student_mask",)
    exact = {n: proof._held(n, a, torch.float64, "cpu") for n, a in given.items()}
    truth, _ = _differentiate(_truth, exact, (), ())
    draw = torch.Generator().manual_seed(seed)
    grads = [torch.randn(result.shape, generator=draw, dtype=torch.float64) for result in truth]
    grads = [g if name in upstream else torch.zeros_like(g) for name, g in zip(RESULTS, grads, strict=True)]
    grads[1] = torch.where(truth[1].isfinite(), grads[1], 0.0)
    _, exact_grads = _differentiate(_truth, exact, names, grads)
    boost = 2.0 ** -math.floor(math.log2(max(map(proof._largest, exact_grads))))
    grads = [g * boost for g in grads]
    results, found = _differentiate(lambda **g: _run(impl, **g), given, names, grads)

    dtype = value.dtype
    single = {n: proof._held(n, a, torch.promote_types(dtype, torch.float32)) for n, a in given.items()}
    own = {n: proof._held(n, a, dtype) for n, a in given.items()}
    plain_values, _ = _differentiate(_plain, single, (), ())
    plain_output, plain_grads = _differentiate(_plain, own, names, grads)
    kind = arguments.get("divergence", "forward_kl")
    label = f"{impl} {kind} {str(dtype)[6:]}"
    scale = 1.0 if kind in proof.LOGARITHMIC else 2.0 * math.sqrt(proof._largest(truth[1][truth[1].isfinite()]))
    judged = [
        compare(f"{label} output", results[0], truth[0], plain_output[0]),
        compare(f"{label} divergence", results[1], truth[1], plain_values[1], scale=scale),
    ]
    problem = {n: a for n, a in exact.items() if n in proof.PROBLEM}
    terms = proof._terms(problem, 1.0)
    terms["value"] = terms["student_mask"]  # a probability recomputed from a normaliser, times a gradient
    largest = max(map(proof._largest, grads))
    for name, grad, exact_grad, plain in zip(names, found, exact_grads, plain_grads, strict=True):
        size = terms[name] * largest * torch.finfo(torch.float32).eps / torch.finfo(plain.dtype).eps
        judged.append(compare(f"{label} d{name}", grad, exact_grad * boost, plain, scale=size))
    return judged


def assert_one_pass(impl: str, **arguments: Any) -> None:
    """Like :func:`prove_one_pass`; raises AssertionError naming everything that is wrong."""
    wrong = [str(result) for result in prove_one_pass(impl, **arguments) if not result.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _run(impl: str, *, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    sides = {}
    for side in ("student", "teacher"):
        query, key, mask, scale = (given.pop(f"{side}_{name}", None) for name in ("query", "key", "mask", "scale"))
        if query is not None:
            sides[side] = AttentionCall(query, key, mask, query.shape[-1] ** -0.5 if scale is None else scale)
    teacher = sides.get("teacher", given.pop("teacher_probs", None))
    return attention_with_divergence(sides["student"], value=value, teacher=teacher, impl=impl, **given)


def _truth(*, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    query, key, mask, scale = (given.get(f"student_{name}") for name in ("query", "key", "mask", "scale"))
    assert query is not None and key is not None
    return oracle.attention_rows(query, key, scale=scale, mask=mask) @ value, oracle.attention_divergence(**given)


def _plain(*, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The reference in the inputs' own precision."""
    query, key, mask, scale = (given.get(f"student_{name}") for name in ("query", "key", "mask", "scale"))
    student = {"query": query, "key": key, "mask": mask, "scale": scale}
    rows = proof.per_row(given, query.dtype)  # type: ignore[union-attr]
    return proof.probabilities(student, value.dtype) @ value, rows


def _differentiate(function: Any, given: dict[str, Any], names: tuple[str, ...], upstream: Any) -> Any:
    """A function's two results, and the gradients of the named arguments."""
    leaves = {n: given[n].detach().requires_grad_() for n in names}
    results = function(**(given | leaves))
    if not names:
        return tuple(result.detach() for result in results), ()
    grads = [grad.to(result) for grad, result in zip(upstream, results, strict=True)]
    return tuple(r.detach() for r in results), torch.autograd.grad(results, list(leaves.values()), grads)
