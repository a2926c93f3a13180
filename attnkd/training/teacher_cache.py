"""What a method needs of its teacher for every training image, computed once and read in place of the teacher.

Only where an image has the same pixels in every epoch. The folder holds ``cache.json``, which says of what it is, and a safetensors file for every
1,024 images, each written in one step: a run that was killed is continued by the same command, to the same bytes. A checksum of every image's pixels is
kept beside its row: with other images, another transform or another version of the decoder, training stops and says so.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attnkd import files
from attnkd.methods.recipes import Recipe
from attnkd.methods.task import DistillTask
from attnkd.methods.taught import check_keepable, teach, teacher_needs
from attnkd.training import models
from attnkd.training.carrying import PRECISIONS, Carrying
from attnkd.training.config import METHODS
from attnkd.training.data import AugmentedImages, Key
from attnkd.training.distributed import World

NAME, SHARD, CRC = "cache.json", 1024, "pixels_crc"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOOKED_AT = 8
"""So many images are compared before training begins; the others when they are read."""


def check_still(method: str, recipe: Recipe) -> None:
    """Refuse a method whose teacher cannot be kept, and a recipe that shows an image in more than one way.

    Args:
        method: its name on the command line.

    Raises:
        NotImplementedError: names the method.
        ValueError: names every number that does, and what it must be.
    """
    check_keepable(METHODS[method])
    still: dict[str, Any] = {
        "crop_scale": (1.0, 1.0),
        "crop_padding": None if recipe.crop_padding is None else 0,
        "hflip": 0.0,
        "color_jitter": 0.0,
        "auto_augment": None,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    moving = [
        f"train.{name}={getattr(recipe, name)}" for name, value in still.items() if getattr(recipe, name) != value
    ]
    if moving:
        wanted = ", ".join(f"{name}={value}" for name, value in still.items() if value is not None)
        raise ValueError(
            "teacher_cache: the teacher's output is kept once for an image, but this recipe changes an image's pixels from epoch to "
            f"epoch ({', '.join(moving)}). Needed: {wanted}, no auto_augment; or train without a cache"
        )


def describe(task: DistillTask, count: int, size: tuple[int, int], precision: str) -> dict[str, Any]:
    """What a cache is of, as JSON knows it; all but the images' pixels, which have checksums of their own."""
    norms = {
        role: [None if value is None else value.flatten().tolist() for value in (teacher.scale, teacher.shift)]
        for role, teacher in task.teachers.items()
    }
    return {
        "format": 2,
        "needs": teacher_needs(task, size),
        "teacher_sha256": {role: models.checksum(teacher.tap.model) for role, teacher in task.teachers.items()},
        "normalisation": norms,
        "precision": precision,
        "size": list(size),
        "images": count,
    }  # fmt: skip


def write(
    folder: Path,
    task: DistillTask,
    images: AugmentedImages,
    count: int,
    size: tuple[int, int],
    world: World,
    carrying: Carrying,
    *,
    dtype: str = "float32",
    say: Callable[[str], None] = print,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda numbers: numbers,
) -> None:
    """Run the teacher on every image, or on those that are not in the folder yet.

    Args:
        folder: exists; the first process has locked it.
        images: of a recipe that :func:`check_still` takes.
        count: number of images.
        size: (height, width) of the images in pixels.
        world: the processes; each writes its share of the files.
        carrying: images at once, workers and precision.
        dtype: of what is kept.
        progress: wraps the numbers of this process's files.

    Raises:
        ValueError: another cache in the folder, too little room on the disk, images that differ from epoch to epoch, or a teacher whose
            output is not finite.
        NotImplementedError: a method whose teacher cannot be kept.
    """
    from safetensors.torch import save as to_bytes

    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    description = {**describe(task, count, size, carrying.precision), "dtype": dtype}
    if (folder / NAME).exists():
        _check_same(folder, _read(folder), description)
    for index in _spread(count):
        if not torch.equal(images[0, index][0], images[1, index][0]):
            raise ValueError(f"teacher_cache: image {index} has other pixels in the second epoch than in the first")
    missing = [number for number in range(math.ceil(count / SHARD)) if not (folder / _file(number)).exists()]
    mine = [number for number in missing if number % world.size == world.rank]  # by number: others write meanwhile
    sample = _taught(task, images[0, 0][0][None], world, carrying.precision)
    each = 8 + sum(value[0].numel() for value in sample.values()) * DTYPES[dtype].itemsize
    needed = each * sum(min(SHARD, count - number * SHARD) for number in missing)
    free = shutil.disk_usage(folder).free
    say(f"{folder}: {each:,} bytes an image, {each * count / 1e9:.3g} GB in all, {needed / 1e9:.3g} GB to write")
    if needed > free:
        raise ValueError(f"output: {folder} needs {needed / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB")
    if world.first:
        files.write_json(folder / NAME, description)
    at_once = carrying.at_once or 64
    for number in progress(mine):
        keys = [(0, index) for index in range(number * SHARD, min((number + 1) * SHARD, count))]
        parts: dict[str, list[Tensor]] = {CRC: []}
        sampler = [keys[start : start + at_once] for start in range(0, len(keys), at_once)]
        for batch, _ in DataLoader(images, batch_sampler=sampler, num_workers=carrying.workers):
            parts[CRC].append(torch.tensor([_crc(image) for image in batch]))
            for name, value in _taught(task, batch, world, carrying.precision).items():
                kept = value.to(DTYPES[dtype]).cpu()
                if not bool(kept.isfinite().all()):
                    raise ValueError(
                        f"teacher: its {name} of images {number * SHARD} to {number * SHARD + len(keys) - 1} is not finite in "
                        f"{dtype}; check its weights and run.precision, or keep float32"
                    )
                parts.setdefault(name, []).append(kept)
        files.write_bytes(folder / _file(number), to_bytes({name: torch.cat(part) for name, part in parts.items()}))


