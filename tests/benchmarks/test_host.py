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
from attnkd_kernels import replay
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
    for case in 2 * cases:
        launches(*case)
    again = [launches(*case) for case in cases]
    fresh = []
    for case in cases:
        replay.forget()
        fresh.append(launches(*case))
print(json.dumps({
    "same": [first == second for (first, _), (second, _) in zip(again, fresh)],
    "again by triton": sum(count for _, count in again),
    "fresh by triton": sum(count for _, count in fresh),
    "launches": sum(len(found) for found, _ in fresh),
    "kernels": len({h for found, _ in fresh for h, *_ in found}),
}))
"""


REPLAYED = """
import json, sys, torch
import attnkd
from attnkd.operators import register
from attnkd.testing import guard
from attnkd_kernels import replay
from benchmarks import compiled

bodies = []
@replay.replayed
def product(x, y, times):
    bodies.append(1)
    out = torch.empty_like(x)
    torch.mul(x, y, out=out)
    torch.promote_types(x.dtype, y.dtype)
    return out, [(out[:, 1:].sum(1) * times).view(-1, 1)], None

def right(x, y, times):
    out, (sums,), none = product(x, y, times)
    return torch.equal(out, x * y) and torch.equal(sums, ((x * y)[:, 1:].sum(1) * times).view(-1, 1)) and out.stride() == x.stride() and none is None

@replay.replayed
def of_values(x):
    return x * 2 if x.sum().item() > 0 else x * 3

@replay.replayed
def of_shapes(x):
    return torch.empty_like(x.nonzero()).fill_(1).sum(0)

@replay.replayed
def of_a_pair(x, pair):
    return x * pair[0] + pair[1]

@replay.replayed
def of_the_outside(x):
    return x + outside

@replay.replayed
def fails_for_one(x):
    if x.shape[0] == 1:
        raise ValueError("one")
    return x + 1

x, y = torch.randn(2, 3, 4)
found = {"right": [], "bodies": []}
def thrice(*args):
    before = len(bodies)
    found["right"] += [right(*args), right(*args), right(*args)]
    found["bodies"].append(len(bodies) - before)
thrice(x, x, 2.0)                                     # one tensor twice ...
thrice(x, y, 2.0)                                     # ... is not remembered as one
thrice(x, y, 3.0)
thrice(x.double(), y.double(), 3.0)
thrice(x.mT, y.mT, 3.0)
thrice(torch.randn(13)[1:].view(3, 4), y, 3.0)        # not aligned
thrice(torch.randn(5, 4), torch.randn(5, 4), 3.0)
found["compiler"] = "torch._dynamo" in sys.modules
found["shapes"] = [of_shapes(torch.tensor(given)).tolist() for given in ([1, 1], [1, 1], [0, 1], [0, 0])]
found["right"] += [torch.equal(of_a_pair(x, (2.0, 3.0)), x * 2 + 3) for _ in range(3)]
found["guarded"] = []
for _ in range(2):
    with guard.canaries() as allocated:
        found["right"] += [right(x, y, 2.0) for _ in range(3)]
    found["right"] += [right(x, y, 2.0) for _ in range(3)]
    found["guarded"].append(len(allocated))
q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 20, 16)
try:
    with compiled.unlaunched("sm90"):
        attnkd.attention_divergence(q, k, q, k, impl="triton")
    attnkd.attention_divergence(q, k, q, k, impl="triton")
    found["refused"] = False
except NotImplementedError:
    found["refused"] = True

def step(query, key):
    attnkd.attention_divergence(query, key, query.detach(), key.detach(), impl="triton").backward()

with compiled.unlaunched("sm90") as launched:
    launched.clear()
    for _ in range(4):
        torch.compile(step, backend="eager")(q.requires_grad_(), k.requires_grad_())
    found["launched in a compiled step"] = list(launched)
operator = register(
    "test_product(Tensor x, Tensor y, float times) -> (Tensor, Tensor)",
    replay.replayed(lambda x, y, times: (torch.empty_like(x).copy_(x * y), x * times)),
    lambda x, y, times: (torch.empty_like(x), torch.empty_like(x)),
)
for function in (operator, torch.compile(operator, backend="aot_eager", fullgraph=True)):
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            out, more = function(x, y, 2.0)
        found["right"].append(torch.equal(out, x * y) and torch.equal(more, x * 2.0) and out.is_inference() == more.is_inference())
found["values"] = [of_values(torch.full((2,), v)).tolist() for v in (1.0, -1.0, 1.0, -1.0)]
found["outside"] = []
for value in (1.0, 2.0, 3.0, 4.0):
    outside = torch.full((2,), value)
    found["outside"] += of_the_outside(torch.zeros(2)).tolist()
found["errors"] = 0
for n in (2, 1, 2, 1, 2, 1):
    try:
        fails_for_one(torch.zeros(n))
    except ValueError:
        found["errors"] += 1
print(json.dumps(found))
"""


def test_a_replayed_launcher_does_for_other_tensors_what_it_would_have_done():
    """A record of its first call is run in its place, for tensors of exactly that kind, and only where it tells all."""
    found = json.loads(_python("-c", REPLAYED).splitlines()[-1])
    assert all(found["right"]) and len(found["right"]) == 42
    assert found["bodies"] == [2, 0, 2, 2, 2, 2, 2]
    assert found["values"] == [[2.0, 2.0], [-3.0, -3.0]] * 2, "the course depends on a value"
    assert found["outside"] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0], "a tensor that was not given"
    assert found["errors"] == 3
    assert found["shapes"] == [[2], [2], [1], [0]], "a shape depends on a value"
    assert not found["compiler"], "a record imported torch.compile"
    assert found["guarded"] == [3, 3], "a record hides allocations from the proof, or keeps the proof's"
    assert found["launched in a compiled step"] == ["_row_kl_fwd_kernel", "_row_kl_bwd_kernel"] * 4
    assert found["refused"], "what was decided for a GPU stayed"


def test_a_repeated_launch_gets_the_kernel_and_the_arguments_that_triton_would_give_it():
    """Over dtypes, alignments, sizes that are 1 or divisible by 16, masks and forms; all are known before they are repeated."""
    found = json.loads(_python("-c", LAUNCHES).splitlines()[-1])
    assert found["again by triton"] == 0 and found["launches"] >= found["fresh by triton"] > 20
    assert found["kernels"] > 16
    assert all(found["same"]), found["same"]
