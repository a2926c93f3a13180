"""Handwritten digits from scikit-learn: 1,797 real 8x8 images, upsampled to 16x16, with a fixed stratified split."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 16
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images are normalised with the training images' mean and standard deviation; ``background`` is an empty pixel."""

    train_images: Tensor
    """[n, 1, 16, 16] float32."""
    train_labels: Tensor
    """[n] int64."""
    test_images: Tensor
    test_labels: Tensor
    spare_images: Tensor
    """The images that are in neither part: there to choose heads or images with."""
    spare_labels: Tensor
    background: float
    stats: tuple[float, float]
    """Mean and standard deviation of the training images' pixels, which are 0 to 1 before normalisation."""

    def to(self, device: torch.device) -> Digits:
        return Digits._make(value.to(device) if isinstance(value, Tensor) else value for value in self)


def load_digits(train_size: int, test_size: int) -> Digits:
    """Load and split the digits; classes keep their shares in both parts.

    Raises:
        ValueError: sizes that leave a class out or exceed the 1,797 images.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    data = sklearn_digits()
    total = len(data.target)
    if min(train_size, test_size) < 10 or train_size + test_size > total:
        raise ValueError(
            f"train_size, test_size: expected at least 10 each, at most {total} in all, got {train_size}, {test_size}"
        )
    train, test = train_test_split(
        range(total), train_size=train_size, test_size=test_size, random_state=SPLIT_SEED, stratify=data.target
    )
    spare = sorted(set(range(total)) - {*train, *test})
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    labels = torch.from_numpy(data.target).long()
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    parts = [part[chosen] for chosen in (train, test, spare) for part in (images, labels)]
    return Digits._make([*parts, float(-mean / std), (float(mean), float(std))])


class RandomAffine:
    """A light random rotation, scaling, shear and shift of every image of a batch, in one grid_sample.

    The random numbers come from the given CPU generator alone: a batch is the same on every device and after a resume.

    Args:
        background: pixel value outside the image.
        degrees, scale, shear, shift: largest rotation in degrees, relative change of size, shear, and shift as a share
            of half the image.
    """

    def __init__(
        self, background: float, degrees: float = 7.5, scale: float = 0.075, shear: float = 0.1, shift: float = 0.075
    ) -> None:
        self.background = background
        self.limits = torch.tensor([math.radians(degrees), scale, shear, shift, shift])

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images [B, C, H, W] → the same shape."""
        draws = (2 * torch.rand(len(images), 5, generator=generator) - 1) * self.limits
        angle, scale, shear, shift_x, shift_y = draws.unbind(1)
        cos, sin = angle.cos() / (1 + scale), angle.sin() / (1 + scale)
        rows = [torch.stack([cos, shear - sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)]
        theta = torch.stack(rows, 1).to(images)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images - self.background, grid, align_corners=False) + self.background
