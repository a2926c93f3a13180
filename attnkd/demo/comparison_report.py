"""From the comparison of all methods to numbers, tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnkd.demo.arms import ARMS, COMPARISONS, RULERS, Arm, Comparison
from attnkd.demo.comparison import ComparisonConfig, Outcome
from attnkd.demo.models import describe
from attnkd.demo.report import difference, holm, plus_minus, spread

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("", "the student learns from", "labels", "accuracy %", "k-NN top-1 %", "distance to the attention", "digits")
LEVEL = 0.05


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Scores of all teachers and arms, and all comparisons."""
    arms = {}
    for name, runs in outcome.students.items():
        arm = ARMS[name]
        metrics = {score: spread([run.scores[score] for run in runs]) for score in runs[0].scores}
        arms[name] = {"group": arm.group, "name": arm.words, "labels": _labels(arm, outcome.config), **metrics}
    teachers = {
        name: {
            **describe(getattr(outcome.teachers[0], name).model),
            **{score: spread([getattr(each, name).scores[score] for each in outcome.teachers]) for score in scores},
        }
        for name in ("teacher", "assistant")
        for scores in [getattr(outcome.teachers[0], name).scores]
    }
    return {
        "teachers": teachers,
        "heads": [each.heads for each in outcome.teachers],
        "student": describe(outcome.students["labels"][0].model),
        "before": {name: spread([scores[name] for scores in outcome.before]) for name in outcome.before[0]},
        "arms": arms,
        "comparisons": _compare(arms),
    }


def _labels(arm: Arm, config: ComparisonConfig) -> dict[str, int]:
    """Labels of training images that the student sees, and that reach it through its teachers and the choice of heads."""
    own = {None: 0, "some": config.labelled, "all": config.train_size}[arm.labels]
    return {"own": own, "teachers": config.train_size if arm.taught else 0}


def _compare(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every comparison's paired differences, and p corrected by Holm for all of them together."""
    found = [
        {**asdict(each), **difference(arms[each.against][each.score]["values"], arms[each.arm][each.score]["values"])}
        for each in COMPARISONS
    ]
    if found[0]["p"] is not None:
        for change, p in zip(found, holm([change["p"] for change in found]), strict=True):
            change["p_holm"] = p
    for each, change in zip(COMPARISONS, found, strict=True):
        change["verdict"] = sentence(each, change)
    return found


def sentence(comparison: Comparison, change: Mapping[str, Any]) -> str:
    """What the numbers allow to be said."""
    digits = 1 if comparison.more_is_better else 3
    by = f"{change['mean']:+.{digits}f} {comparison.unit}"
    if change["interval_95"] is None:
        return f"{comparison.question}: {by} in one seed, which cannot show whether this is chance."
    low, high = change["interval_95"]
    numbers = f"{by}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}, p = {_p(change['p_holm'])}"
    if change["p_holm"] >= LEVEL:
        return f"{comparison.question}: no difference shown ({numbers})."
    return f"{comparison.question}: {'better' if (change['mean'] > 0) == comparison.more_is_better else 'worse'} ({numbers})."


def _p(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, an arm each."""
    made: list[tuple[str, ...]] = []
    group = None
    for arm in summary["arms"].values():
        rulers, before = RULERS[arm["group"]], summary["before"]
        distance = f"{rulers[0]}_distance" if len(rulers) == 1 else None
        made.append(
            (
                "" if arm["group"] == group else arm["group"],
                arm["name"],
                " + ".join(str(count) if count else "–" for count in arm["labels"].values()),
                plus_minus(arm["top1" if "top1" in arm else "linear_probe"], 1),
                plus_minus(arm["knn"], 1),
                "" if distance is None else f"{before[distance]['mean']:.3f} → {plus_minus(arm[distance], 3)}",
                plus_minus(arm["digits_kept"], 0) if "digits_kept" in arm else "",
            )
        )
        group = arm["group"]
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
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(summary)]
    return "\n".join([*lines, "", *[f"* {comparison['verdict']}" for comparison in summary["comparisons"]]]) + "\n"
