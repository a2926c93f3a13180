"""`attnkd models`: :func:`attnkd.testing.census.census` on the command line."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections import Counter
from pathlib import Path

from attnkd import files
from attnkd.testing.census import STATUSES, WRONG, census
from attnkd.testing.census_page import as_line, as_markdown, read_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds every Vision Transformer of the installed timm and transformers small, captures its last attention, and compares it with "
        "the attention that the model computes with fused attention off. Then every method takes a step with it. Nothing is downloaded. "
        "The exit status is 1 if any is wrong."
    )
    option = parser.add_argument
    option("--sample", action="store_true", help="one model of every family (a minute) in place of all")
    option("--contains", default="", metavar="TEXT", help="only models with this in their name")
    option(
        "--found", type=Path, metavar="FILE", help="keep what was found here, a line a model, and continue from there"
    )
    option("--output", type=Path, metavar="FILE", help="write the table here, as Markdown")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    if args.output is not None:
        files.check_writable("output", args.output)
    known = []
    if args.found is not None:
        files.check_writable("found", args.found)
        known = read_lines(args.found.read_text(encoding="utf-8")) if args.found.exists() else []
        files.write_text(args.found, "".join(map(as_line, known)))
    found = []
    for one in census(args.sample, args.contains, known):
        found.append(one)
        if args.found is not None and one not in known:
            with args.found.open("a", encoding="utf-8") as file:
                file.write(as_line(one))
        print(f"{one.family:>28}  {one.name:<48} {one.status}{': ' * bool(one.why)}{one.why}", flush=True)
        for method, how in one.methods.items():
            if how:
                print(f"{'':>32}{method}: {how}", flush=True)
    if not found:
        raise ValueError(f"contains: no model has {args.contains!r} in its name")
    counts = Counter(one.status for one in found)
    print(f"{len(found)} models: " + ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]))
    if args.output is not None:
        names = sorted({"torch"} | {one.library for one in found})
        versions = {name: importlib.metadata.version(name) for name in names}
        files.write_text(args.output, as_markdown(found, versions, str(datetime.date.today())))
        print(f"wrote {args.output}")
    if counts[WRONG]:
        print("a captured attention is not the model's: please report it", file=sys.stderr)
    return 1 if counts[WRONG] else 0
