"""Runs one call of an operation against the float64 oracle: its result and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkd.attention import reference
from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.merging import merge_attention
from attnkd.attention.problem import make_problem, make_side
from attnkd.attention.resample import resample_attention
from attnkd.relation import reference as relation_reference
from attnkd.relation.api import relation_row_loss
from attnkd.testing import oracle
from attnkd.testing.tolerance import ALLOWANCE, CAP, Result, compare

PROBLEM = (
    "student_query", "student_key", "teacher_query", "teacher_key", "teacher_probs", "student_scale", "teacher_scale",
    "student_mask", "teacher_mask", "merge", "divergence", "temperature",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"divergence": "forward_kl", "temperature": 1.0}
LOGARITHMIC = ("forward_kl", "reverse_kl", "js", "cross_entropy")
HONEST_ULPS = {2: 1, 4: 16, 8: 256}
"""By the bytes of a result: its error in ulp where nothing simpler exists to measure the error of rounding. Half precision is rounded once
from float32, float32 has short sums, and in float64 the oracle rounds as well."""
LOGITS = 256.0
"""Larger logits allow a gradient no larger error; only eager's own error does."""
ZERO = 1e-10
"""A gradient below this fraction of the upstream gradients' sum counts as zero; what remains is the oracle's rounding."""


