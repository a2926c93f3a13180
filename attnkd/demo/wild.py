"""A wild folder from real images that come with scikit-learn: digits among pieces of two photographs, as Attention Probe meets it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from attnkd import files
from attnkd.capture.loading import image_config, image_transform
from attnkd.demo import models
from attnkd.demo.data import IMAGE_SIZE, Digits


def digit_pixels(digits: Digits, images: Tensor) -> Tensor:
    """Normalised digits [n, 1, H, W] as grey levels uint8 [n, H, W]; an empty pixel is 0."""
    span = digits.train_images.max() - digits.background
    return ((images - digits.background) / span * 255).round().clamp(0, 255).byte()[:, 0]


def save_pictures(folder: Path, digits: Digits) -> None:
    """The first test image of every digit as PNG, for `attnkd maps` to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = digits.test_labels.tolist()
    first = digits.test_images[[labels.index(digit) for digit in range(10)]]
    for digit, pixels in enumerate(digit_pixels(digits, first.cpu())):
        content = io.BytesIO()
        Image.fromarray(pixels.cpu().numpy()).save(content, "PNG")
        files.write_bytes(folder / f"digit {digit}.png", content.getvalue())


def make_wild_folder(folder: Path, digits: Digits, images: Tensor, num_photos: int, seed: int) -> None:
    """``images`` as digits/*.png, and squares of 16 to 128 pixels out of two photographs as photos/*.png.

    Args:
        images: digits [n, 1, 16, 16], normalised like those of ``digits``.
    """
    from sklearn.datasets import load_sample_images

    for name in ("digits", "photos"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(digit_pixels(digits, images)):
        Image.fromarray(pixels.numpy()).save(folder / "digits" / f"{index}.png")
    photos = [Image.fromarray(array).convert("L") for array in load_sample_images().images]
    generator = np.random.default_rng(seed)
    for index in range(num_photos):
        photo = photos[index % len(photos)]
        side = int(generator.integers(IMAGE_SIZE, 129))
        x, y = int(generator.integers(photo.width - side)), int(generator.integers(photo.height - side))
        square = photo.crop((x, y, x + side, y + side)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        square.save(folder / "photos" / f"{index}.png")


def transform(digits: Digits) -> Callable[[Image.Image], Tensor]:
    """Grey image of the folder → [1, H, W], normalised like the digits."""
    model = timm.create_model(**models.COARSE_TEACHER)
    return image_transform(image_config(model, mean=digits.stats[:1], std=digits.stats[1:], crop_pct=1.0))


def load_images(wild: Path, names: Sequence[str], digits: Digits) -> Tensor:
    """Images of the folder [n, 1, H, W], normalised like the digits."""
    span = digits.train_images.max() - digits.background
    pixels = [torch.from_numpy(np.array(Image.open(wild / name).convert("L"))) for name in names]
    return torch.stack(pixels)[:, None].float() / 255 * span + digits.background
