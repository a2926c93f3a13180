"""Images of a folder of any size, one batch after the other: nothing grows with the number of files but a list on disk."""

from __future__ import annotations

import os
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from attnkd import files

ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
"""How file names are written: any name a file system can hold survives, except one with a line break."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, whatever a file is called. Pillow knows more, and starts other programs for some of them."""
LONGEST = 200
"""An image's long side over its short side, at most: resizing makes the short side as long as the model needs."""


class Batch(NamedTuple):
    """``names`` [b] of which those with no ``errors`` entry are, in order, the ``images`` [≤ b, C, H, W]."""

    number: int
    names: list[str]
    errors: list[str]
    images: Tensor | None


def open_image(path: str | os.PathLike, mode: str) -> Image.Image:
    """An image file, decoded and converted to Pillow's mode 'RGB' or 'L'.

    Raises:
        OSError: no ordinary file (a pipe would hang, a device would answer), or no image of :data:`FORMATS`.
        ValueError: more pixels than Pillow's limit, or a very long and narrow image.
        Exception: whatever Pillow's decoders meet in a broken file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not an ordinary file")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"an image of {image.width}x{image.height} pixels is too long and narrow")
            return image.convert(mode)


def list_images(folder: Path, out: Path, on_found: Callable[[int], None] | None = None) -> tuple[int, int]:
    """Write the names of all image files under a folder to ``out``, one a line, relative to the folder.

    Files count as images by the suffixes of :data:`FORMATS`. Links are followed, except back into a folder above them.

    Args:
        on_found: is called with the number of images found so far.

    Returns:
        The number of images, and of image files left out because their name has a line break.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    found = skipped = 0
    with files.replacing(out, **ENCODING) as file:
        top = os.stat(folder)
        pending: list[tuple[str, frozenset]] = [("", frozenset([(top.st_dev, top.st_ino)]))]
        while pending:
            prefix, above = pending.pop()
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.is_dir():
                        status = entry.stat()
                        if (key := (status.st_dev, status.st_ino)) not in above:
                            pending.append((prefix + entry.name + "/", above | {key}))
                    elif os.path.splitext(entry.name)[1].lower() in suffixes:
                        if "\n" in prefix + entry.name or "\r" in prefix + entry.name:
                            skipped += 1
                            continue
                        file.write(prefix + entry.name + "\n")
                        found += 1
                        if on_found is not None:
                            on_found(found)
    return found, skipped


def read_lines(path: Path) -> Iterator[str]:
    """The names that :func:`list_images` wrote."""
    with path.open(**ENCODING) as file:
        for line in file:
            yield line.removesuffix("\n")


class ListedImages(IterableDataset):
    """Batches of the listed images, in order, also with several workers (``DataLoader(batch_size=None)``).

    Args:
        folder, listed: as given to :func:`list_images`.
        start: number of images to leave out at the beginning.
        batch_size: images a batch, the unreadable ones included.
        mode: Pillow mode that images are converted to, 'RGB' or 'L'.
        transform: image → [C, H, W].
    """

    def __init__(
        self, folder: Path, listed: Path, start: int, batch_size: int, mode: str, transform: Callable[[Any], Tensor]
    ) -> None:
        super().__init__()
        self.folder, self.listed, self.start = folder, listed, start
        self.batch_size, self.mode, self.transform = batch_size, mode, transform

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        lines = islice(read_lines(self.listed), self.start, None)
        number = 0
        while names := list(islice(lines, self.batch_size)):
            if number % workers == worker:  # the loader asks the workers in turn
                yield self._load(number, names)
            number += 1

    def _load(self, number: int, names: list[str]) -> Batch:
        errors, images = [], []
        for name in names:
            try:
                images.append(self.transform(open_image(self.folder / name, self.mode)))
                errors.append("")
            except Exception as error:  # Pillow's decoders raise whatever they meet in a broken file
                errors.append(" ".join(f"{type(error).__name__}: {error}".split()))
        return Batch(number, names, errors, torch.stack(images) if images else None)


def leave_interrupts_to_the_main_process(worker: int) -> None:
    """A worker's ``worker_init_fn``: Ctrl-C reaches it too, but the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
