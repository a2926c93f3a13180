"""From an outcome to numbers, a table and sentences; the same numbers go to the screen, into summary.json and into results.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnkd.demo.arms import ARMS, RULERS, Arm, Comparison
from attnkd.demo.config import Config
from attnkd.demo.experiment import Outcome
from attnkd.evaluation.pairs import correct, difference, in_words, spread

if TYPE_CHECKING:
    from torch import nn

HEAD = ("", "the student learns from", "labels", "accuracy %", "k-NN top-1 %", "distance to the attention", "digits")


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Scores of all teachers and arms, and all comparisons."""
    arms, teachers = {}, {}
    for name, runs in outcome.students.items():
        arm = ARMS[name]
        metrics = {score: spread([run.scores[score] for run in runs]) for score in runs[0].scores}
        arms[name] = {"group": arm.group, "name": arm.words, "labels": _labels(arm, outcome.config), **metrics}
    for name in ("teacher", "assistant"):
        runs = [run for each in outcome.teachers if (run := getattr(each, name)) is not None]
        if runs:
            scores = {score: spread([run.scores[score] for run in runs]) for score in runs[0].scores}
            teachers[name] = {**describe(runs[0].model), **scores}
    return {
        "teachers": teachers,
        "heads": [each.heads for each in outcome.teachers],
        "student": describe(next(iter(outcome.students.values()))[0].model),
        "before": {name: spread([scores[name] for scores in outcome.before]) for name in outcome.before[0]},
        "arms": arms,
        "comparisons": _compare(outcome.config.comparisons, arms),
        "runs": [run.folder.name for run in outcome.runs()],
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """The numbers by which two Vision Transformers compare."""
    parts: Any = model
    return {
        "heads": parts.blocks[-1].attn.num_heads,
        "patches": parts.patch_embed.num_patches,
        "width": parts.embed_dim,
        "depth": len(parts.blocks),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _labels(arm: Arm, config: Config) -> dict[str, int]:
    """Labels of training images that the student sees, and that reach it through its teachers and the choice of heads."""
    own = {None: 0, "some": config.labelled, "all": config.train_size}[arm.labels]
    return {"own": own, "teachers": config.train_size if arm.taught else 0}


def _compare(comparisons: tuple[Comparison, ...], arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every comparison's paired differences, and p corrected by Holm for all of them together."""
    found = [
        {**asdict(each), **difference(arms[each.against][each.score]["values"], arms[each.arm][each.score]["values"])}
        for each in comparisons
    ]
    correct(found)
    for each, change in zip(comparisons, found, strict=True):
        digits, more = (1, True) if each.unit == "points" else (3, False)
        change["verdict"] = f"{each.question}: {in_words(change, each.unit, digits, more_is_better=more)}."
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """The table, for a page and for the screen, and the sentences below it."""
    rows: list[tuple[str, ...]] = [HEAD]
    group = None
    for arm in summary["arms"].values():
        rulers, kept = RULERS[arm["group"]], arm.get("digits_kept")
        distance = f"{rulers[0]}_distance"
        rows.append(
            (
                "" if arm["group"] == group else arm["group"],
                arm["name"],
                " + ".join(str(count) if count else "–" for count in arm["labels"].values()),
                plus_minus(arm["top1" if "top1" in arm else "linear_probe"], 1),
                plus_minus(arm["knn"], 1),
                ""
                if len(rulers) > 1
                else f"{summary['before'][distance]['mean']:.3f} → {plus_minus(arm[distance], 3)}",
                "" if kept is None else plus_minus(kept, 0),
            )
        )
        group = arm["group"]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rules = ["-" * width if place < 2 else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    head, *body = zip(*columns, strict=True)
    lines = []
    for row in (head, rules, *body):
        cells = (f"{cell:{'<>'[place > 1]}{widths[place]}}" for place, cell in enumerate(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"* {comparison['verdict']}" for comparison in summary["comparisons"])]) + "\n"


def teachers_in_words(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {found['heads']} heads, {found['patches']} patches, k-NN {plus_minus(found['knn'], 1)} %, "
        f"linear probe {plus_minus(found['linear_probe'], 1)} %"
        for name, found in summary["teachers"].items()
    ]


def plus_minus(value: dict[str, Any], digits: int) -> str:
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"
