"""The `attnkd` command: runs the requested command, and turns errors into one sentence and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attnkd import __version__

COMMANDS = {
    # name: (module with run(args) -> int and add_arguments(parser), or its own parse(words) -> args; one-line help)
    "info": ("attnkd.commands.info", "versions, devices, and which implementation each operation would use here"),
    "maps": (
        "attnkd.commands.maps",
        "where teacher and student look: every head, merged and rolled out, with the KL of each",
    ),
    "validate": (
        "attnkd.commands.validate",
        "the implementations against a float64 oracle, the methods against the textbook, on this machine",
    ),
    "models": (
        "attnkd.commands.models",
        "which models of the installed timm and transformers are captured exactly, as a table",
    ),
    "select": (
        "attnkd.commands.select",
        "list the images of a folder on which a teacher should be distilled (Attention Probe)",
    ),
    "train": ("attnkd.commands.train", "train a student by one of the methods, from published recipes"),
    "cache": ("attnkd.commands.cache", "run a teacher once on every training image, and keep what a run needs of it"),
    "eval": ("attnkd.commands.eval", "k-NN, linear probe and fine-tuning of a run's student or another model"),
    "export": (
        "attnkd.commands.export",
        "write a run's student as a folder that its own library loads, with a model card",
    ),
    "demo": ("attnkd.demo", "distil a small ViT on real handwritten digits and compare with and without attention"),
}

BAD_REQUEST = (ValueError, TypeError, NotImplementedError, ImportError)
"""What the product raises for arguments that cannot be honoured: exit status 2. Everything else it raises is 1."""
COULD_NOT_FINISH = (OSError, RuntimeError, MemoryError)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything is left as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `attnkd <command>`.

    Args:
        argv: the command and its options; None: those of this process, which is then the command's alone.

    Returns:
        The exit status: 0 done; 1 could not finish (or a check failed); 2 a request that cannot be honoured; 130 after
        Ctrl-C, 143 after SIGTERM, 141 when the reader of the output has gone.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    name, args = next((word for word in given[:1] if word in COMMANDS), ""), argparse.Namespace()
    try:
        with _terminable():
            args = _parse(given)
            args.argv, args.whole_process = given, argv is None
            status = importlib.import_module(COMMANDS[args.command][0]).run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        print(
            f"\n{'terminated' if terminated else 'interrupted'}; run the same command again to continue",
            file=sys.stderr,
        )
        return 143 if terminated else 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except (*BAD_REQUEST, *COULD_NOT_FINISH) as error:
        print(f"attnkd {name}: {_sentence(error, args)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        # An UnsupportedOperation of io, a fault of a file, is a ValueError too.
        return 2 if isinstance(error, BAD_REQUEST) and not isinstance(error, OSError) else 1


def _parse(argv: list[str]) -> argparse.Namespace:
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
            asked = importlib.import_module(module)
            if hasattr(asked, "parse"):
                return asked.parse(argv[1:])
            asked.add_arguments(command)
    return parser.parse_args(argv)


def _sentence(error: BaseException, args: argparse.Namespace) -> str:
    """What went wrong. A message that begins with the name of an argument begins with that of its option instead."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'standard output'}: {error.strerror}"  # all other files are named, see attnkd.files
    text = str(error).strip() or type(error).__name__
    names, colon, rest = text.partition(": ")
    if colon and all(word in vars(args) for word in names.split(", ")):
        own = hasattr(args, "experiment")  # train and cache take the settings' own names
        return ", ".join(f"--{word if own else word.replace('_', '-')}" for word in names.split(", ")) + ": " + rest
    return text


def _drop_output() -> None:
    """Where standard output cannot be written: Python writes what is left of it once more at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # it is not a file, or closed


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that files are closed and temporary ones removed."""

    def stop(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
