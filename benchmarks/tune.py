"""`python -m benchmarks tune`: searches launch configurations for this device and prints the table rows to commit.

Opt-in: the package itself never tunes. A kernel's configuration is a module attribute of its launcher (a constant, or the
function that picks a tile); the search replaces that attribute for the time of one measurement. Every candidate must pass the
correctness gate before it gets a time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Config = dict[str, int]


@dataclass(frozen=True)
class Tunable:
    """One kernel's configuration space.

    kernel: the name on the command line.
    operation, mode: what is timed, an entry of benchmarks/operations.py.
    shapes: names of shapes, or numbers of tokens N (H 6, B 16).
    space: values of every parameter; the product is searched.
    apply: (configuration, replacements) the module attributes to replace, as (module, attribute, value).
    row: how the configuration stands in the committed table.
    """

    kernel: str
    operation: str
    mode: str
    shapes: tuple[str | int, ...]
    space: dict[str, tuple[int, ...]]
    apply: Callable[[Config], list[tuple[str, str, Any]]]
    row: Callable[[Config], str]

    def candidates(self) -> list[Config]:
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]


def _attributes(
    module: str, **names: str
) -> tuple[Callable[[Config], list[tuple[str, str, Any]]], Callable[[Config], str]]:
    """A space whose parameters are constants of one module; ``warps`` may be the function ``_warps``."""

    def apply(config: Config) -> list[tuple[str, str, Any]]:
        found: list[tuple[str, str, Any]] = []
        for parameter, attribute in names.items():
            value = config[parameter]
            found.append((module, attribute, (lambda *_, value=value: value) if attribute.startswith("_") else value))
        return found

    def row(config: Config) -> str:
        return f"{module}: " + ", ".join(f"{attribute} = {config[parameter]}" for parameter, attribute in names.items())

    return apply, row


def _map_tile(op: str) -> tuple[Callable[[Config], list[tuple[str, str, Any]]], Callable[[Config], str]]:
    """One kernel's entry of the whole-map kernels' tile table."""

    def apply(config: Config) -> list[tuple[str, str, Any]]:
        launcher = importlib.import_module("attnkd_kernels.map.launch")
        usual = launcher.pick_tile

        def pick(wanted: str, *args: Any) -> Any:
            tile = usual(wanted, *args)
            return replace(tile, **config) if wanted == op else tile

        return [("attnkd_kernels.map.launch", "pick_tile", pick)]

    return (
        apply,
        lambda config: f"attnkd_kernels.map.tiles: {op}: Tile({', '.join(f'{k}={v}' for k, v in config.items())})",
    )


_TILES = {"stays": (32, 64, 128), "streams": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}
_WIDE = (197, 577, 1370)


def tunables() -> list[Tunable]:
    """Every kernel that can be tuned."""
    kernels = "attnkd_kernels"
    found = [
        Tunable(
            "row_kl", "cls_row", "fwd", ("deit_small", "vit_base_384"),
            {"tile": (16384, 32768, 65536, 131072), "warps": (2, 4, 8, 16)},
            *_attributes(f"{kernels}.row.kl", tile="WHOLE_TILE", warps="_warps"),
        ),
        Tunable(
            "row_kl_split", "cls_row", "fwd", (2048, 8192),
            {"tile": (2048, 4096, 8192, 16384), "warps": (2, 4, 8)},
            *_attributes(f"{kernels}.row.kl_split", tile="TILE", warps="WARPS"),
        ),
        Tunable(
            "row_kl_bwd", "cls_row", "bwd", ("deit_small", "vit_small_8"), {"tile": (1024, 2048, 4096, 8192, 16384)},
            *_attributes(f"{kernels}.row.backward", tile="TILE"),
        ),
        Tunable(
            "row_logits", "attention_rows", "both", ("deit_small", "vit_small_8"), {"tile": (2048, 4096, 8192, 16384)},
            *_attributes(f"{kernels}.row.logits", tile="TILE"),
        ),
        Tunable(
            "relation_row", "relation_row", "both", ("deit_small", "vit_small_8"),
            {"tile": (2048, 4096, 8192, 16384), "warps": (4, 8, 16)},
            *_attributes(f"{kernels}.relation_row", tile="TILE", warps="_warps"),
        ),
    ]  # fmt: skip
    for op, operation, mode in (
        ("normaliser", "whole_map", "fwd"),
        ("unit", "whole_map", "both"),
        ("dq", "whole_map_mean", "bwd"),
        ("dk", "whole_map", "bwd"),
        ("value", "whole_map_mean", "fwd"),
    ):
        found.append(Tunable(f"map_{op}", operation, mode, _WIDE, _TILES, *_map_tile(op)))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="such as row_kl, map_dk (default: all)")
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", default=["bf16"], help="bf16 (default), fp16, fp32")
    parser.add_argument("--budget-ms", type=float, default=50.0, help="time spent on one candidate (default: 50)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="result file (default: benchmarks/results/<device>/tune.json)")
    parser.add_argument(
        "--smoke", action="store_true", help="two candidates on a tiny shape, correctness only; runs without a GPU too"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 when a candidate was wrong, 2 when it could not start."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.smoke:
        print("tune: needs a CUDA or ROCm GPU and found none; `tune --smoke` checks the search itself", file=sys.stderr)
        return 2
    if not has_gpu:
        from benchmarks.run import prepare_interpreter

        prepare_interpreter()
    from tqdm import tqdm

    from benchmarks import machine, schema, shapes

    known = {tunable.kernel: tunable for tunable in tunables()}
    try:
        device = machine.use_gpu(args.device) if has_gpu else torch.device("cpu")
        dtypes = [shapes.parse_dtype(name) for name in args.dtypes]
        for name in args.kernels or ():
            if name not in known:
                raise ValueError(f"kernel: expected one of {', '.join(known)}, got {name!r}")
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    facts = machine.describe(device)
    print(machine.headline(facts))
    result = schema.document("tune", facts, "python -m benchmarks tune", {"budget_ms": args.budget_ms}, [])
    todo = [(known[name], dtype) for name in args.kernels or known for dtype in dtypes]
    wrong = 0
    for tunable, dtype in tqdm(todo, unit="kernel", leave=False, disable=None):
        for shape in [shapes.SMOKE] if args.smoke else [_shape(name) for name in tunable.shapes]:
            records = list(search(tunable, shape, dtype, device, args.budget_ms, args.smoke))
            result["records"] += records
            wrong += sum(record["status"] in ("FAIL", "error") for record in records)
            for line in summary(tunable, shape, records):
                tqdm.write(line)
            if not args.smoke:
                schema.save(args.output or schema.default_path("tune", facts), result)
    return 1 if wrong else 0


def search(
    tunable: Tunable, shape: Any, dtype: torch.dtype, device: torch.device, budget_ms: float, smoke: bool
) -> Iterator[dict[str, Any]]:
    """One record a candidate, the committed configuration (config {}) first."""
    from benchmarks import judge, measure, shapes
    from benchmarks.operations import OPERATIONS
    from benchmarks.timing import GpuClock
    from benchmarks.timing import measure as time_it

    operation = OPERATIONS[tunable.operation]
    ours, call = operation.implementations[0], operation.call.at(shape, dtype)
    settings = measure.Settings(device)
    expected = judge.truth(call, device)
    clock = GpuClock(device) if device.type == "cuda" else None
    candidates: list[Config] = [{}, *tunable.candidates()]
    if smoke:
        candidates = [candidates[0], candidates[1], candidates[-1]]
    for config in candidates:
        record: dict[str, Any] = {
            "kernel": tunable.kernel, "operation": tunable.operation, "mode": tunable.mode, **shapes.describe(shape, dtype), "config": config,
        }  # fmt: skip
        try:
            with configured(tunable, config):
                run = measure.Run(call, ours, settings)
                record |= measure.verdict(expected.judge(ours, *run.once(expected.upstream)))
                if record["status"] == "ok" and clock is not None:
                    call, setup = run.mode(tunable.mode)
                    timing = time_it(call, setup, clock=clock, budget_ms=1.0 if smoke else budget_ms)
                    record |= {} if smoke else {"ms": timing.as_dict()}
        except Exception as error:
            # A tile that does not fit the device is no fault of the search.
            status, detail = measure.failure(error, ours=False, device=device)
            record |= {"status": status, "detail": detail}
        yield record


@contextlib.contextmanager
def configured(tunable: Tunable, config: Config) -> Iterator[None]:
    """The kernel's configuration replaced while it lasts; nothing replaced for {}."""
    from attnkd_kernels import replay

    with contextlib.ExitStack() as stack:
        for module, attribute, value in tunable.apply(config) if config else []:
            stack.enter_context(mock.patch.object(importlib.import_module(module), attribute, value))
        replay.forget()  # the launches of another configuration
        try:
            yield
        finally:
            replay.forget()


def summary(tunable: Tunable, shape: Any, records: list[dict[str, Any]]) -> Iterator[str]:
    """The committed configuration's time, the best ones, and the row to commit."""
    failed = [record for record in records if record["status"] in ("FAIL", "error")]
    yield f"{tunable.kernel} ({tunable.operation} {tunable.mode}), {shape.label}, N {shape.tokens}: {len(records)} candidates, {len(failed)} wrong"
    for record in failed:
        yield f"  {record['status']} {record['config']}: {record.get('detail', '')}"
    timed = sorted((record for record in records if record.get("ms")), key=lambda record: record["ms"]["median"])
    committed = next((record for record in timed if not record["config"]), None)
    if committed is not None:
        yield f"  committed {committed['ms']['median']:.4f} ms"
    for record in [record for record in timed if record["config"]][:3]:
        yield f"  {record['ms']['median']:.4f} ms ({record['ms']['p20']:.4f}–{record['ms']['p80']:.4f})  {tunable.row(record['config'])}"


def _shape(name: str | int) -> Any:
    from benchmarks import shapes

    return shapes.find_shape(name) if isinstance(name, str) else shapes.Shape(f"n{name}", 6, 12, name, batch=16)
