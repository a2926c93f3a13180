"""Result files: small JSON, one layout for all commands, described in benchmarks/results/README.md."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from attnkd import files
from benchmarks.machine import ROOT, slug

VERSION = 1
RESULTS = ROOT / "benchmarks" / "results"
STATUSES = ("ok", "FAIL", "OOM", "unsupported", "error")
TOP = {"schema": int, "kind": str, "created": str, "command": str, "machine": dict, "settings": dict, "records": list}
MACHINE = {"device": str, "details": str, "toolkit": str, "system": str, "versions": dict, "commit": str}
MEASURED = {
    "operations": {"operation": str, "shape": str, "dims": dict, "dtype": str, "mode": str, "implementation": str},
    "scaling": {"operation": str, "shape": str, "dims": dict, "dtype": str, "mode": str, "implementation": str},
    "training": {"pair": str, "variant": str, "batch": int, "dtype": str},
    "first_call": {"operation": str, "implementation": str, "cache": str},
    "tune": {"kernel": str, "shape": str, "dtype": str, "config": dict},
}
"""Fields that every record of a kind has, besides ``status``; the other kinds' records are described by their commands."""


def document(
    kind: str, machine: dict[str, Any], command: str, settings: dict[str, Any], records: list
) -> dict[str, Any]:
    """A result file's content."""
    return {
        "schema": VERSION,
        "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine,
        "settings": settings,
        "records": records,
    }


def default_path(kind: str, machine: dict[str, Any]) -> Path:
    return RESULTS / slug(machine["device"]) / f"{kind}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, one record a line so that diffs can be read.

    Raises:
        ValueError: ``result`` does not follow the schema; nothing is written.
    """
    problems = check(result)
    if problems:
        raise ValueError(f"{path.name}: {'; '.join(problems)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in result.items() if key != "records"}
    records = ",\n".join(f"    {json.dumps(record, allow_nan=False)}" for record in result["records"])
    text = json.dumps(head, indent=2, allow_nan=False)[:-2] + f',\n  "records": [\n{records}\n  ]\n}}\n'
    files.write_text(path, text)


def load(path: str | Path) -> dict[str, Any]:
    """Read and check a result file.

    Raises:
        ValueError: not JSON, or not this schema; the message says what is wrong.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    problems = check(result)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return result


def check(result: Any) -> list[str]:
    """What is wrong with a result file's content; empty when it follows the schema."""
    if not isinstance(result, dict):
        return [f"expected an object, got {type(result).__name__}"]
    problems = _check_fields("file", result, TOP)
    if problems:
        return problems
    if result["schema"] != VERSION:
        return [f"expected schema {VERSION}, got {result['schema']}"]
    problems = _check_fields("machine", result["machine"], MACHINE)
    fields = MEASURED.get(result["kind"])
    for index, record in enumerate(result["records"]):
        where = f"record {index}"
        if not isinstance(record, dict):
            problems.append(f"{where}: expected an object, got {type(record).__name__}")
        elif fields is not None:
            problems += _check_fields(where, record, {**fields, "status": str}) or _check_measured(where, record)
    return problems


def is_ours(record: dict[str, Any]) -> bool:
    """Records without an implementation (bytes of our kernels) are ours; 'off' is our training step without its loss."""
    name = record.get("implementation", record.get("variant", "ours"))
    return name.startswith(("ours", "chunked", "off"))


def _check_fields(where: str, value: dict, fields: dict[str, type]) -> list[str]:
    problems = []
    for name, kind in fields.items():
        if name not in value:
            problems.append(f"{where}: {name} is missing")
        elif not isinstance(value[name], kind):
            problems.append(f"{where}: {name}: expected {kind.__name__}, got {value[name]!r}")
    return problems


def _check_measured(where: str, record: dict) -> list[str]:
    if record["status"] not in STATUSES:
        return [f"{where}: status: expected one of {', '.join(STATUSES)}, got {record['status']!r}"]
    ms = record.get("ms")
    if ms is None:
        return []
    if record["status"] != "ok":
        return [f"{where}: a case that is {record['status']} has a time"]
    if set(ms) != {"median", "p20", "p80", "samples"}:
        return [f"{where}: ms: expected median, p20, p80 and samples, got {sorted(ms)}"]
    if not (math.isfinite(ms["p80"]) and 0 < ms["p20"] <= ms["median"] <= ms["p80"]):
        return [f"{where}: ms: expected 0 < p20 <= median <= p80, got {ms}"]
    return []
