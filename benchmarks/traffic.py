"""`python -m benchmarks traffic`: bytes that every operation moves, per tensor, divided by the least it must.

Runs in Triton's interpreter on the CPU, where every access has an address (:class:`attnkd.testing.traffic.Meter`); a kernel
that left its tensor would raise. Two ratios are printed for the forward and the backward of each call:

* **moved**: bytes asked for ÷ floor. Repeated reads are counted in full, although a cache may serve them.
* **touched**: bytes of the distinct elements asked for ÷ floor. What is above 1 is scratch: written and read again.

The floors are the calls' own (:meth:`benchmarks.calls.Attention.floors`). Kernels are metered, PyTorch's own operations
(the mean over rows, the sum of partial gradients) are not. Whole maps are bound by arithmetic, not by bytes. A GPU with
many idle processors splits the keys of a small batch further than the interpreter does, which adds scratch.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.calls import Attention, Call, ClassRow, OnePass, Relation, gradients


def metered() -> list[Call]:
    """Small calls, run element by element in the interpreter by the traffic report."""
    row = Attention(1, 197, 6, 64, "bfloat16", batch=2)
    wide = replace(row, merge="logsum", teacher_heads=12)
    whole = Attention(0, 197, 2, 64, "bfloat16", batch=1)
    return [
        row,
        replace(row, dim=80, dtype="float32"),
        replace(row, keys=577),
        replace(row, heads=3, keys=1370, teacher_dim=128),
        replace(row, rows=4),
        replace(row, rows=4, keys=577),
        replace(row, rows=4, merge="logsum", teacher_heads=12),
        replace(row, rows=4, merge="mean"),
        replace(row, mask="additive"),
        replace(row, probs=True),
        wide,
        replace(wide, keys=577),
        replace(wide, probs=True, teacher_heads=None),
        replace(row, merge="mean"),
        replace(row, divergence="js"),
        replace(row, divergence="js", keys=577),
        replace(row, backward=False),
        replace(row, one_model=True),
        ClassRow(1, 197, 6, 64, "bfloat16", batch=2),
        ClassRow(1, 197, 6, 64, "bfloat16", merge="logsum", batch=2),
        Relation(197, 192, 384, "bfloat16", batch=2),
        whole,
        replace(whole, divergence="js"),
        replace(whole, merge="logsum"),
        OnePass(0, 197, 2, 64, "bfloat16", batch=1),
        OnePass(0, 197, 2, 64, "bfloat16", batch=1, divergence="none"),
    ]


def measure(call: Call) -> list[dict[str, Any]]:
    """One record per pass of the call: launches, bytes per tensor, and the ratios to the floor."""
    from attnkd.testing.traffic import Meter

    given = call.tensors()
    named = {name: tensor.detach() for name, tensor in given.items()}
    records = []
    results = None
    for phase, floor in call.floors().items():
        with Meter(**named) as meter:
            if results is None:
                results = call.results(given)
            else:
                gradients(results, given)
        tensors = {
            name: {
                kind + part: int(value)
                for kind, counted in (("loaded", meter.loaded(name)), ("stored", meter.stored(name)))
                for part, value in (("", counted), ("_once", counted.once), ("_sectors", counted.sectors))
            }
            for name in meter.names
        }
        records.append(
            {
                "call": call.name,
                "pass": phase,
                "launches": [launch.kernel for launch in meter.launches],
                "floor": floor,
                "moved": meter.loaded() + meter.stored(),
                "touched": meter.loaded().once + meter.stored().once,
                "tensors": {name: counts for name, counts in tensors.items() if any(counts.values())},
            }
        )
    return records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every tensor's bytes")
    parser.add_argument("--match", default="", metavar="TEXT", help="only calls whose name contains TEXT")
    parser.add_argument("--tensors", action="store_true", help="print every tensor of every call")


def run(args: argparse.Namespace) -> int:
    """Prints one line per call and pass."""
    if "triton" in sys.modules:
        raise RuntimeError("traffic: triton was imported before TRITON_INTERPRET could be set")
    os.environ["TRITON_INTERPRET"] = "1"
    from attnkd.testing import interpreter

    interpreter.install()
    calls = [call for call in metered() if args.match in call.name]
    if not calls:
        print(f"no call's name contains {args.match!r}", file=sys.stderr)
        return 2
    width = max(len(call.name) for call in calls)
    print(f"{'call'.ljust(width)}  pass      launches  floor (KB)  moved ÷ floor  touched ÷ floor")
    records = []
    for call in calls:
        for record in measure(call):
            records.append(record)
            ratios = f"{record['moved'] / record['floor']:13.2f}  {record['touched'] / record['floor']:15.2f}"
            launches = len(record["launches"])
            print(
                f"{call.name.ljust(width)}  {record['pass']:8}  {launches:8}  {record['floor'] / 1024:10.1f}  {ratios}"
            )
            if args.tensors:
                _print_tensors(record)
            sys.stdout.flush()
    if args.json:
        import torch

        from benchmarks import machine, schema

        facts = machine.describe(torch.device("cpu"))
        schema.save(args.json, schema.document("traffic", facts, "python -m benchmarks traffic", {}, records))
    return 0


def _print_tensors(record: dict[str, Any]) -> None:
    for name, counts in record["tensors"].items():
        parts = []
        for verb in ("loaded", "stored"):
            if counts[verb]:
                times = counts[verb] / counts[verb + "_once"]
                parts.append(f"{verb} {counts[verb]:,}" + (f" ({times:.2f} times)" if times > 1 else ""))
        print(f"    {name:16} {', '.join(parts)}")
