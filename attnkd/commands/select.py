"""`attnkd select`: :func:`attnkd.methods.selection.select_images` on the command line."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from attnkd import files
from attnkd.capture.loading import image_config, image_transform, load_model
from attnkd.capture.models import input_channels
from attnkd.commands.options import ByName, add_loading, check_format, choose_device, require, several
from attnkd.evaluation.embedding import draw_points, sampled, tsne
from attnkd.evaluation.features import batches, extract
from attnkd.methods.image_stream import ENCODING, open_image
from attnkd.methods.selection import Selection, select_images
from attnkd.training.sources import open_source

DRAWN = 300
"""Images of each kind in a picture, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Scores every image under a folder with a Vision Transformer classifier and lists the most useful ones: those where "
        "its prediction is certain (low −log of the largest class probability) and its class token's attention is concentrated (low "
        "cosine between its attention to the patches and the uniform distribution). Memory does not grow with the folder."
    )
    parser.epilog = (
        "Interrupt it at any time: the same command continues after the last finished batch. Scores are kept in OUT.work; "
        "another --num-select, --attn-weight or --output-weight then takes seconds. Delete OUT.work when done."
    )
    option = parser.add_argument
    option("--data", type=Path, required=True, metavar="DIR", help="folder with images, searched recursively")
    option(
        "--teacher",
        required=True,
        metavar="MODEL",
        help="timm model name or another library's (docs/models.md), or a model.safetensors of attnkd train",
    )
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
        type=several(int),
        nargs="+",
        metavar="I",
        help="blocks of the probes, from 0 (default: at 1/3 and 2/3 of the depth)",
    )
    option("--head", default="0", metavar="H", help="head of the probes, or 'mean' over heads (default: 0)")
    option("--attn-weight", type=float, default=0.05, metavar="W", help="weight of each block's cosine (default: 0.05)")
    option("--output-weight", type=float, default=0.9, metavar="W", help="weight of the output's term (default: 0.9)")
    option("--checkpoint", type=Path, metavar="FILE", help="the teacher's weights (default: the published ones)")
    option("--num-classes", type=int, metavar="N", help="classes of the teacher (default: the checkpoint's)")
    option("--model-kwargs", nargs="*", default={}, action=ByName, metavar="K=V", help="arguments of the model")
    option("--img-size", type=int, metavar="N", help="image size (default: the model's)")
    option("--mean", type=several(float), nargs="+", metavar="X", help="image mean per channel (default: the model's)")
    option(
        "--std",
        type=several(float),
        nargs="+",
        metavar="X",
        help="image standard deviation per channel (default: the model's)",
    )
    option("--crop-pct", type=float, metavar="X", help="share of the image that is kept (default: the model's)")
    option("--interpolation", metavar="NAME", help="of resizing (default: the model's)")
    add_loading(parser)
    option("--device", metavar="NAME", help="a PyTorch device (default: cuda if there is one, else cpu)")
    option("--amp", action="store_true", help="run the teacher in bfloat16 autocast")
    option(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw the teacher's features of selected and rejected images by t-SNE (Attention Probe's Figure 3)",
    )
    option(
        "--original",
        metavar="SPEC",
        help="draw those of the original training images too: a folder of images by class, 'digits', torch/NAME or hfds/NAME",
    )
    option("--restart", action="store_true", help="forget earlier scores and list the folder again")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    if args.head != "mean" and not args.head.isdecimal():
        raise ValueError(f"head: expected 'mean' or an index from 0, got {args.head!r}")
    device = choose_device(args.device)
    files.make_folder("out", args.out.parent)
    files.check_writable("out", args.out)  # before a model is downloaded
    if args.picture is not None:
        require({"sklearn": "scikit-learn", "matplotlib": "matplotlib"})
        files.check_writable("picture", args.picture)
        check_format("picture", args.picture)
    elif args.original is not None:
        raise ValueError("original: needs the --picture that its images go into")
    kwargs = {**args.model_kwargs, **({} if args.num_classes is None else {"num_classes": args.num_classes})}
    teacher = load_model("teacher", args.teacher, args.checkpoint, **kwargs)
    data = ("img_size", "mean", "std", "crop_pct", "interpolation")
    original = None if args.original is None else _original(args.original, _mode(teacher))
    config = image_config(teacher, **{name: getattr(args, name) for name in data})
    names = ("scores", "blocks", "attn_weight", "output_weight", "batch_size", "workers", "amp", "restart")
    done = select_images(
        teacher,
        args.data,
        args.out,
        args.num_select,
        image_transform(config),
        head=args.head if args.head == "mean" else int(args.head),
        device=device,
        settings={"teacher": args.teacher, "model_kwargs": kwargs, "images": config},
        **{name: getattr(args, name) for name in names},
    )
    print(f"{done.kept} of {done.images} images listed in {done.out}, all scores in {done.scores}")
    if done.skipped:
        print(f"{done.skipped} images were left out: their names have line breaks", file=sys.stderr)
    if done.unreadable:
        print(f"{done.unreadable} could not be read; their errors are in {done.scores}", file=sys.stderr)
    if args.picture is not None:
        draw_selection(args, teacher.to(device), image_transform(config), done, original)
        print(f"wrote {args.picture}")
    return 0


def draw_selection(
    args: argparse.Namespace, teacher: nn.Module, transform: Callable[[Any], Tensor], done: Selection, original: Any
) -> None:
    """At most :data:`DRAWN` images of each kind, by their class tokens after the teacher's last normalisation."""

    def named(selected: str) -> list[str]:
        with done.scores.open(**{**ENCODING, "newline": ""}) as file:
            rows = csv.DictReader(file)
            return sampled((row["path"] for row in rows if row["selected"] == selected and not row["error"]), DRAWN)

    mode = _mode(teacher)
    kinds: dict[str, Any] = {
        "selected": _Files(args.data, named("1"), mode),
        "original": None if original is None else Subset(original.images, sampled(range(len(original.images)), DRAWN)),
        "rejected": _Files(args.data, named("0"), mode),
    }
    found = {
        name: extract(teacher, batches(images, transform, args.batch_size, args.workers)).values
        for name, images in kinds.items()
        if images is not None and len(images)
    }
    files.write_figure(args.picture, draw_points(tsne(found), f"t-SNE of the features of {args.teacher}"))


class _Files(Dataset):
    """Images of a folder by name, without labels."""

    def __init__(self, folder: Path, names: Sequence[str], mode: str) -> None:
        self.folder, self.names, self.mode = folder, names, mode

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.folder / self.names[index], self.mode), 0


def _original(name: str, mode: str) -> Any:
    try:
        return open_source(name, "train", mode=mode)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise type(error)(str(error).replace("data: ", "original: ", 1)) from None


def _mode(teacher: nn.Module) -> str:
    return "L" if input_channels(teacher) == 1 else "RGB"
