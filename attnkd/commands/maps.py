"""`attnkd maps`: a figure of where teacher and student look, per head, merged and rolled out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from attnkd import files
from attnkd.attention.problem import MERGES
from attnkd.capture.class_maps import ClassMaps, class_kl, class_maps, upsample
from attnkd.capture.loading import image_config, image_transform, load_model, load_saved
from attnkd.capture.models import input_channels, input_stats
from attnkd.commands.options import choose_device, require
from attnkd.methods.image_stream import open_image
from attnkd.methods.task import check_pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    files.write_figure(args.output, draw(names, pictures, shown, per_head, merged, args.merge))
    print(f"wrote {args.output}")
    return 0


def draw(
    names: Sequence[str],
    pictures: Tensor,
    shown: dict[str, ClassMaps],
    per_head: Tensor | None,
    merged_kl: Tensor,
    merge: str,
) -> Figure:
    """Two rows an image, teacher above student: the image, every head, merged, rollout; maps upsampled over the image.

    Args:
        names: of the images. pictures: [B, C, H, W], values 0 to 1.
        shown: the maps of 'teacher' and 'student'.
        per_head, merged_kl: as :func:`attnkd.capture.class_maps.class_kl` returns them, written over the student's maps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = max(maps.rows.shape[1] for maps in shown.values())
    extra = 1 if shown["teacher"].rollout is None else 2
    columns, size = 1 + heads + extra, (pictures.shape[-2], pictures.shape[-1])
    figure = Figure(figsize=(1.25 * columns + 0.8, 2.75 * len(names) + 0.7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    grid = figure.subplots(2 * len(names), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for index, name in enumerate(names):
        pixels = pictures[index].permute(1, 2, 0).squeeze(-1).clamp(0, 1).cpu().numpy()
        for row, (who, maps) in enumerate(shown.items()):
            line = grid[2 * index + row]
            line[0].imshow(pixels, cmap="gray", vmin=0, vmax=1)
            line[0].set_ylabel(who, fontsize=9)
            if row == 0:
                line[0].set_title(name, fontsize=8)
            cells = [
                (f"head {head}", maps.heads_map[index, head], line[1 + head]) for head in range(maps.rows.shape[1])
            ]
            cells.append((f"{merge} of heads", maps.merged_map[index], line[1 + heads]))
            if maps.rollout_map is not None:
                cells.append(("rollout", maps.rollout_map[index], line[2 + heads]))
            for column, (title, values, axes) in enumerate(cells):
                kl = None
                if who == "student" and title.startswith("head") and per_head is not None:
                    kl = per_head[index, column]
                elif who == "student" and title.endswith("of heads"):
                    kl = merged_kl[index]
                heat = upsample(values, size).cpu().numpy()
                if pixels.ndim == 2:  # strokes would shine through and be read as attention: outline them instead
                    axes.imshow(heat, cmap="inferno", vmin=0)
                    axes.contour(pixels, levels=[0.5], colors="deepskyblue", linewidths=0.9)
                else:
                    axes.imshow(pixels)
                    axes.imshow(heat, cmap="inferno", alpha=0.65, vmin=0)
                axes.set_title(title if kl is None else f"{title}\nKL {kl.item():.3f}", fontsize=8)
    figure.suptitle(
        "Attention of the class token over the patches; every map from 0 (dark) to its own maximum (bright)", fontsize=9
    )
    return figure


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
