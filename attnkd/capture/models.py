"""What a timm Vision Transformer is: how it is built, what it takes, what its features are.

The one module of the package that imports timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

__all__ = [
    "TrainingTask",
    "check_final_norm",
    "check_images",
    "cls_features",
    "evaluating",
    "final_tokens",
    "image_size",
    "input_channels",
    "input_stats",
    "modes",
    "parameter_dtype",
    "resolve_model",
    "restore_modes",
    "unwrap_model",
]


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
    check_final_norm("model", model)
    fc_norm: Any = model.fc_norm
    return fc_norm(kept)


def check_final_norm(label: str, model: nn.Module) -> None:
    """Refuse a model whose final tokens are not normalised, such as RADIO or InternViT.

    Raises:
        ValueError: it has neither ``norm`` nor ``fc_norm``; names ``label``.
    """
    norms = (getattr(model, name, nn.Identity()) for name in ("norm", "fc_norm"))
    if all(isinstance(norm, nn.Identity) for norm in norms):
        raise ValueError(
            f"{label}: the features of {type(model).__name__} are not normalised (it has neither norm nor fc_norm), so its "
            "class token and patch tokens cannot be compared; pa_weight=0 and patch_weight=0 compare attention alone"
        )


def resolve_model(model: str | nn.Module, pretrained: bool, num_classes: int | None = 0) -> nn.Module:
    """A model as it is, or a new one by timm name; ``pretrained`` loads its published weights.

    num_classes: of the new model; 0 is no classifier, None the one that it was published with.
    """
    if isinstance(model, str):
        return timm.create_model(model, pretrained=pretrained, num_classes=num_classes)
    return model


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """The one image size (height, width) a model accepts, or None when it accepts several."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None or not getattr(embed, "strict_img_size", False) or getattr(model, "dynamic_img_size", False):
        return None
    return tuple(size)


def input_stats(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation with which a timm model's images were normalised in pretraining, if it says.

    Those of colour images say nothing about a model that was built for others.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    if mean is not None and len(mean) != (input_channels(model) or len(mean)):
        return None
    return (tuple(mean), tuple(std)) if mean is not None and std is not None else None


def input_channels(model: nn.Module) -> int | None:
    """The number of image channels a model takes, if it says."""
    channels = getattr(model, "in_chans", None)
    if channels is None:
        channels = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "in_channels", None)
    return channels if isinstance(channels, int) else None


def check_images(label: str, model: nn.Module, images: Tensor) -> None:
    """Refuse images that a model cannot take.

    Args:
        label: which model it is, for the message.
        images: [B, C, H, W].

    Raises:
        ValueError: another number of channels, or another size than the one it accepts.
    """
    channels, size = input_channels(model), image_size(model)
    if channels is not None and images.shape[1] != channels:
        raise ValueError(f"images: {label} ({type(model).__name__}) takes {channels} channels, got {images.shape[1]}")
    if size is not None and tuple(images.shape[-2:]) != size:
        raise ValueError(
            f"images: {label} ({type(model).__name__}) takes {size[0]}x{size[1]} pixels, got "
            f"{images.shape[-2]}x{images.shape[-1]}; resize them, or build it with dynamic_img_size=True"
        )


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model wants its images: that of its patch embedding, else of its first parameter."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    for module in (embed, model):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def modes(model: nn.Module) -> dict[str, bool]:
    """Training or evaluation mode of every module, for :func:`restore_modes`."""
    return {path: module.training for path, module in model.named_modules()}


def restore_modes(model: nn.Module, saved: dict[str, bool]) -> None:
    """Set every module's mode back; parts in evaluation mode inside a model in training mode stay so."""
    for path, module in model.named_modules():
        module.training = saved.get(path, module.training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode while open, every module in its own mode again after that."""
    saved = modes(model)
    try:
        yield model.eval()
    finally:
        restore_modes(model, saved)
