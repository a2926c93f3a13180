"""Real images that come with scikit-learn, as folders that every command takes: handwritten digits by class, and a wild folder of
digits among pieces of two photographs, as Attention Probe meets it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from attnkd import files
from attnkd.training.sources import DIGITS, Source, open_source

IMAGE_SIZE = 16
SPLIT_SEED = 0


def digits_folder(parent: Path, train: int, test: int, labelled: int) -> Path:
    """The 1,797 digits as split/class/number.png: 'train', 'validation', 'labelled' (some of 'train'), and the others as 'spare'.

    Args:
        train, test, labelled: images of the splits; classes have their shares in each of the first two.

    Raises:
        ValueError: sizes that leave a class out, or more images than there are.
    """
    from sklearn.model_selection import train_test_split

    images = [pair for split in ("train", "validation") for pair in open_source(DIGITS, split, mode="L").images]
    if min(train, test) < 10 or train + test > len(images) or not 0 <= labelled <= train:
        raise ValueError(
            f"train_size, test_size: expected at least 10 each, at most {len(images)} in all, got {train}, {test} "
            f"(labelled, at most train_size: {labelled})"
        )
    chosen = train_test_split(
        range(len(images)), train_size=train, test_size=test, random_state=SPLIT_SEED, stratify=[y for _, y in images]
    )
    if labelled and len({images[index][1] for index in chosen[0][:labelled]}) < 10:
        raise ValueError(f"labelled: expected images of every class among the first {labelled}")
    spare = sorted(set(range(len(images))) - {*chosen[0], *chosen[1]})
    splits = {"train": chosen[0], "validation": chosen[1], "labelled": chosen[0][:labelled], "spare": spare}
    folder = parent / f"digits-{train}-{test}-{labelled}"
    with _complete(folder) as new:
        if new is not None:
            for split, indices in splits.items():
                for index in indices:
                    image, label = images[index]
                    _save(image, new / split / str(label) / f"{index:04}.png")
    return folder


def wild_folder(folder: Path, digits: Path, num_digits: int, num_photos: int, seed: int) -> Path:
    """Spare digits as digits/*.png, and squares of 16 to 128 pixels out of two photographs as photos/*.png.

    Raises:
        ValueError: fewer spare digits than asked for.
    """
    from sklearn.datasets import load_sample_images

    spare = sorted((digits / "spare").rglob("*.png"), key=lambda path: path.name)[:num_digits]
    if len(spare) < num_digits:
        raise ValueError(f"train_size, test_size: expected to leave {num_digits} digits over, leave {len(spare)}")
    with _complete(folder) as new:
        if new is not None:
            (new / "digits").mkdir(parents=True)
            for path in spare:
                shutil.copy(path, new / "digits")
            photos = [Image.fromarray(array).convert("L") for array in load_sample_images().images]
            generator = np.random.default_rng(seed)
            for index in range(num_photos):
                photo = photos[index % len(photos)]
                side = int(generator.integers(IMAGE_SIZE, 129))
                x, y = int(generator.integers(photo.width - side)), int(generator.integers(photo.height - side))
                square = photo.crop((x, y, x + side, y + side))
                square = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
                _save(square, new / "photos" / f"{index:04}.png")
    return folder


def open_digits(folder: Path, split: str) -> Source:
    """Images and labels of a split of :func:`digits_folder`."""
    return open_source(str(folder), split, mode="L")


def first_of_each(folder: Path) -> list[Path]:
    """The first test image of every digit."""
    return [min((folder / "validation" / str(digit)).glob("*.png")) for digit in range(10)]


def save_pictures(folder: Path, digits: Path) -> None:
    """These as 'digit 0.png' to 'digit 9.png', for `attnkd maps` to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit, path in enumerate(first_of_each(digits)):
        files.write_bytes(folder / f"digit {digit}.png", path.read_bytes())


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@contextmanager
def _complete(folder: Path) -> Iterator[Path | None]:
    """A new folder that gets its name when the block ends, so that one of that name is complete; None if there is one."""
    if folder.exists():
        yield None
        return
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with files.named(folder):
        yield new
        os.replace(new, folder)
