"""`attnkd cache`: what a training run needs of its teacher, computed once for every image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from attnkd import files
from attnkd.commands import train
from attnkd.commands.options import choose_device

USAGE = """usage: attnkd cache METHOD [--config FILE] [the options of attnkd train METHOD ...] --output DIR [--dtype float32|float16|bfloat16]

Runs the teacher once on every training image and keeps what the method needs of it in DIR, which `attnkd train METHOD --teacher_cache DIR`
with the same options then reads. For attn_distill, and recipes that show an image in the same way in every epoch. The size is said before the work;
the same command continues what was stopped.
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Like `attnkd train`, with one option more. Called in place of an argparse parser's ``parse_args``."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if words else 2)
    own = argparse.ArgumentParser(prog="attnkd cache", add_help=False, allow_abbrev=False)
    own.add_argument("--dtype", default="float32")
    given, rest = own.parse_known_args(list(words))
    args = train.parse(rest)
    args.command, args.dtype = "cache", given.dtype
    return args


def run(args: argparse.Namespace) -> int:
    """Write the cache; returns the exit status."""
    from tqdm.auto import tqdm

    from attnkd.training import run as training
    from attnkd.training import teacher_cache
    from attnkd.training.distributed import joined

    experiment, settings = args.experiment, args.experiment.config
    teacher_cache.check_still(experiment.method, settings.train)
    with ExitStack() as stack:
        world = stack.enter_context(joined(choose_device(args.device)))
        folder = Path(settings.output)
        if world.first:
            files.make_folder("output", folder)
            stack.enter_context(files.locked(folder / ".lock"))
        world.largest([0])  # the folder is there
        made = training.build(experiment, world, print if world.first else lambda line: None)
        teacher_cache.write(
            folder,
            made.task,
            made.images,
            len(made.images.images),
            made.inputs.size,
            world,
            settings.run,
            dtype=args.dtype,
            say=(lambda line: print(line, flush=True)) if world.first else lambda line: None,
            progress=lambda numbers: tqdm(
                numbers, desc="cache", unit="file", disable=None if world.first else True, file=sys.stderr
            ),
        )
        world.largest([0])  # all have written
    if world.first:
        print(f"{folder}: finished; attnkd train {experiment.method} --teacher_cache {folder} reads it")
    return 0
