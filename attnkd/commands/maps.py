"""`attnkd maps`: a figure of where teacher and student look, per head, merged and rolled out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from attnkd import files
from attnkd.attention.problem import MERGES
from attnkd.capture.class_maps import ClassMaps, class_kl, class_maps
from attnkd.capture.drawing import draw_class_maps
from attnkd.capture.loading import image_config, image_transform, load_model, load_saved
from attnkd.capture.models import input_channels, input_stats
from attnkd.commands.options import choose_device, require
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
    option("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="a demo's results (default: runs/demo)")
    option("--block", type=int, default=-1, help="the student's block (default: the last)")
    option("--teacher-block", type=int, default=-1, help="the teacher's block (default: the last)")
    option("--merge", choices=MERGES[1:], default="mean", help="how heads are merged (default: mean)")
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
    _check_format(args.output)
    teacher = find_model("teacher", args.teacher, args.teacher_checkpoint, args.run).to(device)
    student = find_model("student", args.student, args.student_checkpoint, args.run).to(device)
    check_pair(student, "teacher", teacher)
    own = sorted((args.run / "images").glob("*.png")) if args.teacher is None else []
    names, pictures, inputs = load_pictures(args.files or own, teacher, student)
    shown = {
        role: class_maps(model, images.to(device), block, args.merge, not args.no_rollout)
        for role, model, images, block in zip(
            ("teacher", "student"), (teacher, student), inputs, (args.teacher_block, args.block), strict=True
        )
    }
    per_head, merged = class_kl(shown["student"], shown["teacher"], args.merge)
    print("KL(teacher || student) of the class token's attention, nats")
    for index, name in enumerate(names):
        heads = "" if per_head is None else "  heads " + " ".join(f"{kl:.3f}" for kl in per_head[index].tolist())
        print(f"  {name}:  {args.merge} of heads {merged[index].item():.3f}{heads}")
    if per_head is None:
        print(f"  heads: not compared one by one, teacher and student have {_heads(shown)}")
    files.write_figure(args.output, draw_class_maps(names, pictures, shown, per_head, merged, args.merge))
    print(f"wrote {args.output}")
    return 0


def find_model(role: str, name: str | None, checkpoint: Path | None, run: Path) -> nn.Module:
    """The model asked for, see :func:`attnkd.capture.loading.load_model`; without a name the newest in a run's results.

    Raises:
        ValueError: nothing found in ``run``, or nothing that can be loaded.
    """
    if name is not None:
        return load_model(role, name, checkpoint)
    if checkpoint is not None:
        raise ValueError(f"{role}_checkpoint: needs the model it belongs to, --{role} NAME")
    pattern = "teacher-*" if role == "teacher" else "student-pa_ag-*"
    found = sorted(run.glob(f"{pattern}/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{role}: no {role} in {run}; run `attnkd demo` first, or name a timm model")
    return load_saved(found[-1])


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


def _check_format(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"output: expected a suffix among {', '.join(sorted(known))}, got {path}")


def _heads(shown: dict[str, ClassMaps]) -> str:
    return " and ".join(str(maps.rows.shape[1]) for maps in shown.values())
