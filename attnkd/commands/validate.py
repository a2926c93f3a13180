"""`attnkd validate`: the implementations against a float64 oracle, and the methods against the textbook, on this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnkd import files
from attnkd.attention import dispatch
from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.chunked.sweep import logits_in_a_block
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.commands.info import devices, versions
from attnkd.commands.options import choose_device
from attnkd.relation.api import relation_row_loss
from attnkd.testing import cases, generate
from attnkd.testing.cases import Case
from attnkd.testing.proof import prove, prove_merge, prove_relation, prove_resample, prove_rows
from attnkd.testing.tolerance import Result

if TYPE_CHECKING:
    from attnkd.testing.method_cases import MethodCase

PROOFS = {"rows": prove_rows, "relation": prove_relation, "merge": prove_merge, "resample": prove_resample}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "relation": relation_row_loss,
    "merge": merge_attention,
    "resample": resample_attention,
}
METHOD_EVERY = 8
"""One in so many random cases is a training step of a method."""
SHRINKING = 100
"""How many simpler cases are tried to find the smallest that fails."""
EPILOG = """Every case compares the outputs and all gradients with an oracle that is written from the papers and computes in float64 on
the same inputs; the allowed error is a small multiple of the rounding error of plain PyTorch. Each case also runs twice (results
must be bitwise equal) and, except for the reference, must allocate no more memory than its results and, for a few rows, those
rows. The methods (--methods, and one in eight random cases) compare a training step's losses and all parameters' gradients with the
papers' equations on complete attention maps. Exit status 1 if anything fails, with the command that runs only the failing
case, and one for the smallest case that fails in the same way."""


@dataclass
class Outcome:
    """What one case showed. Errors are relative to the oracle's size; ratio = error / allowed."""

    case: str
    error: float
    allowed: float
    ratio: float
    worst: str
    deterministic: bool
    memory: int
    promise: int
    failure: str

    @property
    def ok(self) -> bool:
        return not self.failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--impl", choices=generate.IMPLS, default="triton", help="what to validate (default: triton)")
    parser.add_argument(
        "--cases", type=int, metavar="N", help="random cases after the fixed ones (default: 100, --quick: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default: 0)")
    parser.add_argument("--quick", action="store_true", help="only every seventh fixed case")
    parser.add_argument("--methods", action="store_true", help="only the methods")
    parser.add_argument("--minutes", type=float, metavar="M", help="run random cases for M minutes")
    parser.add_argument("--case", metavar="SPEC", help="run one case, as a failure prints it")
    parser.add_argument("--device", help="where to run (default: cuda when there is one)")
    parser.add_argument("--json", metavar="FILE", help="write every outcome to FILE")


