"""``torch.nn.MultiheadAttention`` with its attention in sight: the same projections around a call that can be watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_head_attention(
    attend: Callable[..., Tensor],
    path: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` restated, with the fused attention kept.

    Args:
        attend: gets query, key [B, H, N, D], value, mask (True = visible, or additive) and dropout; returns [B, H, M, D].
        path: of the attention, for messages.
        query, key, value: [N, B, C]; the others as in ``F.multi_head_attention_forward``, whose masks are True where hidden.

    Returns:
        The output [M, B, C], and with ``need_weights`` the weights [B, M, N] ([B, H, M, N] without ``average_attn_weights``).

    Raises:
        NotImplementedError: an option whose map is not a softmax over the tokens.
    """
    refused = {
        "need_weights=True with dropout": need_weights and training and dropout_p > 0,
        "add_bias_kv": bias_k is not None or bias_v is not None,
        "add_zero_attn": add_zero_attn,
        "kdim or vdim": use_separate_proj_weight,
        "static keys": static_k is not None or static_v is not None,
        "is_causal": is_causal,
        "input without a batch": query.ndim != 3,
    }
    for name, on in refused.items():
        if on:
            raise NotImplementedError(
                f"{path} (MultiheadAttention): {name} is not supported; tap it where it runs without"
            )
    rows, batch, width = query.shape
    assert in_proj_weight is not None
    weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    if query is key and key is value:
        projected = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        projected = tuple(
            F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
    q, k, v = (x.unflatten(-1, (num_heads, width // num_heads)).permute(1, 2, 0, 3) for x in projected)
    mask = _visible(attn_mask, key_padding_mask, batch, num_heads, q.dtype)
    output = attend(q, k, v, mask, dropout_p if training else 0.0)
    output = F.linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    return output, _weights(q, k, mask, average_attn_weights) if need_weights else None


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, average: bool) -> Tensor:
    """The map that the caller asked for; a fused attention has none to give."""
    logits = query.shape[-1] ** -0.5 * query @ key.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    return weights.mean(1) if average else weights


def _visible(
    mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask as ``F.scaled_dot_product_attention`` takes it: boolean where both are, else additive.

    mask: [M, N] or [B·H, M, N]; padding: [B, N]; both boolean (True = hidden) or additive.
    """
    found: list[Any] = []
    if mask is not None:
        found.append(mask.unflatten(0, (batch, num_heads)) if mask.ndim == 3 else mask)
    if padding is not None:
        found.append(padding[:, None, None])
    if not found:
        return None
    if all(one.dtype == torch.bool for one in found):
        return ~found[0] if len(found) == 1 else ~(found[0] | found[1])
    additive = [
        torch.zeros(one.shape, dtype=dtype, device=one.device).masked_fill(one, -math.inf)
        if one.dtype == torch.bool
        else one
        for one in found
    ]
    return additive[0] if len(additive) == 1 else additive[0] + additive[1]
