"""What several commands ask of their options and of this machine."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path

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
