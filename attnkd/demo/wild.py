"""A wild folder from real images that come with scikit-learn: digits among pieces of two photographs, as Attention Probe meets it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnkd.demo.data import IMAGE_SIZE, Digits
from attnkd.methods import selection


def digit_pixels(digits: Digits, images: Tensor) -> Tensor:
    """Normalised digits [n, 1, H, W] as grey levels uint8 [n, H, W]; an empty pixel is 0."""
    span = digits.train_images.max() - digits.background
    return ((images - digits.background) / span * 255).round().clamp(0, 255).byte()[:, 0]


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


def select_arguments(
    wild: Path, teacher: Path, args: dict[str, Any], digits: Digits, num_select: int, out: Path
) -> list[str]:
    """The command line of `attnkd select` for a teacher that :func:`attnkd.demo.models.save` wrote."""
    span = float(digits.train_images.max() - digits.background)
    kwargs = [f"{name}={value}" for name, value in args.items() if name not in ("model_name", "num_classes")]
    return [
        "--data", str(wild), "--teacher", args["model_name"], "--checkpoint", str(teacher), "--num-classes", str(args["num_classes"]),
        "--model-kwargs", *kwargs, "--mean", str(-digits.background / span), "--std", str(1 / span), "--crop-pct", "1",
        "--num-select", str(num_select), "--out", str(out), "--workers", "0",
    ]  # fmt: skip


def select(arguments: Sequence[str]) -> list[str]:
    """Run `attnkd select` and return the names it listed."""
    parser = argparse.ArgumentParser()
    selection.add_arguments(parser)
    args = parser.parse_args(arguments)
    if selection.run(args):
        raise RuntimeError("attnkd select failed")
    return args.out.read_text().splitlines()


def load_images(wild: Path, names: Sequence[str], digits: Digits) -> Tensor:
    """Images of the folder [n, 1, H, W], normalised like the digits."""
    span = digits.train_images.max() - digits.background
    pixels = [torch.from_numpy(np.array(Image.open(wild / name).convert("L"))) for name in names]
    return torch.stack(pixels)[:, None].float() / 255 * span + digits.background
