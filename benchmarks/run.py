"""`python -m benchmarks run`: every operation against its opponents, scaling curves, training steps, first calls."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.measure import Settings

STATE_EVERY_S = 20.0  # how often the GPU's state is asked for
SUITES = ("operations", "training", "first_call", "scaling")
SCALING = {
    # operation: (shape of the batch sweep, heads and batch of the token sweep)
    "cls_row": ("deit_small", 6, 16),
    "cls_row_logsum": ("deit_small", 6, 16),
    "whole_map": ("deit_small", 6, 2),
}
SHORT_SCALING = {
    # operation: the opponents that are drawn beside ours unless everything is asked for
    "cls_row": ("ours", "eager_map", "compile_row"),
    "cls_row_logsum": ("ours", "eager_map", "compile_row"),
    "whole_map": ("ours", "eager_map", "compile_map", "flex"),
}
NO_GPU = (
    "run: needs a CUDA or ROCm GPU and found none; without one there are `traffic` (bytes moved), `aot` (compiled code), `cpu` "
    "(plain PyTorch times) and `run --smoke` (correctness only)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=list(SUITES), help="what to measure (default: all)"
    )
    parser.add_argument(
        "--operations", **several, help="names, 'headline' (default) or 'all'; see benchmarks/operations.py"
    )
    parser.add_argument(
        "--shapes", **several, help="names of benchmarks/shapes.py (default: deit_small vit_base_384; --full: all)"
    )
    parser.add_argument(
        "--full", action="store_true", help="every shape, every point and opponent of the scaling curves: about an hour"
    )
    parser.add_argument("--batch", type=int, help="batch size in place of the shapes' own")
    parser.add_argument("--dtypes", **several, help="bf16 (default), fp16, fp32")
    parser.add_argument("--modes", nargs="+", choices=("fwd", "bwd", "both"), default=["fwd", "bwd", "both"])
    parser.add_argument(
        "--implementations", **several, help="ours, chunked, eager_map, compile_row, ... (default: all)"
    )
    parser.add_argument("--pairs", type=int, nargs="+", choices=(0, 1, 2), help="training pairs (default: all)")
    parser.add_argument("--compile-steps", action="store_true", help="training steps under torch.compile too")
    parser.add_argument(
        "--compile-mode", default="default", help="torch.compile's mode for the opponents (default: default)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="start nothing new after so long; what is left out is listed (the headline comes first)",
    )
    parser.add_argument(
        "--flush",
        choices=("read", "write"),
        default="read",
        help="how the cache is cleared before a sample (default: read)",
    )
    parser.add_argument("--budget-ms", type=float, default=100.0, help="time spent on one number (default: 100)")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, ...")
    parser.add_argument("--output", type=Path, help="folder for SUITE.json (default: benchmarks/results/<device>)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, correctness only, no times; runs without a GPU too"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 when something of ours was wrong or failed, 2 when it could not start."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.smoke:
        print(NO_GPU, file=sys.stderr)
        return 2
    if not has_gpu:
        prepare_interpreter()
        torch.set_num_threads(1)
    from benchmarks import conditions, machine, schema

    torch.set_float32_matmul_precision("highest")
    try:
        device = machine.use_gpu(args.device) if has_gpu else torch.device("cpu")
        settings, todo = plan(args, device)
    except ValueError as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    facts = machine.describe(device)
    print(machine.headline(facts))
    if args.smoke:
        print("smoke: tiny shapes, correctness only; no times")
    ceilings: dict[str, float] = {}
    if settings.clock is not None and settings.report:
        from benchmarks.ceilings import measure_ceilings

        ceilings = measure_ceilings(device, _dtypes(args))
        print("measured here: " + ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    bad, until = 0, time.monotonic() + 60 * args.minutes
    for suite, cases in todo.items():
        folder = args.output or schema.default_path(suite, facts).parent
        path = folder / f"{suite if args.output or not _selected(args) else f'{suite}-selection'}.json"
        left_out: list[str] = []
        states: list[dict[str, Any]] = []
        options = {
            "ceilings": ceilings, "compile_mode": args.compile_mode, "budget_ms": args.budget_ms, "flush": args.flush,
            "conditions": states, "left_out": left_out,
        }  # fmt: skip
        command = shlex.join(["python", "-m", "benchmarks", *_command(args, suite)])
        result = schema.document(suite, facts, command, options, [])
        print(f"\n== {suite}")
        try:
            for record in _records(suite, cases, ceilings, until, left_out):
                if ceilings and (not result["records"] or time.monotonic() > states[-1]["at_s"] + STATE_EVERY_S):
                    states.append({"at_s": round(time.monotonic(), 1), **conditions.read(device)})
                    print(conditions.line(states[-1]))
                result["records"].append(record)
                bad += record["status"] in ("FAIL", "error") and schema.is_ours(record)
                if not args.smoke:  # after every case: an interrupted run keeps what it has
                    schema.save(path, result)
        except machine.DeviceLost as error:
            print(f"stopped, the device does not answer any more: {error}")
            return 1
        if left_out:
            print(f"left out after {args.minutes:g} minutes: {', '.join(left_out)}")
        if not args.smoke and result["records"]:
            print(f"wrote {path.relative_to(machine.ROOT) if path.is_relative_to(machine.ROOT) else path}")
    if bad:
        print(f"\n{bad} of ours are wrong or failed")
    return 1 if bad else 0


def prepare_interpreter() -> None:
    """Kernels run in Triton's interpreter; to be called before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    from attnkd.testing import interpreter

    interpreter.install()


