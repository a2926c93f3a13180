"""What a timm Vision Transformer's tokens are: which one is the class token, which are patches, which are compared.

The one module of the package that imports timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

__all__ = [
    "TokenLayout",
    "TrainingTask",
    "cls_features",
    "final_tokens",
    "image_size",
    "input_stats",
    "patch_grid",
    "resolve_model",
    "token_layout",
    "unwrap_model",
]


@dataclass(frozen=True)
class TokenLayout:
    """The token sequence of a Vision Transformer is [class token?, other prefix tokens, patches in row-major order].

    num_prefix_tokens: class token, distillation token and registers together.
    has_cls: whether token 0 is a class token. Prefix tokens alone do not imply one: several models have only registers.
    feature_dim: width of the tokens.
    """

    num_prefix_tokens: int
    has_cls: bool
    feature_dim: int


def token_layout(model: nn.Module) -> TokenLayout:
    """Read a timm model's token layout off its attributes.

    Raises:
        TypeError: the model does not say how many prefix tokens it has or how wide they are.
    """
    prefix, width = getattr(model, "num_prefix_tokens", None), getattr(model, "num_features", None)
    if not isinstance(prefix, int) or not isinstance(width, int):
        raise TypeError(
            "model: expected a timm Vision Transformer with num_prefix_tokens and num_features, "
            f"got {type(model).__name__}"
        )
    owner = model if hasattr(model, "cls_token") else getattr(model, "embeds", None)  # NaFlexVit keeps it in embeds
    return TokenLayout(prefix, prefix > 0 and getattr(owner, "cls_token", None) is not None, width)


def patch_grid(model: nn.Module, size: Sequence[int], num_patches: int) -> tuple[int, int]:
    """(height, width) in patches of the tokens that images of ``size`` (height, width in pixels) become.

    Worked out from the input, because ``patch_embed.grid_size`` stays at its first value under ``dynamic_img_size``,
    and checked against the number of patch tokens that were really there.

    Raises:
        ValueError: the tokens do not form this grid (patch dropout, token pruning, a model that adds tokens).
        TypeError: the model cannot tell its grid.
    """
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    feat_size = getattr(embed, "dynamic_feat_size", None)
    if feat_size is None:
        raise TypeError(f"model: {type(model).__name__} has no patch_embed that tells its grid (dynamic_feat_size)")
    height, width = feat_size(size)
    if height * width != num_patches:
        raise ValueError(
            f"{type(model).__name__}: expected {height}·{width} = {height * width} patch tokens for images of "
            f"{size[0]}x{size[1]}, its attention has {num_patches}; patch dropout (patch_drop_rate) and token pruning "
            "are not supported"
        )
    return height, width


def cls_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """The normalised class token [B, D] of ``model.forward_features(images)`` [B, N, D]; see :func:`final_tokens`."""
    return final_tokens(model, tokens, patches=False)[:, 0]


def final_tokens(model: nn.Module, tokens: Tensor, patches: bool) -> Tensor:
    """The normalised class token [B, 1, D] of ``model.forward_features(images)`` [B, N, D], or it and the patches.

    timm normalises all tokens (``norm``) or, in models that pool patches, the pooled feature (``fc_norm``); whichever
    of the two the model has is applied once, token by token.

    Args:
        model: a timm Vision Transformer whose token 0 is a class token.
        tokens: [B, P + patches, D], P prefix tokens.
        patches: return [B, 1 + patches, D] without registers and distillation token.

    Raises:
        ValueError: not [B, N, D] tokens, or the model has neither norm.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{type(model).__name__}.forward_features: expected [B, N, D] tokens, got {got}")
    prefix: Any = getattr(model, "num_prefix_tokens", 1)
    kept = tokens[:, :1]
    if patches:
        kept = tokens if prefix == 1 else torch.cat([kept, tokens[:, prefix:]], 1)
    if not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
        return kept
    fc_norm = getattr(model, "fc_norm", nn.Identity())
    if isinstance(fc_norm, nn.Identity):
        raise ValueError(f"{type(model).__name__}: its features are not normalised, it has neither norm nor fc_norm")
    return fc_norm(kept)


def resolve_model(model: str | nn.Module, pretrained: bool) -> nn.Module:
    """A model as it is, or a new one by timm name without classifier; ``pretrained`` loads its published weights."""
    if isinstance(model, str):
        return timm.create_model(model, pretrained=pretrained, num_classes=0)
    return model


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """The one image size (height, width) a model accepts, or None when it accepts several."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None or not getattr(embed, "strict_img_size", True) or getattr(model, "dynamic_img_size", False):
        return None
    return tuple(size)


def input_stats(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation with which a timm model's images were normalised in pretraining, if it says."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    return (tuple(mean), tuple(std)) if mean is not None and std is not None else None
