"""One captured attention call, and the views that a comparison takes of it: some heads, the class token's row, shared tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Heads = tuple[int, ...]


class AttentionCall(NamedTuple):
    """What one call of ``scaled_dot_product_attention`` put into its softmax: scale · query · keyᵀ + mask.

    An :class:`attnkd.AttentionTap` returns them. The last three fields say which tokens the rows and keys are; None where
    nobody knows.
    """

    query: Tensor
    """[B, H, M, D], with the autograd graph of the model."""
    key: Tensor
    """[B, H, N, D]."""
    mask: Tensor | None
    """Broadcasts to [B, H, M, N]; boolean (True = visible) or additive, such as a relative position bias."""
    scale: float
    num_prefix_tokens: int | None = None
    """Tokens before the first patch: class token, distillation token, registers."""
    has_cls: bool | None = None
    """Whether token 0 is a class token."""
    grid: tuple[int, int] | None = None
    """(height, width) in patches."""


def take_heads(call: AttentionCall, heads: Heads) -> AttentionCall:
    """The call of some heads: views where the heads follow each other, else copies of these heads."""
    if heads == tuple(range(call.query.shape[1])):
        return call
    neighbours = heads == tuple(range(heads[0], heads[0] + len(heads)))

    def take(tensor: Tensor, dim: int) -> Tensor:
        if neighbours:
            return tensor.narrow(dim, heads[0], len(heads))
        # Not tensor[:, [1, 4]]: the list would be copied to the GPU, and the host would wait for it.
        return torch.stack([tensor.select(dim, head) for head in heads], dim)

    mask = call.mask
    if mask is not None and mask.ndim >= 3 and mask.shape[-3] != 1:
        mask = take(mask, -3)
    return call._replace(query=take(call.query, 1), key=take(call.key, 1), mask=mask)


def shared_map(call: AttentionCall, num_prefix_tokens: int, keep_cls: bool) -> AttentionCall:
    """Rows and keys that two models share: patches, and the class token where both have one.

    Registers, distillation tokens and a class token of one model alone are left out before the softmax: what remains is
    the distribution conditional on the shared keys.
    """
    prefix, kept = num_prefix_tokens, int(keep_cls)
    if prefix == kept:
        return call

    def cut(tensor: Tensor, dim: int) -> Tensor:
        patches = tensor.narrow(dim, prefix, tensor.shape[dim] - prefix)
        return torch.cat([tensor.narrow(dim, 0, 1), patches], dim) if kept else patches

    mask = call.mask
    for dim in (-1, -2):
        if mask is not None and mask.ndim >= -dim and mask.shape[dim] != 1:
            mask = cut(mask, dim)
    return call._replace(
        query=cut(call.query, 2), key=cut(call.key, 2), mask=mask, num_prefix_tokens=kept, has_cls=keep_cls
    )


def shared_keys(key: Tensor, mask: Tensor | None, num_prefix_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Keep the keys that any two models share: class token and patches, without registers and distillation token.

    Leaving keys out before the softmax gives the distribution conditional on what is kept.

    Args:
        key: [B, H, N, D], token 0 the class token.
        mask: broadcasts to [B, H, M, N], or None.
        num_prefix_tokens: P ≥ 1 including the class token.

    Returns:
        key [B, H, N - P + 1, D] and the mask for it. With P = 1 they are the arguments themselves; otherwise copies.

    Raises:
        ValueError: no class token (P < 1) or fewer than P keys.
    """
    if not 1 <= num_prefix_tokens <= key.shape[2]:
        raise ValueError(f"num_prefix_tokens: expected 1 to {key.shape[2]} (all keys), got {num_prefix_tokens}")
    if num_prefix_tokens == 1:
        return key, mask
    if mask is not None and mask.shape[-1] != 1:
        mask = torch.cat([mask[..., :1], mask[..., num_prefix_tokens:]], -1)
    return torch.cat([key[:, :, :1], key[:, :, num_prefix_tokens:]], 2), mask


def cls_row(call: AttentionCall, num_prefix_tokens: int) -> AttentionCall:
    """The class token's query [B, H, 1, D] with the shared keys [B, H, 1 + patches, D] and their mask."""
    mask = call.mask
    if mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
        mask = mask[..., :1, :]
    key, mask = shared_keys(call.key, mask, num_prefix_tokens)
    return call._replace(query=call.query[:, :, :1], key=key, mask=mask, num_prefix_tokens=1)