Case = tuple[str, Callable[[], Iterator[dict[str, Any]]]]


def plan(args: argparse.Namespace, device: torch.device) -> tuple[Settings, dict[str, list[Case]]]:
    """How to measure, and for every suite its cases: a label and what yields the case's records.

    Raises:
        ValueError: an unknown name.
    """
    from benchmarks import shapes, training
    from benchmarks.first_call import measure_first_calls
    from benchmarks.measure import Settings, measure_case
    from benchmarks.operations import OPERATIONS, Operation, find_operations
    from benchmarks.timing import GpuClock

    on_gpu = device.type == "cuda"
    settings = Settings(
        device,
        modes=tuple(args.modes),
        clock=GpuClock(device, args.flush) if on_gpu else None,
        report=not args.smoke,
        budget_ms=1.0 if args.smoke else args.budget_ms,
        compile_mode=args.compile_mode,
        compile_backend="inductor" if on_gpu else "aot_eager",
    )
    operations = find_operations(args.operations or (["all"] if args.smoke else ["headline"]))
    chosen = tuple(args.implementations) if args.implementations else None
    known = {i.name for operation in OPERATIONS.values() for i in operation.implementations}
    for name in chosen or ():
        if name not in known and name not in training.VARIANTS:
            raise ValueError(f"implementation: expected one of {', '.join(sorted(known))}, got {name!r}")
    usual_names = shapes.SHAPES if args.full else shapes.SHORT_SHAPES
    named = [
        shapes.find_shape(name) for name in args.shapes or usual_names
    ]  # unknown names are refused in a smoke run too
    sizes = [shapes.SMOKE] if args.smoke else named
    if args.batch:
        sizes = [replace(shape, batch=args.batch) for shape in sizes]
    dtypes = _dtypes(args)

    def case(operation: Operation, shape: shapes.Shape, dtype: torch.dtype, how: Settings, usual: Any = None) -> Case:
        wanted = chosen or usual
        names = tuple(i.name for i in operation.implementations if wanted is None or i.name in wanted)
        label = f"{operation.name} {shape.label} {str(dtype)[6:]}"
        return label, lambda: measure_case(operation, shape, dtype, how, names)

    def scaling() -> list[Case]:
        how = replace(settings, modes=("both",), count_launches=False)
        found = []
        for operation in operations:
            if operation.name not in SCALING:
                continue
            name, heads, batch = SCALING[operation.name]
            of_batch, of_tokens = shapes.batch_sweep(name, args.full), shapes.token_sweep(heads, batch, args.full)
            if args.smoke:
                of_batch = [replace(shapes.SMOKE, name="deit_small", batch=1)]
                of_tokens = [replace(shapes.SMOKE, name="n37", tokens=37)]
            usual = SHORT_SCALING[operation.name]
            if args.full:
                usual = tuple(i.name for i in operation.implementations if i.name != "chunked")
            found += [
                case(operation, shape, dtype, how, usual) for dtype in dtypes for shape in (*of_batch, *of_tokens)
            ]
        return found

    pairs = training.SMOKE if args.smoke else training.PAIRS
    pairs = [pair for index, pair in enumerate(pairs) if args.pairs is None or index in args.pairs]
    variants = tuple(v for v in chosen if v in training.VARIANTS) if chosen else None
    first = {"shape": shapes.SMOKE.name if args.smoke else "deit_small", "dtype": str(dtypes[0])[6:]}
    names = {operation.name for operation in operations}
    makers: dict[str, Callable[[], list[Case]]] = {
        "operations": lambda: [case(o, s, d, settings) for d in dtypes for s in sizes for o in operations],
        "scaling": scaling,
        "training": lambda: [
            (p.name, lambda p=p: training.measure_pair(p, settings, variants, args.compile_steps)) for p in pairs
        ],
        "first_call": lambda: [
            ("first calls", lambda: measure_first_calls(str(device), **first, operations=names, smoke=args.smoke))
        ],
    }
    return settings, {suite: makers[suite]() for suite in SUITES if suite in args.suite}


