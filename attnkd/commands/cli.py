"""The `attnkd` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from attnkd import __version__

COMMANDS = {
    # name: (module with add_arguments(parser) and run(args) -> int, one-line help)
    "info": ("attnkd.commands.info", "versions, devices, and which implementation each operation would use here"),
    "maps": (
        "attnkd.commands.maps",
        "where teacher and student look: every head, merged and rolled out, with the KL of each",
    ),
    "validate": (
        "attnkd.commands.validate",
        "the implementations against a float64 oracle, the methods against the textbook, on this machine",
    ),
    "select": (
        "attnkd.methods.selection",
        "list the images of a folder that are worth distilling a teacher on (Attention Probe)",
    ),
    "demo": ("attnkd.demo", "distil a small ViT on real handwritten digits and compare with and without attention"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `attnkd <command>`; returns the exit status (130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="attnkd",
        description="Fused attention distillation for Vision Transformers.",
        epilog="`attnkd COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"attnkd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the command that was asked for is imported: `attnkd --help` should be instant.
        if name in argv[:1]:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
