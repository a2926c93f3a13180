"""What `attnkd eval` leaves in a run's folder, as a table of several runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {"knn": "k-NN", "linear": "linear", "finetune": "fine-tuned"}


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
    """Top-1 accuracies in percent by what was measured, such as 'linear, 0.01 of the labels'."""
    name = NAMES[result["evaluation"]]
    part = "" if result.get("subset") is None else f", {result['subset']} of the labels"
    if result["evaluation"] == "knn":
        return {f"{name} {k}{part}": score["top1"] for k, score in result["scores"].items()}
    return {f"{name}{part}": result["top1"]}


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
    for data, rows in table.items():
        width = max(len(row) for row in rows)
        lines += [f"top-1 % on {data}", " " * width + "".join(f"{name:>{len(name) + 3}}" for name in names)]
        for row, found in rows.items():
            best = max(found.values())
            cells = (
                f"{found[name]:.2f}{'*' if found[name] == best and len(found) > 1 else ' '}" if name in found else "- "
                for name in names
            )
            lines.append(row.ljust(width) + "".join(f"{c:>{len(n) + 3}}" for c, n in zip(cells, names, strict=True)))
        lines.append("")
    return "\n".join(lines).rstrip()
