"""Draws docs/figures/tile_sweep.png: how the whole-map kernels walk over the map. Run: python docs/figures/tile_sweep.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

ROWS, COLUMNS = 4, 6
STAYS, STREAMS, NOW, SEEN, IDLE = "#2a6f97", "#e08e45", "#c1121f", "#d9e6ee", "#ffffff"


def sweep(axes: plt.Axes, title: str, along_keys: bool, stays: str, streams: str, carried: str, result: str) -> None:
    """One program's walk: ``along_keys`` it owns a row of tiles, else a column."""
    own, at = (1, 3) if along_keys else (2, 2)
    for row in range(ROWS):
        for column in range(COLUMNS):
            mine, step = (row == own, column) if along_keys else (column == own, row)
            color = NOW if mine and step == at else SEEN if mine and step < at else IDLE
            axes.add_patch(
                Rectangle((column, ROWS - 1 - row), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.8)
            )
    queries = [
        STAYS if along_keys and row == own else STREAMS if not along_keys and row == at else IDLE for row in range(ROWS)
    ]
    keys = [
        STAYS if not along_keys and c == own else STREAMS if along_keys and c == at else IDLE for c in range(COLUMNS)
    ]
    for row, color in enumerate(queries):
        axes.add_patch(Rectangle((-1.0, ROWS - 1 - row), 0.7, 1, facecolor=color, edgecolor="#888888", linewidth=0.8))
    for column, color in enumerate(keys):
        axes.add_patch(Rectangle((column, ROWS + 0.3), 1, 0.7, facecolor=color, edgecolor="#888888", linewidth=0.8))
    if along_keys:
        y = ROWS - own - 0.5
        start, end, place = (at + 1.1, y), (COLUMNS - 0.1, y), (COLUMNS + 0.2, y)
        axes.text(*place, result, va="center", fontsize=9)
    else:
        x = own + 0.5
        start, end, place = (x, ROWS - at - 1.1), (x, 0.1), (x, -0.25)
        axes.text(*place, result, ha="center", va="top", fontsize=9)
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=NOW, linewidth=1.5))
    axes.text(-1.35, ROWS / 2, "queries", rotation=90, ha="center", va="center", fontsize=9)
    axes.text(COLUMNS / 2, ROWS + 1.15, "keys", ha="center", va="bottom", fontsize=9)
    axes.set_title(title, fontsize=11, pad=16)
    axes.text(
        COLUMNS / 2,
        -1.15,
        f"stays: {stays}\nstreams: {streams}\ncarried: {carried}",
        ha="center",
        va="top",
        fontsize=8.5,
    )
    axes.set_xlim(-1.8, COLUMNS + 1.9)
    axes.set_ylim(-2.9, ROWS + 1.8)
    axes.set_aspect("equal")
    axes.axis("off")


def draw() -> Path:
    figure, (forward, query, key) = plt.subplots(1, 3, figsize=(13.5, 5.2))
    sweep(
        forward, "forward", True, "q of student and teacher", "k of both", "maxima, sums, c of each row", "loss\nLSEs"
    )
    sweep(query, "query gradient", True, "q of both, LSEs", "k of both", "accumulator [BM, D]", "dq")
    sweep(key, "key gradient", False, "k of both", "q of both, LSEs, upstream", "accumulator [BN, D]", "dk")
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="#888888") for c in (STAYS, STREAMS, NOW, SEEN)]
    labels = ["stays on chip", "streams past", "tile of both maps being computed", "computed and forgotten"]
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    print(draw())
