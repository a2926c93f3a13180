"""`python -m benchmarks compare A.json B.json`: what became slower or larger from one result file to another."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks import schema

KINDS = {
    # kind: (fields that say what was measured, what is compared)
    "operations": (("operation", "shape", "dims", "dtype", "mode", "implementation"), ("ms", "peak_bytes")),
    "scaling": (("operation", "shape", "dims", "dtype", "mode", "implementation"), ("ms", "peak_bytes")),
    "training": (("pair", "variant", "batch", "dtype"), ("ms", "peak_bytes")),
    "first_call": (("operation", "implementation", "cache", "shape", "dtype"), ("first_call_s",)),
    "cpu": (("group", "batch", "tokens", "rows", "divergence", "merge", "implementation"), ("ms", "extra_mib")),
    "traffic": (("call", "pass"), ("moved",)),
}


@dataclass(frozen=True)
class Change:
    """One number in both files.

    ours: whether the package's own; an opponent that became slower is printed, but is no regression.
    """

    label: str
    what: str
    before: float
    after: float
    ours: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else (1.0 if not self.after else float("inf"))

    def __str__(self) -> str:
        return f"{self.ratio - 1:+8.1%}  {self.what:<13}{self.before:>14.6g} -> {self.after:<14.6g}{self.label}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument(
        "--fail-above",
        metavar="PERCENT",
        type=percent,
        help="exit with 1 if anything of ours grew by more, such as 5%%",
    )
    parser.add_argument("--all", action="store_true", help="show unchanged numbers too")


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 on a regression beyond --fail-above; 2 when the files cannot be compared."""
    try:
        before, after = schema.load(args.before), schema.load(args.after)
        changes, broken, gone = compare(before, after)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for name, result in (("A", before), ("B", after)):
        machine = result["machine"]
        print(
            f"{name}: {machine['device']}, torch {machine['versions'].get('torch')}, commit {machine['commit']}, {result['created']}"
        )
    same_device = before["machine"]["device"] == after["machine"]["device"]
    if not same_device and args.fail_above is not None:
        print("compare: --fail-above needs two files of one device; these are of two", file=sys.stderr)
        return 2
    threshold = 0.05 if args.fail_above is None else args.fail_above
    shown = sorted((c for c in changes if args.all or abs(c.ratio - 1) > threshold), key=lambda c: -c.ratio)
    for change in shown:
        print(f"{change}{'' if change.ours else '  (opponent)'}")
    for line in broken:
        print(f"  BROKEN  {line}")
    for line in gone:
        print(f"    gone  {line}")
    worse = [c for c in changes if c.ours and c.ratio - 1 > threshold]
    print(
        f"{len(changes)} numbers in both; of ours {len(worse)} grew by more than {threshold:.0%}; "
        f"{len(broken)} cases worked in A and fail in B; {len(gone)} are missing in B"
    )
    return int(args.fail_above is not None and bool(worse or broken or gone))


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Change], list[str], list[str]]:
    """Numbers that both files have; cases of ours that worked and now fail; cases of ours that are missing.

    Raises:
        ValueError: files of two kinds, or of one that has no numbers to compare.
    """
    if before["kind"] != after["kind"]:
        raise ValueError(f"expected two files of one kind, got {before['kind']!r} and {after['kind']!r}")
    if before["kind"] not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {before['kind']!r}")
    fields, metrics = KINDS[before["kind"]]

    def keyed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {json.dumps([record.get(name) for name in fields]): record for record in result["records"]}

    old, new = keyed(before), keyed(after)
    changes, broken, gone = [], [], []
    for key, record in old.items():
        label = " ".join(_word(record.get(name)) for name in fields)
        ours = schema.is_ours(record)
        if key not in new:
            gone += [label] if ours else []
            continue
        other = new[key]
        if record.get("status", "ok") == "ok" and other.get("status", "ok") != "ok" and ours:
            broken.append(f"{label}: {other['status']} {other.get('detail', '')}".rstrip())
        for metric in metrics:
            a, b = _value(record, metric), _value(other, metric)
            if a is not None and b is not None:
                changes.append(Change(label, metric, a, b, ours))
    return changes, broken, gone


def percent(text: str) -> float:
    """'5%' or '5' -> 0.05."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 5%, got {text!r}") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a percentage of at least 0, got {text!r}")
    return value


def _value(record: dict[str, Any], metric: str) -> float | None:
    value = record.get(metric)
    return value["median"] if isinstance(value, dict) else value


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name[0].upper()}{size}" for name, size in value.items() if name in ("batch", "tokens"))
    return str(value)
