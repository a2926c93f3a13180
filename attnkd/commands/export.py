"""`attnkd export`: :func:`attnkd.training.export.export` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnkd.training.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Writes the student of a finished run as a folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads: '
        "weights, configuration, and a model card with method, teacher, recipe and the results of attnkd eval."
    )
    parser.add_argument("run", type=Path, help="folder of a run of attnkd train")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    folder = export(args.run, args.output)
    print(f'wrote {folder}; timm.create_model("local-dir:{folder}", pretrained=True) loads it')
    return 0
