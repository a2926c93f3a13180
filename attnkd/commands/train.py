"""`attnkd train`: :func:`attnkd.training.run.train` on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from attnkd.commands.options import choose_device

USAGE = """usage: attnkd train METHOD --teacher MODEL --student MODEL --data SPEC --output DIR [--recipe ROW] [--config FILE] [OPTION ...]

Train a student with one of the methods: {methods}.
`attnkd train METHOD --help` lists all options: the method's begin with --method, those of optimizer and images with --train,
those of this machine with --run. `attnkd train --recipes` lists the recipes. The run is in DIR; the same command continues
it. `torchrun --nproc-per-node 8 -m attnkd train ...` uses eight GPUs.

options of every method, among others: --teacher --student --assistant --label_teacher (each with _kwargs and _checkpoint, as --student_kwargs and --teacher_checkpoint),
--data --data_root --download --mean --std --img_size --seed --resume --device --tensorboard --teacher_cache
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command's options, which depend on the method. Called in place of an argparse parser's ``parse_args``."""
    from attnkd.commands.options import require
    from attnkd.training.config import METHODS
    from attnkd.training.config import parse as parse_experiment

    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(methods=", ".join(METHODS)))
        raise SystemExit(0 if words else 2)
    if words[0] == "--recipes":
        print(table_of_recipes())
        raise SystemExit(0)
    require({"jsonargparse": "jsonargparse", "safetensors": "safetensors"}, extra="train")
    method, rest = (None, words) if words[0].startswith("-") else (words[0], words[1:])
    experiment = parse_experiment(method, rest)
    return argparse.Namespace(command="train", experiment=experiment, **vars(experiment.config))


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status: 0 also after a SIGTERM, with the state saved."""
    from attnkd.training.config import as_yaml
    from attnkd.training.run import train

    device = choose_device(args.device)
    if _first():
        print(as_yaml(args.experiment.settings()), end="", flush=True)
    ended = train(args.experiment, device)
    if _first():
        if ended.nonfinite:
            print(f"{ended.nonfinite} steps were left out: their gradient was not finite", file=sys.stderr)
        where = f"step {ended.steps} of {ended.total}"
        if ended.finished:
            print(f"{where}: finished, the student is {ended.folder / 'model.safetensors'}")
        else:
            print(f"{where}: stopped and saved; run the same command again to continue")
    return 0


def table_of_recipes() -> str:
    """Every row with its source and what is ours."""
    from attnkd.training.rows import ROWS

    return "\n".join(
        f"{name} ({row.method})\n    {row.source}\n    open: {row.open}" for name, row in ROWS.items()
    )  # fmt: skip


def _first() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
