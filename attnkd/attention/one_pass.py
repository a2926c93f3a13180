"""A student's attention and its divergence from a teacher's, in one call: what a distilled block computes.

Two engines, chosen by one rule (:func:`engine`):

* ``beside``: ``F.scaled_dot_product_attention`` computes the output with whatever kernel PyTorch has for it, and the operation of
  :mod:`attnkd.attention.api` reads queries and keys once more. Covers everything.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention import reference
from attnkd.attention.api import attention_divergence, refuse_loose
from attnkd.attention.call import AttentionCall
from attnkd.attention.checks import check_choice, check_number, check_tensor, kind
from attnkd.attention.dispatch import IMPLS
from attnkd.attention.problem import Side, make_side


@overload
def attention_with_divergence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher: AttentionCall | Tensor,
    *,
    rows: str = "all",
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
    rows: str = "all",
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
    rows: str = "all",
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
        rows: which rows are compared: 'all', or 'cls', the class token's row (token 0).
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
    check_choice("impl", impl, IMPLS)
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    student, value = _student(query, key, value, mask, scale)
    if isinstance(teacher, AttentionCall):
        targets: dict[str, Any] = {"teacher": teacher}
    elif isinstance(teacher, Tensor):
        targets = {"teacher": None, "teacher_probs": teacher}
    else:
        raise TypeError(
            "teacher: expected an AttentionCall (loose tensors: AttentionCall(query, key, mask, scale)) or probabilities "
            f"[B, H, M, N], got {kind(teacher)}"
        )
    loss = attention_divergence(
        student,
        targets.pop("teacher"),
        rows=rows,
        merge=merge,
        divergence=divergence,
        temperature=temperature,
        row_weight=row_weight,
        reduction=reduction,
        impl=impl,
        **targets,
    )
    return _output(student, value, dropout_p, impl), loss


def _student(
    query: Any, key: Any, value: Any, mask: Tensor | None, scale: float | None
) -> tuple[AttentionCall, Tensor]:
    """The student's call and its values, checked, and in autocast's dtype."""
    if isinstance(query, AttentionCall):
        refuse_loose({"key": key, "mask": mask, "scale": scale})
        call = query
    elif key is None and value is None:
        check_tensor(
            "query", query, 5, "[B, N, 3, H, D] (queries, keys and values packed) where key and value are None"
        )
        if query.shape[2] != 3:
            raise ValueError(f"query: expected [B, N, 3, H, D], packed, got shape {tuple(query.shape)}")
        query, key, value = query.permute(2, 0, 3, 1, 4).unbind(0)
        call = AttentionCall(query, key, mask, 1.0)
    else:
        call = AttentionCall(query, key, mask, 1.0)
    side = make_side("", call.query, call.key, call.scale if call is query else scale, call.mask)
    assert side.query is not None and side.key is not None
    check_tensor("value", value, 4, "[B, H, N, Dv]")
    if value.shape[:3] != side.key.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"value: expected [B, H, N, Dv] = {[*side.key.shape[:3], 'Dv']} like key {tuple(side.key.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if value.dtype != side.key.dtype or value.device != side.key.device:
        raise TypeError(
            f"value: expected {side.key.dtype} on {side.key.device} like key, got {value.dtype} on {value.device}"
        )
    return call._replace(scale=side.scale), value


def _output(call: AttentionCall, value: Tensor, dropout_p: float, impl: str) -> Tensor:
    """softmax(scale · q·k + mask) · v."""
    if impl != "reference":
        mask = call.mask
        if mask is not None and mask.ndim < 2:  # PyTorch wants both dimensions, [M, N]
            mask = mask[(None,) * (2 - mask.ndim)]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(call.query.dtype)  # PyTorch refuses others, or reads them as this one and says nothing
        return F.scaled_dot_product_attention(call.query, call.key, value, mask, dropout_p, scale=call.scale)
    attention = reference.attention_rows(_side(call), None, 1.0)
    return (F.dropout(attention, dropout_p) @ value.to(attention.dtype)).to(value.dtype)


def _side(call: AttentionCall) -> Side:
    return make_side("", call.query, call.key, call.scale, call.mask)
