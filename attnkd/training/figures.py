"""Pictures of a run while it trains: its curves, and where student and teacher look in the same few images."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkd import files
from attnkd.capture.class_maps import class_kl, class_maps
from attnkd.capture.drawing import draw_class_maps
from attnkd.training.report import LOG
from attnkd.training.watchers import Watcher

CURVES, ATTENTION = "curves.png", "attention.png"
IMAGES = 4
MERGE = "mean"


class Figures(Watcher):
    """Draws curves.png and attention.png into a run's folder, every few epochs and at the end.

    Args:
        folder: of the run.
        epochs: between two drawings.
        task: of one of the methods.
        pictures: [B, C, H, W], values 0 to 1, of the models' size.
        mean, std: of each channel, as the run normalises its images.
        say: is told why there is no attention to draw, where there is none: models without class token.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """

    def __init__(
        self,
        folder: Path,
        epochs: int,
        task: Any,
        pictures: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.epochs, self.task, self.pictures = folder, epochs, task, pictures
        mean_, std_ = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.inputs = (pictures - mean_) / std_
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("figures: needs the package matplotlib: pip install matplotlib")
        self.attention = True
        try:
            self._maps()
        except (ValueError, NotImplementedError) as error:
            self.attention = False
            say(f"figures: {ATTENTION} is not drawn ({error})")

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self.steps, self.every = steps, self.epochs * steps_per_epoch

    def step(self, step: int, parts: Any) -> None:
        if step % self.every and step != self.steps:
            return
        files.write_figure(self.folder / CURVES, draw_curves(self.folder / LOG))
        if self.attention:
            shown = self._maps()
            per_head, merged = class_kl(shown["student"], shown["teacher"], MERGE)
            names = [f"image {index}" for index in range(len(self.pictures))]
            figure = draw_class_maps(names, self.pictures, shown, per_head, merged, MERGE)
            files.write_figure(self.folder / ATTENTION, figure)

    def _maps(self) -> dict[str, Any]:
        teacher = self.task.teachers["teacher"]
        images = self.inputs.to(self.task.device)
        return {
            "teacher": class_maps(teacher.tap.model, teacher.normalise(images), -1, MERGE),
            "student": class_maps(self.task.student, images, -1, MERGE),
        }


def draw_curves(log: Path) -> Any:
    """The losses, the gradient's norm and the learning rate over the epochs, as a run's log has them."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    names = list(dict.fromkeys(name for record in records for name in record if name.endswith("loss")))
    panels = [*names, "grad_norm", "lr"]
    figure = Figure(figsize=(3.2 * len(panels), 2.8), dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        seen = [(record["epoch"], record[name]) for record in records if name in record]
        if seen:
            axes.plot(*zip(*seen, strict=True), linewidth=1.2, marker="." if len(seen) < 30 else None)
        if seen and min(value for _, value in seen) > 0 and name != "lr":
            axes.set_yscale("log")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3, which="both")
    return figure
