"""What :mod:`attnkd.testing.census` found, as a page and as lines of a file from which a run continues."""

from __future__ import annotations

import json
from collections import Counter

from attnkd.testing.census import BY_PATH, EXACT, NOT_BUILT, REFUSED, STATUSES, WRONG, Found
from attnkd.testing.census_steps import STEPS

_REFUSED = "refused: "


def as_line(found: Found) -> str:
    """A line of a file that :func:`read_lines` reads."""
    return json.dumps(found._asdict()) + "\n"


def read_lines(text: str) -> list[Found]:
    """The whole lines; one that a kill cut off is left out."""
    return [Found(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def as_markdown(found: list[Found], versions: dict[str, str], date: str) -> str:
    """Counts by family, and the models that are not captured or that a method refuses, with the reason."""
    lines = [
        "# Models that are captured",
        "",
        f"Written by `attnkd models` on {date}: "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
        + ".",
        "",
        "Every model was built small, with random weights. *exact*: the last block's captured attention is that of the model with its "
        "fused attention off. *by path*: the same, but the model has no single list of blocks, so a module path is needed. *refused*: the "
        "tap raises. *not built*: it could not be built without downloading, or not small. Below each method: on how many of the captured "
        "models it takes a step, with a copy of the model as teacher and the captured attention compared.",
        "",
        "| family | " + " | ".join((*STATUSES, *STEPS)) + " |",
        "|---" * (1 + len(STATUSES) + len(STEPS)) + "|",
    ]
    for library, family in [*dict.fromkeys((one.library, one.family) for one in found), ("", "all")]:
        ours = [one for one in found if family in (one.family, "all")]
        counts = [sum(one.status == status for one in ours) for status in STATUSES]
        ran = [sum(not one.methods.get(name, _REFUSED).startswith(_REFUSED) for one in ours) for name in STEPS]
        title = f"{library}, `{family}`" if library == "timm" else family
        lines.append(f"| {title} | " + " | ".join(str(count or "") for count in counts + ran) + " |")
    for status in (REFUSED, NOT_BUILT, WRONG):
        those = [one for one in found if one.status == status]
        lines += _table(status.capitalize(), "why", [(one.why, one) for one in those], names=True)
    captured = [one for one in found if one.status in (EXACT, BY_PATH)]
    for name in STEPS:
        forms = [(one.methods[name], one) for one in captured if one.methods.get(name)]
        lines += _table(f"{name} otherwise than by default", "how", forms, names=False)
    return "\n".join(lines) + "\n"


def _table(title: str, first: str, rows: list[tuple[str, Found]], names: bool) -> list[str]:
    """One row a reason. The models by name, or counted by family."""
    if not rows:
        return []
    lines = ["", f"## {title}", "", f"| {first} | models |", "|---|---|"]
    for reason in dict.fromkeys(reason for reason, _ in rows):
        those = [one for why, one in rows if why == reason]
        counted = Counter(one.family for one in those)
        listed = [one.name for one in those] if names else [f"{family} {count}" for family, count in counted.items()]
        lines.append(f"| {reason.replace('|', '/')} | {', '.join(listed)} |")
    return lines
