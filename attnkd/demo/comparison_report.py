"""From the comparison of all methods to numbers, tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnkd.demo.comparison import ARMS, COMPARISONS, Comparison, Outcome
from attnkd.demo.models import describe
from attnkd.demo.report import difference, plus_minus, spread

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("", "the student learns from", "accuracy %", "k-NN top-1 %", "distance to the attention", "digits chosen")
ACCURACIES = {"top1": "top-1", "linear_probe": "linear probe top-1"}


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Scores of all teachers and arms, and every method's paired differences from its arm without attention."""
    arms = {}
    for arm, runs in outcome.students.items():
        metrics = {name: spread([run.scores[name] for run in runs]) for name in runs[0].scores}
        arms[arm] = {"name": ARMS[arm], **metrics}
    before = {name: spread([scores[name] for scores in outcome.before]) for name in outcome.before[0]}
    return {
        "teachers": {name: {**describe(run.model), **run.scores} for name, run in outcome.teachers.items()},
        "heads": outcome.heads,
        "student": describe(outcome.students["labels"][0].model),
        "before": before,
        "arms": arms,
        "comparisons": [_compare(comparison, arms) for comparison in COMPARISONS],
    }


def _compare(comparison: Comparison, arms: Mapping[str, Any]) -> dict[str, Any]:
    scores = {"accuracy": comparison.accuracy, "distance": comparison.distance}
    differences = {
        what: difference(arms[comparison.without][name]["values"], arms[comparison.arm][name]["values"])
        for what, name in scores.items()
    }
    return {
        **asdict(comparison),
        "differences": differences,
        "verdict": f"{comparison.method}: with attention "
        + "; ".join(
            [
                _words(ACCURACIES[comparison.accuracy], differences["accuracy"], "points", 1, +1),
                _words("distance to the attention", differences["distance"], comparison.unit, 3, -1),
            ]
        )
        + ".",
    }


def _words(name: str, change: Mapping[str, Any], unit: str, digits: int, good: int) -> str:
    mean, interval = change["mean"], change["interval_95"]
    if interval is None:
        return f"{name} {mean:+.{digits}f} {unit} in one seed, which cannot show whether this is chance"
    span = f"{mean:+.{digits}f} {unit}, 95 % interval {interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"
    if interval[0] <= 0 <= interval[1]:
        return f"{name} not significantly different ({span})"
    return f"{name} {'better' if mean * good > 0 else 'worse'} ({span})"


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows: for every method the arm without attention, others like it, and the method's own."""
    made: list[tuple[str, ...]] = []
    for comparison in summary["comparisons"]:
        shown = [comparison["without"], comparison["arm"]]
        if comparison["without"] == "output":
            shown.insert(0, "random")
        before = summary["before"][comparison["distance"]]["mean"]
        for place, name in enumerate(shown):
            arm = summary["arms"][name]
            made.append(
                (
                    "" if place else comparison["method"],
                    arm["name"],
                    plus_minus(arm[comparison["accuracy"]], 1),
                    plus_minus(arm["knn"], 1),
                    f"{before:.3f} → {plus_minus(arm[comparison['distance']], 3)}",
                    plus_minus(arm["digits_kept"], 0) if "digits_kept" in arm else "",
                )
            )
    return made


def table(summary: Mapping[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    seeds = len(summary["arms"]["labels"]["top1"]["values"])
    title = f"Test images; mean ± std over {seeds} seeds" if seeds > 1 else "Test images; one seed"
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for place, heading in enumerate(HEAD):
        made.add_column(heading, justify="left" if place < 2 else "right")
    for row in rows(summary):
        made.add_row(*row)
    return made


def markdown(summary: Mapping[str, Any]) -> str:
    """The same table for a page, and the sentences below it."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(summary)]
    return "\n".join([*lines, "", *[f"* {comparison['verdict']}" for comparison in summary["comparisons"]]]) + "\n"
