"""`attnkd maps`: a figure of where teacher and student look, per head, merged and rolled out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from attnkd import files
from attnkd.attention.checks import check_temperature
from attnkd.attention.problem import MERGES
from attnkd.capture.adapters import adapter_for
from attnkd.capture.class_maps import ClassMaps, class_kl, class_maps
from attnkd.capture.drawing import draw_class_maps
from attnkd.capture.loading import image_config, image_transform, load_model, load_saved
from attnkd.capture.models import evaluating, input_channels, input_stats, num_classes
from attnkd.commands.options import ByName, check_format, choose_device, require, several
from attnkd.methods.image_stream import open_image
from attnkd.methods.task import check_pair

EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws the class token's attention over each image: teacher and student, every head, the heads merged, and the "
        "attention rollout through all blocks; prints KL(teacher || student). Without arguments: models and images of the "
        "newest `attnkd demo`."
    )
    option = parser.add_argument
    option(
        "files",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files; none: those of --run for its models, scikit-learn's two photographs for others",
    )
    for name in ("teacher", "student"):
        option(
            f"--{name}",
            metavar="MODEL",
            help="timm model name or another library's (docs/models.md), with published weights, or a model.safetensors of attnkd "
            "train; default: the newest of --run",
        )
        option(
            f"--{name}-checkpoint",
            type=Path,
            metavar="FILE",
            help=f"weights for the --{name} named; the classifier of a timm model may differ or be missing",
        )
        option(
            f"--{name}-kwargs",
            nargs="*",
            default={},
            action=ByName,
            metavar="K=V",
            help=f"arguments of the --{name}",
        )
    option("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="a demo's results (default: runs/demo)")
    option("--block", type=int, default=-1, help="the student's block (default: the last)")
    option("--teacher-block", type=int, default=-1, help="the teacher's block (default: the last)")
    option("--merge", choices=MERGES[1:], default="mean", help="how heads are merged (default: mean)")
    option(
        "--temperature",
        type=several(float),
        nargs="+",
        default=[1.0],
        metavar="T",
        help="of the merged maps, one map for each (default: 1; AttnDistill's Figure 3 is IMAGE --merge logsum --temperature 1 10, images before it)",
    )
    option(
        "--labels",
        action="store_true",
        help="write below each image what the models predict, and above it the folder that it is in, which is its class in an image folder",
    )
    option("--no-rollout", action="store_true", help="leave the attention rollout out")
    option(
        "--output", type=Path, default=Path("attention_maps.png"), metavar="FILE", help="default: attention_maps.png"
    )
    option("--device", metavar="NAME", help="a PyTorch device (default: cuda if there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Draw the figure; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    require(EXTRA)
    device = choose_device(args.device)
    files.make_folder("output", args.output.parent)
    files.check_writable("output", args.output)
    check_format("output", args.output)
    for temperature in args.temperature:
        check_temperature(temperature)
    given = vars(args)
    teacher, student = (
        find_model(role, given[role], given[f"{role}_checkpoint"], given[f"{role}_kwargs"], args.run).to(device)
        for role in ("teacher", "student")
    )
    check_pair(student, "teacher", teacher)
    own = sorted((args.run / "images").glob("*.png")) if args.teacher is None else []
    names, pictures, inputs = load_pictures(args.files or own, teacher, student)
    shown = {
        role: class_maps(model, images.to(device), block, args.merge, not args.no_rollout, args.temperature)
        for role, model, images, block in zip(
            ("teacher", "student"), (teacher, student), inputs, (args.teacher_block, args.block), strict=True
        )
    }
    for role, found in shown.items():
        if not all(bool(part.isfinite().all()) for part in (found.rows, found.rollout) if part is not None):
            raise ValueError(f"{role}: its attention is not finite; check its weights")
    per_head, merged = class_kl(shown["student"], shown["teacher"], args.merge, args.temperature)
    captions = None
    if args.labels:
        captions = {
            role: predicted(model, images.to(device))
            for role, model, images in zip(("teacher", "student"), (teacher, student), inputs, strict=True)
        }
        if args.files:
            names = [f"{name}\nin {file.resolve().parent.name}" for name, file in zip(names, args.files, strict=True)]
    print("KL(teacher || student) of the class token's attention, nats")
    for index, name in enumerate(names):
        heads = "" if per_head is None else "  heads " + " ".join(f"{kl:.3f}" for kl in per_head[index].tolist())
        kls = " ".join(f"{kl:.3f}" for kl in merged[index].tolist())
        print(f"  {name}:  {args.merge} of heads {kls}{heads}")
    if per_head is None:
        print(f"  heads: not compared one by one, teacher and student have {_heads(shown)}")
    files.write_figure(
        args.output, draw_class_maps(names, pictures, shown, per_head, merged, args.merge, args.temperature, captions)
    )
    print(f"wrote {args.output}")
    return 0


def predicted(model: nn.Module, images: Tensor) -> list[str]:
    """The most probable class of each image [B, C, H, W], by name where timm knows ImageNet's, and its probability."""
    with torch.no_grad(), evaluating(model):
        _, output = adapter_for(model).run(model, images, True)
    if output is None or output.ndim != 2 or (num_classes(model) or 0) < 2:
        return ["no classifier"] * len(images)
    probability, index = output.float().softmax(-1).max(-1)
    name: Callable[[int], str] = str
    if output.shape[1] == 1000:
        from timm.data import ImageNetInfo

        name = ImageNetInfo().index_to_description
    return [f"{name(i)[:24]} ({p:.2f})" for i, p in zip(index.tolist(), probability.tolist(), strict=True)]


