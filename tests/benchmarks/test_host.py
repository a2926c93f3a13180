"""What a call costs the host is measured on launches that are real up to the driver's; and a repeated launch is the same launch."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def _python(*arguments):
    """Triton compiles or interprets, never both in one process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_host_reports_launches_and_times_of_a_call(tmp_path):
    _python("-m", "benchmarks", "host", "--only", "log-sum", "--seconds", "0.1", "--json", str(tmp_path / "host.json"))
    (record,) = json.loads((tmp_path / "host.json").read_text())["records"]
    assert record["kernels"] == ["_row_kl_split_kernel", "_row_kl_join_kernel", "_row_kl_bwd_kernel"]
    for what in ("floor", "forward", "both"):
        assert 1 < record[what]["fastest"] <= record[what]["median"] <= record[what]["p80"]
    assert record["floor"]["fastest"] < record["both"]["fastest"]


LAUNCHES = """
import json, sys, torch
from dataclasses import replace
from benchmarks import compiled
from benchmarks.calls import Attention, Relation, gradients
from attnkd_kernels import launch
from triton.runtime.jit import JITFunction

handed, by_triton = [], []
def launcher_cls(self, src, metadata):
    def start(x, y, z, stream, function, packed, meta, enter, leave, *args):
        handed.append((metadata.hash, metadata.num_warps, (x, y, z), plain(args)))
    return start
def plain(x):
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.stride(), x.data_ptr() % 16
    return tuple(map(plain, x)) if isinstance(x, tuple) else repr(x)
compiled._LoadingDriver.launcher_cls = launcher_cls
run = JITFunction.run
JITFunction.run = lambda self, *a, **k: by_triton.append(self) or run(self, *a, **k)

row = Attention(batch=2, keys=37, heads=2, dim=16)
single = replace(row, dtype="float32", dim=32)
relation = Relation(37, 64, 96, batch=2)
cases = [(call, shift) for call in (row, single, relation) for shift in (False, True)]
cases += [(replace(row, **change), False) for change in (
    {"batch": 1}, {"keys": 48}, {"temperature": 2.0}, {"mask": "additive"}, {"merge": "logsum", "keys": 301}, {"rows": 0}
)]
def launches(call, shift):
    given = call.tensors(filled=False)
    if shift:  # not aligned any more
        moved = {n: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).requires_grad_(x.requires_grad) for n, x in given.items()}
        given = moved
    handed.clear(); by_triton.clear()
    results = call.results(given)
    if call.backward:
        gradients(results, given)
    return list(handed), len(by_triton)

with compiled.unlaunched("sm90"):
    for case in cases:
        launches(*case)
    again = [launches(*case) for case in cases]
    fresh = []
    for case in cases:
        launch._compiled.clear()
        fresh.append(launches(*case))
print(json.dumps({
    "same": [first == second for (first, _), (second, _) in zip(again, fresh)],
    "again by triton": sum(count for _, count in again),
    "fresh by triton": sum(count for _, count in fresh),
    "launches": sum(len(found) for found, _ in fresh),
    "kernels": len({h for found, _ in fresh for h, *_ in found}),
}))
"""


def test_a_repeated_launch_gets_the_kernel_and_the_arguments_that_triton_would_give_it():
    """Over dtypes, alignments, sizes that are 1 or divisible by 16, masks and forms; all are known before they are repeated."""
    found = json.loads(_python("-c", LAUNCHES).splitlines()[-1])
    assert found["again by triton"] == 0 and found["launches"] >= found["fresh by triton"] > 20
    assert found["kernels"] > 16
    assert all(found["same"]), found["same"]
