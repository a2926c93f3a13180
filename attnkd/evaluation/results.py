"""What `attnkd eval` leaves in a run's folder, as a table of several runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnkd.evaluation.knn import TEMPERATURE
from attnkd.evaluation.pairs import correct, difference, draw, in_words

NAMES = {"knn": "k-NN", "linear": "linear", "finetune": "fine-tuned"}
PLAIN = {"temperature": TEMPERATURE, "img_size": None, "mean": None, "std": None, "model_kwargs": None}
"""What a result may have been measured with, and what goes without saying."""


def results_of(run: Path) -> list[dict[str, Any]]:
    """All results in a run's folder.

    Raises:
        ValueError: no folder, or a file that is no result.
    """
    if not run.is_dir():
        raise ValueError(f"model: expected the folder of a run, got {run}")
    found = []
    for path in sorted(run.glob("eval_*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            scores(result)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"model: {path} is no result of attnkd eval; delete it") from None
        found.append(result)
    return found


def scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 accuracies in percent by what was measured, such as 'linear, 0.01 of the labels': all that makes scores of other runs
    incomparable, but for the data set and its validation split."""
    name = NAMES[result["evaluation"]]
    part = "" if result.get("subset") is None else f", {result['subset']} of the labels"
    if result.get("last_blocks", 1) != 1:
        part += f", last {result['last_blocks']} blocks"
    if (result.get("train_split") or "train") != "train":
        part += f", learnt from {result['train_split']}"
    for option, plain in PLAIN.items():
        if result.get(option, plain) != plain:
            part += f", {option} {in_short(result[option])}"
    if result["evaluation"] == "knn":
        return {f"{name} {k}{part}": score["top1"] for k, score in result["scores"].items()}
    return {f"{name}{part}": result["top1"]}


def in_short(value: Any) -> str:
    """An option's value as it is given on the command line."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={own}" for name, own in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def compared(runs: Sequence[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """{data set: {what was measured: {run: top-1 accuracy in percent}}}; a run may lack some."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        for result in results_of(run):
            for name, score in scores(result).items():
                table.setdefault(f"{result['data']}, {result['val_split'] or 'validation'}", {}).setdefault(name, {})[
                    str(run)
                ] = score
    return table


def as_text(table: Mapping[str, Mapping[str, Mapping[str, float]]], runs: Iterable[Path]) -> str:
    """One table a data set: a row for each measure, a column for each run, the best marked."""
    names, lines = [str(run) for run in runs], []
    columns = [max(len(name), len("100.00*")) + 3 for name in names]
    for data, rows in table.items():
        width = max(len(row) for row in rows)
        lines += [
            f"top-1 % on {data}",
            " " * width + "".join(f"{name:>{own}}" for name, own in zip(names, columns, strict=True)),
        ]
        for row, found in rows.items():
            best = max(found.values())
            cells = (
                f"{found[name]:.2f}{'*' if found[name] == best and len(found) > 1 else ' '}" if name in found else "- "
                for name in names
            )
            lines.append(row.ljust(width) + "".join(f"{cell:>{own}}" for cell, own in zip(cells, columns, strict=True)))
        lines.append("")
    return "\n".join(lines).rstrip()


def paired(runs: Sequence[Path], against: Sequence[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """{data set: {what was measured: differences in points, see :func:`attnkd.evaluation.pairs.difference`}}, the first run against
    the first of the others and so on: of the same seed, say. ``p_holm`` is corrected for all measures together.

    Raises:
        ValueError: not as many runs on both sides, a run that is named twice, or nothing that was measured in all of them.
    """
    if len(runs) != len(against) or len({run.resolve() for run in [*runs, *against]}) < 2 * len(runs):
        raise ValueError(
            f"against: expected as many runs as are compared with them, {len(runs)}, each of them once, got {', '.join(map(str, against))}"
        )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for data, rows in compared([*runs, *against]).items():
        for name, scores in rows.items():
            if len(scores) == 2 * len(runs):
                before, after = ([scores[str(run)] for run in side] for side in (against, runs))
                found.setdefault(data, {})[name] = difference(before, after)
    if not found:
        raise ValueError("model, against: expected a score that all runs have; evaluate all in the same way")
    correct([change for rows in found.values() for change in rows.values()])
    return found


def pairs_as_text(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each measure: what its differences allow to be said."""
    lines = []
    for data, rows in table.items():
        pairs = len(next(iter(rows.values()))["values"])
        lines.append(f"differences in top-1 on {data}, {pairs} pair{'s' * (pairs > 1)}, p corrected by Holm")
        width = max(len(row) for row in rows)
        lines += [*(f"{row.ljust(width)}  {in_words(change)}" for row, change in rows.items()), ""]
    return "\n".join(lines).rstrip()


def draw_pairs(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Any:
    """The same as a matplotlib figure, a panel for each data set."""
    from matplotlib.figure import Figure

    lines = [len(rows) for rows in table.values()]
    figure = Figure(figsize=(9, 0.8 * len(lines) + 0.4 * sum(lines)), dpi=130, layout="constrained")
    panels = figure.subplots(len(lines), squeeze=False, height_ratios=lines)[:, 0]
    for axes, (data, rows) in zip(panels, table.items(), strict=True):
        draw(axes, rows)
        axes.set_title(f"difference in top-1 points on {data}", fontsize=10)
    return figure
