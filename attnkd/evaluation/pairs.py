"""What differences between two ways of training allow to be said: paired by seed, with intervals, corrected for their number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.05
"""A corrected p below this is called a difference."""
BLUE, ORANGE = "#0072B2", "#D55E00"
"""Okabe and Ito's, which colour-blind readers can tell apart."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one value)."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def difference(against: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Paired difference (values − against), its 95 % t interval, and the p of the two-sided t test.

    Both are None where they say nothing: for one pair, and where all differences are the same up to rounding, which on a test set of some
    hundred images is a matter of chance.
    """
    from scipy.stats import t

    result = spread([b - a for a, b in zip(against, values, strict=True)])
    interval, p = None, None
    rounding = 1e-9 * max(1.0, *map(abs, [*against, *values]))
    if result["std"] is not None and result["std"] > rounding:
        pairs = len(against)
        error = result["std"] / math.sqrt(pairs)
        reach = float(t.ppf(0.975, pairs - 1)) * error
        interval = [result["mean"] - reach, result["mean"] + reach]
        p = 2 * float(t.sf(abs(result["mean"]) / error, pairs - 1))
    return {**result, "interval_95": interval, "p": p}


def correct(changes: Sequence[dict[str, Any]]) -> None:
    """Give every difference that has a p its ``p_holm``, corrected for all of them together; None for the others."""
    known = [change for change in changes if change["p"] is not None]
    for change in changes:
        change["p_holm"] = None
    for change, p in zip(known, holm([change["p"] for change in known]), strict=True):
        change["p_holm"] = p


def in_words(change: Mapping[str, Any], unit: str = "points", digits: int = 2, *, more_is_better: bool = True) -> str:
    """What a difference and its ``p_holm`` allow to be said: better or worse where p is below 0.05, else no difference shown."""
    by = f"{change['mean']:+.{digits}f} {unit}"
    if change["interval_95"] is None:
        pairs = len(change["values"])
        where = "in one pair" if pairs == 1 else f"in each of {pairs} pairs"
        return f"{by} {where}, which cannot show whether this is chance"
    (low, high), p = change["interval_95"], change["p_holm"]
    said = "no difference shown"
    if p < LEVEL:
        said = "better" if (change["mean"] > 0) == more_is_better else "worse"
    return f"{said} ({by}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}, p = {f'{p:.2f}' if p >= 0.095 else f'{p:.1g}'})"


def draw(axes: Axes, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each difference by name: a dot for each pair, the mean, and its 95 % interval; orange where it stands after correction."""
    for place, change in enumerate(changes.values()):
        colour = ORANGE if change["p_holm"] is not None and change["p_holm"] < LEVEL else BLUE
        values = change["values"]
        axes.plot(values, [place] * len(values), "o", markersize=5, color="0.35", markerfacecolor="white", zorder=3)
        if change["interval_95"] is not None:
            axes.plot(change["interval_95"], [place, place], color=colour, linewidth=2)
        axes.plot(change["mean"], place, "D", color=colour, markersize=6, zorder=4)
    axes.axvline(0, color="0.35", linewidth=1)
    axes.grid(axis="x", alpha=0.25)
    axes.set_yticks(range(len(changes)), list(changes))
    axes.set_ylim(len(changes) - 0.5, -0.5)  # the first on top


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number: whoever calls those below 0.05 real is wrong even once in 5 % of such families.

    Holm: A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for done, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[place]))
        corrected[place] = largest
    return corrected
