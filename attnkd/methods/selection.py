"""Choosing images for a teacher to be distilled on: the images of a folder with the lowest values V of Attention Probe.

Wang et al.: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022; docs/methods/attention_probe.md.
`attnkd select` is this function on the command line.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import heapq
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnkd import files
from attnkd.attention.checks import check_device, integer, kind
from attnkd.capture.blocks import Blocks
from attnkd.capture.models import input_channels
from attnkd.methods.image_stream import (
    ENCODING,
    ListedImages,
    leave_interrupts_to_the_main_process,
    list_images,
    read_lines,
)
from attnkd.methods.probe_scores import ProbeScorer
from attnkd.methods.score_log import Row, ScoreLog


class Selection(NamedTuple):
    """Where a selection was written, and the numbers of images in the list, in the folder and unreadable."""

    out: Path
    scores: Path
    kept: int
    images: int
    unreadable: int
    skipped: int
    """Files left out because their names have line breaks."""

    def names(self) -> list[str]:
        """The chosen images' paths relative to the folder, lowest value first."""
        return list(read_lines(self.out))


def select_images(
    teacher: nn.Module,
    data: str | os.PathLike,
    out: str | os.PathLike,
    num_select: int,
    transform: Callable[[Image.Image], Tensor],
    *,
    scores: str | os.PathLike | None = None,
    blocks: Blocks | None = None,
    head: int | str = 0,
    attn_weight: float = 0.05,
    output_weight: float = 0.9,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    restart: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Selection:
    """Score every image under a folder with a Vision Transformer classifier and list the K most useful ones.

    Scores are kept in the folder ``OUT.work``. After an interruption the same call continues after the last whole batch; a
    finished one with another ``num_select`` or other weights takes seconds. Images that could not be read are left out
    and named in the table; the next call reads them again. Memory grows with K, not with the folder.

    Args:
        teacher: timm Vision Transformer classifier with a class token, for images of 1 or 3 channels; a copy of it is
            run, and it is left as it is.
        data: folder with images, searched recursively.
        out: the list to write: paths relative to ``data``, lowest value first.
        num_select: K, how many images to list.
        transform: Pillow image ('RGB', or 'L' for a one-channel teacher) → [C, H, W], as
            ``timm.data.create_transform`` makes it.
        scores: the table to write, CSV: all images with values, their parts and errors. None: ``out`` with suffix .csv.
        blocks, head: of the probes, see :class:`attnkd.methods.probe_scores.ProbeScorer`.
        attn_weight, output_weight: V = attn_weight · Σ_blocks V_a + output_weight · V_n.
        batch_size: images at a time.
        workers: processes that decode images; 0 decodes in this one.
        device: where the teacher runs; None is a GPU if there is one, else the CPU.
        amp: run the teacher in bfloat16 autocast.
        restart: forget earlier scores and list the folder again.
        settings: what the scores depend on besides the teacher and the options here, as JSON; earlier scores of another
            value are refused. None: the text of ``transform``.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: an argument out of range or that cannot be written, an empty folder, fewer readable images
            than ``num_select``, a teacher that cannot take the images.
        RuntimeError: another process writes ``out``, earlier scores were made with other settings, or the teacher's
            output is not finite.
        OSError: a file that cannot be read or written.
    """
    data, out = Path(data), Path(out)
    table = out.with_suffix(".csv") if scores is None else Path(scores)
    num_select, batch_size, workers = (
        _whole(name, value, least)
        for name, value, least in (
            ("num_select", num_select, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        )
    )
    _check(data, out, table, attn_weight, output_weight)
    files.make_folder("out", out.parent)
    files.check_writable("out", out)
    files.check_writable("scores", table)
    work = files.make_folder("out", out.with_name(out.name + ".work"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(device)
    teacher = copy.deepcopy(teacher)
    digest = _digest(teacher)
    scorer = ProbeScorer(teacher, blocks, head).to(device)
    channels = input_channels(teacher) or 3
    with files.locked(work / "lock"):
        log, again = (ScoreLog(work / f"{names}.txt", work / f"{rows}.csv") for names, rows in _LOGS)
        described = {
            "data": str(data.resolve()),
            "teacher": digest,
            "settings": _plain(transform) if settings is None else json.loads(json.dumps(settings)),
            "blocks": list(scorer.blocks),
            "head": scorer.head,
            "amp": amp,
        }
        count, skipped = _prepare(work, described, log, again, data, restart, progress)
        if num_select > count:
            raise ValueError(
                f"num_select: expected at most {count}, the number of images under {data}, got {num_select}"
            )
        run = _Scoring(
            scorer, data, transform, "L" if channels == 1 else "RGB", batch_size, workers, device, amp, progress
        )
        log.done(batch_size, count)  # cuts off what a kill left
        if not again.names.exists():
            log.list_errors(again)
        run.score(again, "reading again")
        if again.rows.exists():
            log.merge(again)
        again.remove()
        run.score(log, "scoring")
        kept, unreadable = _finish(log, scorer.blocks, num_select, (attn_weight, output_weight), out, table)
    return Selection(out, table, kept, count, unreadable, skipped)


_LOGS = (("files", "scores"), ("again", "again"))
"""Lists and rows in the work folder: of all images, and of those being read once more."""


@dataclass(frozen=True)
class _Scoring:
    """What does not change while images are scored."""

    scorer: ProbeScorer
    data: Path
    transform: Callable[[Image.Image], Tensor]
    mode: str
    batch_size: int
    workers: int
    device: torch.device
    amp: bool
    progress: bool

    def score(self, log: ScoreLog, title: str) -> None:
        """Score what the log does not have yet."""
        from tqdm import tqdm

        count = sum(1 for _ in read_lines(log.names))
        done = log.done(self.batch_size, count)
        if done == count:
            return
        self._try_one()
        images = ListedImages(self.data, log.names, done, self.batch_size, self.mode, self.transform)
        loader = DataLoader(
            images,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_interrupts_to_the_main_process,
        )
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()
        with (
            log.appending() as append,
            tqdm(total=count, initial=done, unit="image", desc=title, disable=not self.progress) as bar,
        ):
            for expected, batch in enumerate(loader):
                assert batch.number == expected, "batches are not in order"
                with autocast:
                    scores = (
                        None if batch.images is None else self.scorer(batch.images.to(self.device, non_blocking=True))
                    )
                append(batch, scores)
                bar.update(len(batch.names))

    def _try_one(self) -> None:
        """Find out on a grey image whether transform and teacher fit, so that no image is reported for a fault of theirs."""
        try:
            image = self.transform(Image.new(self.mode, (64, 64), "gray"))[None].to(self.device)
            with torch.no_grad():
                self.scorer.tap.model(image)
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"transform, teacher: a plain grey image cannot be scored ({error})") from error


def _finish(
    log: ScoreLog, blocks: list[int], num_select: int, weights: tuple[float, float], out: Path, table: Path
) -> tuple[int, int]:
    """Choose the lowest values, then write table and list; how many were kept and how many could not be read."""
    lowest: list[tuple[float, int]] = []  # heap of (−value, −index), the K lowest values so far
    unreadable = 0
    for index, (_, value) in enumerate(_values(log, weights)):
        if value is None:
            unreadable += 1
        elif len(lowest) < num_select:
            heapq.heappush(lowest, (-value, -index))
        else:
            heapq.heappushpop(lowest, (-value, -index))
    if len(lowest) < num_select:
        raise ValueError(
            f"num_select: expected at most {len(lowest)}, the number of images that can be read, got {num_select}"
        )
    rank = {-index: place for place, (_, index) in enumerate(sorted(lowest, reverse=True))}
    names = [""] * len(rank)
    with files.replacing(table, **ENCODING) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "value", "selected", "output", "label", "error", *(f"attn_block{i}" for i in blocks)])
        for index, (row, value) in enumerate(_values(log, weights)):
            if index in rank:
                names[rank[index]] = row[0]
            writer.writerow([row[0], "" if value is None else f"{value:.9g}", int(index in rank), *row[1:]])
    with files.replacing(out, **ENCODING) as file:
        file.writelines(f"{name}\n" for name in names)
    return len(names), unreadable


def _values(log: ScoreLog, weights: tuple[float, float]) -> Iterator[tuple[Row, float | None]]:
    """Every image's row and its value V, None where the image could not be read."""
    for row in log.read():
        yield row, None if row[3] else weights[0] * sum(map(float, row[4:])) + weights[1] * float(row[1])


def _prepare(
    work: Path, described: dict[str, Any], log: ScoreLog, again: ScoreLog, data: Path, restart: bool, progress: bool
) -> tuple[int, int]:
    """List the images, or check that the list and the scores here are this call's; numbers of images and skipped files."""
    from tqdm import tqdm

    note = work / "settings.json"
    if restart:
        note.unlink(missing_ok=True)
    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
            count, skipped = int(before["images"]), int(before["skipped"])
        except (ValueError, KeyError, TypeError):
            raise RuntimeError(f"{note}: is not of this version or damaged; start again with --restart") from None
        changed = [name for name in described if before.get(name) != described[name]]
        if changed:
            raise RuntimeError(
                f"{work}: holds scores made with another {', '.join(changed)}; choose another --out, or --restart to replace them"
            )
        return count, skipped
    for old in (log, again):
        old.remove()
    with tqdm(unit="image", desc="listing", disable=not progress) as bar:
        count, skipped = list_images(data, log.names, lambda found: bar.update(found - bar.n))
    if count == 0:
        raise ValueError(f"data: no images under {data}")
    files.write_json(note, {"images": count, "skipped": skipped, **described})
    return count, skipped


def _whole(name: str, value: int, least: int) -> int:
    """The value as a Python int."""
    whole = integer(value)
    if whole is None:
        raise TypeError(f"{name}: expected an integer, got {kind(value)} {value!r}")
    if whole < least:
        raise ValueError(f"{name}: expected at least {least}, got {whole}")
    return whole


def _check(
    data: Path,
    out: Path,
    table: Path,
    attn_weight: float,
    output_weight: float,
) -> None:
    for name, weight in (("attn_weight", attn_weight), ("output_weight", output_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {weight}")
    if attn_weight == output_weight == 0:
        raise ValueError("attn_weight, output_weight: both are 0, all images would have the same value")
    if not data.is_dir():
        raise ValueError(f"data: expected a folder, got {data}")
    if os.path.realpath(out) == os.path.realpath(table):
        raise ValueError(
            f"out, scores: list and table are the same file {out}; give the table another name with scores"
        )


def _digest(teacher: nn.Module) -> str:
    """Of all that the teacher computes with: its modules, their numbers of heads (no text shows them) and weights."""
    heads = [getattr(m, "num_heads", getattr(m, "num_attention_heads", None)) for m in teacher.modules()]
    digest = hashlib.sha256(_plain(teacher, heads).encode())
    for name, value in teacher.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _plain(*described: Any) -> str:
    """A text that is the same in every process: without addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(map(repr, described)))
