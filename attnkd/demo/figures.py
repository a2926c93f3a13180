"""The demo's figures. Colours: Okabe and Ito's, and the map 'viridis', both made for colour-blind readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attnkd import files
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.capture.class_maps import class_maps
from attnkd.capture.loading import image_config, image_transform
from attnkd.demo.data import IMAGE_SIZE, first_of_each
from attnkd.demo.experiment import Outcome
from attnkd.demo.runs import Trained
from attnkd.training.report import LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"pa": "PA only", "pa_ag": "PA + AG"}
STYLES: dict[str, Any] = {
    "pa": {"color": "#0072B2", "linestyle": "--"},
    "pa_ag": {"color": "#D55E00", "linestyle": "-"},
}


def draw_curves(outcome: Outcome, path: Path) -> None:
    """Left: the loss of both arms over the epochs, mean over seeds and from lowest to highest. Then a line or dot for each seed:
    distance to the teacher's attention before and after training, and k-NN."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _new_figure((12, 4.2))
    loss, distance, accuracy = figure.subplots(1, 3)
    for place, (arm, runs) in enumerate(outcome.students.items()):
        _band(loss, runs, "pa_loss", NAMES[arm], STYLES[arm])
        for run, before in zip(runs, outcome.before, strict=True):
            distance.plot(
                (0, 1), [scores["pa_ag_distance"] for scores in (before, run.scores)], marker="o", **STYLES[arm]
            )
        accuracy.plot([place] * len(runs), [run.scores["knn"] for run in runs], "o", color=STYLES[arm]["color"])
    loss.set(title="PA loss, training images", xlabel="epoch", ylabel="mean squared error", yscale="log")
    loss.margins(x=0)
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    distance.set(
        title="KL to the teacher's attention, test images", ylabel="nats", xlim=(-0.2, 1.2), ylim=(0, None),
        xticks=(0, 1), xticklabels=("untrained", "trained"),
    )  # fmt: skip
    accuracy.plot(
        [2] * len(outcome.teachers), [each.teacher.scores["knn"] for each in outcome.teachers], "o", color="0.35"
    )
    accuracy.set(title="k-NN top-1, test images", ylabel="%", xlim=(-0.5, 2.5))
    accuracy.set_xticks(range(3), [*NAMES.values(), "teachers"])
    for axes in (loss, distance, accuracy):
        axes.grid(alpha=0.25)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    seeds = outcome.config.seeds
    figure.suptitle(f"{seeds} seeds; left, line: mean, band: lowest to highest" if seeds > 1 else "one seed")
    files.write_figure(path, figure)


