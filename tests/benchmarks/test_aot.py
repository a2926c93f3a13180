"""Every kernel compiles for every target within its means; and the gate that says so can say no."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from benchmarks import aot, gate, sass, schema, sweep
from tests.benchmarks.aot_toys import Toy

pytest.importorskip("triton")
TOYS = (
    "honest", "small", "strided", "misaligned", "spilling", "dot", "dot_of_fp32", "not_compiling", "raising", "launching_nothing",
)  # fmt: skip


def _by_call(calls, targets):
    records = [record for record in aot.gate(calls, targets) if "progress" not in record]
    return {(call.name, target): [r for r in records if (r["call"], r["target"]) == (call.name, target)]
            for call in calls for target in targets}  # fmt: skip


@pytest.fixture(scope="module")
def toys():
    return _by_call([Toy(name) for name in TOYS], ("sm90", "gfx942"))


@pytest.fixture(scope="module")
def kernels():
    records = [record for record in aot.gate(sweep.representative()) if "progress" not in record]
    assert records
    return records


@pytest.mark.parametrize("target", gate.TARGETS)
def test_kernels_pass(kernels, target):
    """They compile with any compiler; with the locked one their code is good too."""
    records = [r for r in kernels if r["target"] == target]
    assert len({record["kernel"] for record in records}) >= 13
    assert {f"{r['kernel']} [{r['call']}]": r["faults"] for r in records if r["faults"]} == {}


def test_the_committed_counts_are_those_of_the_code(kernels):
    """The figures of docs/kernels/map.md and one_pass.md: with the locked compiler, today's map kernels give the numbers of aot.json."""
    if metadata.version("triton") != gate.COMPILER:
        pytest.skip(f"the counts are those of Triton {gate.COMPILER}")

    def counted(records):
        names = ("target", "kernel", "call", "registers", "spills", "shared", "programs", "last_loop", "loops")
        chosen = [r for r in records if r["kernel"].startswith(("_map_", "_plain_", "_attention_"))]
        return sorted(json.dumps([r.get(n) for n in names]) for r in chosen)

    committed = json.loads((schema.RESULTS / "aot" / "aot.json").read_text())["records"]
    assert counted(kernels) == counted(committed), (
        "run python -m benchmarks aot --json benchmarks/results/aot/aot.json, then table"
    )


