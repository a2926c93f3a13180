"""Attention Probe end to end on real images that come with scikit-learn: `python -m attnkd.demo.wild`.

A teacher learns the handwritten digits. Then it must find digits that it has never seen in a folder where most images are pieces
of two photographs, and a student learns from the teacher on what it found: without labels, and without the teacher's data.
The same with images chosen at random shows what the choice is worth.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.task import ClassificationTask
from torch import Tensor, nn

from attnkd.demo import models
from attnkd.demo.data import IMAGE_SIZE, Digits, RandomAffine, load_digits
from attnkd.demo.training import Recipe, train
from attnkd.methods import selection
from attnkd.methods.attention_probe import AttentionProbe

TEACHER = {**models.TEACHER, "patch_size": 4}
STUDENT = {**models.STUDENT, "num_classes": 10}
CHOICES = {
    "random choice": None,
    "output alone (V_n)": ["--attn-weight", "0"],
    "attention alone (V_a)": ["--output-weight", "0"],
    "attention probe (V)": [],
}


def digit_pixels(digits: Digits, images: Tensor) -> Tensor:
    """Normalised digits [n, 1, H, W] as grey levels uint8 [n, H, W]; an empty pixel is 0."""
    span = digits.train_images.max() - digits.background
    return ((images - digits.background) / span * 255).round().clamp(0, 255).byte()[:, 0]


def make_wild_folder(folder: Path, digits: Digits, num_photos: int, seed: int) -> None:
    """The test digits as digits/*.png, and squares of 16 to 128 pixels out of two photographs as photos/*.png."""
    from sklearn.datasets import load_sample_images

    for name in ("digits", "photos"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(digit_pixels(digits, digits.test_images)):
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


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1]; the model is left in evaluation mode."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Train, select, distil, print and write summary.json; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnkd.demo.wild", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/wild"), metavar="DIR", help="default: runs/wild")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the photographs' pieces, weights and data order (default: 0)"
    )
    parser.add_argument("--teacher-epochs", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--epochs", type=int, default=60, metavar="N", help="of each student (default: 60)")
    parser.add_argument(
        "--photos", type=int, default=700, metavar="N", help="pieces of photographs beside 300 digits (default: 700)"
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits(1197, 600)
    held_out = digits.test_images[300:], digits.test_labels[300:]
    digits = digits._replace(test_images=digits.test_images[:300], test_labels=digits.test_labels[:300])

    def fit(method: nn.Module, images: Tensor, labels: Tensor, epochs: int, name: str) -> None:
        augment = RandomAffine(digits.background)
        fingerprint = f"{name} {vars(args)}"
        state = args.output_dir / f"{name}.pt"
        train(
            method,
            images,
            labels,
            Recipe(epochs),
            seed=args.seed,
            state_path=state,
            fingerprint=fingerprint,
            augment=augment,
        )

    teacher = models.create(TEACHER, args.seed)
    fit(ClassificationTask(teacher), digits.train_images, digits.train_labels, args.teacher_epochs, "teacher")
    found: dict[str, Any] = {"teacher_accuracy": accuracy(teacher, *held_out)}
    models.save(teacher, TEACHER, args.output_dir / "teacher.safetensors")
    wild = args.output_dir / "images"
    make_wild_folder(wild, digits, args.photos, args.seed)
    arguments = select_arguments(
        wild, args.output_dir / "teacher.safetensors", TEACHER, digits, 300, args.output_dir / "selected.txt"
    )
    shutil.rmtree(args.output_dir / "selected.txt.work", ignore_errors=True)  # another teacher's scores

    for number, (choice, options) in enumerate(CHOICES.items()):
        if options is None:
            everything = sorted(str(path.relative_to(wild)) for path in wild.rglob("*.png"))
            names = random.Random(args.seed).sample(everything, 300)
        else:
            names = select([*arguments, *options])
        student = models.create(STUDENT, args.seed + 100)
        task = AttentionProbe(student, teacher, min(found["teacher_accuracy"], 0.99), verbose=False)
        labels = torch.zeros(len(names), dtype=torch.long)  # not used: the teacher says what it sees
        fit(task, load_images(wild, names, digits), labels, args.epochs, f"student{number}")
        task.close()
        found[choice] = {
            "digits": sum(name.startswith("digits/") for name in names),
            "accuracy": accuracy(student, *held_out),
        }
        print(
            f"{choice:<24} {found[choice]['digits']:>4} of 300 are digits   student {100 * found[choice]['accuracy']:.1f} %"
        )
    print(f"{'teacher':<47}{100 * found['teacher_accuracy']:.1f} %")
    (args.output_dir / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