@torch.no_grad()
def draw_attention(outcome: Outcome, path: Path) -> None:
    """For one test image of every digit: where the class token looks, in the teacher and the students of the first seed."""
    from matplotlib.colors import PowerNorm

    config, teacher = outcome.config, outcome.teachers[0].teacher
    pictures = [Image.open(file) for file in first_of_each(outcome.digits)]
    transform = image_transform(image_config(teacher.model))
    images = torch.stack([transform(picture) for picture in pictures]).to(teacher.device)

    def look(model: Any) -> Any:
        return class_maps(model, images, merge="logsum", rollout=False, temperatures=[config.temperature])

    seen, students = look(teacher.model), {arm: look(runs[0].model) for arm, runs in outcome.students.items()}
    grid = next(iter(students.values())).grid
    resized = resample_attention(seen.rows, seen.grid, grid, config.resample_mode)
    target = merge_attention(resized, "logsum", config.temperature)[:, 0, 0]
    # A teacher patch covers a part of a student patch: scaled by the areas, one colour bar serves all maps.
    area = seen.grid[0] * seen.grid[1] / (grid[0] * grid[1])
    rows: list[tuple[str, Tensor]] = [
        (f"teacher, {seen.grid[0]}×{seen.grid[1]} patches", seen.merged[:, 0, 0] * area),
        (f"teacher on {grid[0]}×{grid[1]}\n(what AG matches)", target),
        *((f"student, {NAMES[arm]}", maps.merged[:, 0, 0]) for arm, maps in students.items()),
    ]
    # Few patches hold most of the attention; on a square-root scale the others can be told apart too.
    scale = PowerNorm(0.5, vmin=0, vmax=max(float(values[:, 1:].max()) for _, values in rows))

    figure = _new_figure((13, 6.5))
    cells = figure.subplots(1 + len(rows), 10)
    for column, picture in enumerate(pictures):
        pixels = np.asarray(picture.convert("L"))
        cells[0][column].imshow(pixels, cmap="gray_r")
        cells[0][column].set_title(str(column), fontsize=11)
        for index, (_, values) in enumerate(rows):
            axes, row = cells[1 + index][column], values[column]
            side = round((len(row) - 1) ** 0.5)
            extent = (-0.5, IMAGE_SIZE - 0.5, IMAGE_SIZE - 0.5, -0.5)
            image = axes.imshow(row[1:].reshape(side, side).cpu().numpy(), cmap="viridis", norm=scale, extent=extent)
            axes.contour(pixels, levels=[pixels.max() / 2], colors="white", linewidths=0.8)
            if index > 1:
                kl = F.kl_div(row.log(), target[column], reduction="sum").item()
                axes.set_xlabel(f"KL {kl:.2f}", fontsize=9, labelpad=3)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(cells[:, 0], ["test image", *(name for name, _ in rows)], strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    bar = figure.colorbar(image, ax=cells[1:, :], fraction=0.025, pad=0.01)
    bar.set_label("attention per student patch (square-root scale)")
    figure.suptitle("Attention of the class token over the patches, last block, heads merged (seed 1)")
    files.write_figure(path, figure)


def draw_comparison(summary: Mapping[str, Any], path: Path) -> None:
    """Left: every comparison of accuracies, dots for the seeds and the interval. Right: distances to the attention."""
    figure = _new_figure((13, 6))
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    accuracies = [each for each in summary["comparisons"] if each["unit"] == "points"]
    distances = [each for each in summary["comparisons"] if each["unit"] != "points"]
    for place, change in enumerate(accuracies):
        left.plot(change["values"], [place] * len(change["values"]), "o", markersize=4, color="0.75")
        shown = change["p_holm"] is not None and change["p_holm"] < 0.05
        colour = "#D55E00" if shown else "#0072B2"
        if change["interval_95"] is not None:
            left.plot(change["interval_95"], [place, place], color=colour, linewidth=2)
        left.plot(change["mean"], place, "D", color=colour, markersize=6)
    left.axvline(0, color="0.35", linewidth=1)
    left.set(
        yticks=range(len(accuracies)),
        yticklabels=[each["question"] for each in accuracies],
        xlabel="difference in accuracy, points",
    )
    left.grid(axis="x", alpha=0.25)
    left.invert_yaxis()
    for place, change in enumerate(distances):
        before = summary["before"][change["score"]]["mean"]
        for arm, colour, offset in (("against", "#0072B2", -0.12), ("arm", "#D55E00", 0.12)):
            values = [value / before for value in summary["arms"][change[arm]][change["score"]]["values"]]
            right.plot(values, [place + offset] * len(values), "o", markersize=4, color=colour)
    right.axvline(1, color="0.35", linestyle=":")
    names = [each["question"].partition(":")[0] for each in distances]
    right.set(
        yticks=range(len(distances)),
        yticklabels=names,
        xlabel="distance to the attention,\nuntrained = 1",
        xlim=(0, None),
    )
    right.grid(axis="x", alpha=0.25)
    right.invert_yaxis()
    figure.suptitle(
        "Left: a dot for each seed, mean and its 95 % interval; orange where the difference stands after correction.\n"
        "Right: with the attention loss (orange) and without (blue).",
        fontsize=10,
    )
    files.write_figure(path, figure)


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    return figure


def _band(axes: Axes, runs: list[Trained], name: str, label: str, style: dict[str, Any]) -> None:
    logs = [(run.folder / LOG).read_text(encoding="utf-8").splitlines() for run in runs]
    values = np.array([[json.loads(line)[name] for line in log] for log in logs])
    epochs = range(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(0), label=label, **style)
    axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)