def test_no_kernel_is_forgotten():
    """Every kernel of the package is launched by some call of the full sweep."""
    code = (
        "import sys; from unittest import mock; from benchmarks import compiled, sweep\n"
        "compiled.read = lambda *a: {}\n"
        "run = compiled.JITFunction.run\n"
        "seen = set()\n"
        "compiled.JITFunction.run = lambda self, *a, grid, warmup, **k: seen.add(self.fn.__name__) or mock.Mock(hash='')\n"
        "for call in sweep.everything(): compiled.measure(call, 'sm90')\n"
        "import triton\n"
        "every = {n for m in list(sys.modules.values()) if m.__name__.startswith('attnkd_kernels')\n"
        "         for n, f in vars(m).items() if isinstance(f, triton.JITFunction) and n.endswith('_kernel')}\n"
        "assert every; print(sorted(every - seen))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_an_honest_kernel_passes(toys):
    for target in ("sm90", "gfx942"):
        (record,) = toys["honest", target]
        assert record["faults"] == []
        assert record["spills"] == 0 and record["shared"] == 0 and record["registers"] > 8
        assert record["tiles"] == {"load": 256 * 64 * 2, "store": 256 * 64 * 2}
        assert 0 < record["occupancy"] <= 1
    assert toys["honest", "sm90"][0]["loads"] == toys["honest", "sm90"][0]["stores"] == {"128": 16}


@pytest.mark.parametrize("toy", ["strided", "misaligned"])
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_narrow_loads_fail(toys, toy, target):
    (record,) = toys[toy, target]
    assert any("128-bit loads cover 0% of the tiles" in found for found in record["faults"] + record["remarks"]), record


def test_tiles_too_small_for_wide_loads_pass(toys):
    for target in ("sm90", "gfx942"):
        (record,) = toys["small", target]
        assert record["faults"] == [] and "128" not in record["loads"] and record["tiles"] == {"load": 0, "store": 0}


def test_spills_fail(toys):
    (record,) = toys["spilling", "sm90"]
    assert record["spills"] > 0
    assert f"spills {record['spills']} bytes" in record["faults"] + record["remarks"]


def test_dots_are_found_with_their_matrix_instructions(toys):
    assert toys["dot", "sm90"][0]["faults"] == toys["dot", "gfx942"][0]["faults"] == []
    assert toys["dot", "sm90"][0]["dots"] == ["64x64 bf16"]
    assert set(toys["dot", "sm90"][0]["matrix"]) == {"HGMMA"}
    assert all(kind.startswith("v_mfma") for kind in toys["dot", "gfx942"][0]["matrix"])
    assert toys["dot_of_fp32", "sm90"][0]["matrix"] == {}
    assert not any("dot" in fault for fault in toys["dot_of_fp32", "sm90"][0]["faults"])


@pytest.mark.parametrize(
    "toy, message",
    [("not_compiling", "K >= 16"), ("raising", "the launcher itself"), ("launching_nothing", "launched no kernel")],
)
def test_what_cannot_be_compiled_fails(toys, toy, message):
    (record,) = toys[toy, "sm90"]
    assert message in record["error"] and record["faults"] == [record["error"]]


def test_a_crash_is_pinned_on_the_call_that_crashed():
    """A failed assertion in LLVM aborts the process; the other calls must be judged all the same."""
    results = _by_call([Toy("honest"), Toy("crashing")], ("sm90",))
    assert [record["faults"] for record in results["crashing", "sm90"]] == [["the compiler crashed"]]
    assert [record["faults"] for record in results["honest", "sm90"]] == [[]]


def test_matrix_loops_are_counted():
    """Innermost loops only; predicates do not hide an instruction; what stands outside counts nowhere."""
    code = """
        /*0000*/                   MUFU.EX2 R1, R2 ;
.L_x_0:
        /*0010*/                   FADD R1, R2, R3 ;
.L_x_1:
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/              @!P0 MUFU.EX2 R5, R5 ;
        /*0050*/                   FFMA R7, R8, R9, R10 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""
    (loop,) = sass.matrix_loops(code)
    assert loop == {
        "issued": 5,
        "matrix": 1,
        "exponentials": 1,
        "other": 0,
        "fp32": 1,
        "shared": 0,
        "shuffles": 0,
        "fences": 1,
    }


GOOD = {
    "target": "sm90", "kernel": "k", "aligned": True, "spills": 0, "shared": 1024, "dots": ["64x64 bf16"], "threads": 128,
    "tiles": {"load": 8192, "store": 0}, "loads": {"128": 4, "32": 3}, "stores": {}, "matrix": {"HGMMA": 2}, "last_loop": {"products": 3, "pairs": 32.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "change, remark",
    [
        ({}, None),
        ({"spills": gate.SPILL_LIMIT}, None),
        ({"spills": gate.SPILL_LIMIT + 8}, "spills 40 bytes"),
        ({"loads": {"128": 2, "64": 4}}, "128-bit loads cover 50% of the tiles: {'128': 2, '64': 4}"),
        ({"loads": {"128": 2, "64": 4}, "aligned": False}, None),
        ({"loops": [{"matrix": 12, "fences": 5}]}, None),
        ({"loops": [{"matrix": 3, "fences": 6}]}, None),
        ({"loops": [{"matrix": 12, "fences": 5}, {"matrix": 12, "fences": 24}]}, "matrix loop 1 is serialised: 24 fences for 12 products"),
        ({"matrix": {"HMMA": 2}}, "dot 64x64 bf16 without HGMMA: {'HMMA': 2}"),
        ({"matrix": {"HMMA": 2}, "dots": ["16x64 bf16"]}, None),
        ({"matrix": {}, "dots": ["64x64 f32"]}, None),
        ({"target": "sm100", "matrix": {"UTCHMMA": 2}}, None),
        ({"target": "sm100"}, "dot 64x64 bf16 without UTC: {'HGMMA': 2}"),
        ({"target": "gfx942", "matrix": {"v_mfma_f32_32x32x8_bf16": 1}}, None),
        ({"dots": [], "tiles": {"load": 0, "store": 4096}, "stores": {"64": 8}}, "128-bit stores cover 0% of the tiles: {'64': 8}"),
    ],
)  # fmt: skip
def test_poor_code_is_a_fault_of_the_locked_compiler_and_a_remark_on_others(change, remark):
    found = [] if remark is None else [remark]
    assert gate.verdict(GOOD | change, gate.COMPILER) == {"faults": found, "remarks": []}
    assert gate.verdict(GOOD | change, "3.6.0") == {"faults": [], "remarks": found}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"shared": 232449}, "shared memory 232449 of 232448 bytes"),
        ({"target": "sm120", "shared": 101377, "matrix": {"HMMA": 1}}, "shared memory 101377 of 101376 bytes"),
        ({"error": "CompilationError: at 3:0"}, "CompilationError: at 3:0"),
    ],
)
@pytest.mark.parametrize("compiler", [gate.COMPILER, "3.6.0"])
def test_what_cannot_run_is_a_fault_with_every_compiler(change, fault, compiler):
    assert gate.verdict(GOOD | change, compiler) == {"faults": [fault], "remarks": []}


def test_calls_have_distinct_names():
    calls = set(sweep.everything())
    assert len({call.name for call in calls}) == len(calls)


def test_the_command_reports_and_writes_what_it_found(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "aot",
        "--targets",
        "sm90",
        "--jobs",
        "1",
        "--json",
        str(tmp_path / "aot.json"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, "--match", "row logsum 6x64 from 12x64"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "3 kernels compiled, 0 failed"
    records = json.loads((tmp_path / "aot.json").read_text())["records"]
    assert sorted(record["kernel"] for record in records) == [
        "_row_kl_bwd_kernel",
        "_row_kl_join_kernel",
        "_row_kl_split_kernel",
    ]
    done = subprocess.run(
        [*command, "--match", "no such"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 2 and "no call's name contains 'no such'" in done.stderr
