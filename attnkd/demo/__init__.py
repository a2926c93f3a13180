"""`attnkd demo`: distil small ViTs on real handwritten digits, with and without attention."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnkd.commands.options import require

EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "In every seed, trains a ViT teacher on scikit-learn's handwritten digits and distils it with AttnDistill into students "
        "with fewer heads and fewer patches: with projector alignment only (PA) and with attention guidance (PA + AG), from "
        "the same initial weights, in the same data order. Prints k-NN, linear probe and the KL to the teacher's "
        "attention; writes summary.json, results.md, comparison.png and attention.png. Under 10 minutes "
        "on two CPU cores. With --all, instead, all four methods (AttnDistill, head-specific KD, SSTA, Attention Probe), and "
        "what they are compared with: labels alone, logit distillation, random heads and images; under 30 minutes. "
        "Students are folders as attnkd train makes them."
    )
    parser.epilog = (
        "Interrupt it at any time: the same command continues after the last finished epoch. Runs whose settings "
        "have not changed are reused, others are trained in new folders; summary and figures are always written again."
    )
    option = parser.add_argument
    option("--all", action="store_true", help="all four methods, and what they are compared with")
    option("--output-dir", type=Path, metavar="DIR", help="default: runs/demo, with -all and -quick as asked for")
    option(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of each student (default: 15, with --all 26 on half the images; on fewer images as many steps)",
    )
    option("--teacher-epochs", type=int, metavar="N", help="epochs of the teachers (default: 10, with --all 26)")
    option(
        "--seeds",
        type=int,
        metavar="N",
        help="teachers, and students in each arm, seeds 1 to N (default: 3, with --all 5)",
    )
    option("--attn-weight", type=float, metavar="W", help="weight of AG: the loss is PA + W·AG (default: 0.1)")
    option("--temperature", type=float, metavar="T", help="temperature of the merged attention (default: 4)")
    option(
        "--resample-mode",
        choices=("area", "bilinear", "bicubic"),
        help="how the teacher's attention is resized to the student's patches (default: area)",
    )
    option(
        "--jobs",
        type=int,
        metavar="N",
        help="models trained at a time, each in a process of one thread; changes no result (default: one for each core, at "
        "most 4; 1 on a GPU and with --quick)",
    )
    option("--device", help="a PyTorch device (default: cuda if there is one, else cpu)")
    option(
        "--quick",
        action="store_true",
        help="test in a minute or two that everything works: few images, 2 epochs, 2 seeds",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status. Ctrl-C passes through as KeyboardInterrupt: finished epochs are kept."""
    require(EXTRA)
    from attnkd.demo import command  # needs the extra

    return command.run(args)
