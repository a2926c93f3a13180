"""Where else the records of a run go: TensorBoard, Weights & Biases. Each is a function of (record, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Tracker(NamedTuple):
    """``write`` takes the numbers of a record by name, and the step."""

    write: Callable[[Mapping[str, float], int], Any]
    close: Callable[[], Any]


def trackers(folder: Path, settings: Mapping[str, Any], tensorboard: bool, wandb: str | None) -> list[Tracker]:
    """Those that are asked for.

    Args:
        folder: of the run. TensorBoard's files go below it.
        settings: of the run, as JSON.
        wandb: the project there. A run that is continued continues there too.

    Raises:
        ModuleNotFoundError: a package that is not installed.
    """
    return [
        *([_tensorboard(folder)] if tensorboard else []),
        *([_wandb(folder, settings, wandb)] if wandb is not None else []),
    ]


def _tensorboard(folder: Path) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("tensorboard: needs the package of that name: pip install tensorboard") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(record: Mapping[str, float], step: int) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, writer.close)


def _wandb(folder: Path, settings: Mapping[str, Any], project: str) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise ModuleNotFoundError("wandb: needs the package of that name: pip install wandb") from None
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(project=project, id=name, name=folder.name, dir=str(folder), config=dict(settings), resume="allow")
    return Tracker(lambda record, step: run.log(dict(record), step=step), run.finish)
