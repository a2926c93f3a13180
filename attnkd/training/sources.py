"""Data sets by the names that users give: folders, timm's prefixes, and the digits that come with scikit-learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnkd.methods.image_stream import open_image, read_lines

DIGITS = "digits"
DIGITS_STATS = {"mean": (0.31,), "std": (0.348,)}
STREAMS = ("hfids", "tfds")
TRAIN, VALIDATION = ("train", "training"), ("validation", "val", "valid", "eval", "evaluation")
"""Names for the same split, as timm finds the folder of one."""


class Source(NamedTuple):
    """A data set: index → (PIL image, label)."""

    images: Any
    num_classes: int | None
    """None where it cannot be told."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    labelled: bool = True


def open_source(name: str, split: str, *, root: str | None = None, download: bool = False, mode: str = "RGB") -> Source:
    """The images of one split.

    Args:
        name: 'digits', a folder of images by class, a list of images without labels as `attnkd select` writes it, or a name
            that ``timm.data.create_dataset`` knows, such as 'torch/cifar100' or 'hfds/imagenet-1k'.
        split: 'train', 'validation' or another that the data set has; a list has none, and a folder without any is its 'train'.
        root: where the data set is kept, or the folder that a list's names begin in; a folder needs none.
        download: fetch a torch/ data set.
        mode: Pillow mode of the images, 'RGB' or 'L'.

    Raises:
        ValueError: no such data set or split.
        NotImplementedError: a data set that can only be read from its beginning.
    """
    if name == DIGITS:
        digits = _digits(split)
        return digits if mode == "L" else digits._replace(images=_Converted(digits.images, mode))
    prefix = name.partition("/")[0].lower()
    if prefix in (*STREAMS, "wds"):
        raise NotImplementedError(
            f"data: {name} is a stream, and a run could not continue in the middle of one; use a folder, torch/ or hfds/"
        )
    if Path(name).is_file():
        return _listed(Path(name), root, mode)
    if prefix not in ("torch", "hfds"):
        if not Path(name).is_dir():
            raise ValueError(
                f"data: {name!r} is no folder and no list; expected one of them, 'digits', 'torch/NAME' or 'hfds/NAME'"
            )
        name, root = "", str(_part(Path(name), split))
    if prefix == "torch" and root is None:
        raise ValueError(f"data_root: expected the folder in which {name} is kept, got None")
    if name in ("torch/folder", "torch/image_folder"):
        root = str(_part(Path(str(root)), split))
    from timm.data import create_dataset

    options: dict[str, Any] = {} if prefix == "torch" else {"input_img_mode": mode}
    try:
        images: Any = create_dataset(name, root=root, split=split, search_split=False, download=download, **options)
    except ImportError as error:
        raise ModuleNotFoundError(f"data: {name} needs a package that is not installed ({error})") from None
    except (RuntimeError, AssertionError, ValueError, OSError) as error:
        raise ValueError(f"data: {name or root} cannot be opened ({str(error).splitlines()[0]})") from None
    if prefix == "torch":
        images = _Converted(images, mode)
    return Source(images, _num_classes(images))


def _part(folder: Path, split: str) -> Path:
    """The folder of a split. timm takes the whole folder where there is none: training images would be scored, say."""
    names = next((group for group in (TRAIN, VALIDATION) if split in group), (split,))
    found = next((folder / name for name in (split, *names) if (folder / name).is_dir()), None)
    if found is not None:
        return found
    others = [name for name in (*TRAIN, *VALIDATION, "test", "testing") if (folder / name).is_dir()]
    if split in TRAIN and not others:
        return folder
    has = f"has the splits {', '.join(others)}" if others else "has no splits, and is 'train' as a whole"
    raise ValueError(f"split: {folder} has no folder {split!r}; it {has}")


def with_classes_of(train: Source, other: Source) -> Source:
    """The other split of a folder, labelled as the training images are: a class without images there would shift all that follow.

    Raises:
        ValueError: a class that the training images do not have.
    """
    mine, theirs = (_folder_of(source.images) for source in (train, other))
    if mine is None or theirs is None or mine.class_to_idx == theirs.class_to_idx:
        return other
    strange = [name for name in theirs.class_to_idx if name not in mine.class_to_idx]
    if strange:
        raise ValueError(
            f"data: expected the classes of the training images, {len(mine.class_to_idx)}, in the other split too, got {strange[0]!r} "
            f"{f'and {len(strange) - 1} more ' * (len(strange) > 1)}there"
        )
    names = {index: name for name, index in theirs.class_to_idx.items()}
    theirs.samples = [(path, mine.class_to_idx[names[index]]) for path, index in theirs.samples]
    if hasattr(theirs, "targets"):  # torchvision's
        theirs.targets = [index for _, index in theirs.samples]
    theirs.class_to_idx = mine.class_to_idx
    return other._replace(num_classes=train.num_classes)


def _folder_of(images: Any) -> Any:
    """timm's reader of a folder, or torchvision's data set, with ``samples`` and ``class_to_idx``; None for others."""
    inner = images.images if isinstance(images, _Converted) else images
    inner = getattr(inner, "reader", inner)
    return inner if hasattr(inner, "samples") and hasattr(inner, "class_to_idx") else None


