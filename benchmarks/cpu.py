"""The chunked implementation against eager PyTorch on the CPU: time and extra memory of one forward and backward.

Every measurement has a process of its own: first one step whose peak resident memory is read, then repeated steps that are
timed. Times are only given where chunked is right: each process ends with the case, in small, against the float64 oracle.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, schema
from benchmarks.machine import ROOT, describe, headline
from benchmarks.timing import summarise

IMPLEMENTATIONS = ("eager", "chunked")
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")
HEADS, HEAD_DIM = 6, 64


@dataclass(frozen=True)
class Case:
    """One comparison of B images, H heads, ``rows`` query rows (0: all) and N keys of 64 dims."""

    group: str
    batch: int
    tokens: int
    rows: int = 0
    divergence: str = "forward_kl"
    merge: str | None = None

    @property
    def label(self) -> str:
        what = "whole map" if self.rows == 0 else f"{self.rows} row{'s' if self.rows > 1 else ''}"
        return f"{what:<9} B {self.batch:<3} N {self.tokens:<5} {self.merge or 'per head':<9} {self.divergence}"


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield Case("divergences", 2, 197)
        yield Case("divergences", 2, 197, divergence="js")
        yield Case("rows", 16, 197, rows=1, merge="logsum")
        return
    for tokens in (197, 577, 1025):
        for divergence in DIVERGENCES:
            yield Case("divergences", 8, tokens, divergence=divergence)
    for merged in ("logsum", "mean", "max"):
        yield Case("merges", 8, 577, merge=merged)
    for tokens in (512, 1024, 2048, 4096):
        yield Case("growth", 1, tokens)
    for tokens in (197, 1025):
        yield Case("rows", 64, tokens, rows=1)
        for merged in ("logsum", "mean"):
            yield Case("rows", 64, tokens, rows=1, merge=merged)
        yield Case("rows", 64, tokens, rows=16)


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
    chosen = [case for case in cases(args.quick) if args.only in f"{case.group} {case.label}"]
    records, failed = [], False
    progress = tqdm([(case, name) for case in chosen for name in IMPLEMENTATIONS], unit="process", leave=False)
    for case, name in progress:
        progress.set_description(case.label)
        record = _in_fresh_process({"case": asdict(case), "implementation": name, **settings})
        records.append({**asdict(case), "implementation": name, **record})
        failed |= record["status"] not in ("ok", "OOM")
        if name == IMPLEMENTATIONS[-1]:
            with tqdm.external_write_mode():
                _print(case, records[-2], records[-1], first=len(records) == 2)
    if args.json:
        schema.save(args.json, schema.document("cpu", machine, "cpu", settings, records))
    return int(failed)


def _print(case: Case, eager: dict[str, Any], chunked: dict[str, Any], first: bool) -> None:
    if first:
        print(f"{'':<51} {'eager':>18} {'chunked':>18} {'faster':>7} {'memory':>7}", flush=True)
    cells = []
    for record in (eager, chunked):
        ok = record["status"] == "ok"
        numbers = f"{record['ms']['fastest']:8.1f} ms {record['extra_mib']:5.0f} M" if ok else record["status"]
        cells.append(f"{numbers:>18}")
    if eager["status"] == chunked["status"] == "ok":
        cells.append(f"{eager['ms']['fastest'] / chunked['ms']['fastest']:6.2f}x")
        cells.append(f"{chunked['extra_mib'] / max(eager['extra_mib'], 1e-3):7.1%}")
    print(f"{case.label:<51}", *cells, chunked.get("detail", ""), flush=True)


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
    case, name = Case(**request["case"]), request["implementation"]
    clock = time.perf_counter if request["clock"] == "wall" else time.process_time
    try:
        small = replace(case, batch=2, tokens=17, rows=min(case.rows, 1))
        _step(small, name)()  # loads libraries and starts threads, which are not the step's
        step = _step(case, name)
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
    if name == "chunked" and (wrong := _wrong(case)):
        return {"status": "FAIL", "detail": wrong}
    timing = summarise(samples).as_dict() | {"fastest": round(min(samples), 3)}
    return {"status": "ok", "ms": timing, "extra_mib": round(extra / 2**20, 2)}


def _step(case: Case, name: str) -> Callable[[], None]:
    """One forward and backward on views of packed qkv projections, the layout of timm's blocks."""
    torch.manual_seed(0)
    tensors = []
    for _ in ("student", "teacher"):
        packed = torch.randn(case.batch, case.tokens, 3, HEADS, HEAD_DIM)
        query, key, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
        tensors += [query[:, :, : case.rows or case.tokens], key]
    student = [x.requires_grad_() for x in tensors[:2]]
    if name == "chunked":
        loss = _chunked(case)
    else:
        loss = baselines.divergence(baselines.matmul_scores, case.merge, case.divergence, 1.0)

    def step() -> None:
        torch.autograd.grad(loss(*tensors), student)

    return step


def _chunked(case: Case) -> Callable[..., Tensor]:
    from attnkd import attention_divergence

    def loss(*tensors: Tensor) -> Tensor:
        return attention_divergence(
            *tensors, merge=case.merge, divergence=case.divergence, reduction="batchmean", impl="chunked"
        )

    return loss


def _wrong(case: Case) -> str:
    """What the oracle says against chunked on this case in small; '' when nothing."""
    from attnkd.testing.proof import prove

    torch.manual_seed(0)
    shapes = [(2, 3, min(case.rows or 65, 65), 64), (2, 3, 65, 64)] * 2
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    arguments: dict[str, Any] = {n: torch.randn(s) for n, s in zip(names, shapes, strict=True)}
    results = prove("chunked", **arguments, merge=case.merge, divergence=case.divergence)
    return "; ".join(str(result) for result in results if not result.ok)


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
