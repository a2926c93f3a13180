"""The chunked implementation against PyTorch, eager and under torch.compile, on the CPU: time and extra memory of a forward and
backward.

Every measurement has a process of its own: first one step whose peak resident memory is read, then repeated steps that are
timed. (Under torch.compile the first step compiles, so memory is read in the second.) Times are only given where chunked is
right: its processes end with the case, in small, against the float64 oracle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import opponents, schema
from benchmarks.calls import DIVERGENCES, Attention, gradients
from benchmarks.machine import ROOT, describe, headline
from benchmarks.timing import summarise

IMPLEMENTATIONS = ("eager", "compile", "chunked")
HEADS, HEAD_DIM = 6, 64


def calls(quick: bool) -> Iterator[tuple[str, Attention]]:
    """(group, call): B images, 6 heads of 64 dims, N keys, one query row, some, or all (0)."""
    base = Attention(heads=HEADS, dim=HEAD_DIM, dtype="float32")
    if quick:
        yield "divergences", replace(base, rows=0, batch=2)
        yield "divergences", replace(base, rows=0, batch=2, divergence="js")
        yield "rows", replace(base, batch=16, merge="logsum")
        return
    for tokens in (197, 577, 1025):
        for divergence in DIVERGENCES:
            yield "divergences", replace(base, rows=0, batch=8, keys=tokens, divergence=divergence)
    for merged in ("logsum", "mean", "max"):
        yield "merges", replace(base, rows=0, batch=8, keys=577, merge=merged)
    for tokens in (512, 1024, 2048, 4096):
        yield "growth", replace(base, rows=0, batch=1, keys=tokens)
    for tokens in (197, 1025):
        row = replace(base, batch=64, keys=tokens)
        yield "rows", row
        for merged in ("logsum", "mean"):
            yield "rows", replace(row, merge=merged)
        yield "rows", replace(row, rows=16)


def describe_call(group: str, call: Attention) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    sizes = {"batch": call.batch, "tokens": call.keys, "rows": call.rows}
    return {"group": group, **sizes, "divergence": call.divergence, "merge": call.merge}


def label(r: dict[str, Any]) -> str:
    what = "whole map" if r["rows"] == 0 else f"{r['rows']} row{'s' if r['rows'] > 1 else ''}"
    return f"{what:<9} B {r['batch']:<3} N {r['tokens']:<5} {r['merge'] or 'per head':<9} {r['divergence']}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="three small cases: does everything work?")
    parser.add_argument(
        "--only", metavar="WORD", default="", help="cases whose line has this word, such as 'growth' or 'N 1025'"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's own CPU time, for a machine that is busy with other things; use it with --threads 1",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a case is timed (default: 3)")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "seconds": 0.2 if args.quick else args.seconds,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
    }
    machine = describe(torch.device("cpu"))
    print(headline(machine), flush=True)
    print(
        f"Forward and backward in float32, {HEADS} heads of {HEAD_DIM} dims; the fastest of the repetitions, by {args.clock} time."
    )
    if args.clock == "wall" and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        print(f"This machine is busy (load {os.getloadavg()[0]:.1f}): times are too long.", file=sys.stderr)
    todo = [(describe_call(group, call), call) for group, call in calls(args.quick)]
    todo = [(what, call) for what, call in todo if args.only in f"{what['group']} {label(what)}"]
    records: list[dict[str, Any]] = []
    progress = tqdm([(*each, name) for each in todo for name in IMPLEMENTATIONS], unit="process", leave=False)
    for what, call, name in progress:
        progress.set_description(label(what))
        measured = _in_fresh_process({"call": asdict(call), "implementation": name, **settings})
        records.append({**what, "implementation": name, **measured})
        if name == IMPLEMENTATIONS[-1]:
            with tqdm.external_write_mode():
                _print(records[-len(IMPLEMENTATIONS) :], first=len(records) == len(IMPLEMENTATIONS))
    if args.json:
        schema.save(args.json, schema.document("cpu", machine, "cpu", settings, records))
    return int(any(record["status"] not in ("ok", "OOM") for record in records))


def _print(records: list[dict[str, Any]], first: bool) -> None:
    """One line: time and memory of each, and how many times faster chunked is than each of the others."""
    *others, chunked = records
    if first:
        heads = "".join(f"{r['implementation']:>19}" for r in records) + "".join(
            f"{'to ' + r['implementation']:>11}" for r in others
        )
        print(f"{'':<51}{heads}", flush=True)
    cells = []
    for record in records:
        ok = record["status"] == "ok"
        numbers = f"{record['ms']['fastest']:8.1f} ms {record['extra_mib']:5.0f} M" if ok else record["status"]
        cells.append(f"{numbers:>18}")
    for record in others:
        ok = record["status"] == chunked["status"] == "ok"
        cells.append(f"{record['ms']['fastest'] / chunked['ms']['fastest']:9.2f}x" if ok else " " * 10)
    print(f"{label(chunked):<51}", *cells, chunked.get("detail", ""), flush=True)


def _in_fresh_process(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cpu", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == -9:
        return {"status": "OOM"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"status": "error", "detail": (done.stderr.strip().splitlines() or ["no output"])[-1]}


# -- in the process of one measurement --------------------------------------------------------------------------------


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    call, name = Attention(**request["call"]), request["implementation"]
    clock = time.perf_counter if request["clock"] == "wall" else time.process_time
    try:
        small = replace(call, batch=2, keys=17, rows=min(call.rows, 1))
        _step(small, name)()  # loads libraries and starts threads, which are not the step's
        step = _step(call, name)
        if name == "compile":
            step()
        extra = _extra_bytes(step)
        samples: list[float] = []
        end = time.perf_counter() + request["seconds"]
        while len(samples) < 5 or time.perf_counter() < end and len(samples) < 1000:
            start = clock()
            step()
            samples.append((clock() - start) * 1e3)
    except RuntimeError as error:
        return {"status": "OOM" if "allocate" in str(error) else "error", "detail": str(error).splitlines()[0]}
    # Only now, since what it leaves in the allocator would hide part of the step's memory.
    if name == "chunked" and (wrong := _wrong(call)):
        return {"status": "FAIL", "detail": wrong}
    timing = summarise(samples).as_dict() | {"fastest": round(min(samples), 3)}
    return {"status": "ok", "ms": timing, "extra_mib": round(extra / 2**20, 2)}


def _step(call: Attention, name: str) -> Callable[[], None]:
    """One forward and backward on views of packed qkv projections, the layout of timm's blocks."""
    given = call.tensors()
    eager = opponents.divergence(opponents.matmul_scores, call.merge, call.divergence, call.temperature)
    if name == "compile":
        torch._dynamo.reset()
        eager = torch.compile(eager, fullgraph=True, dynamic=False)

    def step() -> None:
        gradients(call.results(given, "chunked") if name == "chunked" else (eager(**given),), given)

    return step


def _wrong(call: Attention) -> str:
    """What the judge says against chunked on this call in small; '' when nothing."""
    from benchmarks import judge
    from benchmarks.operations import Implementation

    small = replace(call, batch=2, heads=3, keys=65, rows=min(call.rows, 65))
    given = small.tensors()
    expected = judge.truth(small)
    outputs = small.results(given, "chunked")
    chunked = Implementation("chunked", small.results, ours=True)
    found = expected.judge(chunked, outputs, gradients(outputs, given, [g.float() for g in expected.upstream]))
    return "; ".join(str(result) for result in found if not result.ok)


def _extra_bytes(step: Callable[[], None]) -> int:
    """How far the peak of resident memory during one step lies above the memory before it."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):  # not Linux: the peak of the process's life, which the step raises
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{field}:"))

    clear.write_text("5")  # resets the peak
    before = kib("VmRSS")
    step()
    return (kib("VmHWM") - before) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
