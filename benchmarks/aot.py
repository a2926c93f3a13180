"""`python -m benchmarks aot`: every kernel compiled for every target, without a GPU, and held to what it should use.

The rules stand in :mod:`benchmarks.gate`, the calls in :mod:`benchmarks.sweep`. This process only schedules: compilation runs in
spawned processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gate import TARGETS, directions, verdict, wide_share


def gate(calls: Sequence[Any], targets: Sequence[str] = TARGETS, jobs: int | None = None) -> Iterator[dict[str, Any]]:
    """Compiles what the calls launch for the targets, in ``jobs`` processes, and yields one record per compiled kernel.

    A record tells the call, target and kernel, what the kernel uses (:func:`benchmarks.compiled.read`), its ``faults`` and
    ``remarks`` (:func:`benchmarks.gate.verdict`).
    As each call is done comes a record of ``progress`` with its ``kernels``; at the end the kernels, in the order of the calls. One that
    several calls launch alike comes once, with the first of them.
    """
    compiler = metadata.version("triton")
    tasks, found = _tasks(calls, targets), {}
    for call, target, records in _results(tasks, jobs):
        records = records or [{"kernel": "", "hash": "", "error": "launched no kernel"}]
        records = [{"call": call.name, "aligned": call.aligned, "target": target} | record for record in records]
        found[call.name, target] = [record | verdict(record, compiler) for record in records]
        yield {"progress": (call.name, target), "kernels": found[call.name, target]}
    seen = set()
    for call, target in tasks:
        for record in found[call.name, target]:
            key = (target, record["hash"] or call.name)
            if key not in seen:
                seen.add(key)
                yield record


Task = tuple[Any, str]  # call and target


def _tasks(calls: Sequence[Any], targets: Sequence[str]) -> list[Task]:
    """Every call for every target, but for those calls that name their own ``targets``."""
    return [(call, target) for target in targets for call in calls if target in getattr(call, "targets", targets)]


def _results(tasks: Sequence[Task], jobs: int | None) -> Iterator[tuple[Any, str, list[dict[str, Any]]]]:
    """Every task's records, as they come. A compiler that crashes takes its process along; the gate survives and says so."""
    todo = dict(enumerate(tasks))
    jobs = jobs or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        while todo:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _compile_here) as pool:
                pending = {pool.submit(_measure, *task, Path(folder, str(i))): i for i, task in todo.items()}
                for future in as_completed(pending):
                    if not isinstance(future.exception(), BrokenProcessPool):
                        yield *todo.pop(pending[future]), future.result()
            suspects = [note for note in Path(folder).iterdir() if int(note.name) in todo]
            if todo and not suspects:
                raise RuntimeError("the gate's processes end before they compile anything")
            if len(suspects) == 1 or jobs == 1:
                for note in suspects:
                    record = {"kernel": note.read_text(), "hash": "", "error": "the compiler crashed"}
                    yield *todo.pop(int(note.name)), [record]
            jobs = 1  # from here on one at a time, so that who crashes is known
            for note in suspects:
                note.unlink()


def _compile_here() -> None:
    """Runs first in every spawned process, before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _measure(call: Any, target: str, note: Path) -> list[dict[str, Any]]:
    from benchmarks.compiled import measure

    note.touch()
    records = measure(call, target, note)
    note.unlink()
    return records


# --- command ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full", action="store_true", help="every dtype, head dim and option (minutes), not a selection"
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only calls whose name contains TEXT")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every compiled kernel's numbers")
    parser.add_argument("--jobs", type=int, default=None, metavar="N", help="processes (default: one per CPU)")


def run(args: argparse.Namespace) -> int:
    """Prints what fails as it is found, and at the end a table and all of it; 1 when something did."""
    from tqdm import tqdm

    from benchmarks import sweep

    calls = list(dict.fromkeys(sweep.everything() if args.full else sweep.representative()))
    calls = [call for call in calls if args.match in call.name]
    if not calls:
        print(f"no call's name contains {args.match!r}", file=sys.stderr)
        return 2
    records = []
    with tqdm(total=len(_tasks(calls, args.targets)), unit="call", leave=False, disable=None) as bar:
        for record in gate(calls, args.targets, args.jobs):
            if "progress" in record:
                bar.set_description(" ".join(reversed(record["progress"])))
                bar.update()
                for kernel in record["kernels"]:
                    if kernel["faults"]:
                        bar.write(_told(kernel, "faults"))
            else:
                records.append(record)
    if args.json:
        import torch

        from benchmarks import machine, schema

        facts = machine.describe(torch.device("cpu"))
        settings = {"full": args.full, "targets": list(args.targets), "match": args.match}
        schema.save(args.json, schema.document("aot", facts, "python -m benchmarks aot", settings, records))
    print(table(records))
    for kind in ("remarks", "faults"):
        for record in records:
            if record[kind]:
                print(_told(record, kind))
    failed, noted = (sum(bool(record[kind]) for record in records) for kind in ("faults", "remarks"))
    print(f"{len(records)} kernels compiled, {failed} failed", end=f", {noted} with remarks\n" if noted else "\n")
    return 1 if failed else 0


def _told(record: dict[str, Any], kind: str) -> str:
    return f"{record['target']} {record['kernel']} [{record['call']}]: {'; '.join(record[kind])}"


def table(records: Sequence[dict[str, Any]]) -> str:
    """One line per kernel and target: the worst of all its variants. ``programs``: resident on a processor at a time."""
    head = ("kernel", "target", "variants", "registers", "spills", "shared", "128-bit", "matrix", "programs", "failed")
    lines = [head]
    for kernel, target in dict.fromkeys((r["kernel"], r["target"]) for r in sorted(records, key=_order)):
        group = [r for r in records if (r["kernel"], r["target"]) == (kernel, target)]
        good = [r for r in group if "error" not in r]
        failed = sum(bool(r["faults"]) for r in group)
        if not good:
            lines.append((kernel, target, str(len(group)), *["-"] * 6, str(failed)))
            continue
        share = min((wide_share(r, d) for r in good if r["aligned"] for d in directions(r)), default=1.0)
        matrix = sorted({kind if len(kind) < 12 else "MFMA" for r in good for kind in r["matrix"]})
        lines.append(
            (
                kernel, target, str(len(group)), _span(r["registers"] for r in good), str(max(r["spills"] for r in good)),
                str(max(r["shared"] for r in good)), f"{share:.0%}", " ".join(matrix) or "-",
                _span(r["programs"] for r in good), str(failed),
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _order(record: dict[str, Any]) -> tuple[str, int]:
    return record["kernel"], TARGETS.index(record["target"])


def _span(values: Any) -> str:
    values = sorted(values)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}–{values[-1]}"
