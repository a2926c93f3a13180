"""What several commands ask of their options and of this machine."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkd.attention.checks import check_device
from attnkd.training.carrying import WORKERS


def add_loading(parser: argparse.ArgumentParser) -> None:
    """--batch-size and --workers, of commands that run a model on images."""
    option = parser.add_argument
    option("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    option(
        "--workers",
        type=int,
        default=WORKERS,
        metavar="N",
        help="processes that decode images (default: 4, or the number of cores)",
    )


BEFORE = "what is not of this option comes before it, or after --"
"""An option that takes several values takes all words up to the next option, the command's own arguments too."""


def several(kind: type) -> Callable[[str], Any]:
    """The type of an option of several numbers."""

    def number(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers, got {word!r}; {BEFORE}") from None

    return number


class ByName(argparse.Action):
    """The action of an option of several NAME=VALUE: numbers, None and tuples as Python writes them, all else as words."""

    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option: Any = None) -> None:
        found: dict[str, Any] = {}
        for word in filter(None, values or ()):
            name, sign, value = word.partition("=")
            if not sign:
                raise argparse.ArgumentError(self, f"expected NAME=VALUE, got {word!r}; {BEFORE}")
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[name] = value
        setattr(namespace, self.dest, found)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None is a GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch cannot compute on a device of that name here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(name)


def require(packages: Mapping[str, str], extra: str = "demo") -> None:
    """Refuse to start without the packages of an extra.

    Args:
        packages: module → the name that pip knows it by.
        extra: of attnkd, which has them.

    Raises:
        ModuleNotFoundError: at least one cannot be imported; the message says what to install.
    """
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f'needs {", ".join(missing)}: pip install "attnkd[{extra}]"')


def check_format(name: str, path: Path) -> None:
    """Refuse a picture's file whose suffix matplotlib cannot write, before the work.

    Raises:
        ValueError: ``name`` is the argument that the message begins with.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"{name}: expected a suffix among {', '.join(sorted(known))}, got {path}")
