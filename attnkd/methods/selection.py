"""`attnkd select`: the images of a folder that are worth distilling a teacher on, by Attention Probe."""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from attnkd.methods.image_stream import ENCODING, Batch, ListedImages, list_images, read_lines
from attnkd.methods.probe_scores import ProbeScorer, ProbeScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from timm.utils import ParseKwargs

    parser.description = (
        "Scores every image under a folder with a Vision Transformer classifier and lists the most useful ones: those it is "
        "sure about (low −log of the largest class probability) and where its class token looks at something (low cosine "
        "between its attention to the patches and the uniform distribution). Memory does not grow with the folder."
    )
    parser.epilog = (
        "Interrupt it at any time: the same command continues behind the last finished batch. Scores are kept in OUT.work; "
        "another --num-select, --attn-weight or --output-weight then takes seconds. Delete OUT.work when done."
    )
    option = parser.add_argument
    option("--data", type=Path, required=True, metavar="DIR", help="folder with images, searched recursively")
    option("--teacher", required=True, metavar="MODEL", help="timm model name")
    option("--num-select", type=int, required=True, metavar="K", help="how many images to keep")
    option("--out", type=Path, required=True, metavar="FILE", help="the list: paths relative to DIR, most useful first")
    option(
        "--scores",
        type=Path,
        metavar="FILE",
        help="all images with scores and errors, CSV (default: OUT with suffix .csv)",
    )
    option(
        "--blocks",
        type=int,
        nargs="+",
        metavar="I",
        help="blocks of the probes, from 0 (default: at 1/3 and 2/3 of the depth)",
    )
    option("--head", default="0", metavar="H", help="head of the probes, or 'mean' over heads (default: 0)")
    option("--attn-weight", type=float, default=0.05, metavar="W", help="weight of each block's cosine (default: 0.05)")
    option("--output-weight", type=float, default=0.9, metavar="W", help="weight of the output's term (default: 0.9)")
    option("--checkpoint", type=Path, metavar="FILE", help="the teacher's weights (default: timm's pretrained ones)")
    option("--num-classes", type=int, metavar="N", help="classes of the teacher in the checkpoint")
    option(
        "--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="arguments of the timm model"
    )
    option("--img-size", type=int, metavar="N", help="image size (default: the model's)")
    option("--mean", type=float, nargs="+", metavar="X", help="image mean per channel (default: the model's)")
    option(
        "--std", type=float, nargs="+", metavar="X", help="image standard deviation per channel (default: the model's)"
    )
    option("--crop-pct", type=float, metavar="X", help="share of the image that is kept (default: the model's)")
    option("--interpolation", metavar="NAME", help="of resizing (default: the model's)")
    option("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    option("--workers", type=int, default=4, metavar="N", help="processes that decode images (default: 4)")
    option("--device", metavar="NAME", help="a PyTorch device (default: cuda if there is one, else cpu)")
    option("--amp", action="store_true", help="run the teacher in bfloat16 autocast")
    option("--restart", action="store_true", help="forget earlier scores and list the folder again")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Ctrl-C passes through as KeyboardInterrupt: finished batches are kept."""
    try:
        select(args)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        print(f"attnkd select: {error}", file=sys.stderr)
        return 1
    return 0


def select(args: argparse.Namespace) -> None:
    """Score what is not scored yet, then write scores and list.

    Raises:
        ValueError: an option out of range, an empty folder, fewer readable images than ``--num-select``.
        RuntimeError: the work folder belongs to another command, or the teacher's output is not finite.
        OSError: a folder or file that cannot be read or written.
    """
    from tqdm import tqdm

    _check_options(args)
    work = args.out.with_name(args.out.name + ".work")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    teacher = _load_teacher(args)
    scorer = ProbeScorer(teacher, args.blocks, args.head if args.head == "mean" else int(args.head)).to(device)
    config = _data_config(args, teacher)
    count = _prepare(work, args, {"blocks": scorer.blocks, "config": json.loads(json.dumps(config))})
    if args.num_select > count:
        raise ValueError(
            f"--num-select: expected at most {count}, the number of images under {args.data}, got {args.num_select}"
        )

    listed, parts = work / "files.txt", work / "scores.csv"
    done = _complete_rows(parts)
    if done < count:
        loader = _loader(args, listed, done, config, device)
        autocast = torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()
        with (
            parts.open("a", **ENCODING) as file,
            tqdm(total=count, initial=done, unit="image", desc="scoring") as progress,
        ):
            writer = csv.writer(file, lineterminator="\n")
            for expected, batch in enumerate(loader):
                assert batch.number == expected, "batches came out of order"
                with autocast:
                    scores = None if batch.images is None else scorer(batch.images.to(device, non_blocking=True))
                writer.writerows(_rows(batch, scores))
                file.flush()
                progress.update(len(batch.names))
    table = args.scores or args.out.with_suffix(".csv")
    kept, unreadable = _finish(listed, parts, scorer.blocks, args, table)
    print(f"{kept} of {count} images listed in {args.out}, all scores in {table}")
    if unreadable:
        print(f"{unreadable} could not be read; their errors are in {table}", file=sys.stderr)


def _finish(listed: Path, parts: Path, blocks: list[int], args: argparse.Namespace, table: Path) -> tuple[int, int]:
    """Choose the lowest values, then write table and list; how many were kept and how many could not be read."""
    lowest: list[tuple[float, int]] = []  # heap of (−value, −index), the K lowest values so far
    unreadable = 0
    for index, (_, values) in enumerate(_read_parts(listed, parts, args)):
        if values is None:
            unreadable += 1
        elif len(lowest) < args.num_select:
            heapq.heappush(lowest, (-values, -index))
        else:
            heapq.heappushpop(lowest, (-values, -index))
    if len(lowest) < args.num_select:
        raise ValueError(
            f"--num-select: expected at most {len(lowest)}, the number of images that can be read, got {args.num_select}"
        )
    rank = {-index: place for place, (_, index) in enumerate(sorted(lowest, reverse=True))}
    names = [""] * len(rank)
    temporary = table.with_name(table.name + ".tmp")
    with temporary.open("w", **ENCODING) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "value", "selected", "output", "label", "error", *(f"attn_block{i}" for i in blocks)])
        for index, (row, values) in enumerate(_read_parts(listed, parts, args)):
            if index in rank:
                names[rank[index]] = row[0]
            writer.writerow([row[0], "" if values is None else f"{values:.9g}", int(index in rank), *row[1:]])
    os.replace(temporary, table)
    temporary = args.out.with_name(args.out.name + ".tmp")
    with temporary.open("w", **ENCODING) as file:
        file.writelines(f"{name}\n" for name in names)
    os.replace(temporary, args.out)
    return len(names), unreadable


def _read_parts(listed: Path, parts: Path, args: argparse.Namespace) -> Iterator[tuple[list[str], float | None]]:
    """Rows [path, output, label, error, cosines...] and their value V, None where the image could not be read."""
    with parts.open(**ENCODING) as file:
        for name, row in zip(read_lines(listed), csv.reader(file), strict=True):
            if row[0] != name:
                raise RuntimeError(
                    f"{parts}: its row for {row[0]!r} belongs to {name!r} of {listed}; start anew with --restart"
                )
            if row[3]:
                yield row, None
            else:
                yield row, args.attn_weight * sum(map(float, row[4:])) + args.output_weight * float(row[1])


def _rows(batch: Batch, scores: ProbeScores | None) -> Iterator[list[Any]]:
    columns = [] if scores is None else [x.tolist() for x in scores]
    readable = iter(zip(*columns, strict=True))
    for name, error in zip(batch.names, batch.errors, strict=True):
        if error:
            yield [name, "", "", error]
            continue
        attention, output, label = next(readable)
        if not all(map(math.isfinite, [*attention, output])):
            raise RuntimeError(
                f"{name}: the teacher's scores are not finite ({attention}, {output}); check weights and precision"
            )
        yield [name, f"{output:.9g}", label, "", *(f"{value:.9g}" for value in attention)]


def _prepare(work: Path, args: argparse.Namespace, more: dict[str, Any]) -> int:
    """Create the work folder or check that it is this command's; the number of images."""
    from tqdm import tqdm

    checkpoint = args.checkpoint and [
        str(args.checkpoint.resolve()),
        args.checkpoint.stat().st_size,
        args.checkpoint.stat().st_mtime,
    ]
    names = ("teacher", "num_classes", "model_kwargs", "head", "amp")
    settings = (
        {name: getattr(args, name) for name in names}
        | {"data": str(args.data.resolve()), "checkpoint": checkpoint}
        | more
    )
    described = work / "settings.json"
    if args.restart and work.exists():
        shutil.rmtree(work)
    if described.exists():
        before = json.loads(described.read_text())
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise RuntimeError(
                f"{work}: holds scores made with another {', '.join(changed)}; choose another --out, or --restart to replace them"
            )
        return before["images"]
    work.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="image", desc="listing") as progress:
        count, skipped = list_images(args.data, work / "files.txt", lambda found: progress.update(found - progress.n))
    if count == 0:
        raise ValueError(f"--data: no images under {args.data}")
    if skipped:
        print(f"{skipped} images were left out: their names have line breaks", file=sys.stderr)
    (work / "scores.csv").write_text("")
    temporary = work / "settings.json.tmp"
    temporary.write_text(json.dumps({"images": count, **settings}, indent=2) + "\n")
    os.replace(temporary, described)
    return count


