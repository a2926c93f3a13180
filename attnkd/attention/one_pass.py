"""A student's attention and its divergence from a teacher's, in one call: what a distilled block computes.

Two engines compute it:

* **one sweep**: the kernels of :mod:`attnkd_kernels.attention` are the attention, and yield the divergence from the same tiles.
* **beside**: ``F.scaled_dot_product_attention`` computes the output with the kernel that PyTorch has for it, and the implementation of
  :func:`attnkd.attention_divergence` reads queries and keys once more.

The rule (:func:`why_beside` names the reason): one sweep where ``impl`` is or becomes 'triton', the rows of all tokens are compared
over all keys (more than 16 rows), heads are not merged, the temperature is 1, queries, keys and values are float16 or bfloat16 of up to 96 channels,
nothing is dropped, and masks are
boolean and the same for all queries (padding), or absent. Else beside: a class token's row costs less than the sweep over it, and the rest is not what
the attention computes. 'chunked' and 'reference' give the same numbers, as everywhere; 'reference' materialises the attention.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention import dispatch, reference
from attnkd.attention.api import all_in_autocast, choose, divergence_of, problem_of_calls, refuse_loose
from attnkd.attention.call import AttentionCall
from attnkd.attention.checks import check_choice, check_number, check_tensor, kind
from attnkd.attention.problem import Problem, make_side
from attnkd.attention.reductions import check_reduction, check_weight, reduced

if dispatch.TRITON_INSTALLED:
    # Not where it is used: torch.compile must find this module imported.
    from attnkd.attention import fused_attention, fused_rows


@overload
def attention_with_divergence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher: AttentionCall | Tensor,
    *,
    rows: str | int = "all",
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_with_divergence(
    query: Tensor | AttentionCall,
    *,
    value: Tensor | None = None,
    teacher: AttentionCall | Tensor,
    rows: str | int = "all",
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention_with_divergence(
    query: Tensor | AttentionCall,
    key: Tensor | None = None,
    value: Tensor | None = None,
    teacher: AttentionCall | Tensor | None = None,
    *,
    rows: str | int = "all",
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The output of an attention, and the divergence between this attention and a teacher's.

    Three forms::

        attention_with_divergence(query, key, value, teacher, ...)
        attention_with_divergence(qkv, teacher=teacher, ...)                    # packed, as a linear layer puts it out
        attention_with_divergence(student_call, value=value, teacher=teacher)   # scale, mask and tokens are in the call

    The output is softmax(scale · q·k + mask) · v, as ``F.scaled_dot_product_attention`` computes it. The divergence is what
    :func:`attnkd.attention_divergence` returns for the same queries and keys: its temperature and the tokens that it leaves out
    do not change the output. Gradients are the sums of both. The teacher gets none.

    Args:
        query: [B, H, M, D], any strides. Or queries, keys and values in one tensor [B, N, 3, H, D]; or the student's
            :class:`attnkd.AttentionCall`, whose mask and scale then hold.
        key: [B, H, N, D].
        value: [B, H, N, Dv].
        teacher: an :class:`attnkd.AttentionCall`, as captured or made of loose tensors:
            ``AttentionCall(query, key, mask, scale)``. Or finished probabilities, as ``teacher_probs`` of
            :func:`attnkd.attention_divergence`.
        rows: which rows are compared: 'all'; 'cls', the class token's row (token 0); or a number n, the first n tokens' rows.
        merge, divergence, temperature, row_weight, reduction: of the divergence, see :func:`attnkd.attention_divergence`.
        mask: of the student; broadcasts to [B, H, M, N], boolean (True = visible) or additive.
        scale: of the student; None means D**-0.5.
        dropout_p: probability with which an attention weight is dropped before it meets the values. The divergence is that of
            the attention before dropout.
        impl: 'auto', 'triton', 'chunked' or 'reference', see :mod:`attnkd.attention.one_pass`.

    Returns:
        The output [B, H, M, Dv] in the dtype of the values, and the divergence as :func:`attnkd.attention_divergence` returns it.

    Raises:
        TypeError, ValueError: as :func:`attnkd.attention_divergence`; a value that does not fit the keys.
        NotImplementedError: an explicit ``impl`` that cannot be honoured.
    """
    check_choice("impl", impl, dispatch.IMPLS)
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    student, inputs = _student(query, key, value, mask, scale)
    return distilled(
        student,
        inputs,
        teacher,
        rows=rows,
        merge=merge,
        divergence=divergence,
        temperature=temperature,
        row_weight=row_weight,
        reduction=reduction,
        dropout_p=dropout_p,
        impl=impl,
    )


