"""`python -m benchmarks COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    # name: (module with add_arguments(parser) and run(args) -> int, one-line help)
    "run": (
        "benchmarks.run",
        "every operation against its opponents, scaling, training steps, first calls (needs a GPU)",
    ),
    "aot": ("benchmarks.aot", "compile every kernel for every GPU target and check what it uses (no GPU needed)"),
    "traffic": ("benchmarks.traffic", "count the bytes every kernel moves, against the least possible (no GPU needed)"),
    "host": (
        "benchmarks.host",
        "what one call costs the processor that issues it, kernels not launched (no GPU needed)",
    ),
    "cpu": ("benchmarks.cpu", "the chunked implementation against eager PyTorch on this machine's CPU"),
    "matrix": ("benchmarks.matrix", "kernels and capture with the oldest to the newest torch, Triton and timm"),
    "compare": ("benchmarks.compare", "what became slower or larger from one result file to another"),
    "plot": ("benchmarks.plot", "figures from result files"),
    "table": ("benchmarks.table", "write the tables of README and docs from the committed results"),
    "tune": (
        "benchmarks.tune",
        "search launch configurations for this device and print the rows to commit (needs a GPU)",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Proofs and measurements of the kernels.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv[:1]:  # only the command that was asked for is imported
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