def _complete_rows(parts: Path) -> int:
    """The number of whole rows; what a kill left of the row after them is cut off."""
    rows = end = 0
    with parts.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                rows, end = rows + 1, end + len(line)
        file.truncate(end)
    return rows


def _loader(
    args: argparse.Namespace, listed: Path, start: int, config: dict[str, Any], device: torch.device
) -> DataLoader:
    from timm.data import create_transform

    transform = create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images = ListedImages(args.data, listed, start, args.batch_size, mode, transform)
    return DataLoader(images, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")


def _load_teacher(args: argparse.Namespace) -> Any:
    import timm

    return timm.create_model(
        args.teacher,
        pretrained=args.checkpoint is None,
        checkpoint_path="" if args.checkpoint is None else str(args.checkpoint),
        num_classes=args.num_classes,
        **args.model_kwargs,
    )


def _data_config(args: argparse.Namespace, teacher: Any) -> dict[str, Any]:
    """Size, mean, deviation, crop and interpolation of the teacher's images, as timm resolves them."""
    from timm.data import resolve_data_config

    embed = teacher.patch_embed
    channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"--teacher: expected a model of images with 1 or 3 channels, {args.teacher} takes {channels}")
    size = (args.img_size, args.img_size) if args.img_size else getattr(embed, "img_size", None)
    options = {name: getattr(args, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    options["input_size"] = None if size is None else (channels, *size)
    for name in ("mean", "std"):
        given = options[name] or (getattr(teacher, "pretrained_cfg", None) or {}).get(name) or (0.0, 0.0, 0.0)
        if len(given) not in (1, channels) or (options[name] is None and len(given) != channels):
            raise ValueError(f"--{name}: expected 1 or {channels} numbers for {channels} channels, got {tuple(given)}")
    return resolve_data_config(options, model=teacher)


def _check_options(args: argparse.Namespace) -> None:
    for name in ("num_select", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.head != "mean" and not args.head.isdecimal():
        raise ValueError(f"--head: expected 'mean' or an index from 0, got {args.head!r}")
    for name in ("attn_weight", "output_weight"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) >= 0):
            raise ValueError(f"--{name.replace('_', '-')}: expected a finite number >= 0, got {getattr(args, name)}")
    if args.attn_weight == args.output_weight == 0:
        raise ValueError("--attn-weight, --output-weight: both are 0, all images would be worth the same")
    if not args.data.is_dir():
        raise ValueError(f"--data: expected a folder, got {args.data}")
    if args.checkpoint is not None and not args.checkpoint.is_file():
        raise ValueError(f"--checkpoint: expected a file, got {args.checkpoint}")