def distilled(
    student: AttentionCall,
    inputs: list[Tensor],
    teacher: Any,
    *,
    rows: str | int = "all",
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    dropout_p: float = 0.0,
    impl: str = "auto",
    pack: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_with_divergence` of a student's call and its ``inputs``: [query, key, value], or [qkv], packed.

    ``pack``: the gradient may go to the tensor that the inputs are slices of (:func:`packed`), and past the slices.
    """
    if not isinstance(teacher, (AttentionCall, Tensor)):
        raise TypeError(
            "teacher: expected an AttentionCall (loose tensors: AttentionCall(query, key, mask, scale)) or probabilities "
            f"[B, H, M, N], got {kind(teacher)}"
        )
    probs = None if isinstance(teacher, AttentionCall) else teacher
    problem = problem_of_calls(student, teacher if probs is None else None, rows, probs, merge, divergence, temperature)
    implementation = choose(impl, problem)
    weight = check_weight(row_weight, problem)
    check_reduction(problem, reduction)
    if implementation == "triton" and why_beside(problem, student, inputs, dropout_p) is None:
        qkv = packed(*inputs) if pack else None
        output, losses = fused_attention.attend(inputs if qkv is None else [qkv], problem)
        return output, reduced(losses, problem, weight, reduction)
    if implementation == "triton" and rows == "cls":
        found = fused_rows.beside(student.query, student.key, problem)
        if found is not None:
            query, key, losses = found
            call = student._replace(query=query, key=key)
            return _output(call, _value(inputs), dropout_p, implementation), reduced(losses, problem, weight, reduction)
    loss = divergence_of(problem, implementation, row_weight, reduction)
    return _output(student, _value(inputs), dropout_p, implementation), loss


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The tensor [B, N, 3, H, D] of which query, key and value [B, H, N, D] are the slices, as in timm's attention; None where they
    are something else. Its gradient is one tensor, where those of three slices would be copied into one."""
    slices = (query, key, value)
    base = query._base
    if torch.compiler.is_compiling() or base is None or not base.is_contiguous() or base.numel() != 3 * query.numel():
        return None
    for one in slices:
        other = one._base is not base or one.requires_grad != base.requires_grad or one.shape != query.shape
        if other or one._backward_hooks or one.retains_grad:
            return None
    batch, heads, tokens, dim = query.shape
    qkv = base.view(batch, tokens, 3, heads, dim)
    same = all(
        mine.storage_offset() == one.storage_offset() and mine.stride() == one.stride()
        for mine, one in zip(qkv.permute(2, 0, 3, 1, 4).unbind(0), slices, strict=True)
    )
    return qkv if same else None


def why_beside(problem: Problem, student: AttentionCall, inputs: list[Tensor], dropout_p: float) -> str | None:
    """The reason for which the divergence is not computed in the attention's own sweep, or None."""
    if problem.student.query is not student.query or problem.student.key is not student.key:
        return "only some tokens are compared"
    if problem.rows_shape[2] <= dispatch.MAX_ROWS:
        return f"up to {dispatch.MAX_ROWS} rows are compared"
    if dropout_p:
        return "attention weights are dropped"
    return fused_attention.why_not(problem, _value(inputs))


def _student(
    query: Any, key: Any, value: Any, mask: Tensor | None, scale: float | None
) -> tuple[AttentionCall, list[Tensor]]:
    """The student's call, and its [query, key, value] or [qkv], packed; checked, and in autocast's dtype."""
    tokens = AttentionCall(query, key, mask, 1.0)
    if isinstance(query, AttentionCall):
        refuse_loose({"key": key, "mask": mask, "scale": scale})
        tokens = query
        query, key, mask, scale = query.query, query.key, query.mask, query.scale
    if key is None and value is None:
        check_tensor(
            "query", query, 5, "[B, N, 3, H, D] (queries, keys and values packed) where key and value are None"
        )
        if query.shape[2] != 3:
            raise ValueError(f"query: expected [B, N, 3, H, D], packed, got shape {tuple(query.shape)}")
        inputs = list(all_in_autocast(query))
        query, key, value = _unpacked(inputs)
    else:
        check_tensor("value", value, 4, "[B, H, N, Dv]")
        inputs = list(all_in_autocast(query, key, value))
        query, key, value = inputs
    side = make_side("", query, key, scale, mask)
    if value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"value: expected [B, H, N, Dv] = {[*key.shape[:3], 'Dv']} like key {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype != key.dtype or value.device != key.device:
        raise TypeError(f"value: expected {key.dtype} on {key.device} like key, got {value.dtype} on {value.device}")
    return tokens._replace(query=query, key=key, mask=mask, scale=side.scale), inputs


def _unpacked(inputs: list[Tensor]) -> list[Tensor]:
    """Query, key and value [B, H, N, D]: views where they are packed."""
    return list(inputs[0].permute(2, 0, 3, 1, 4).unbind(0)) if len(inputs) == 1 else inputs


def _value(inputs: list[Tensor]) -> Tensor:
    return _unpacked(inputs)[2]


def _output(call: AttentionCall, value: Tensor, dropout_p: float, implementation: str) -> Tensor:
    """softmax(scale · q·k + mask) · v."""
    mask = call.mask
    if implementation != "reference":
        if mask is not None and mask.ndim < 2:  # PyTorch wants both dimensions, [M, N]
            mask = mask[(None,) * (2 - mask.ndim)]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(call.query.dtype)  # PyTorch refuses others, or reads them as this one and says nothing
        return F.scaled_dot_product_attention(call.query, call.key, value, mask, dropout_p, scale=call.scale)
    attention = reference.attention_rows(make_side("", call.query, call.key, call.scale, mask), None, 1.0)
    return (F.dropout(attention, dropout_p) @ value.to(attention.dtype)).to(value.dtype)
