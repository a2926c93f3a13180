"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from attnkd.evaluation.pairs import BLUE, ORANGE, draw


def draw_comparison(summary: Mapping[str, Any], path: Path) -> None:
    """Left: every comparison of accuracies, dots for the seeds and the interval. Right: distances to the attention."""
    from matplotlib.figure import Figure

    accuracies = [each for each in summary["comparisons"] if each["unit"] == "points"]
    distances = [each for each in summary["comparisons"] if each["unit"] != "points"]
    figure = Figure(figsize=(13, 1.8 + 0.3 * len(accuracies)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    draw(left, {each["question"]: each for each in accuracies})
    for place, change in enumerate(distances):
        before = summary["before"][change["score"]]["mean"]
        for arm, colour, offset in (("against", BLUE, -0.12), ("arm", ORANGE, 0.12)):
            values = [value / before for value in summary["arms"][change[arm]][change["score"]]["values"]]
            right.plot(values, [place + offset] * len(values), "o", markersize=4, color=colour)
    left.set(xlabel="difference in accuracy, points")
    right.axvline(1, color="0.35", linestyle=":")
    right.grid(axis="x", alpha=0.25)
    right.set(xlabel="distance to the attention,\nuntrained = 1", xlim=(0, None), ylim=(len(distances) - 0.5, -0.5))
    right.set_yticks(range(len(distances)), [each["question"].partition(":")[0] for each in distances])
    figure.suptitle(
        "Left: a dot for each seed, mean and its 95 % interval; orange where the difference stands after correction.\n"
        "Right: with the attention loss (orange) and without (blue).",
        fontsize=10,
    )
    files.write_figure(path, figure)


@torch.no_grad()
def draw_attention(outcome: Outcome, path: Path) -> None:
    """For one test image of every digit: where the class token looks, in the teacher and in AttnDistill's students of the first seed."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    config, teacher = outcome.config, outcome.teachers[0].teacher
    pictures = [Image.open(file) for file in first_of_each(outcome.digits)]
    transform = image_transform(image_config(teacher.model))
    images = torch.stack([transform(picture) for picture in pictures]).to(teacher.device)

    def look(model: Any) -> Any:
        return class_maps(model, images, merge="logsum", rollout=False, temperatures=[config.temperature])

    seen, students = look(teacher.model), [look(outcome.students[arm][0].model) for arm in ("pa", "pa_ag")]
    grid = students[0].grid
    resized = resample_attention(seen.rows, seen.grid, grid, config.resample_mode)
    target = merge_attention(resized, "logsum", config.temperature)[:, 0, 0]
    # A teacher patch covers a part of a student patch: scaled by the areas, one colour bar serves all maps.
    area = seen.grid[0] * seen.grid[1] / (grid[0] * grid[1])
    rows: dict[str, Tensor] = {
        f"teacher, {seen.grid[0]}×{seen.grid[1]} patches": seen.merged[:, 0, 0] * area,
        f"teacher on {grid[0]}×{grid[1]}\n(what AG matches)": target,
        "student, PA only": students[0].merged[:, 0, 0],
        "student, PA + AG": students[1].merged[:, 0, 0],
    }
    # Few patches hold most of the attention; on a square-root scale the others can be told apart too.
    scale = PowerNorm(0.5, vmin=0, vmax=max(float(values[:, 1:].max()) for values in rows.values()))
    figure = Figure(figsize=(13, 6.5), dpi=130, layout="constrained")
    cells = figure.subplots(1 + len(rows), 10)
    for column, picture in enumerate(pictures):
        pixels = np.asarray(picture.convert("L"))
        cells[0][column].imshow(pixels, cmap="gray_r")
        cells[0][column].set_title(str(column), fontsize=11)
        for axes, (name, values) in zip(cells[1:, column], rows.items(), strict=True):
            row, extent = values[column], (-0.5, IMAGE_SIZE - 0.5, IMAGE_SIZE - 0.5, -0.5)
            side = round((len(row) - 1) ** 0.5)
            image = axes.imshow(row[1:].view(side, side).cpu().numpy(), cmap="viridis", norm=scale, extent=extent)
            axes.contour(pixels, levels=[pixels.max() / 2], colors="white", linewidths=0.8)
            if name.startswith("student"):
                kl = F.kl_div(row.log(), target[column], reduction="sum").item()
                axes.set_xlabel(f"KL {kl:.2f}", fontsize=9, labelpad=3)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(cells[:, 0], ["test image", *rows], strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    bar = figure.colorbar(image, ax=cells[1:, :], fraction=0.025, pad=0.01)
    bar.set_label("attention per student patch (square-root scale)")
    figure.suptitle("Attention of the class token over the patches, last block, heads merged (seed 1)")
    files.write_figure(path, figure)
