"""``impl="chunked"``: attention divergences in plain PyTorch, block by block, with memory O(N): for any device without Triton.

``per_row`` (the loss of every row) and ``weighted_sum`` (Σ weight · row) walk over blocks of (images, heads, query rows). A
block's logits of both sides stay in the cache; :mod:`attnkd.attention.chunked.divergence` turns them into rows and ds = ∂row/∂z_s.
With z = (scale · q·k + mask) / T and upstream g_i:

    dq_i = (scale / T) · g_i · Σ_j ds_ij k_j        dk_j = (scale / T) · Σ_i ds_ij g_i q_i        dmask = g ds / T

What is kept for the backward:
  M <= 16 rows          the coefficient rows ds [B, H, M, N] (M/D of a key tensor); the backward is two thin matmuls
  weighted_sum          dq, dk, dmask themselves in float32: g is the weight times one number, so the backward only scales
  per_row, more rows    nothing; the blocks are computed again

Computes in float32 (float64 where the student is float64) whatever the inputs are, autocast or not; float32 matmuls follow
``torch.set_float32_matmul_precision``. Every pass is an opaque operator, so ``torch.compile(fullgraph=True)`` sees one
node and gives the same bits. Deterministic where ``torch.baddbmm`` is. Double backward raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkd.attention.chunked.matmul import Gradients
from attnkd.attention.chunked.sweep import all_logits, contract, sweep
from attnkd.attention.problem import HIDDEN_BELOW, Problem, Side
from attnkd.attention.reductions import weighted
from attnkd.operators import first_order_only, keep, kept, register

FEW_ROWS = 16
"""Up to this many query rows the coefficient rows are kept instead of gradients."""


def per_row(problem: Problem) -> Tensor:
    """The divergence of every row, [B, Ho, M]; float32 (float64 for a float64 student).

    Differentiable in the student's query, key and floating point mask.
    """
    flat = _flatten(problem)
    if not _needs_grad(flat):
        return torch.ops.attnkd.chunked_rows(*flat)
    return (_FewRows if problem.rows_shape[2] <= FEW_ROWS else _Rows).apply(*flat)


def weighted_sum(problem: Problem, weight: Tensor) -> Tensor:
    """Σ weight · per_row as a scalar; rows of weight 0 leave the sum even if they are infinite.

    weight: [B, Ho, M], gets no gradient. The gradients are computed in the forward and scaled in the backward.
    """
    flat, weight = _flatten(problem), weight.detach()
    if not _needs_grad(flat) or problem.rows_shape[2] <= FEW_ROWS:
        return weighted(per_row(problem), weight).sum()
    return _WeightedSum.apply(weight, *flat)


def row_logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float) -> Tensor:
    """(scale · query·key + mask) / temperature, [B, H, M, N], float32 (float64 for float64): meant for few rows M.

    query: [B, H, M, D]; key: [B, H, N, D]; mask: boolean (True = visible) or additive, [B, H, M, N] or broadcastable in
    four dimensions. Hidden keys are -inf and send no gradient; so a row that sees no key is all -inf and its softmax is NaN:
    the caller decides which value such a row gets. Differentiable in query, key and a floating point mask.
    """
    inputs = (query, key, _stored(mask))
    function = _RowLogits.apply if _needs_grad(inputs) else torch.ops.attnkd.chunked_logits
    return function(*inputs, scale, temperature)


# -- autograd ---------------------------------------------------------------------------------------------------------
# The functions take the problem flat: query, key, mask of the student (which may get gradients), then eleven arguments more.


class _FewRows(torch.autograd.Function):
    """Rows of a problem; keeps the coefficient rows."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        rows, ds = torch.ops.attnkd.chunked_coefficients(*flat)
        keep(ctx, ds, *flat[:3])
        ctx.options = flat[7], flat[11]
        return rows

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ds, *inputs = kept(ctx)
        needs = ctx.needs_input_grad[:3]
        units = torch.ops.attnkd.chunked_contract(ds, grad, *inputs, *ctx.options, *needs)
        return *_gradients(units, inputs, needs), *[None] * 11


