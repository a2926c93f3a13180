"""`attnkd select`: :func:`attnkd.methods.selection.select_images` on the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attnkd import files
from attnkd.capture.loading import image_config, image_transform, load_model
from attnkd.commands.options import choose_device
from attnkd.methods.selection import select_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from timm.utils import ParseKwargs

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
        type=int,
        nargs="+",
        metavar="I",
        help="blocks of the probes, from 0 (default: at 1/3 and 2/3 of the depth)",
    )
    option("--head", default="0", metavar="H", help="head of the probes, or 'mean' over heads (default: 0)")
    option("--attn-weight", type=float, default=0.05, metavar="W", help="weight of each block's cosine (default: 0.05)")
    option("--output-weight", type=float, default=0.9, metavar="W", help="weight of the output's term (default: 0.9)")
    option("--checkpoint", type=Path, metavar="FILE", help="the teacher's weights (default: the published ones)")
    option("--num-classes", type=int, metavar="N", help="classes of the teacher (default: the checkpoint's)")
    option("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="arguments of the model")
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
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    if args.head != "mean" and not args.head.isdecimal():
        raise ValueError(f"head: expected 'mean' or an index from 0, got {args.head!r}")
    device = choose_device(args.device)
    files.make_folder("out", args.out.parent)
    files.check_writable("out", args.out)  # before a model is downloaded
    kwargs = {**args.model_kwargs, **({} if args.num_classes is None else {"num_classes": args.num_classes})}
    teacher = load_model("teacher", args.teacher, args.checkpoint, **kwargs)
    data = ("img_size", "mean", "std", "crop_pct", "interpolation")
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
    return 0