def _records(
    suite: str,
    cases: list[Case],
    ceilings: dict[str, float],
    until: float = math.inf,
    left_out: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs the cases, prints their lines above a progress bar and yields their records.

    After ``until`` (of time.monotonic) no implementation is started; cases that miss some are added to ``left_out``.
    """
    from tqdm import tqdm

    for label, records in (bar := tqdm(cases, unit="case", leave=False, disable=None)):
        bar.set_description(label)
        printed: list[dict[str, Any]] = []
        for record in _before(until, records, label, left_out):
            for line in _lines(suite, record, printed, ceilings):
                tqdm.write(line)
            printed.append(record)
            yield record


def _before(
    until: float, records: Callable[[], Iterator[dict[str, Any]]], label: str, left_out: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The records that are begun in time. A generator of records runs on only when the next one is asked for."""
    found = records()
    while time.monotonic() < until:
        record = next(found, None)
        if record is None:
            return
        yield record
    if left_out is not None:
        left_out.append(label)


def _lines(suite: str, record: dict[str, Any], before: list[dict[str, Any]], ceilings: dict[str, float]) -> list[str]:
    from benchmarks import report

    if suite == "training":
        head = [] if before else [record["pair"] + f", batch {record['batch']}"]
        off = next((r for r in before if r["variant"] == "off"), None)
        return [*head, report.step_line(record, off)]
    if suite == "first_call":
        return [report.first_call_line(record)]
    head = [] if before else [report.case_head(record), report.columns()]
    same = [r for r in before if r["implementation"] == "ours" and r["mode"] == record["mode"]]
    return [*head, report.case_line(record, same[0] if same else None, ceilings)]


def _dtypes(args: argparse.Namespace) -> list[torch.dtype]:
    from benchmarks.shapes import parse_dtype

    return [parse_dtype(name) for name in args.dtypes or ["bf16"]]


def _selected(args: argparse.Namespace) -> bool:
    chosen = (args.operations, args.shapes, args.batch, args.dtypes, args.implementations, args.pairs)
    return any(value is not None for value in chosen) or len(args.modes) != 3


def _command(args: argparse.Namespace, suite: str) -> list[str]:
    """The command that repeats one suite of this run."""
    words = ["run", "--suite", suite]
    for name in ("operations", "shapes", "batch", "dtypes", "implementations", "pairs"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if len(args.modes) != 3:
        words += ["--modes", *args.modes]
    for name, default in (
        ("compile_mode", "default"),
        ("budget_ms", 100.0),
        ("flush", "read"),
        ("minutes", math.inf),
        ("compile_steps", False),
        ("full", False),
    ):
        value = getattr(args, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words
