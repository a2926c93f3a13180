"""What the training tasks ask of a model: what it takes, what its features are. The answers come from its adapter.

The one module of the package that imports timm: its training task, and models by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from attnkd.capture.adapters import adapter_for, adapter_or_plain
from attnkd.capture.tokens import mean_token

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
    "num_classes",
    "parameter_dtype",
    "resolve_model",
    "restore_modes",
    "unwrap_model",
]


def cls_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """The normalised class token [B, D] of ``model.forward_features(images)`` [B, N, D]; see :func:`final_tokens`."""
    return final_tokens(model, tokens, patches=False)[:, 0]


def final_tokens(model: nn.Module, tokens: Tensor, patches: bool, padded: Tensor | None = None) -> Tensor:
    """The normalised class token [B, 1, D] of a model's final tokens [B, N, D], or it and the patches.

    Of a model without class token it is the mean of the normalised patches.

    Args:
        tokens: [B, P + patches, D], P prefix tokens.
        patches: return [B, 1 + patches, D] without registers and distillation token.
        padded: [B or 1, patches] boolean, patches of padding, which have no part in a mean.

    Raises:
        ValueError: not [B, N, D] tokens, none of them a patch, or the model has no norm for them.
    """
    if tokens.ndim != 3:
        raise ValueError(f"{type(model).__name__}: expected [B, N, D] tokens, got {tuple(tokens.shape)}")
    adapter = adapter_for(model)
    layout = adapter.layout(model)
    prefix = layout.num_prefix_tokens
    if tokens.shape[1] <= prefix:
        raise ValueError(
            f"{type(model).__name__}: expected patches after {prefix} prefix tokens, its final tokens are {tokens.shape[1]}"
        )
    if not layout.has_cls:
        found = adapter.normalised(model, tokens[:, prefix:])
        mean = mean_token(found, padded)
        return torch.cat([mean, found], 1) if patches else mean
    kept = tokens[:, :1]
    if patches:
        kept = tokens if prefix == 1 else torch.cat([kept, tokens[:, prefix:]], 1)
    return adapter.normalised(model, kept)


def check_final_norm(label: str, model: nn.Module) -> None:
    """Refuse a model whose final tokens are not normalised, such as RADIO or InternViT.

    Raises:
        ValueError: it has no norm for them; names ``label``.
    """
    adapter_for(model, label).check_features(label, model)


def resolve_model(model: str | nn.Module, pretrained: bool, num_classes: int | None = 0) -> nn.Module:
    """A model as it is, or a new one by timm name; ``pretrained`` loads its published weights.

    num_classes: of the new model; 0 is no classifier, None the one that it was published with.
    """
    if isinstance(model, str):
        return timm.create_model(model, pretrained=pretrained, num_classes=num_classes)
    return model


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """The one image size (height, width) a model accepts, or None when it accepts several."""
    return adapter_or_plain(model).image_size(model)


def input_stats(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation with which a model's images were normalised in pretraining, if it says."""
    return adapter_or_plain(model).input_stats(model)


def input_channels(model: nn.Module) -> int | None:
    """The number of image channels a model takes, if it says."""
    return adapter_or_plain(model).input_channels(model)


def num_classes(model: nn.Module) -> int | None:
    """The number of classes that a model's output scores; 0 without a classifier, None where unknown."""
    return adapter_or_plain(model).num_classes(model)


def check_images(label: str, model: nn.Module, images: Tensor) -> None:
    """Refuse images that a model cannot take.

    Args:
        label: which model it is, for the message.
        images: [B, C, H, W].

    Raises:
        ValueError: integers, another number of channels, or another size than the one it accepts.
    """
    if not images.is_floating_point():  # not normalised, and without a word they would be trained on as they are
        raise ValueError(
            f"images: expected floating point numbers, normalised for {label}, got {images.dtype}; divide pixels by 255 and normalise them "
            "by the model's mean and std, as its transform does"
        )
    channels, size = input_channels(model), image_size(model)
    if channels is not None and images.shape[1] != channels:
        raise ValueError(f"images: {label} ({type(model).__name__}) takes {channels} channels, got {images.shape[1]}")
    if size is not None and tuple(images.shape[-2:]) != size:
        raise ValueError(
            f"images: {label} ({type(model).__name__}) takes {size[0]}x{size[1]} pixels, got "
            f"{images.shape[-2]}x{images.shape[-1]}; resize them, or build it for that size (a plain Vision Transformer of timm takes any "
            "with dynamic_img_size=True)"
        )


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model wants its images: that of its patch embedding, else of its first parameter."""
    for module in (adapter_or_plain(model).embedding(model), model):
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
