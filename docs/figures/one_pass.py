"""Draws docs/figures/one_pass.png: the three kernels of attention with its divergence. Run: python docs/figures/one_pass.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ATTENTION, TEACHER, BOTH, INK = "#2a6f97", "#e08e45", "#7b5ea7", "#333333"


def box(axes: plt.Axes, x: float, y: float, text: str, color: str) -> None:
    """A step of a tile: a matrix product, an exponential, or what they become."""
    width = max(1.1, 0.085 * len(text))
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.24), width, 0.48, boxstyle="round,pad=0.03", facecolor="white", edgecolor=color, linewidth=1.6))  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#888888", zorder=0, linewidth=1.1, shrinkA=14, shrinkB=14))  # fmt: skip


def kernel(
    axes: plt.Axes, title: str, steps: dict[str, tuple[float, float, str]], arrows: list[tuple[str, str]], note: str
) -> None:
    for text, (x, y, color) in steps.items():
        box(axes, x, y, text, color)
    for start, end in arrows:
        arrow(axes, steps[start][:2], steps[end][:2])
    axes.set_title(title, fontsize=11)
    axes.text(1.5, -0.75, note, ha="center", va="top", fontsize=9, color=INK)
    axes.set_xlim(-0.9, 3.9)
    axes.set_ylim(-1.2, 4.5)
    axes.axis("off")


def draw() -> Path:
    figure, (forward, query, key) = plt.subplots(1, 3, figsize=(13.5, 4.6))
    kernel(
        forward,
        "forward: queries stay, keys stream",
        {
            "q · k": (0, 4, ATTENTION), "q$_t$ · k$_t$": (3, 4, TEACHER),
            "p": (0, 2.7, ATTENTION), "p$_t$": (3, 2.7, TEACHER),
            "p · v": (0, 1.2, ATTENTION), "Σ p$_t$ (log p$_t$ − log p)": (2.6, 1.2, BOTH),
            "output, LSE": (0, 0, ATTENTION), "divergence": (2.6, 0, BOTH),
        },
        [("q · k", "p"), ("q$_t$ · k$_t$", "p$_t$"), ("p", "p · v"), ("p$_t$", "Σ p$_t$ (log p$_t$ − log p)"),
         ("p", "Σ p$_t$ (log p$_t$ − log p)"), ("p · v", "output, LSE"), ("Σ p$_t$ (log p$_t$ − log p)", "divergence")],
        "3 products, 2 exponentials (attention alone: 2 and 1)",
    )  # fmt: skip
    backward = {
        "q · k": (0, 4, ATTENTION), "do · v": (1.5, 4, ATTENTION), "q$_t$ · k$_t$": (3, 4, TEACHER),
        "p": (0, 2.7, ATTENTION), "p$_t$": (3, 2.7, TEACHER), "dS = p (dP − shift) + coef · term": (1.5, 1.4, BOTH),
    }  # fmt: skip
    joined = [("q · k", "p"), ("q$_t$ · k$_t$", "p$_t$"), ("p", "dS = p (dP − shift) + coef · term"),
              ("do · v", "dS = p (dP − shift) + coef · term"), ("p$_t$", "dS = p (dP − shift) + coef · term")]  # fmt: skip
    kernel(
        query,
        "dq: queries stay, keys stream",
        {**backward, "dS · k": (1.5, 0, BOTH)},
        [*joined, ("dS = p (dP − shift) + coef · term", "dS · k")],
        "4 products, 2 exponentials (attention alone: 3 and 1)",
    )
    kernel(
        key,
        "dk and dv: keys stay, queries stream",
        {**backward, "p$^T$ · do": (0, 0, ATTENTION), "dS$^T$ · q": (2.2, 0, BOTH)},
        [*joined, ("p", "p$^T$ · do"), ("dS = p (dP − shift) + coef · term", "dS$^T$ · q")],
        "5 products, 2 exponentials (attention alone: 4 and 1)",
    )
    handles = [
        FancyBboxPatch((0, 0), 1, 1, facecolor="white", edgecolor=c, linewidth=1.6) for c in (ATTENTION, TEACHER, BOTH)
    ]
    figure.legend(
        handles, ["the attention's own", "the teacher's", "both"], loc="lower center", ncol=3, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    print(draw())
