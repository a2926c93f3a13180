"""``F.scaled_dot_product_attention`` that also returns the normalisers that it computes anyway.

It takes the same kernel as PyTorch would, so output and gradients have the same bits. Where it is not sure that it can, or the kernel
leaves no normalisers, it calls PyTorch's function and returns None beside the output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from attnkd.attention.problem import HIDDEN_BELOW
from attnkd.operators import composite

_ATEN = torch.ops.aten


def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """The output, and log Σ_j exp(scale · q·k_j + mask_j) of every query.

    Args:
        query: [B, H, M, D].
        key: [B, H, N, D].
        value: [B, H, N, Dv].
        mask: broadcasts to [B, H, M, N]; boolean (True = visible) or additive.
        dropout_p: of the probabilities, after the softmax.
        scale: None means D**-0.5.

    Returns:
        [B, H, M, Dv], differentiable; and [B, H, M] float32 without gradient, −inf where no key is visible, or None.
    """
    call = _compiled if torch.compiler.is_compiling() else _attention
    output, lse = call(query, key, value, mask, dropout_p, scale)
    return output, lse if lse.numel() else None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The same; [0] in place of None."""
    backend, given = _backend(query, key, value, mask, dropout_p, scale), (query, key, value)
    if backend == SDPBackend.FLASH_ATTENTION and query.device.type == "cpu":
        added = mask
        if mask is not None and mask.dtype == torch.bool:
            added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            *given, dropout_p, False, attn_mask=added, scale=scale
        )
    elif backend == SDPBackend.FLASH_ATTENTION:
        output, lse, *_ = _ATEN._scaled_dot_product_flash_attention(*given, dropout_p, False, False, scale=scale)
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        output, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
            *given, None, True, dropout_p, False, scale=scale
        )
    elif backend == SDPBackend.CUDNN_ATTENTION:
        output, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
            *given, None, True, dropout_p, False, False, scale=scale
        )
    else:
        output = F.scaled_dot_product_attention(*given, mask, dropout_p, scale=scale)
        lse = query.new_empty(0, dtype=torch.float32)
    if lse.numel() and mask is not None:  # the kernels write 0 for a row that sees no key
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN_BELOW
        lse = torch.where(seen.any(-1), lse, float("-inf"))
    if lse.numel():  # some kernels round the number of queries up, some keep a dimension of 1
        lse = lse.detach().reshape(*query.shape[:2], -1)[:, :, : query.shape[2]]
    return output, lse


_compiled = composite(
    "attention_and_lse(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout_p, float? scale) -> (Tensor, Tensor)",
    _attention,
)
"""Under torch.compile PyTorch tells the kernel of GPU tensors only: on a CPU there are no normalisers then."""


def _backend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> SDPBackend:
    """Which of PyTorch's kernels runs, of those that this module can call as PyTorch does; else MATH.

    On a GPU that is half precision without a mask: PyTorch pads masks and odd head dims, and single precision may be TF32, whose
    normalisers are not those of the exact products.
    """
    plain = query.dtype == key.dtype == value.dtype and (mask is None or mask.dtype in (torch.bool, query.dtype))
    if query.device.type == "cuda":
        plain = (
            plain and mask is None and query.dtype != torch.float32 and query.shape[3] % 8 == value.shape[3] % 8 == 0
        )
    elif query.device.type != "cpu":
        plain = False
    if not plain or query.numel() == 0 or key.numel() == 0:
        return SDPBackend.MATH
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask, dropout_p, False, scale=scale))