def find_model(role: str, name: str | None, checkpoint: Path | None, kwargs: dict[str, Any], run: Path) -> nn.Module:
    """The model asked for, see :func:`attnkd.capture.loading.load_model`; without a name the newest student in a run's results, or the
    teacher that it learned from.

    Raises:
        ValueError: nothing found in ``run``, or nothing that can be loaded.
    """
    if name is not None:
        return load_model(role, name, checkpoint, **kwargs)
    if checkpoint is not None or kwargs:
        given = "checkpoint" if checkpoint is not None else "kwargs"
        raise ValueError(f"{role}_{given}: needs the model it belongs to, --{role} NAME")
    found = _newest(run, "student-pa_ag-*")
    if role == "teacher":
        seed = (
            re.search(r"-seed\d+-", found.parent.name) if found else None
        )  # `attnkd demo --all` has a teacher for each
        found = _newest(run, f"teacher{seed[0]}*" if seed else "teacher-*") or _newest(run, "teacher-*")
    if found is None:
        raise ValueError(f"{role}: no {role} in {run}; run `attnkd demo` first, or name a timm model")
    return load_saved(found)


def _newest(run: Path, pattern: str) -> Path | None:
    return max(run.glob(f"{pattern}/model.safetensors"), key=lambda path: path.stat().st_mtime, default=None)


def load_pictures(
    images: Sequence[Path], teacher: nn.Module, student: nn.Module
) -> tuple[list[str], Tensor, list[Tensor]]:
    """Names; images [B, C, H, W] with values 0 to 1; and the same as teacher and as student want them.

    The files, or scikit-learn's two photographs, resized and cropped as timm evaluates the teacher; grey for models of
    one channel.

    Raises:
        ValueError: models for different numbers of channels; a file that is no image; no files for models of one channel.
    """
    channels = [input_channels(model) or 3 for model in (teacher, student)]
    if channels[0] != channels[1] or channels[0] not in (1, 3):
        raise ValueError(
            f"teacher, student: expected both for 1 or both for 3 channels, got {channels[0]} and {channels[1]}"
        )
    if channels[0] == 1 and not images:
        raise ValueError("teacher, student: these models take grey images, and photographs are not; name image files")
    config = image_config(teacher)
    transform = image_transform({**config, "mean": (0.0,) * channels[0], "std": (1.0,) * channels[0]})
    named = [(file.name, _open(file, "L" if channels[0] == 1 else "RGB")) for file in images] or _photographs()
    pictures = torch.stack([transform(image) for _, image in named])
    inputs = []
    for role, model in (("teacher", teacher), ("student", student)):
        stats = input_stats(model)
        if stats is None:
            raise ValueError(f"{role}: {type(model).__name__} does not say its images' mean and std (pretrained_cfg)")
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in stats)
        inputs.append((pictures - mean) / std)
    return [Path(name).stem if channels[0] == 1 else name for name, _ in named], pictures, inputs


def _open(path: Path, mode: str) -> Image.Image:
    try:
        return open_image(path, mode)
    except Exception as error:  # whatever Pillow's decoders meet in a broken file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from None


def _photographs() -> list[tuple[str, Image.Image]]:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    return [
        (Path(name).name, Image.fromarray(pixels))
        for name, pixels in zip(photographs.filenames, photographs.images, strict=True)
    ]


def _heads(shown: dict[str, ClassMaps]) -> str:
    return " and ".join(str(maps.rows.shape[1]) for maps in shown.values())
