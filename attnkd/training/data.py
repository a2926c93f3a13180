"""The images of a run: which come in which step, and how each is augmented, as functions of seed, epoch and image alone.

So a run continues exactly, in the middle of an epoch and with any number of workers, and two processes see the images that
one would see. This is why timm's data sets and transforms are used, but not its loader, whose order and augmentation come
from the workers' own random numbers and whose epochs cannot be entered in the middle.
"""

from __future__ import annotations

import math
import random
import signal
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Key = tuple[int, int]
"""(epoch, index of an image)."""
TRIES = 10
"""Images after one another of which one must be readable, as in timm."""
GRACE = 120
"""Seconds that a worker goes on for after a SIGTERM."""


@dataclass(frozen=True)
class Plan:
    """Which images each process sees in each step.

    Args:
        images: number of images in the data set.
        batch_size: images a step, over all processes.
        drop_last: leave out an epoch's last images that fill no batch; if not, they make a smaller step.
        seed: of the order, which is new in every epoch.
        rank, size: this process among all.
        at_once: images that this process computes at a time; a step's share is split into parts of at most so many.

    Raises:
        ValueError: a batch that the data set cannot fill, or more processes than images in a batch.
    """

    images: int
    batch_size: int
    drop_last: bool
    seed: int
    rank: int = 0
    size: int = 1
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"train.batch_size: expected at most {self.images}, the number of training images, got {self.batch_size}"
            )
        if self.batch_size < self.size:
            raise ValueError(f"train.batch_size: expected at least one image for each of {self.size} processes")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once: expected at least 1, got {self.at_once}")

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch_size if self.drop_last else math.ceil(self.images / self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The images [images] of an epoch in their order."""
        return torch.randperm(self.images, generator=torch.Generator().manual_seed(mixed(self.seed, epoch)))

    def parts(self, step: int) -> list[tuple[list[int], float]]:
        """This process's images in a step, as positions in the epoch's order, in parts, each with the factor of its mean loss.

        The factor is the part's share of the step's images, times the number of processes: gradients are averaged over the
        processes, and their sum is the gradient of the mean over all images of the step. All processes have the same number of
        parts, because they wait for each other: where images are missing, a part is one image with factor 0.
        """
        start = (step % self.steps_per_epoch) * self.batch_size
        end = min(start + self.batch_size, self.images)
        mine = list(range(start + self.rank, end, self.size))
        most = math.ceil((end - start) / self.size)
        at_once = self.at_once or most
        split = [mine[i : i + at_once] for i in range(0, len(mine), at_once)]
        parts = [(part, len(part) * self.size / (end - start)) for part in split]
        return parts + [([start], 0.0)] * (math.ceil(most / at_once) - len(parts))


class Steps(Sampler[list[Key]]):
    """The keys of every part of the steps from ``start`` to before ``stop``, for a DataLoader's ``batch_sampler``."""

    def __init__(self, plan: Plan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[list[Key]]:
        order, ordered = torch.empty(0), -1
        for step in range(self.start, self.stop):
            epoch = step // self.plan.steps_per_epoch
            if epoch != ordered:
                order, ordered = self.plan.order(epoch), epoch
            for part, _ in self.plan.parts(step):
                yield [(epoch, int(order[position])) for position in part]


class AugmentedImages(Dataset):
    """Images and labels by (epoch, index), augmented by random numbers that belong to that key.

    Args:
        images: index → (PIL image or tensor, label).
        transform: image → [C, H, W]; draws from ``random``, NumPy's or PyTorch's global generator.
        seed: of those.
        beside: (key, transformed image) → tensors by name that come with the image, as a third part.
    """

    def __init__(
        self,
        images: Any,
        transform: Callable[[Any], Tensor] | None,
        seed: int,
        beside: Callable[[Key, Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.images, self.transform, self.seed, self.beside = images, transform, seed, beside

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        image, label = self._read(key[1])
        if self.transform is not None:
            reseed(self.seed, *key)
            image = self.transform(image)
        found = (image, int(label))
        return found if self.beside is None else (*found, self.beside(key, image))

    def _read(self, index: int) -> tuple[Any, Any]:
        """An image that cannot be read is named, and the next one takes its place: timm's data sets do that themselves, others do not."""
        for place in range(index, index + TRIES):
            try:
                return self.images[place % len(self.images)]
            except (OSError, SyntaxError) as error:  # Pillow's decoders raise both
                warnings.warn(f"an image cannot be read, and the next one takes its place ({error})", stacklevel=2)
        raise RuntimeError(f"{TRIES} images after one another cannot be read, the first of them number {index}")


def loader(images: AugmentedImages, steps: Steps, workers: int, pin: bool) -> DataLoader:
    """Batches ([b, C, H, W], [b]) of the steps, part by part."""
    return DataLoader(
        images,
        batch_sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=False,
        worker_init_fn=_work_until_told if workers else None,
    )


def drawn(loader: DataLoader) -> Generator[Any, None, None]:
    """The batches of a loader. Close it: an error's traceback would keep the workers alive, waiting for work, until Python ends.

    Raises:
        RuntimeError: what went wrong in a worker: of its traceback, which PyTorch makes the message, the last line.
    """
    batches = iter(loader)
    try:
        yield from batches
    except Exception as error:
        if "Original Traceback" not in str(error):
            raise
        raise RuntimeError(f"in a worker of the data loader: {str(error).strip().splitlines()[-1]}") from error
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()


def mixed(*numbers: int) -> int:
    """A seed from several numbers, so that no two of their combinations are likely to have the same."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(*numbers: int) -> None:
    """Set the global generators of Python, NumPy and PyTorch by :func:`mixed` numbers."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed takes 0.7 ms where it is not
        torch.cuda.manual_seed_all(seed)


def _work_until_told(worker: int) -> None:
    """Signals reach all processes of a group; the main process decides, and tells its workers to end."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _work_on)


def _work_on(number: int, frame: Any) -> None:
    """The first SIGTERM may be the group's. A second is the main process's, which waits for its workers at its end; if it has only that
    one to give, the time ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(GRACE)


class Mixing:
    """Mixup and cutmix of a batch, with smoothed labels; by timm, for any number of images.

    Args:
        mixup, cutmix: α of each, one of them above 0.
        label_smoothing: of the targets.
        num_classes: of the targets.
    """

    def __init__(self, mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> None:
        from timm.data import Mixup

        self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, C, H, W], targets [b] → mixed images, targets [b, classes]."""
        if len(images) % 2 == 0:
            return self.mix(images, targets)
        # timm mixes pairs: the odd one is mixed with itself.
        images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
        images, targets = self.mix(images, targets)
        return images[:-1], targets[:-1]
