"""From an outcome to numbers, a table and sentences; the same numbers go to the screen, into summary.json and into results.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnkd.demo.arms import ARMS, RULERS, Arm, Comparison
from attnkd.demo.config import Config
from attnkd.demo.experiment import Outcome
from attnkd.evaluation.pairs import correct, difference, spread

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

HEAD = ("", "the student learns from", "labels", "accuracy %", "k-NN top-1 %", "distance to the attention", "digits")
LEVEL = 0.05


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
        change["verdict"] = sentence(each, change)
    return found


def sentence(comparison: Comparison, change: Mapping[str, Any]) -> str:
    """What the numbers allow to be said."""
    digits = 1 if comparison.more_is_better else 3
    by = f"{change['mean']:+.{digits}f} {comparison.unit}"
    if change["interval_95"] is None:
        seeds = len(change["values"])
        where = "in one seed" if seeds == 1 else f"in each of {seeds} seeds"
        return f"{comparison.question}: {by} {where}, which cannot show whether this is chance."
    low, high = change["interval_95"]
    numbers = f"{by}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}, p = {_p(change['p_holm'])}"
    if change["p_holm"] >= LEVEL:
        return f"{comparison.question}: no difference shown ({numbers})."
    return f"{comparison.question}: {'better' if (change['mean'] > 0) == comparison.more_is_better else 'worse'} ({numbers})."


def _p(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: its head, then an arm each; without columns that are empty."""
    made: list[tuple[str, ...]] = [HEAD]
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
    kept = [place for place in range(len(HEAD)) if any(row[place] for row in made[1:])]
    return [tuple(row[place] for place in kept) for row in made]


def table(summary: Mapping[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    seeds = len(next(iter(summary["arms"].values()))["knn"]["values"])
    title = f"Test images; mean ± std over {seeds} seeds" if seeds > 1 else "Test images; one seed"
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    head, *others = rows(summary)
    for place, heading in enumerate(head):
        made.add_column(heading, justify="left" if place < 2 else "right")
    for row in others:
        made.add_row(*row)
    return made


def teachers_in_words(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {found['heads']} heads, {found['patches']} patches, k-NN {plus_minus(found['knn'], 1)} %, "
        f"linear probe {plus_minus(found['linear_probe'], 1)} %"
        for name, found in summary["teachers"].items()
    ]


def markdown(summary: Mapping[str, Any]) -> str:
    """The same table for a page, and the sentences below it."""
    head, *others = rows(summary)
    lines = [_line(head), "|---|---" + "|---:" * (len(head) - 2) + "|", *map(_line, others)]
    return "\n".join([*lines, "", *[f"* {comparison['verdict']}" for comparison in summary["comparisons"]]]) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def scores_in_words(scores: Mapping[str, float]) -> str:
    names = {
        "knn": "k-NN",
        "linear_probe": "linear probe",
        "top1": "top-1",
        "train_top1": "top-1 on its training images",
    }

    def words(key: str, value: float) -> str:
        name, digits = names.get(key, key.replace("_", " ")), 3 if key.endswith("distance") else 1
        return f"{name} {value:.{0 if key == 'digits_kept' else digits}f}"

    return ", ".join(words(key, value) for key, value in scores.items())


def plus_minus(value: dict[str, Any], digits: int) -> str:
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"