def per_row(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's divergence of every row, [B, Ho, M], computed in ``precision`` from attention_divergence's arguments."""
    values: list[Any] = [arguments.get(name, DEFAULTS.get(name)) for name in PROBLEM]
    return reference.per_row(make_problem(*values), precision)


def probabilities(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's attention, [B, Ho, M, N], from attention_rows' arguments (which may carry the student's names)."""
    given = {name.removeprefix("student_"): value for name, value in arguments.items()}
    side = make_side("", given["query"], given["key"], given.get("scale"), given.get("mask"))
    return reference.attention_rows(side, given.get("merge"), given.get("temperature", 1.0), precision)


def per_image(arguments: dict[str, Any], precision: torch.dtype) -> Tensor:
    """The reference's relation loss of every image, [B], from relation_row_loss's arguments."""
    features = arguments["student_features"], arguments["teacher_features"]
    prefixes = arguments.get("student_prefix_tokens", 1), arguments.get("teacher_prefix_tokens", 1)
    return relation_reference.per_image(*features, *prefixes, arguments.get("normalize_dim", -1), precision)


def prove(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """Compare ``attention_divergence(**arguments, impl=impl)`` and its gradients with the oracle.

    The oracle (:mod:`attnkd.testing.oracle`) computes in float64 on the same rounded inputs; the allowance is set by the error
    of plain PyTorch in float32 (loss) and in the input's precision (gradients). The upstream gradient is random, scaled so that
    the gradients are of order one (as a loss scaler does: float16 could not hold them otherwise); rows of infinite value get
    none, since their gradient means nothing.

    Args:
        impl: the implementation to judge. 'reference' claims float64 and is held to the rounding of its results alone.
        seed: seeds the upstream gradient.
        arguments: those of :func:`attnkd.attention_divergence`, but ``reduction`` is 'none' unless given; a floating point
            ``student_mask`` is differentiated too.

    Returns:
        One result for the loss and one for every gradient.
    """
    arguments = {"reduction": "none"} | arguments
    weight, reduction = arguments.get("row_weight"), arguments["reduction"]
    exact = {n: _held(n, a, torch.float64, "cpu") for n, a in arguments.items() if n in PROBLEM}
    _, alive = oracle.divergence_rows(**exact)

    def eager(precision: torch.dtype) -> Callable[..., Tensor]:
        def loss(**given: Any) -> Tensor:
            rows = per_row(given, precision)
            return oracle.reduce_rows(rows, alive.to(rows.device), weight, reduction)

        return loss

    kind = arguments.get("divergence", "forward_kl")
    scale = 0.0
    if kind in LOGARITHMIC:  # every row is a difference of logarithms of order one
        ones = None if weight is None else weight.detach().double().abs().cpu()
        sizes = oracle.reduce_rows(torch.ones(alive.shape, dtype=torch.float64), alive, ones, reduction)
        scale = float(sizes.max()) if sizes.numel() else 0.0
    dtype = arguments["student_query"].dtype
    return _judge(
        f"{impl} {kind} merge={arguments.get('merge')} {str(dtype)[6:]}",
        ("student_query", "student_key", "student_mask"),
        arguments,
        run=lambda **given: attention_divergence(**given, impl=impl),
        truth=oracle.attention_divergence,
        eager=None if impl == "reference" else eager,
        seed=seed,
        scale=scale,
        squares=kind in ("mse", "logit_mse"),
        terms=_terms(exact, _weight_of_a_row(alive, weight, reduction)),
    )


def prove_rows(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.attention_rows`, whose arguments may carry the student's names."""
    arguments = {name.removeprefix("student_"): value for name, value in arguments.items()}
    exact = {f"student_{n}": _held(n, a, torch.float64, "cpu") for n, a in arguments.items()}

    def eager(precision: torch.dtype) -> Callable[..., Tensor]:
        def rows(**given: Any) -> Tensor:
            found = probabilities(given, precision)
            return found if given["query"].dtype == torch.float64 else found.float()

        return rows

    return _judge(
        f"{impl} attention_rows merge={arguments.get('merge')} {str(arguments['query'].dtype)[6:]}",
        ("query", "key", "mask"),
        arguments,
        run=lambda **given: attention_rows(**given, impl=impl),
        truth=oracle.attention_rows,
        eager=None if impl == "reference" else eager,
        seed=seed,
        terms={name.removeprefix("student_"): size for name, size in _terms(exact, 1.0).items()},
    )


def prove_relation(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.relation_row_loss`; ``reduction`` is 'none' unless given."""
    arguments = {"reduction": "none"} | arguments

    def eager(precision: torch.dtype) -> Callable[..., Tensor]:
        def loss(**given: Any) -> Tensor:
            images = per_image(given, precision)
            return {"none": images, "sum": images.sum(), "mean": images.mean()}[given["reduction"]]

        return loss

    return _judge(
        f"{impl} relation_row {str(arguments['student_features'].dtype)[6:]}",
        ("student_features",),
        arguments,
        run=lambda **given: relation_row_loss(**given, impl=impl),
        truth=oracle.relation_row_loss,
        eager=None if impl == "reference" else eager,
        seed=seed,
        squares=True,
        terms={"student_features": _terms_of_relation(arguments)},
    )


def prove_merge(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.merge_attention`, which has one implementation."""
    run, truth = merge_attention, oracle.merge_attention
    return _judge("merge_attention", ("probs",), arguments, run=run, truth=truth, eager=None, seed=seed)


def prove_resample(impl: str, *, seed: int = 0, **arguments: Any) -> list[Result]:
    """The same for :func:`attnkd.resample_attention`, which has one implementation."""
    run, truth = resample_attention, oracle.resample_attention
    exact = {n: _held(n, a, torch.float64, "cpu") for n, a in arguments.items()}
    # y_j = rest · x_j / Σ x: its derivative is a difference of numbers of the size rest / Σ x.
    terms = _largest(1 / oracle.resized_patches(**exact).sum(-1)) if exact["rows"].numel() else 0.0
    return _judge(
        "resample_attention", ("rows",), arguments, run=run, truth=truth, eager=None, seed=seed, terms={"rows": terms}
    )


def assert_proved(impl: str, **arguments: Any) -> None:
    """Like :func:`prove`; raises AssertionError naming everything that is wrong."""
    wrong = [str(result) for result in prove(impl, **arguments) if not result.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _judge(
    label: str,
    names: tuple[str, ...],
    arguments: dict[str, Any],
    *,
    run: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    eager: Callable[[torch.dtype], Callable[..., Tensor]] | None,
    seed: int,
    scale: float = 0.0,
    squares: bool = False,
    terms: dict[str, float] | None = None,
) -> list[Result]:
    """Value and gradients of ``run`` against ``truth``, both called with ``arguments``.

    Args:
        names: the arguments to differentiate; those that are floating point tensors are.
        eager: the same in plain PyTorch, in a precision. None: plain PyTorch itself is judged, by rounding alone.
        scale: as in :func:`attnkd.testing.tolerance.compare`, of the value.
        squares: the value is made of squared differences of numbers of order one. An ulp of those in a difference x changes x² by
            2x ulp.
        terms: by argument, the size of the numbers whose differences its gradient is, for an upstream gradient of 1. They are
            known to a float32 ulp (float64 in float64), also where the result is rounded to half precision.
    """
    names = tuple(n for n in names if isinstance(arguments.get(n), Tensor) and arguments[n].is_floating_point())
    dtype, loss_dtype = arguments[names[0]].dtype, torch.promote_types(arguments[names[0]].dtype, torch.float32)
    exact = {n: _held(n, a, torch.float64, "cpu") for n, a in arguments.items()}
    value, _ = _differentiate(truth, exact, (), None)
    poisoned = any(isinstance(a, Tensor) and bool(a.isnan().any()) for a in exact.values())
    if poisoned or (value.ndim == 0 and not value.isfinite()):
        names = ()  # there is no gradient that means anything
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upstream = torch.where(value.isfinite(), upstream, 0.0)
    _, exact_grads = _differentiate(truth, exact, names, upstream)
    whole = float(upstream.abs().sum())
    exact_grads = tuple(g if _largest(g) > ZERO * whole else torch.zeros_like(g) for g in exact_grads)
    largest = max(map(_largest, exact_grads), default=0.0)
    boost = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0
    exact_grads = tuple(g * boost for g in exact_grads)
    result, grads = _differentiate(run, arguments, names, upstream * boost)

    if eager is None or dtype == torch.float64:
        plain_value = _off_by_rounding(value, loss_dtype)
        plain_grads = tuple(_off_by_rounding(g, arguments[n].dtype) for n, g in zip(names, exact_grads, strict=True))
    else:
        single = {n: _held(n, a, dtype) for n, a in arguments.items()}
        plain_value, _ = _differentiate(eager(loss_dtype), single, (), None)
        _, plain_grads = _differentiate(eager(dtype), single, names, upstream * boost)
    nan = value.isnan()  # such as the mean of rows that all see nothing
    if result.shape == value.shape and torch.equal(result.isnan().cpu(), nan):
        value, plain_value, result = (torch.where(nan.to(x.device), 0.0, x) for x in (value, plain_value, result))
    value = value.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # a missing NaN is an infinity missed
    if squares:
        scale = 2.0 * math.sqrt(_largest(value[value.isfinite()]))
    if dtype == torch.float64:  # what it is compared with is rounded as well
        scale *= HONEST_ULPS[8] / ALLOWANCE[dtype][1]
    results = [compare(f"{label} value", result, value, plain_value, scale=scale)]
    for name, grad, exact_grad, plain in zip(names, grads, exact_grads, plain_grads, strict=True):
        size = (terms or {}).get(name, 0.0) * _largest(upstream) * boost
        ulp = ALLOWANCE[plain.dtype][1] * torch.finfo(plain.dtype).eps
        if exact_grad.any():
            # PyTorch itself rounds each copy of a broadcast mask's gradient before it adds them.
            if eager is not None or "mask" not in name:
                size *= torch.finfo(loss_dtype).eps / torch.finfo(plain.dtype).eps
            size = min(size, CAP * _largest(exact_grad) / ulp)  # a gradient of zeros must not pass
        else:
            size = max(size, 4 * whole * boost, ZERO * whole * boost / ulp)  # zero by right: everything cancelled
        verdict = compare(f"{label} d{name}", grad, exact_grad, plain, scale=size)
        if not verdict.ok and eager is not None and exact_grad.any() and dtype != torch.float64:
            # A gradient below float32's rounding, as of a saturated row: plain PyTorch in float32 misses it too, and by how much is allowed.
            given = {n: _held(n, a, torch.float32) for n, a in arguments.items()}
            _, (plain32,) = _differentiate(eager(torch.float32), given, (name,), upstream * boost)
            missed = _largest(plain32.detach().cpu().double() - exact_grad)
            size = max(size, ALLOWANCE[torch.float32][0] * missed / ulp)
            verdict = compare(f"{label} d{name}", grad, exact_grad, plain, scale=size)
        results.append(verdict)
    return results


def _terms(arguments: dict[str, Any], weight: float) -> dict[str, float]:
    """How large the numbers are whose differences the gradients of q, k and mask are, for rows of that weight.

    dq_i = scale/T Σ_j (…)k_j, where (…) is a difference of probabilities of order one. A probability is e^(z − lse), with an error
    of z ulp: Σ_j p_j |k_j| is off by z ulp on each side, of which half is allowed (tolerance.py allows four ulp of what is returned
    here). In reverse_kl (…) is p times a difference of logits, in logit_mse that difference alone.
    """
    temperature, merge = arguments.get("temperature", 1.0), arguments.get("merge")
    logits = 0.0
    for side in ("student", "teacher"):
        if arguments.get(f"{side}_query") is None:
            continue
        query, key, scale, mask = (arguments.get(f"{side}_{name}") for name in ("query", "key", "scale", "mask"))
        z = oracle.scores(query, key, scale, mask)  # type: ignore[arg-type]
        z = torch.where(z == oracle.NOTHING, 0.0, z)
        logits = max(logits, _largest(z.sum(1) if merge == "logsum" else z) / temperature)
    query, key, scale = (arguments.get(f"student_{name}") for name in ("query", "key", "scale"))
    assert query is not None and key is not None
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    logits = min(logits, LOGITS)
    size = weight / temperature * max(1.0, logits / 4)
    if arguments.get("divergence") == "reverse_kl":
        size *= max(1.0, logits)
    elif arguments.get("divergence") == "logit_mse":
        size = weight / temperature * max(1.0, logits)
    return {
        "student_query": size * scale * _largest(key),
        "student_key": size * scale * _largest(query),
        "student_mask": size,
    }


def _terms_of_relation(arguments: dict[str, Any]) -> float:
    """The same for a relation row: the class token's gradient is 2/P Σ_j (r_s,j − r_t,j)·(…)_j / ‖F_0‖, and P similarities that
    are each known to an ulp of the largest leave √P of them in the sum. Channels (normalize_dim -2) are left to eager's error."""
    if arguments.get("normalize_dim", -1) != -1 or not len(arguments["student_features"]):
        return 0.0
    features, prefix = arguments["student_features"].double().cpu(), arguments.get("student_prefix_tokens", 1)
    rows = [torch.stack(oracle.relation_row(f[0], f[prefix:], -1)) for f in features]
    images = len(features) if arguments["reduction"] == "mean" else 1
    sizes = [
        2.0 * _largest(r) / math.sqrt(len(r)) / float(f[0].norm())
        for r, f in zip(rows, features, strict=True)
        if f[0].any()
    ]
    return max(filter(math.isfinite, sizes), default=0.0) / images


def _weight_of_a_row(alive: Tensor, weight: Tensor | None, reduction: str) -> float:
    """The largest factor that a row has in the reduced loss."""
    rows = torch.ones(alive.shape, dtype=torch.float64, requires_grad=True)
    loss = oracle.reduce_rows(rows, alive, None if weight is None else weight.cpu(), reduction)
    (factors,) = torch.autograd.grad(loss.sum(), rows)
    return _largest(factors[factors.isfinite()])


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _differentiate(
    function: Callable[..., Tensor], arguments: dict[str, Any], names: tuple[str, ...], upstream: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A function's value, and its gradients with respect to the named arguments."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    value = function(**(arguments | leaves))
    if not names or upstream is None:
        return value.detach(), ()
    if not value.requires_grad:  # no row depends on anything
        return value, tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    grads = torch.autograd.grad(value, list(leaves.values()), upstream.to(value), materialize_grads=True)
    return value.detach(), grads


def _held(name: str, value: Any, dtype: torch.dtype, device: str | None = None) -> Any:
    """A floating point tensor in ``dtype``; masks keep their own precision short of the oracle's."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device or value.device)
    if not value.is_floating_point() or ("mask" in name and dtype != torch.float64):
        return value
    return value.to(dtype)


def _off_by_rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value as rounding alone would spoil it; float16 and bfloat16 results are rounded once, from a longer type."""
    return (value * (1 + HONEST_ULPS[dtype.itemsize] * torch.finfo(dtype).eps)).to(dtype)