def run(args: argparse.Namespace) -> int:
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"minutes: expected a number above 0, got {args.minutes:g}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory reports every start and stop
    device = choose_device(args.device)
    if args.json:
        files.check_writable("json", args.json)
    interpreted = args.impl == "triton" and device.type != "cuda"
    if interpreted and not dispatch.interpreting():
        return _again_in_the_interpreter(args)
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    for row in devices():
        if device.type in row["device"]:
            print(f"{row['device']}: {row['name']} ({row['details']})")
    if interpreted:
        from attnkd.testing import interpreter

        interpreter.install()
        print(
            "No GPU: the kernels run in Triton's interpreter on small shapes. This proves their arithmetic, not their compilation."
        )
    outcomes = []
    todo = _selection(args, small=interpreted)
    for case in _with_progress(todo):
        outcome = examine(case, args.impl, device)
        outcomes.append(outcome)
        if not outcome.ok:
            print(f"FAIL {outcome.failure}\n     {_command(args, case)}", file=sys.stderr)
            if args.case is None and isinstance(case, Case):
                smallest = _smallest(case, args.impl, device)
                print(f"     the smallest: {_command(args, smallest)}", file=sys.stderr, flush=True)
    print(table(outcomes))
    if args.json:
        _write_json(args.json, outcomes, device)
    failed = sum(not outcome.ok for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


def examine(case: Case | MethodCase, impl: str, device: torch.device) -> Outcome:
    """Run one case: errors, determinism, memory. A case that raises is a failure, not a crash."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    memory = promise = 0
    try:
        if not isinstance(case, Case):
            from attnkd.testing.method_cases import prove_method

            results = prove_method(case, impl, device)
        else:
            arguments = case.arguments(device)
            results = PROOFS.get(case.operation, prove)(impl, seed=case.seed, **arguments)
            first, memory = _measured(case, impl, arguments, device)
            second, _ = _measured(case, impl, arguments, device)
            if impl != "reference" and case.operation not in ("merge", "resample"):
                promise = memory_promise(case, first, logits_in_a_block(device) if impl == "chunked" else 0)
    except Exception as error:
        return Outcome(str(case), 0.0, 0.0, float("inf"), "", False, 0, 0, f"{type(error).__name__}: {error}")
    worst = max(results, key=lambda r: r.ratio)
    same = all(torch.equal(a, b) or _same_nan(a, b) for a, b in zip(first, second, strict=True))
    failure = "; ".join(str(r) for r in results if not r.ok)
    if not same:
        failure = "; ".join(filter(None, (failure, "two runs differ")))
    if promise and memory > promise:
        failure = "; ".join(filter(None, (failure, f"{memory:,} bytes allocated, promised {promise:,}")))
    return Outcome(str(case), worst.error, worst.allowed, worst.ratio, _short(worst), same, memory, promise, failure)


def memory_promise(case: Case, results: list[Tensor], block: int) -> int:
    """Bytes that forward and backward may allocate: the results three times over (they are accumulated in fp32), a few numbers a
    query, key and head, and, where at most 16 rows are asked for, six fp32 copies of those rows. Nothing grows with M·N beyond
    that, but for an implementation that works on blocks of ``block`` logits: it has eight fp32 buffers of that size, or of the
    logits that there are (ten, and two of merged rows, where finished rows of heads are merged).
    """
    wide = 2 if "fp64" in (case.dtype, case.teacher_dtype) else 1
    total = 3 * sum(x.numel() * max(x.element_size(), 4) for x in results)
    heads = max(case.H, case.Ht)
    total += wide * 128 * case.B * heads * (case.M + case.N) + (1 << 20)
    merged = case.merge in ("mean", "max", "min")  # from rows that are finished, of each head
    total += wide * (10 if merged else 8) * 4 * min(block, case.B * heads * case.M * case.N)
    total += wide * 2 * 4 * min(block, case.B * case.M * case.N) if merged else 0
    for mask in (case.mask, case.teacher_mask):  # which keys a stored mask hides, a few bytes an element
        total += 0 if mask == "none" else 8 * case.B * heads * case.M * case.N
    if case.operation != "map":
        total += wide * 6 * 4 * case.B * 2 * heads * case.M * case.N
        total += (
            wide * 8 * case.B * heads * case.M * (case.D + case.Dt) * (1 + case.N // 4)
        )  # partial sums of split rows
    return total


def table(outcomes: list[Outcome]) -> str:
    """A line for each operation, dtype and merge: cases, worst error, allowed error, their ratio."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_group(outcome.case), []).append(outcome)
    lines = [
        f"{'operation':<16}{'dtype':<7}{'merge':<8}{'cases':>6}{'worst error':>14}{'allowed':>11}{'ratio':>8}  result"
    ]
    for (operation, dtype, merge), members in groups.items():
        worst = max(members, key=lambda o: o.ratio)
        failed = sum(not o.ok for o in members)
        verdict = f"{failed} FAILED" if failed else "ok"
        numbers = f"{worst.error:>14.2e}{worst.allowed:>11.2e}{worst.ratio:>8.2f}"
        lines.append(f"{operation:<16}{dtype:<7}{merge:<8}{len(members):>6}{numbers}  {verdict:<9} {worst.worst}")
    return "\n".join(lines)


def _group(text: str) -> tuple[str, str, str]:
    """What a line of the table is about."""
    if text.startswith("method="):
        return text.removeprefix("method=").partition(",")[0], "", ""
    case = cases.parse(text)
    return case.operation, case.dtype, "" if case.operation in ("relation", "resample") else str(case.merge)


def _selection(args: argparse.Namespace, small: bool) -> Iterable[Case | MethodCase]:
    if args.case is not None:
        if args.case.startswith("method="):
            from attnkd.testing.method_cases import parse_method

            return [parse_method(args.case)]
        return [cases.parse(args.case)]
    drawn = _random(random.Random(args.seed), args.impl, small, args.methods)
    if args.minutes is not None:
        return _until(time.monotonic() + 60 * args.minutes, drawn)
    chosen = [] if args.methods else list(generate.fixed(args.impl, small))[:: 7 if args.quick else 1]
    count = args.cases if args.cases is not None else (10 if args.quick else 100)
    return chosen + list(itertools.islice(drawn, count))


def _random(rng: random.Random, impl: str, small: bool, methods: bool) -> Iterator[Case | MethodCase]:
    """Random cases without end."""
    for turn in itertools.count(1):
        if methods or turn % METHOD_EVERY == 0:
            from attnkd.testing.method_cases import draw_method

            yield draw_method(rng)
        else:
            yield generate.draw(rng, impl, small)


def _until(end: float, drawn: Iterator[Case | MethodCase]) -> Iterator[Case | MethodCase]:
    for case in drawn:
        yield case
        if time.monotonic() >= end:
            return


def _smallest(case: Case, impl: str, device: torch.device) -> Case:
    """A simpler case that fails too, found in not too many tries."""
    tries = iter(range(SHRINKING))

    def fails(simpler: Case) -> bool:
        return (
            next(tries, None) is not None and generate.exists(simpler, impl) and not examine(simpler, impl, device).ok
        )

    return generate.smallest(case, fails)


def _with_progress(todo: Iterable[Case | MethodCase]) -> Iterable[Case | MethodCase]:
    from tqdm.auto import tqdm

    return tqdm(todo, desc="validate", unit="case", leave=False, disable=None)


def _measured(case: Case, impl: str, arguments: dict[str, Any], device: torch.device) -> tuple[list[Tensor], int]:
    """Loss and gradients of a plain call, and the bytes it allocated at its peak (interpreter: in all)."""
    names = [n for n in ("student_query", "student_key", "student_features", "probs", "rows") if n in arguments]
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = _call(case, impl, arguments | leaves, list(leaves.values()))
        torch.cuda.synchronize(device)
        return results, torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = _call(case, impl, arguments | leaves, list(leaves.values()))
    return results, _peak(profiler)


def _call(case: Case, impl: str, arguments: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    if case.operation in OTHERS:
        options: dict[str, Any] = {"impl": impl} if case.operation == "relation" else {}
        out = OTHERS[case.operation](**arguments, **options)
    elif case.operation == "rows":
        renamed = {n.removeprefix("student_"): a for n, a in arguments.items()}
        out = attention_rows(**renamed, impl=impl)
    else:
        out = attention_divergence(**arguments, impl=impl)
    loss = out.square().sum() if case.operation in ("rows", "merge", "resample") else out.sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def _peak(profiler: Any) -> int:
    """The highest sum of allocations minus frees that the profiler saw."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _same_nan(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _short(result: Result) -> str:
    return f"{result.name.split()[-1]} ({result.why})"


def _command(args: argparse.Namespace, case: Case | MethodCase) -> str:
    device = f" --device {args.device}" if args.device else ""
    return f"attnkd validate --impl {args.impl}{device} --case {case}"


def _again_in_the_interpreter(args: argparse.Namespace) -> int:
    """Triton's interpreter must be chosen before the kernels are imported, so start over with it."""
    if not dispatch.TRITON_INSTALLED:
        raise ModuleNotFoundError(
            "triton is not installed; `--impl chunked` validates the plain PyTorch implementation"
        )
    command = [sys.executable, "-m", "attnkd", *args.argv]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    sys.stdout.flush()
    if args.whole_process:
        os.execve(sys.executable, command, environment)
    return subprocess.run(command, env=environment).returncode  # called by a Python program, which goes on


def _write_json(path: str, outcomes: list[Outcome], device: torch.device) -> None:
    report = {
        "versions": versions(),
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "outcomes": [asdict(o) | {"ok": o.ok} for o in outcomes],
    }
    files.write_json(path, report)
