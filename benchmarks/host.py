"""`python -m benchmarks host`: what one call costs the processor that issues it, forward and backward, without a GPU.

Triton gets a driver without a device: kernels are compiled for the target, every launch takes the whole way through Python and
Triton (checks, autograd, the operator's dispatch, the launch), and only the last step, the driver's own launch function, does
nothing. What that adds on a GPU (a few microseconds a launch) is not in these numbers. The *floor* is an autograd function of the
same tensors that does nothing but allocate their gradients: what PyTorch itself takes for any operation that is differentiated.

A GPU waits for the host where this is longer than what its kernels take and the host is not ahead already. Samples are short, since
the fastest of them is what a busy machine disturbs least: compare that one.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import schema
from benchmarks.calls import Attention, Call, Relation, gradients
from benchmarks.gate import TARGETS
from benchmarks.timing import summarise

CALLS: dict[str, Call] = {
    "class row": Attention(batch=2),
    "class row, log-sum": Attention(batch=2, merge="logsum", temperature=10.0, teacher_heads=12),
    "class row, mean": Attention(batch=2, merge="mean"),
    "whole map": Attention(batch=2, rows=0),
    "rows of one model": Attention(batch=2, one_model=True),
    "relation row": Relation(batch=2),
}
"""Small batches: the host does the same for any."""
CALLS_A_SAMPLE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--only", default="", metavar="WORD", help="calls whose name has this word")
    parser.add_argument("--target", choices=TARGETS, default="sm90", help="compile for this GPU (default: sm90)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each call is timed (default: 2)")


def run(args: argparse.Namespace) -> int:
    from benchmarks import machine

    torch.set_num_threads(1)
    facts = machine.describe(torch.device("cpu"))
    print(machine.headline(facts))
    print(f"Microseconds of one core for one call, bfloat16, kernels compiled for {args.target} and not launched.")
    print(
        f"{'call':<20} {'launches':>8} {'forward':>9} {'both':>9} {'fastest':>9} {'p20–p80':>12} {'floor':>9}",
        flush=True,
    )
    records = []
    for name, call in CALLS.items():
        if args.only in name:
            record = {"call": name, **measure(call, args.target, args.seconds)}
            records.append(record)
            both = record["both"]
            spread = f"{both['p20']:.0f}–{both['p80']:.0f}"
            times = [record["forward"]["fastest"], both["median"], both["fastest"]]
            cells = " ".join(f"{value:>9.0f}" for value in times)
            print(
                f"{name:<20} {record['launches']:>8} {cells} {spread:>12} {record['floor']['fastest']:>9.0f}",
                flush=True,
            )
    if args.json:
        settings = {"target": args.target, "seconds": args.seconds}
        schema.save(args.json, schema.document("host", facts, "python -m benchmarks host", settings, records))
    return 0


def measure(call: Call, target: str = "sm90", seconds: float = 2.0) -> dict[str, Any]:
    """Launches of one forward and backward, and microseconds of the floor, the forward and of both."""
    from benchmarks.compiled import unlaunched

    given = call.tensors()
    trained = [tensor for tensor in given.values() if tensor.requires_grad]
    with unlaunched(target) as launched:
        call.results(given)  # compiles
        for _ in range(2):  # recorded
            gradients(call.results(given), given)
        launched.clear()
        gradients(call.results(given), given)
        kernels = list(launched)
        work = {
            "floor": lambda: torch.autograd.grad(_Nothing.apply(*trained), trained),
            "forward": lambda: call.results(given),
            "both": lambda: gradients(call.results(given), given),
        }
        return {"launches": len(kernels), "kernels": kernels} | _sample(work, seconds)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(*trained)
        return trained[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _sample(work: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
    """Of each: median, p20, p80 and the fastest, in microseconds, of samples of a few calls taken in turn."""
    samples: dict[str, list[float]] = {name: [] for name in work}
    gc.collect()
    gc.disable()  # a collection in the middle of a sample is not the call's time
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not samples["both"]:
            for name, call in work.items():
                start = time.perf_counter()
                for _ in range(CALLS_A_SAMPLE):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS_A_SAMPLE * 1e6)
    finally:
        gc.enable()
    return {name: summarise(found).as_dict() | {"fastest": min(found)} for name, found in samples.items()}