def subset(source: Source, which: str, seed: int = 0) -> Source:
    """Fewer images of a labelled source, as the evaluations with 1 % and 10 % of the labels use them.

    Args:
        which: a share of every class, such as '0.01': at least one image, drawn by ``seed``, the same ones for the same data set
            on every machine. Or a text file with the names of images of a folder, one a line, with or without the folders
            that they are in.

    Raises:
        ValueError: neither; a share that is not in (0, 1]; a name that is not in the folder.
        NotImplementedError: a data set that does not tell its labels, or its names, without its images being read.
    """
    from torch.utils.data import Subset

    if not source.labelled:
        raise ValueError("subset: expected images with labels; a list is a choice of its own, write a shorter one")
    if Path(which).is_file():
        chosen = _named(source.images, Path(which))
    else:
        try:
            share = float(which)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(f"subset: expected a share of the images from 0 to 1, or a file with names, got {which!r}")
        labels = torch.as_tensor(_labels(source.images))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        per_class = (order[labels[order] == label] for label in labels.unique())
        chosen = sorted(int(i) for own in per_class for i in own[: max(1, round(share * len(own)))])
    return source._replace(images=Subset(source.images, chosen))


def _labels(images: Any) -> list[int]:
    inner = images.images if isinstance(images, _Converted) else images
    reader: Any = getattr(inner, "reader", None)
    for labels in (getattr(inner, "labels", None), getattr(inner, "targets", None)):
        if labels is not None:
            return [int(label) for label in labels]
    if hasattr(reader, "samples"):  # timm's, of folders
        return [label for _, label in reader.samples]
    if hasattr(reader, "label_key"):  # timm's, of Hugging Face data sets
        return list(reader.dataset[reader.label_key])
    raise NotImplementedError(
        "subset: this data set does not tell its labels without its images; give a file with names"
    )


def _named(images: Any, path: Path) -> list[int]:
    reader: Any = getattr(images, "reader", None)
    if not hasattr(reader, "samples"):
        raise NotImplementedError("subset: only the images of a folder have names; give a share, such as 0.1")
    names = [name for name in read_lines(path) if name]
    plain = not any("/" in name for name in names)
    every = [reader.filename(i, basename=plain) for i in range(len(reader.samples))]
    found = {name: i for i, name in enumerate(every)}
    times = Counter(every)
    several = next((name for name in names if times[name] > 1), None)
    if several is not None:
        raise ValueError(
            f"subset: {path} lists {several!r}, which {times[several]} images are called; list their folders too"
        )
    missing = next((name for name in names if name not in found), None)
    if missing is not None or not names:
        raise ValueError(
            f"subset: {path} lists {missing!r}, which is not in the data set" if names else f"subset: {path} is empty"
        )
    return sorted({found[name] for name in names})


def _num_classes(images: Any) -> int | None:
    inner = getattr(images, "images", images)
    names = getattr(inner, "classes", None) or getattr(getattr(inner, "reader", None), "class_to_idx", None)
    if names:
        return len(names)
    features = getattr(getattr(getattr(inner, "reader", None), "dataset", None), "features", None) or {}
    return getattr(features.get("label"), "num_classes", None)


class _Listed:
    """Images by name, without labels: theirs is 0."""

    def __init__(self, folder: Path, names: list[str], mode: str) -> None:
        self.folder, self.names, self.mode = folder, names, mode

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_image(self.folder / self.names[index], self.mode), 0


def _listed(path: Path, folder: str | None, mode: str) -> Source:
    if folder is None:
        raise ValueError(f"data_root: {path} is a list; expected the folder in which its names begin, got None")
    names = [name for name in read_lines(path) if name]
    if not names:
        raise ValueError(f"data: {path} is a list without a name")
    missing = next((name for name in names if not (Path(folder) / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"data_root: {path} lists {missing!r}, which is not in {folder}")
    return Source(_Listed(Path(folder), names, mode), None, labelled=False)


class _Converted:
    """torchvision's data sets keep the mode of their files."""

    def __init__(self, images: Any, mode: str) -> None:
        self.images, self.mode = images, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return image.convert(self.mode), label


class _Digits(Sequence):
    def __init__(self, pixels: Any, labels: Any) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def _digits(split: str) -> Source:
    """1,797 handwritten digits of 8×8 grey pixels, resized to 16×16, every third one for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModuleNotFoundError('data: digits needs scikit-learn: pip install "attnkd[demo]"') from None
    import numpy as np
    from PIL import Image

    if split not in ("train", "validation", "val", "test"):
        raise ValueError(f"split: digits have 'train' and 'validation', got {split!r}")
    data = load_digits()
    small = np.round(data.images * 255 / 16).astype(np.uint8)
    pixels = np.stack(
        [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in small]
    )
    held_out = np.arange(len(pixels)) % 3 == 0
    chosen = ~held_out if split == "train" else held_out
    return Source(_Digits(pixels[chosen], data.target[chosen]), 10, DIGITS_STATS["mean"], DIGITS_STATS["std"])
