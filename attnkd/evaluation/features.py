"""Features of images: a model's normalised class tokens, once for every image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from attnkd.capture.adapters import adapter_for
from attnkd.capture.models import check_images, cls_features, evaluating, parameter_dtype
from attnkd.capture.tokens import token_layout
from attnkd.training.data import drawn
from attnkd.training.distributed import World


class Features(NamedTuple):
    """On the CPU."""

    values: Tensor
    """[n, D] float32."""
    labels: Tensor
    """[n] int64."""


class _Images(Dataset):
    def __init__(self, images: Any, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


def batches(images: Any, transform: Callable[[Any], Tensor], batch_size: int, workers: int) -> Iterable[list[Tensor]]:
    """Batches ([b, C, H, W], [b]) of all images, in order.

    Args:
        images: index → (image, label), with a length.
        transform: image → [C, H, W].
    """
    return _Batches(DataLoader(_Images(images, transform), batch_size, num_workers=workers))


class _Batches:
    """A loader whose workers' errors are one line."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return drawn(self.loader)


def extract_together(
    model: nn.Module,
    images: Any,
    transform: Callable[[Any], Tensor],
    world: World,
    *,
    batch_size: int,
    workers: int,
    seen: Callable[[Iterable[Any]], Iterable[Any]] = lambda data: data,
    **options: Any,
) -> Features:
    """The features of all images, on every process; each of them runs the model on its share. All must call it.

    Args:
        images: index → (image, label), with a length.
        transform: image → [C, H, W].
        world: the processes; the model runs on its device.
        seen: wraps this process's batches, for a progress bar.
        options: of :func:`extract`.
    """
    share = Subset(images, world.share(len(images)))
    own = extract(model, seen(batches(share, transform, batch_size, workers)), device=world.device, **options)
    return Features(*(world.together(part, len(images)) for part in own))


@torch.no_grad()
def extract(
    model: nn.Module,
    data: Iterable[Any],
    *,
    last_blocks: int = 1,
    device: torch.device | None = None,
    precision: torch.dtype | None = None,
) -> Features:
    """The normalised class token of every image; of several blocks, one after the other.

    Args:
        model: with a class token; is put into evaluation mode meanwhile.
        data: batches (images [b, C, H, W], labels [b]).
        last_blocks: how many of the last blocks give a token, as DINO's linear probe of ViT-S takes four.
        device: where to run; None is where the model is.
        precision: of autocast; None for none.

    Raises:
        ValueError: a model without class token, no images, or features that are not finite.
    """
    if not token_layout(model).has_cls:
        raise ValueError(f"model: its class token is evaluated, but {type(model).__name__} has none")
    device = device or next(model.parameters()).device
    values, labels = [], []
    with evaluating(model.to(device)), torch.autocast(device.type, precision, enabled=precision is not None):
        for images, targets in data:
            check_images("model", model, images)
            images = images.to(device, parameter_dtype(model))
            values.append(class_tokens(model, images, last_blocks).float().cpu())
            labels.append(targets.long().cpu())
    if not values:
        raise ValueError("data: no images")
    found = Features(torch.cat(values), torch.cat(labels))
    if not bool(found.values.isfinite().all()):
        raise ValueError("model: its features are not finite; check weights and precision")
    return found


def class_tokens(model: Any, images: Tensor, last_blocks: int = 1) -> Tensor:
    """The normalised class tokens [b, last_blocks · D] of the last blocks for images [b, C, H, W]; the last block's come last."""
    if last_blocks == 1:
        return cls_features(model, adapter_for(model).tokens(model, images))
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"last_blocks: expected 1 for {type(model).__name__}, got {last_blocks}; only timm models say how tokens of other "
            "blocks than the last are normalised (forward_intermediates)"
        )
    if last_blocks < 1 or last_blocks > len(model.blocks):
        raise ValueError(f"last_blocks: expected 1 to {len(model.blocks)}, got {last_blocks}")
    found = model.forward_intermediates(
        images, indices=last_blocks, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    return torch.cat([prefix[:, 0] for _, prefix in found], 1)
