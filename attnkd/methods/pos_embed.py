"""Position embeddings of a student that starts from scratch: 2-D sines and cosines, fixed or to learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def sincos_pos_embed_(model: nn.Module, learnable: bool = False) -> nn.Module:
    """Set a timm Vision Transformer's position embeddings to 2-D sines and cosines, in place.

    Of an embedding's D entries the first half are sines and the second cosines, and of each half the first half stands for
    the row y and the second for the column x: sin(y·ω), sin(x·ω), cos(y·ω), cos(x·ω) with D/4 frequencies
    ω_k = 10000^(−4k/D), y and x counted in patches.

    Fixed embeddings (as in MAE, whose training recipe AttnDistill uses) stay in ``state_dict()`` but take no gradient, so
    timm's optimizer factory leaves them out. The entries of class token, registers and distillation token, where the model
    has any, are 0 then: those tokens learn their own values. Learnable ones only start from the sines and cosines, and the
    entries of other tokens stay as they are. timm's own default is learnable, from small random values.

    Args:
        model: with a parameter ``pos_embed`` [1, P + H·W, D] for its patch grid (H, W), where P is its number of prefix
            tokens, or 0 (``no_embed_class``).
        learnable: go on learning them.

    Returns:
        ``model``.

    Raises:
        ValueError: no absolute position embeddings of that shape (rotary or relative positions only, several stages), or D
            not divisible by 4.

    Example::

        student = sincos_pos_embed_(timm.create_model("vit_small_patch16_224", num_classes=0))
    """
    from timm.layers import build_sincos2d_pos_embed

    embed = getattr(model, "pos_embed", None)
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    tokens: Any = getattr(model, "num_prefix_tokens", 0)
    if not isinstance(embed, nn.Parameter) or grid is None:
        raise ValueError(f"model: expected position embeddings for a patch grid, {type(model).__name__} has none")
    patches = grid[0] * grid[1]
    if embed.ndim != 3 or embed.shape[:2] not in {(1, patches), (1, tokens + patches)}:
        raise ValueError(
            f"model: expected pos_embed [1, {patches} or {tokens + patches}, D] for {tokens} prefix tokens and "
            f"{grid[0]}·{grid[1]} patches, {type(model).__name__} has {tuple(embed.shape)}"
        )
    if embed.shape[2] % 4:
        raise ValueError(f"model: expected a width divisible by 4, got {embed.shape[2]}")
    with torch.no_grad():
        if not learnable:
            embed.zero_()
        embed[0, -patches:] = build_sincos2d_pos_embed(list(grid), dim=embed.shape[2]).to(embed)
    embed.requires_grad_(learnable)
    return model
