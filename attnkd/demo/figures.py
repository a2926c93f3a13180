"""The demo's figures. Colours: Okabe and Ito's, and the map 'viridis', both made for colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from attnkd import files
from attnkd.demo.attention import attention_divergence_per_image, cls_attention
from attnkd.demo.experiment import ARMS, Outcome
from attnkd.demo.training import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, Any] = {
    "pa": {"color": "#0072B2", "linestyle": "--"},
    "pa_ag": {"color": "#D55E00", "linestyle": "-"},
}


def draw_curves(outcome: Outcome, path: Path) -> None:
    """Per epoch and arm, mean over seeds and from lowest to highest seed: PA loss, KL to the teacher, k-NN."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _new_figure((12, 4.2))
    panels = figure.subplots(1, 3)
    for axes, key, title, unit in zip(
        panels,
        ("pa_loss", "kl", "knn"),
        ("PA loss, training images", "KL to the teacher's attention, test images", "k-NN top-1, test images"),
        ("mean squared error", "nats", "%"),
        strict=True,
    ):
        for arm, runs in outcome.students.items():
            _band(axes, [run.history for run in runs], key, ARMS[arm], STYLES[arm])
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.margins(x=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[1].set_ylim(bottom=0)
    teacher = outcome.teacher.scores["knn"]
    panels[2].axhline(teacher, color="0.35", linestyle=":", label=f"teacher, {teacher:.1f} %")
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    seeds = outcome.config.seeds
    figure.suptitle(f"line: mean, band: lowest to highest of {seeds} seeds" if seeds > 1 else "one seed")
    files.write_figure(path, figure)


def draw_attention(outcome: Outcome, path: Path) -> None:
    """For one test image of every digit: where the class token looks, in teacher and students."""
    from matplotlib.colors import PowerNorm

    digits, temperature = outcome.digits, outcome.config.temperature
    labels = digits.test_labels.tolist()
    chosen = [labels.index(digit) for digit in range(10)]
    images, target = digits.test_images[chosen], outcome.target[chosen]
    teacher = cls_attention(outcome.teacher.model, images, temperature)
    students = {arm: cls_attention(runs[0].model, images, temperature) for arm, runs in outcome.students.items()}
    # A teacher patch covers a part of a student patch: scaled by the areas, one colour bar serves all maps.
    area = (teacher.shape[1] - 1) / (target.shape[1] - 1)
    rows: list[tuple[str, Tensor]] = [
        (f"teacher, {_sides(teacher)} patches", teacher * area),
        (f"teacher on {_sides(target)}\n(what AG matches)", target),
        *((f"student, {ARMS[arm]}", rows) for arm, rows in students.items()),
    ]
    kl = {
        index: attention_divergence_per_image(target, rows).tolist()
        for index, rows in enumerate(students.values(), start=2)
    }
    # Few patches hold most of the attention; on a square-root scale the others can be told apart too.
    scale = PowerNorm(0.5, vmin=0, vmax=max(float(values[:, 1:].max()) for _, values in rows))

    figure = _new_figure((13, 6.5))
    grid = figure.subplots(1 + len(rows), 10)
    pixels = images[:, 0].cpu().numpy()
    half = (digits.background + pixels.max((1, 2))) / 2
    for column in range(10):
        top = grid[0][column]
        top.imshow(pixels[column], cmap="gray_r")
        top.set_title(str(column), fontsize=11)
        for index, (_, values) in enumerate(rows):
            axes = grid[1 + index][column]
            image = axes.imshow(_as_map(values[column]), cmap="viridis", norm=scale, extent=(-0.5, 15.5, 15.5, -0.5))
            axes.contour(pixels[column], levels=[half[column]], colors="white", linewidths=0.8)
            if index in kl:
                axes.set_xlabel(f"KL {kl[index][column]:.2f}", fontsize=9, labelpad=3)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], ["test image", *(name for name, _ in rows)], strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    bar = figure.colorbar(image, ax=grid[1:, :], fraction=0.025, pad=0.01)
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
        shown = change.get("p_holm", 1.0) < 0.05
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


def _band(axes: Axes, histories: Sequence[Sequence[Record]], key: str, label: str, style: dict[str, Any]) -> None:
    epochs = [int(record["epoch"]) for record in histories[0] if key in record]
    values = np.array([[record[key] for record in history if key in record] for history in histories])
    axes.plot(epochs, values.mean(0), label=label, **style)
    axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def _as_map(row: Tensor) -> np.ndarray:
    side = round((len(row) - 1) ** 0.5)
    return row[1:].reshape(side, side).cpu().numpy()


def _sides(rows: Tensor) -> str:
    side = round((rows.shape[1] - 1) ** 0.5)
    return f"{side}×{side}"