class _Rows(torch.autograd.Function):
    """Rows of a problem; keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        keep(ctx, *flat[:7])
        ctx.options = flat[7:]
        return torch.ops.attnkd.chunked_rows(*flat)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        inputs, needs = kept(ctx), ctx.needs_input_grad[:3]
        _, *units = torch.ops.attnkd.chunked_gradients(*inputs, *ctx.options, grad, *needs)
        return *_gradients(units, inputs[:3], needs), *[None] * 11


class _WeightedSum(torch.autograd.Function):
    """Σ weight · rows; keeps dq, dk and dmask in float32 (float64)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *flat: Any) -> Tensor:
        rows, *units = torch.ops.attnkd.chunked_gradients(*flat, weight, *ctx.needs_input_grad[1:4])
        keep(ctx, *units, *flat[:3])  # the last three only for second derivatives, to refuse them
        ctx.dtypes = [None if x is None else x.dtype for x in flat[:3]]
        return weighted(rows, weight).sum()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        units, needs = kept(ctx)[:3], ctx.needs_input_grad[1:4]
        grads = [
            (unit * grad).to(dtype) if need else None
            for unit, dtype, need in zip(units, ctx.dtypes, needs, strict=True)
        ]
        return None, *grads, *[None] * 11


class _RowLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float) -> Tensor:
        keep(ctx, query, key, mask)
        ctx.options = scale, temperature
        return torch.ops.attnkd.chunked_logits(query, key, mask, scale, temperature)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        query, key, mask = kept(ctx)
        if mask is not None:
            grad = grad.masked_fill(~mask if mask.dtype == torch.bool else mask <= HIDDEN_BELOW, 0.0)
        one = grad.new_ones((1, 1, 1)).expand(grad.shape[:3])
        needs = ctx.needs_input_grad[:3]
        units = torch.ops.attnkd.chunked_contract(grad, one, query, key, mask, *ctx.options, *needs)
        return *_gradients(units, (query, key, mask), needs), None, None


