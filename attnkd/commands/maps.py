"""`attnkd maps`: a figure of where teacher and student look, per head, merged and rolled out."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from attnkd.attention.problem import MERGES
from attnkd.capture.class_maps import ClassMaps, class_kl, class_maps, upsample
from attnkd.capture.models import input_stats
from attnkd.methods.task import check_pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws the class token's attention over each image: teacher and student, every head, the heads merged, and the "
        "attention rollout through all blocks; prints KL(teacher || student). Without arguments: the models of the "
        "newest `attnkd demo` on handwritten digits."
    )
    option = parser.add_argument
    option("images", nargs="*", type=Path, metavar="IMAGE", help="image files; none: scikit-learn's two photographs")
    for name in ("teacher", "student"):
        option(
            f"--{name}",
            metavar="MODEL",
            help="timm model name (pretrained weights), or a model.safetensors of attnkd demo; default: the newest of --run",
        )
        option(
            f"--{name}-checkpoint",
            type=Path,
            metavar="FILE",
            help=f"weights for the --{name} named, as timm reads them",
        )
    option("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="a demo's results (default: runs/demo)")
    option("--digits", type=int, default=4, metavar="N", help="how many digits, for one-channel models (default: 4)")
    option("--block", type=int, default=-1, help="the student's block (default: the last)")
    option("--teacher-block", type=int, default=-1, help="the teacher's block (default: the last)")
    option("--merge", choices=MERGES[1:], default="mean", help="how heads are merged (default: mean)")
    option("--no-rollout", action="store_true", help="leave the attention rollout out")
    option("--output", type=Path, default=Path("attention_maps.png"), metavar="PNG", help="default: attention_maps.png")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a PyTorch device")


def run(args: argparse.Namespace) -> int:
    """Draw the figure; returns the exit status, 2 for arguments that cannot be honoured."""
    missing = [package for module, package in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f'attnkd maps: needs {", ".join(missing)}: pip install "attnkd[demo]"', file=sys.stderr)
        return 2
    try:
        teacher = load_model(args.teacher, args.teacher_checkpoint, args.run, "teacher").to(args.device)
        student = load_model(args.student, args.student_checkpoint, args.run, "student").to(args.device)
        check_pair(student, "teacher", teacher)
        names, pictures, inputs = load_pictures(args.images, args.digits, teacher, student)
        shown = {
            role: class_maps(model, images.to(args.device), block, args.merge, not args.no_rollout)
            for role, model, images, block in zip(
                ("teacher", "student"), (teacher, student), inputs, (args.teacher_block, args.block), strict=True
            )
        }
    except (OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        print(f"attnkd maps: {error}", file=sys.stderr)
        return 2
    per_head, merged = class_kl(shown["student"], shown["teacher"], args.merge)
    print("KL(teacher || student) of the class token's attention, nats")
    for index, name in enumerate(names):
        heads = "" if per_head is None else "  heads " + " ".join(f"{kl:.3f}" for kl in per_head[index].tolist())
        print(f"  {name}:  {args.merge} of heads {merged[index].item():.3f}{heads}")
    if per_head is None:
        print(f"  heads: not compared one by one, teacher and student have {_heads(shown)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(names, pictures, shown, per_head, merged, args.merge).savefig(args.output)
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


def load_model(name: str | None, checkpoint: Path | None, run: Path, role: str) -> nn.Module:
    """A timm model by name, pretrained or from a checkpoint; or one that `attnkd demo` saved.

    Raises:
        ValueError: neither a timm model nor a saved one; nothing found in ``run``.
    """
    import timm

    from attnkd.demo import models

    if name is None:
        if checkpoint is not None:
            raise ValueError(f"--{role}-checkpoint: needs the model it belongs to, --{role} NAME")
        pattern = "teacher-*" if role == "teacher" else "student-pa_ag-*"
        found = sorted(run.glob(f"{pattern}/model.safetensors"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(f"--{role}: no {role} in {run}; run `attnkd demo` first, or name a timm model")
        return models.load(found[-1]).eval()
    if Path(name).with_suffix(".json").exists() and Path(name).exists():
        return models.load(Path(name)).eval()
    if not timm.is_model(name):
        raise ValueError(f"--{role}: {name!r} is neither a timm model nor a model.safetensors with its .json beside it")
    if checkpoint is None:
        return timm.create_model(name, pretrained=True).eval()
    return timm.create_model(name, checkpoint_path=str(checkpoint)).eval()


def load_pictures(
    files: Sequence[Path], digits: int, teacher: nn.Module, student: nn.Module
) -> tuple[list[str], Tensor, list[Tensor]]:
    """Names; images [B, C, H, W] with values 0 to 1; and the same as teacher and as student want them.

    Three channels: the files, or scikit-learn's two photographs, resized and cropped as timm evaluates the teacher. One
    channel: test digits of the demo.

    Raises:
        ValueError: models for different numbers of channels; image files for one-channel models.
        OSError: a file that is no image.
    """
    channels = [model.patch_embed.proj.in_channels for model in (teacher, student)]  # type: ignore[union-attr]
    if channels[0] != channels[1] or channels[0] not in (1, 3):
        raise ValueError(
            f"teacher, student: expected both for 1 or both for 3 channels, got {channels[0]} and {channels[1]}"
        )
    if channels[0] == 1:
        if files:
            raise ValueError("images: these models take one channel; they are shown on handwritten digits")
        return _digits(digits)
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(teacher)
    config.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    transform: Any = create_transform(**config)
    named = _photographs() if not files else [(file.name, Image.open(file).convert("RGB")) for file in files]
    pictures = torch.stack([transform(image) for _, image in named])
    inputs = []
    for model in (teacher, student):
        stats = input_stats(model)
        if stats is None:
            raise ValueError(f"model: {type(model).__name__} does not say its images' mean and std (pretrained_cfg)")
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in stats)
        inputs.append((pictures - mean) / std)
    return [name for name, _ in named], pictures, inputs


def _photographs() -> list[tuple[str, Image.Image]]:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    return [
        (Path(name).name, Image.fromarray(pixels))
        for name, pixels in zip(photographs.filenames, photographs.images, strict=True)
    ]


def _digits(count: int) -> tuple[list[str], Tensor, list[Tensor]]:
    from attnkd.demo.data import load_digits
    from attnkd.demo.experiment import Config

    if not 1 <= count <= 10:
        raise ValueError(f"--digits: expected 1 to 10, got {count}")
    digits = load_digits(Config.train_size, Config.test_size)
    labels = digits.test_labels.tolist()
    images = digits.test_images[[labels.index(digit) for digit in range(count)]]
    pictures = (images - digits.background) / (digits.test_images.max() - digits.background)
    return [f"digit {digit}" for digit in range(count)], pictures, [images, images]


def _heads(shown: dict[str, ClassMaps]) -> str:
    return " and ".join(str(maps.rows.shape[1]) for maps in shown.values())