class TeacherCache:
    """The rows of a finished cache by image, for a data set in any process.

    Args:
        folder: as :func:`write` left it.
        description: of the run that wants it, see :func:`describe`.

    Raises:
        ValueError: no cache, an unfinished one, one with a damaged file, or one of something else; names what differs.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.files: dict[int, Any] = {}
        if not (folder / NAME).exists():
            raise ValueError(
                f"teacher_cache: {folder} has no {NAME}; attnkd cache with the settings of this run makes it"
            )
        found = _read(folder)
        _check_same(folder, found, {**description, "dtype": found.get("dtype")})
        numbers = range(math.ceil(found["images"] / SHARD))
        missing = sum(not (folder / _file(number)).exists() for number in numbers)
        if missing:
            raise ValueError(f"teacher_cache: {folder} lacks {missing} of its files; run the same attnkd cache again")
        for number in numbers:  # now, not hours later in a worker
            _opened(folder / _file(number))

    def check(self, images: AugmentedImages, count: int) -> None:
        """Compare some images before the work begins."""
        for index in _spread(count):
            self.row((0, index), images[0, index][0])

    def row(self, key: Key, image: Tensor) -> dict[str, Tensor]:
        """What was kept for an image, after a look at its pixels [C, H, W].

        Raises:
            ValueError: they are others than those that the teacher saw.
        """
        index = key[1]
        number, place = divmod(index, SHARD)
        rows = self._open(number)
        if int(rows.get_slice(CRC)[place : place + 1]) != _crc(image):
            raise ValueError(
                f"teacher_cache: image {index} has other pixels than when {self.folder} was made: another data set, order, transform, "
                "normalisation or version of the decoder. Make the cache anew"
            )
        return {name: rows.get_slice(name)[place : place + 1][0] for name in rows.keys() if name != CRC}

    def _open(self, number: int) -> Any:
        if number not in self.files:
            self.files[number] = _opened(self.folder / _file(number))
        return self.files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # a worker process opens its own


def _taught(task: DistillTask, images: Tensor, world: World, precision: str) -> dict[str, Tensor]:
    with torch.autocast(world.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        return teach(task, images.to(world.device))


def _spread(count: int) -> list[int]:
    """A few indices from the first to the last."""
    return sorted({round(step * (count - 1) / (LOOKED_AT - 1)) for step in range(LOOKED_AT)})


def _file(number: int) -> str:
    return f"images-{number:06d}.safetensors"


def _opened(path: Path) -> Any:
    """The tensors of a file; their sizes are known, and that the file has all their bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"teacher_cache: {path} cannot be read ({error}); delete it and run the same attnkd cache again"
        ) from None


def _crc(image: Tensor) -> int:
    return zlib.crc32(image.contiguous().numpy().tobytes())


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"teacher_cache: {folder / NAME} cannot be read ({error})") from None


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [f"{name}: {found.get(name)}, here {wanted[name]}" for name in wanted if found.get(name) != wanted[name]]
    if differs:
        raise ValueError(f"teacher_cache: {folder} is of something else ({'; '.join(differs)})")
