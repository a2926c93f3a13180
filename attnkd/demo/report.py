"""From an outcome to numbers, a table and sentences; the same numbers go to the screen and into summary.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnkd.demo.experiment import ARMS, Outcome, Trained
from attnkd.demo.models import describe

if TYPE_CHECKING:
    from rich.table import Table

METRICS = {
    # name: (words, unit, digits after the point, does more mean better)
    "knn": ("k-NN top-1", "points", 1, True),
    "linear_probe": ("linear probe top-1", "points", 1, True),
    "kl": ("KL to the teacher", "nats", 3, False),
}


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Scores of teacher and students, and the paired differences between the two arms, seed by seed."""
    arms: dict[str, dict[str, Any]] = {}
    for arm, runs in outcome.students.items():
        arms[arm] = {
            "name": ARMS[arm],
            "attn_weight": outcome.config.arm_weight(arm),
            **describe(runs[0].model),
            "kl_before": spread([run.history[0]["kl"] for run in runs]),
            **{metric: spread([run.scores[metric] for run in runs]) for metric in METRICS},
        }
    differences = {
        metric: difference(arms["pa"][metric]["values"], arms["pa_ag"][metric]["values"]) for metric in METRICS
    }
    return {
        "teacher": {**describe(outcome.teacher.model), **outcome.teacher.scores},
        "students": arms,
        "differences": differences,
        "verdict": [sentence(metric, differences[metric]) for metric in METRICS],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one value) over seeds."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def difference(without: Sequence[float], with_guidance: Sequence[float]) -> dict[str, Any]:
    """Paired difference (with − without), its 95 % t interval, and the p of the two-sided t test (None for one seed)."""
    from scipy.stats import t

    result = spread([b - a for a, b in zip(without, with_guidance, strict=True)])
    interval, p = None, None
    if result["std"] is not None:
        seeds = len(without)
        error = result["std"] / math.sqrt(seeds)
        reach = float(t.ppf(0.975, seeds - 1)) * error
        interval = [result["mean"] - reach, result["mean"] + reach]
        size = abs(result["mean"])
        p = 2 * float(t.sf(size / error, seeds - 1)) if error else float(size == 0)
    return {**result, "interval_95": interval, "p": p}


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number: whoever calls those below 0.05 real is wrong even once in 5 % of such families.

    Holm: A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for done, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[place]))
        corrected[place] = largest
    return corrected


def sentence(metric: str, change: dict[str, Any]) -> str:
    """What the numbers allow to be said about attention guidance and one metric."""
    words, unit, digits, more_is_better = METRICS[metric]
    mean, interval = change["mean"], change["interval_95"]
    by = f"{mean:+.{digits}f} {unit}"
    if interval is None:
        return f"{words}: {by} with attention guidance in one seed, which cannot show whether this is chance."
    span = f"95 % interval {interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}, {len(change['values'])} seeds, one teacher"
    if interval[0] <= 0 <= interval[1]:
        return f"{words}: no difference shown ({by}; {span})."
    verdict = "better" if (mean > 0) == more_is_better else "worse"
    return f"{words}: {verdict} with attention guidance, {by} ({span})."


def table(summary: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    teacher, arms = summary["teacher"], summary["students"]
    seeds = len(arms["pa"]["knn"]["values"])
    students = f"students: mean ± std over {seeds} seeds" if seeds > 1 else "students: one seed"
    made = Table(box=box.SIMPLE_HEAD, title=f"Test images; {students}", title_justify="left")
    made.add_column("")
    for heading in ("heads", "patches", "k-NN top-1 %", "linear probe %", "KL to teacher"):
        made.add_column(heading, justify="right")
    sizes = [str(teacher[key]) for key in ("heads", "patches")]
    made.add_row("teacher", *sizes, f"{teacher['knn']:.1f}", f"{teacher['linear_probe']:.1f}", "")
    for arm in arms.values():
        made.add_row(
            arm["name"],
            str(arm["heads"]),
            str(arm["patches"]),
            plus_minus(arm["knn"], 1),
            plus_minus(arm["linear_probe"], 1),
            f"{arm['kl_before']['mean']:.3f} → {plus_minus(arm['kl'], 3)}",
        )
    return made


def scores_in_words(scores: Mapping[str, float]) -> str:
    names = {
        "top1": ("top-1", 1),
        "train_top1": ("top-1 on its training images", 1),
        "digits_kept": ("digits among the images", 0),
        **{metric: (words, digits) for metric, (words, _, digits, _) in METRICS.items()},
    }

    def words(key: str, value: float) -> str:
        name, digits = names.get(key, (key.replace("_", " "), 3))
        return f"{name} {value:.{digits}f}"

    return ", ".join(words(key, value) for key, value in scores.items())


def plus_minus(value: dict[str, Any], digits: int) -> str:
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{std}"


def curves(outcome: Outcome) -> dict[str, Any]:
    """Every epoch of every stage: {"teacher": [...], "pa": [[...] for every seed], "pa_ag": [[...] for every seed]}."""

    def histories(runs: Sequence[Trained]) -> list:
        return [run.history for run in runs]

    return {"teacher": outcome.teacher.history, **{arm: histories(runs) for arm, runs in outcome.students.items()}}
