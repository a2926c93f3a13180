"""Runs one call of an attention operation against the float64 oracle: its result and every gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkd.attention import reference
from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.problem import make_problem, make_side
from attnkd.relation.api import reference_per_image, relation_row_loss
from attnkd.testing.tolerance import Result, compare

STUDENT = ("student_query", "student_key", "student_mask")
PROBLEM = (
    "student_query", "student_key", "teacher_query", "teacher_key", "teacher_probs", "student_scale", "teacher_scale",
    "student_mask", "teacher_mask", "merge", "divergence", "temperature",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"divergence": "forward_kl", "temperature": 1.0}
LOGARITHMIC = ("forward_kl", "reverse_kl", "js", "cross_entropy")


def per_row(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's divergence of every row, [B, Ho, M], computed in ``precision`` from attention_divergence's arguments."""
    values: list[Any] = [arguments.get(name, DEFAULTS.get(name)) for name in PROBLEM]
    return reference.per_row(make_problem(*values), precision)


def probabilities(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's attention, [B, Ho, M, N], of the student among the arguments."""
    q, k, mask = (arguments.get(name) for name in STUDENT)
    side = make_side("", q, k, arguments.get("student_scale"), mask)  # type: ignore[arg-type]
    return reference.attention_rows(side, arguments.get("merge"), arguments.get("temperature", 1.0), precision)


def per_image(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's relation loss of every image, [B], from relation_row_loss's arguments."""
    features = arguments["student_features"], arguments["teacher_features"]
    prefixes = arguments.get("student_prefix_tokens", 1), arguments.get("teacher_prefix_tokens", 1)
    return reference_per_image(*features, *prefixes, -1, precision)


def prove(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """Compare ``attention_divergence(**arguments, impl=impl, reduction='none')`` and its gradients with the oracle.

    The oracle is the float64 reference on the same rounded inputs; the allowance is set by the reference's own error in float32
    (loss) and in the input's precision (gradients). The upstream gradient is random, scaled so that the gradients are of order
    one (as a loss scaler does: float16 could not hold them otherwise); rows of infinite value get none, since their gradient
    means nothing.

    Args:
        impl: the implementation to judge.
        seed: seeds the upstream gradient.
        arguments: those of :func:`attnkd.attention_divergence`; a floating point ``student_mask`` is differentiated too.

    Returns:
        One result for the loss and one for every gradient.
    """
    names = [n for n in STUDENT if isinstance(arguments.get(n), Tensor) and arguments[n].is_floating_point()]
    dtype = arguments["student_query"].dtype
    oracle_loss, oracle_grads = _run(arguments, names, torch.float64, torch.float64, seed)
    largest = max((float(g.abs().max()) for g in oracle_grads if g.numel()), default=0.0)
    boost = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0
    eager_loss, _ = _run(arguments, [], dtype, torch.float32, seed)
    _, eager_grads = _run(arguments, names, dtype, dtype, seed, boost)

    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    loss = attention_divergence(**(arguments | leaves), reduction="none", impl=impl)
    grads = torch.autograd.grad(loss, list(leaves.values()), _upstream(oracle_loss, seed, boost).to(loss))

    label = f"{impl} {arguments.get('divergence', 'forward_kl')} merge={arguments.get('merge')} {str(dtype)[6:]}"
    scale = 1.0 if arguments.get("divergence", "forward_kl") in LOGARITHMIC else 0.0
    results = [compare(f"{label} loss", loss, oracle_loss, eager_loss.float(), scale=scale)]
    for name, grad, oracle, eager in zip(names, grads, oracle_grads, eager_grads, strict=True):
        results.append(compare(f"{label} d{name}", grad, oracle * boost, eager))
    return results


def prove_rows(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.attention_rows`, whose arguments carry the student's names here."""
    names = [n for n in STUDENT if isinstance(arguments.get(n), Tensor) and arguments[n].is_floating_point()]
    dtype = arguments["student_query"].dtype
    merge, temperature = arguments.get("merge"), arguments.get("temperature", 1.0)

    def reference_rows(inputs: torch.dtype, precision: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = {n: _held(n, arguments[n], inputs).requires_grad_() for n in names}
        rows = probabilities(arguments | leaves, precision)
        return rows.detach(), torch.autograd.grad(rows, list(leaves.values()), _upstream(rows, seed, 1.0))

    oracle, oracle_grads = reference_rows(torch.float64, torch.float64)
    eager, _ = reference_rows(torch.float32, torch.float32)
    _, eager_grads = reference_rows(dtype, dtype)
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    q, k, mask = ((arguments | leaves).get(n) for n in STUDENT)
    rows = attention_rows(q, k, mask=mask, merge=merge, temperature=temperature, impl=impl)  # type: ignore[arg-type]
    grads = torch.autograd.grad(rows, list(leaves.values()), _upstream(oracle, seed, 1.0).to(rows))
    label = f"{impl} attention_rows merge={merge} {str(dtype)[6:]}"
    results = [compare(f"{label} rows", rows, oracle, eager)]
    for name, grad, truth, plain in zip(names, grads, oracle_grads, eager_grads, strict=True):
        results.append(compare(f"{label} d{name}", grad, truth, plain))
    return results


def prove_relation(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.relation_row_loss`."""
    student, teacher = arguments["student_features"], arguments["teacher_features"]
    prefixes = arguments["student_prefix_tokens"], arguments["teacher_prefix_tokens"]

    def reference_loss(inputs: torch.dtype, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = student.detach().to(inputs).requires_grad_()
        held = {"student_features": leaf, "teacher_features": teacher.to(inputs)}
        loss = per_image(arguments | held, precision)
        (grad,) = torch.autograd.grad(loss, leaf, _upstream(loss, seed, boost))
        return loss.detach(), grad

    boost = 4096.0  # a mean over patches and a norm over channels leave small gradients
    oracle, oracle_grad = reference_loss(torch.float64, torch.float64)
    eager, _ = reference_loss(student.dtype, torch.float32)
    _, eager_grad = reference_loss(student.dtype, student.dtype)
    leaf = student.detach().requires_grad_()
    loss = relation_row_loss(
        leaf, teacher, reduction="none", impl=impl, student_prefix_tokens=prefixes[0], teacher_prefix_tokens=prefixes[1]
    )
    (grad,) = torch.autograd.grad(loss, leaf, _upstream(oracle, seed, boost).to(loss))
    label = f"{impl} relation_row {str(student.dtype)[6:]}"
    return [
        compare(f"{label} loss", loss, oracle, eager.float()),
        compare(f"{label} dstudent_features", grad, oracle_grad, eager_grad),
    ]


def assert_proved(impl: str, **arguments: Any) -> None:
    """Like :func:`prove`; raises AssertionError naming everything that is wrong."""
    wrong = [str(result) for result in prove(impl, **arguments) if not result.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _run(
    arguments: dict[str, Any],
    names: list[str],
    inputs: torch.dtype,
    precision: torch.dtype,
    seed: int,
    boost: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference in ``precision`` on inputs held in ``inputs``; gradients of the named arguments."""
    held = {n: _held(n, a, inputs) for n, a in arguments.items()}
    leaves = {n: held[n].requires_grad_() for n in names}
    loss = per_row(held | leaves, precision)
    if not names:
        return loss.detach(), ()
    grads = torch.autograd.grad(loss, list(leaves.values()), _upstream(loss, seed, boost))
    return loss.detach(), grads


def _held(name: str, value: Any, dtype: torch.dtype) -> Any:
    """A floating point tensor in ``dtype``; masks keep their own precision short of the oracle's."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(value.dtype if "mask" in name and dtype != torch.float64 else dtype)


def _upstream(loss: Tensor, seed: int, boost: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.device) * boost
    return torch.where(loss.detach().isfinite(), upstream, 0.0).to(loss.dtype)
