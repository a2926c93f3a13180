"""How alike two models are: in their predictions, and block by block in their features (the questions of SSTA's Figures 2 and 5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkd.capture.models import check_images, evaluating, parameter_dtype


class Seen(NamedTuple):
    """What a model makes of n images. On the CPU."""

    blocks: list[Tensor]
    """Of every block, [n, D] float32: the mean of its tokens, prefix tokens and patches."""
    classes: Tensor | None
    """[n] predicted classes; None without a classifier."""
    labels: Tensor
    """[n]."""


class Overlap(NamedTuple):
    """Shares of the images in percent; the first four add up to 100."""

    both_right: float
    first_right: float
    """Only the first model is."""
    second_right: float
    both_wrong: float
    same: float
    """Both predict the same class."""


@torch.no_grad()
def look(model: Any, data: Iterable[Any], device: torch.device, precision: torch.dtype | None = None) -> Seen:
    """Run a timm Vision Transformer on all images.

    Args:
        data: batches (images [b, C, H, W], labels [b]).
        precision: of autocast; None for none.

    Raises:
        ValueError: a model that gives no features block by block, no images, or features that are not finite.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model: expected a timm Vision Transformer, got {type(model).__name__}")
    classifies, found = getattr(model, "num_classes", 0) > 0, []
    model = model.to(device)
    with evaluating(model), torch.autocast(device.type, precision, enabled=precision is not None):
        for images, labels in data:
            check_images("model", model, images)
            images = images.to(device, parameter_dtype(model))
            final, blocks = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")
            means = [torch.cat(_parts(block), 1).float().mean(1).cpu() for block in blocks]
            classes = model.forward_head(final).argmax(1).cpu() if classifies else labels
            found.append((torch.stack(means), classes, labels))
    if not found:
        raise ValueError("data: no images")
    means, classes, labels = (list(parts) for parts in zip(*found, strict=True))
    features = list(torch.cat(means, 1))
    if not all(bool(values.isfinite().all()) for values in features):
        raise ValueError("model: its features are not finite; check weights and precision")
    return Seen(features, torch.cat(classes) if classifies else None, torch.cat(labels).long())


def _parts(block: Any) -> tuple[Tensor, ...]:
    """Patches, and prefix tokens where there are some."""
    return block if isinstance(block, tuple) else (block,)


def overlap(first: Seen, second: Seen) -> Overlap:
    """How often two classifiers are right, and agree.

    Raises:
        ValueError: a model without a classifier.
    """
    if first.classes is None or second.classes is None:
        raise ValueError("model: expected two classifiers")
    a, b = first.classes == first.labels, second.classes == second.labels
    cases = (a & b, a & ~b, ~a & b, ~a & ~b, first.classes == second.classes)
    return Overlap(*(100 * case.float().mean().item() for case in cases))


def cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment, from 0 to 1 (Kornblith, Norouzi, Lee, Hinton, ICML 2019), computed in float64.

    Args:
        first, second: [n, D] and [n, E] features of the same images.

    Raises:
        ValueError: features that are the same for all images.
    """
    a, b = (values.double() - values.double().mean(0) for values in (first, second))
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    if scale == 0:
        raise ValueError("features: the same for all images, so nothing can be compared")
    return ((a.T @ b).square().sum() / scale).item()


def alignment(first: Seen, second: Seen) -> Tensor:
    """CKA of every block of the first model with every block of the second, [Lf, Ls]."""
    return torch.tensor([[cka(a, b) for b in second.blocks] for a in first.blocks])
