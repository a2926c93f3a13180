"""`attnkd export`: :func:`attnkd.training.export.export` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnkd.training.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the student of a finished run as a folder that its own library loads (timm, transformers and others): "
        "weights, configuration, and a model card with method, teacher, recipe, the results of attnkd eval and the code that loads it."
    )
    parser.add_argument("run", type=Path, help="folder of a run of attnkd train")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--onnx", action="store_true", help="write model.onnx too, for any number of images, and check it"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    use = export(args.run, args.output, args.onnx)
    print(f"wrote {args.output}; it is loaded by\n\n{use}")
    return 0
