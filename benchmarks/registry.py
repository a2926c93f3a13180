"""Every operation that is measured, and against what. A new operation is one entry of :data:`OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import attnkd
from attnkd.relation.api import relation_row_loss
from benchmarks import baselines
from benchmarks.cases import Inputs, Shape

Function = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    function: takes the operation's tensors (see :attr:`Operation.tensors`), returns a tensor or a tuple of them.
    compiled: measured under torch.compile.
    all_queries: needs every query, because it computes whole maps even where one row is compared.
    ours: part of the package, and held to its precision; the others only have to be right.
    """

    name: str
    about: str
    function: Function
    compiled: bool = False
    all_queries: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Work:
    """The least an operation must do: bytes that inputs, results and what the backward needs take; arithmetic operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Operation:
    """An operation: inputs, truth, competitors, and the least work it takes.

    one_row: only the class token's row is compared.
    merged: teacher and student differ in their number of heads (width).
    tensors: from the student's leaves and the inputs to the functions' arguments.
    reference: the same on float64 tensors; returns a tuple. Where the functions give a batch mean, it gives the sum.
    results: shapes of what the functions return, () for a batch mean.
    implementations: ours first; speed-ups are ours over each.
    work: of the forward and of the backward.
    leaves: the student's tensors that get a gradient.
    by_rows: the truth may be summed up over slices of query rows.
    exact: the package's result is as exact as the precision of its inputs allows (no other library's half-precision attention
        is part of it).
    outliers: share of gradient elements that may differ without being wrong (ties of max and min).
    """

    name: str
    summary: str
    one_row: bool
    implementations: tuple[Implementation, ...]
    reference: Function
    results: Callable[[Shape], list[tuple[int, ...]]]
    work: Callable[[Shape, int], dict[str, Work]]
    tensors: Callable[[dict[str, Tensor], Inputs, int], tuple[Tensor, ...]]
    merged: bool = False
    leaves: tuple[str, ...] = ("query", "key")
    by_rows: bool = False
    exact: bool = True
    outliers: float = 0.0
    headline: bool = field(default=True)

    def rows(self, shape: Shape) -> int:
        return 1 if self.one_row else shape.tokens


def _pair(leaves: dict[str, Tensor], inputs: Inputs, rows: int) -> tuple[Tensor, ...]:
    return leaves["query"], leaves["key"], inputs.teacher["query"][:, :, :rows], inputs.teacher["key"]


def _pair_with_values(leaves: dict[str, Tensor], inputs: Inputs, rows: int) -> tuple[Tensor, ...]:
    return *_pair(leaves, inputs, rows), leaves["value"], inputs.teacher["value"]


def _with_teacher_rows(leaves: dict[str, Tensor], inputs: Inputs, rows: int) -> tuple[Tensor, ...]:
    query, key = inputs.teacher["query"][:, :, :1], inputs.teacher["key"]
    with torch.no_grad():
        return leaves["query"], leaves["key"], baselines.row_scores(query, key, False).softmax(-1)


def _divergence(
    name: str,
    summary: str,
    one_row: bool,
    merge: str | None = None,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    **more: Any,
) -> Operation:
    """An entry for one setting of :func:`attnkd.attention_divergence`."""
    options: dict[str, Any] = {"merge": merge, "divergence": kind, "temperature": temperature}

    def ours(impl: str) -> Function:
        return lambda qs, ks, qt, kt: attnkd.attention_divergence(
            qs, ks, qt, kt, reduction="batchmean", impl=impl, **options
        )

    def reference(qs: Tensor, ks: Tensor, qt: Tensor, kt: Tensor) -> tuple[Tensor, ...]:
        return (attnkd.attention_divergence(qs, ks, qt, kt, reduction="sum", impl="reference", **options),)

    by_matmul = baselines.divergence(baselines.matmul_scores, merge, kind, temperature)
    whole = baselines.divergence(None, merge, kind, temperature) if one_row else by_matmul
    found = [
        Implementation("ours", "the package, Triton", ours("triton"), ours=True),
        Implementation("chunked", "the package, plain PyTorch", ours("chunked"), ours=True),
    ]
    if not (one_row and kind == "logit_mse"):  # scores of other rows would have no use
        found += [
            Implementation("eager_map", "whole maps", whole, all_queries=one_row),
            Implementation("compile_map", "whole maps, compiled", whole, compiled=True, all_queries=one_row),
        ]
    if one_row:
        by_products = baselines.divergence(baselines.row_scores, merge, kind, temperature)
        found += [
            Implementation("eager_row", "the row only, matrix product", by_matmul),
            Implementation(
                "compile_row", "the row only, multiply and sum in fp32, compiled", by_products, compiled=True
            ),
        ]
    if merge is None and kind == "forward_kl":
        flex = baselines.flex_divergence
        found.append(
            Implementation("flex", "fused attention with V = [k_t | k_s] and its LSE, compiled", flex, compiled=True)
        )

    def work(shape: Shape, itemsize: int) -> dict[str, Work]:
        m = 1 if one_row else shape.tokens
        heads_t = shape.teacher_heads if merge else shape.heads
        token = shape.batch * shape.head_dim * itemsize
        query, key = token * shape.heads * m, token * shape.heads * shape.tokens
        teacher = token * heads_t * (m + shape.tokens)
        product = 2 * shape.batch * m * shape.tokens * shape.head_dim
        if one_row:  # the backward needs one fp32 number a key, and no key
            coefficients = 4 * shape.batch * (1 if merge == "logsum" else shape.heads) * shape.tokens
            moved = (query + key + teacher + coefficients, coefficients + 2 * query + key)
        else:  # nothing of the map may be kept, so both sides are read again
            moved = (query + key + teacher, 2 * (query + key) + teacher)
        return {
            "fwd": Work(moved[0], product * (shape.heads + heads_t)),
            "bwd": Work(moved[1], 2 * product * shape.heads),
        }

    return Operation(
        name, summary, one_row, tuple(found), reference, lambda shape: [()], work, _pair,
        merged=merge is not None, by_rows=not one_row, outliers=0.02 if merge in ("max", "min") else 0.0, **more,
    )  # fmt: skip


def _attention_rows(
    name: str, summary: str, merge: str | None = None, temperature: float = 1.0, **more: Any
) -> Operation:
    """An entry for one setting of :func:`attnkd.attention_rows`, class-token row."""

    def ours(impl: str) -> Function:
        return lambda q, k: attnkd.attention_rows(q, k, merge=merge, temperature=temperature, impl=impl)

    def work(shape: Shape, itemsize: int) -> dict[str, Work]:
        token = shape.batch * shape.heads * shape.head_dim * itemsize
        result = 4 * shape.batch * (1 if merge else shape.heads) * shape.tokens
        keys = token * shape.tokens
        product = 2 * shape.batch * shape.heads * shape.tokens * shape.head_dim
        return {
            "fwd": Work(token + keys + result, product),
            "bwd": Work(2 * token + 2 * keys + 2 * result, 2 * product),
        }

    return Operation(
        name,
        summary,
        True,
        (
            Implementation("ours", "the package, Triton", ours("triton"), ours=True),
            Implementation("chunked", "the package, plain PyTorch", ours("chunked"), ours=True),
            Implementation("eager_map", "whole maps", baselines.rows(None, merge, temperature), all_queries=True),
            Implementation(
                "eager_row", "the row only, matrix product", baselines.rows(baselines.matmul_scores, merge, temperature)
            ),
            Implementation(
                "compile_row",
                "the row only, multiply and sum in fp32, compiled",
                baselines.rows(baselines.row_scores, merge, temperature),
                compiled=True,
            ),
        ),
        lambda q, k: (attnkd.attention_rows(q, k, merge=merge, temperature=temperature, impl="reference"),),
        lambda shape: [(shape.batch, 1 if merge else shape.heads, 1, shape.tokens)],
        work,
        lambda leaves, inputs, rows: (leaves["query"], leaves["key"]),
        **more,
    )


def _against_rows() -> Operation:
    def ours(impl: str) -> Function:
        return lambda q, k, probs: attnkd.attention_divergence(
            q, k, teacher_probs=probs, reduction="batchmean", impl=impl
        )

    def work(shape: Shape, itemsize: int) -> dict[str, Work]:
        token = shape.batch * shape.heads * shape.head_dim * itemsize
        row = 4 * shape.batch * shape.heads * shape.tokens
        product = 2 * shape.batch * shape.heads * shape.tokens * shape.head_dim
        keys = token * shape.tokens
        return {"fwd": Work(token + keys + 2 * row, product), "bwd": Work(2 * token + keys + row, 2 * product)}

    return Operation(
        "cls_row_given",
        "class-token row against given (cached or resampled) teacher rows",
        True,
        (
            Implementation("ours", "the package, Triton", ours("triton"), ours=True),
            Implementation("chunked", "the package, plain PyTorch", ours("chunked"), ours=True),
            Implementation(
                "eager_row", "the row only, matrix product", baselines.against_rows(baselines.matmul_scores)
            ),
            Implementation(
                "compile_row",
                "the row only, multiply and sum in fp32, compiled",
                baselines.against_rows(baselines.row_scores),
                compiled=True,
            ),
        ),
        lambda q, k, probs: (
            attnkd.attention_divergence(q, k, teacher_probs=probs, reduction="sum", impl="reference"),
        ),
        lambda shape: [()],
        work,
        _with_teacher_rows,
    )


def _attention_and(name: str, summary: str, one_row: bool) -> Operation:
    """Attention outputs of both models and the divergence: what a block computes when it is distilled."""
    rows = 1 if one_row else None

    def ours(qs: Tensor, ks: Tensor, qt: Tensor, kt: Tensor, vs: Tensor, vt: Tensor) -> tuple[Tensor, ...]:
        out_s, out_t = F.scaled_dot_product_attention(qs, ks, vs), F.scaled_dot_product_attention(qt, kt, vt)
        loss = attnkd.attention_divergence(
            qs[:, :, :rows], ks, qt[:, :, :rows], kt, reduction="batchmean", impl="triton"
        )
        return out_s, out_t, loss

    def reference(qs: Tensor, ks: Tensor, qt: Tensor, kt: Tensor, vs: Tensor, vt: Tensor) -> tuple[Tensor, ...]:
        scale = qs.shape[-1] ** -0.5
        out_s, out_t = ((q @ k.mT * scale).softmax(-1) @ v for q, k, v in ((qs, ks, vs), (qt, kt, vt)))
        loss = attnkd.attention_divergence(qs[:, :, :rows], ks, qt[:, :, :rows], kt, reduction="sum", impl="reference")
        return out_s, out_t, loss

    def work(shape: Shape, itemsize: int) -> dict[str, Work]:
        one = shape.batch * shape.heads * shape.tokens * shape.head_dim * itemsize
        product = 2 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
        teacher_again = 0 if one_row else 2 * one
        # q, k, v, out of both; then q, k, v, out, d out and dq, dk, dv of the student
        return {"fwd": Work(8 * one, 4 * product), "bwd": Work(8 * one + teacher_again, 4 * product)}

    beside = baselines.attention_and_scores
    found = [
        Implementation("ours", "scaled_dot_product_attention and the package", ours, ours=True),
        Implementation("eager_map", "maps serve output and loss", baselines.attention_from_maps(rows)),
        Implementation(
            "compile_map", "maps serve output and loss, compiled", baselines.attention_from_maps(rows), compiled=True
        ),
        Implementation(
            "sdpa_eager", "scaled_dot_product_attention and eager scores", beside(baselines.matmul_scores, rows)
        ),
        Implementation(
            "sdpa_compile",
            "scaled_dot_product_attention and scores, compiled",
            beside(baselines.row_scores if one_row else baselines.matmul_scores, rows),
            compiled=True,
        ),
    ]

    def results(shape: Shape) -> list[tuple[int, ...]]:
        one = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
        return [one, one, ()]

    return Operation(
        name,
        summary,
        False,
        tuple(found),
        reference,
        results,
        work,
        _pair_with_values,
        leaves=("query", "key", "value"),
        exact=False,
    )


def _relation_row() -> Operation:
    def ours(impl: str) -> Function:
        return lambda student, teacher: relation_row_loss(student, teacher, impl=impl)

    def work(shape: Shape, itemsize: int) -> dict[str, Work]:
        tokens = shape.batch * shape.tokens
        student, teacher = (tokens * heads * shape.head_dim for heads in (shape.heads, shape.teacher_heads))
        # A norm and a product with the class token on each side; the backward needs both features again.
        forward = Work((student + teacher) * itemsize, 4 * (student + teacher))
        return {"fwd": forward, "bwd": Work(2 * student * itemsize + 4 * 3 * tokens, 8 * student)}

    return Operation(
        "relation_row",
        "squared error between cosine similarities of class token and patches",
        True,
        (
            Implementation("ours", "the package, Triton", ours("triton"), ours=True),
            Implementation("chunked", "the package, plain PyTorch", ours("chunked"), ours=True),
            Implementation("eager_map", "the Gram matrix", baselines.relation(True)),
            Implementation("compile_map", "the Gram matrix, compiled", baselines.relation(True), compiled=True),
            Implementation("eager_row", "the row only", baselines.relation(False)),
            Implementation("compile_row", "the row only, compiled", baselines.relation(False), compiled=True),
        ),
        lambda student, teacher: (relation_row_loss(student, teacher, reduction="sum", impl="reference"),),
        lambda shape: [()],
        work,
        lambda leaves, inputs, rows: (leaves["features"], inputs.teacher["features"]),
        merged=True,
        leaves=("features",),
    )


OPERATIONS = {
    operation.name: operation
    for operation in (
        _divergence("cls_row", "KL of the class-token row, head by head", True),
        _divergence(
            "cls_row_logsum", "KL of the class-token row, heads merged by log-sum", True, "logsum", temperature=10.0
        ),
        _divergence("whole_map", "KL of all rows, head by head", False),
        _attention_rows("attention_rows", "class-token row of probabilities"),
        _against_rows(),
        _relation_row(),
        _attention_and("attention_cls_row", "attention of both models and the class-token KL", True),
        _attention_and("attention_whole_map", "attention of both models and the KL of all rows", False),
        _divergence("cls_row_mean", "KL of the class-token row, heads averaged", True, "mean"),
        _divergence("whole_map_logsum", "KL of all rows, heads merged by log-sum", False, "logsum", temperature=10.0),
        _divergence("whole_map_mean", "KL of all rows, heads averaged", False, "mean", headline=False),
        _divergence("cls_row_max", "KL of the class-token row, maximum over heads", True, "max", headline=False),
        _divergence("cls_row_min", "KL of the class-token row, minimum over heads", True, "min", headline=False),
        _attention_rows("attention_rows_logsum", "class-token row, heads merged", "logsum", 10.0, headline=False),
        *(
            _divergence(
                f"{where}_{kind}", f"{kind} of {what}, head by head", where == "cls_row", None, kind, headline=False
            )
            for where, what in (("cls_row", "the class-token row"), ("whole_map", "all rows"))
            for kind in ("reverse_kl", "js", "cross_entropy", "mse", "logit_mse")
        ),
    )
}
"""By name. The headline ones are measured by default; ``--operations all`` measures the rest too."""


def find_operations(names: list[str]) -> list[Operation]:
    """Operations by name; 'all' and 'headline' are names too.

    Raises:
        ValueError: no such operation; the message lists them.
    """
    found: dict[str, Operation] = {}
    for name in names:
        if name in ("all", "headline"):
            found |= {n: o for n, o in OPERATIONS.items() if name == "all" or o.headline}
        elif name in OPERATIONS:
            found[name] = OPERATIONS[name]
        else:
            raise ValueError(f"operation: expected one of all, headline, {', '.join(OPERATIONS)}, got {name!r}")
    return list(found.values())