class _Unexpand(torch.autograd.Function):
    """An expanded view → what it was expanded from, without summing a full-size gradient on the way back.

    The gradient goes back as a view again: its copies share each entry equally, and add up to it in the backward of expand.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor, *dims: int) -> Tensor:
        ctx.shape, ctx.dims = mask.shape, dims
        for dim in dims:
            mask = mask.narrow(dim, 0, 1)
        return mask

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple:
        copies = 1
        for dim in ctx.dims:
            copies *= ctx.shape[dim]
        return (grad / copies).expand(ctx.shape), *[None] * len(ctx.dims)


def _stored(mask: Tensor | None) -> Tensor | None:
    """The mask without its broadcast dimensions, so that neither it nor its gradient is ever [B, H, M, N]."""
    if mask is None:
        return None
    dims = [
        dim
        for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True))
        if size > 1 and stride == 0
    ]
    if mask.requires_grad and not torch.compiler.is_compiling():
        # Only what the last expand() repeated: a view that the user made has a gradient of its own for every copy.
        expanded = type(mask.grad_fn).__name__ == "ExpandBackward0"
        before = mask.grad_fn._saved_self_sym_sizes if expanded else mask.shape  # type: ignore[union-attr]
        before = (1,) * (mask.ndim - len(before)) + tuple(before)
        dims = [dim for dim in dims if before[dim] == 1]
    return _Unexpand.apply(mask, *dims) if dims else mask


def _needs_grad(flat: tuple) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat[:3])


def _gradients(units: Any, inputs: Any, needs: Any) -> list[Tensor | None]:
    return [unit.to(x.dtype) if need else None for unit, x, need in zip(units, inputs, needs, strict=True)]


# -- operators --------------------------------------------------------------------------------------------------------

_PROBLEM = (
    "Tensor query, Tensor key, Tensor? mask, Tensor? teacher_query, Tensor? teacher_key, Tensor? teacher_mask, "
    "Tensor? teacher_probs, float scale, float teacher_scale, str? merge, str divergence, float temperature, "
    "Tensor? student_lse, Tensor? teacher_lse"
)
_NEEDS = "bool need_query, bool need_key, bool need_mask"


def _operator(schema: str) -> Any:
    """Register ``fn(meta, ...)`` as an operator: outputs only allocated where ``meta`` is true."""

    def decorate(fn: Any) -> Any:
        def kernel(*args: Any) -> Any:
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                return fn(False, *args)

        register(schema, kernel, lambda *args: fn(True, *args))
        return fn

    return decorate


@_operator(f"chunked_rows({_PROBLEM}) -> Tensor")
def _rows_op(meta: bool, *flat: Any) -> Tensor:
    problem = _unflatten(flat)
    rows = _new(problem, problem.rows_shape)
    if not meta:
        sweep(problem, rows)
    return rows


@_operator(f"chunked_coefficients({_PROBLEM}) -> (Tensor, Tensor)")
def _coefficients_op(meta: bool, *flat: Any) -> tuple[Tensor, Tensor]:
    problem = _unflatten(flat)
    batch, heads, num_rows = problem.rows_shape
    if problem.merge not in (None, "logsum"):
        heads = problem.student.num_heads
    rows, ds = _new(problem, problem.rows_shape), _new(problem, (batch, heads, num_rows, problem.num_keys))
    if not meta:
        sweep(problem, rows, coefficients=ds)
    return rows, ds


@_operator(f"chunked_gradients({_PROBLEM}, Tensor weight, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _gradients_op(meta: bool, *args: Any) -> tuple[Tensor, ...]:
    *flat, weight, need_query, need_key, need_mask = args
    problem = _unflatten(flat)
    rows = _new(problem, problem.rows_shape)
    needs, wide = (need_query, need_key, need_mask), problem.merge == "logsum"
    grads = Gradients(problem.student, problem.temperature, rows.dtype, wide, *needs)
    if not meta:
        sweep(problem, rows, weight=weight.to(rows.dtype), gradients=grads)
    return rows, *grads.tensors


@_operator(
    "chunked_contract(Tensor ds, Tensor weight, Tensor query, Tensor key, Tensor? mask, float scale, float temperature, "
    f"{_NEEDS}) -> (Tensor, Tensor, Tensor)"
)
def _contract_op(meta: bool, *args: Any) -> tuple[Tensor, ...]:
    ds, weight, query, key, mask, scale, temperature, *needs = args
    student = Side(query, key, mask, scale)
    grads = Gradients(student, temperature, ds.dtype, ds.shape[1] < query.shape[1], *needs)
    if not meta:
        contract(ds, weight, student, grads)
    return grads.tensors


@_operator("chunked_logits(Tensor query, Tensor key, Tensor? mask, float scale, float temperature) -> Tensor")
def _logits_op(meta: bool, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    z = query.new_empty((*query.shape[:3], key.shape[2]), dtype=dtype)
    if not meta:
        all_logits(Side(query, key, mask, scale), temperature, z)
    return z


def _flatten(problem: Problem) -> tuple:
    s, t = problem.student, problem.teacher
    options = (s.scale, t.scale, problem.merge, problem.divergence, problem.temperature)
    return (s.query, s.key, _stored(s.mask), t.query, t.key, _stored(t.mask), t.probs, *options, s.lse, t.lse)


def _unflatten(flat: Any) -> Problem:
    sq, sk, sm, tq, tk, tm, probs, s_scale, t_scale, merge, divergence, temperature, s_lse, t_lse = flat
    student, teacher = Side(sq, sk, sm, s_scale, None, s_lse), Side(tq, tk, tm, t_scale, probs, t_lse)
    return Problem(student, teacher, merge, divergence, temperature)


def _new(problem: Problem, shape: tuple[int, ...]) -> Tensor:
    assert problem.student.query is not None
    return problem.student.query.new_empty(shape, dtype=problem.dtype)
