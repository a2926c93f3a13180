"""The benchmark suite itself: its gate stops wrong results, its numbers are what they say, and none of its parts rots."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkd_kernels import replay
from benchmarks import (
    conditions,
    judge,
    machine,
    measure,
    plot,
    report,
    run,
    schema,
    shapes,
    table,
    timing,
    training,
    tune,
)
from benchmarks.__main__ import COMMANDS, main
from benchmarks.calls import Attention
from benchmarks.operations import OPERATIONS

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SETTINGS = measure.Settings(DEVICE, modes=("both",), compile_backend="inductor" if HAS_GPU else "aot_eager")


def _judged(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, judge.Truth, tuple, tuple]:
    """Our implementation of an operation, tiny: what it should give and what it gives."""
    operation = OPERATIONS[name]
    ours = operation.implementations[0]
    expected = judge.truth(operation.call.at(shapes.SMOKE, dtype), DEVICE)
    return ours, expected, *measure.Run(expected.call, ours, SETTINGS).once(expected.upstream)


def _right(results: list) -> bool:
    return all(result.ok for result in results)


# --- every operation and opponent is right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_implementation_of_an_operation_is_right(name):
    operation = OPERATIONS[name]
    names = tuple(i.name for i in operation.implementations if not i.compiled)
    records = list(measure.measure_case(operation, shapes.SMOKE, torch.bfloat16, SETTINGS, names))
    assert [r["implementation"] for r in records] == list(names)
    assert {r["status"] for r in records} == {"ok"}, records
    assert operation.implementations[0].name == ("sdpa" if name == "attention_alone" else "ours")


@pytest.mark.parametrize("name, opponent", [("cls_row_logsum", "compile_row"), ("attention_cls_row", "sdpa_compile")])
def test_compiled_opponents_are_right(name, opponent):
    (record,) = measure.measure_case(OPERATIONS[name], shapes.SMOKE, torch.float32, SETTINGS, (opponent,))
    assert record["status"] == "ok", record


def test_fused_attention_with_both_keys_as_values_is_right():
    settings = dataclasses.replace(SETTINGS, modes=("fwd",))
    (record,) = measure.measure_case(OPERATIONS["whole_map"], shapes.SMOKE, torch.float32, settings, ("flex",))
    assert record["status"] == "ok", record


@pytest.mark.parametrize("pair", training.SMOKE, ids=lambda pair: pair.name)
def test_training_variants_have_the_same_losses_and_gradients(pair):
    records = list(training.measure_pair(pair, SETTINGS))
    assert [r["variant"] for r in records] == list(training.VARIANTS)
    assert {r["status"] for r in records} == {"ok"}, records


# --- the gate ---------------------------------------------------------------------------------------------------------------


def _first_head_zeroed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 0] = 0
    return x


def _last_key_zeroed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-1, -1, -1] = 0
    return x


def _one_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = torch.nan
    return x


WRONG = {
    "zeroed": torch.zeros_like, "negated": torch.neg, "scaled": lambda x: 1.5 * x, "permuted keys": lambda x: x.roll(1, -2),
    "permuted heads": lambda x: x.flip(1), "permuted images": lambda x: x.flip(0), "one head": _first_head_zeroed,
    "one key": _last_key_zeroed, "one nan": _one_nan,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_does_not_pass(dtype):
    ours, expected, outputs, (dq, dk) = _judged("whole_map", dtype)
    for implementation in (ours, dataclasses.replace(ours, ours=False)):
        assert _right(expected.judge(implementation, outputs, (dq, dk)))
        for what, wrong in WRONG.items():
            assert not _right(expected.judge(implementation, outputs, (dq, wrong(dk)))), what
            assert not _right(expected.judge(implementation, outputs, (wrong(dq), dk))), what


def test_a_wrong_result_does_not_pass():
    for name in ("cls_row", "attention_rows"):
        ours, expected, outputs, grads = _judged(name)
        assert _right(expected.judge(ours, outputs, grads))
        assert not _right(expected.judge(ours, [x * 1.01 for x in outputs], grads))
        assert not _right(expected.judge(ours, [x[..., None] for x in outputs], grads))


def test_a_gradient_of_rows_that_are_not_compared_does_not_pass():
    ours, expected, outputs, (dq, dk) = _judged("cls_row")
    of_maps = dataclasses.replace(ours, all_queries=True)
    padded = torch.nn.functional.pad(dq, (0, 0, 0, shapes.SMOKE.tokens - 1))
    assert _right(expected.judge(of_maps, outputs, (padded, dk)))
    padded[0, 0, 3, 0] = 1e-3
    assert not _right(expected.judge(of_maps, outputs, (padded, dk)))


def test_only_ties_may_take_another_head():
    ours, expected, outputs, (dq, dk) = _judged("cls_row_max")
    moved = dk.clone()
    moved[0, 0, 3] = 0  # one key of 84
    assert _right(expected.judge(ours, outputs, (dq, moved)))
    moved[:, :, 3:9] = 0
    assert not _right(expected.judge(ours, outputs, (dq, moved)))
    assert not _right(expected.judge(ours, outputs, (dq, _one_nan(dk))))


def test_the_truth_is_the_same_in_slices(monkeypatch):
    for name in ("whole_map", "cls_row_logsum", "attention_whole_map", "relation_row"):
        call = OPERATIONS[name].call.at(shapes.SMOKE, torch.float32)
        whole = judge.truth(call, DEVICE)
        monkeypatch.setattr(judge, "CHUNK", 1)  # one image and one query row at a time
        sliced = judge.truth(call, DEVICE)
        monkeypatch.undo()
        oracles = [
            [x[0] for x in (*truth.results, *truth.gradients.values())] + [truth.results[0][2]]
            for truth in (whole, sliced)
        ]
        for a, b in zip(*oracles, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_wrong_case_gets_no_time_and_fails_the_run(capsys, monkeypatch, tmp_path):
    class Wrong(Attention):
        def results(self, given, impl="triton"):
            return (2 * super().results(given, impl)[0],)

    broken = dataclasses.replace(OPERATIONS["cls_row"], call=Wrong())
    settings = dataclasses.replace(SETTINGS, clock=timing.HostClock())
    (record,) = measure.measure_case(broken, shapes.SMOKE, torch.float32, settings, ("ours",))
    assert record["status"] == "FAIL" and "ms" not in record and "result 0" in record["detail"]
    monkeypatch.setitem(OPERATIONS, "cls_row", broken)
    assert (
        main(
            [
                "run",
                "--smoke",
                "--suite",
                "operations",
                "--operations",
                "cls_row",
                "--modes",
                "both",
                "--implementations",
                "ours",
            ]
        )
        == 1
    )
    assert "FAIL" in capsys.readouterr().out


# --- numbers ----------------------------------------------------------------------------------------------------------------


def test_a_right_case_is_timed():
    settings = dataclasses.replace(
        SETTINGS, modes=shapes.MODES, clock=timing.HostClock(), budget_ms=1.0, count_launches=False
    )
    if HAS_GPU:
        settings = dataclasses.replace(settings, clock=timing.GpuClock(DEVICE), count_launches=True)
    records = list(measure.measure_case(OPERATIONS["cls_row"], shapes.SMOKE, torch.float32, settings, ("eager_row",)))
    assert [r["mode"] for r in records] == list(shapes.MODES)
    for record in records:
        assert 0 < record["ms"]["p20"] <= record["ms"]["median"] <= record["ms"]["p80"]
        assert record["ms"]["samples"] >= timing.MIN_SAMPLES
    result = schema.document("operations", _machine(), "test", {}, json.loads(json.dumps(records)))
    assert schema.check(result) == []


class _CountingClock:
    """A clock on which every call takes as long as it says."""

    def __init__(self) -> None:
        self.now = 0.0

    def samples(self, count: int, call: Any, setup: Any) -> list[float]:
        found = []
        for _ in range(count):
            argument = setup()
            start = self.now
            call(argument)
            found.append(self.now - start)
        return found


def test_only_the_call_is_timed_and_the_budget_is_kept():
    clock = _CountingClock()

    def take(ms: float) -> float:
        clock.now += ms
        return ms

    found = timing.measure(lambda ms: take(ms), lambda: (take(100.0), 2.0)[1], clock=clock, budget_ms=100.0)
    assert (found.median, found.p20, found.p80, found.samples) == (2.0, 2.0, 2.0, 50)
    assert timing.measure(take, lambda: 50.0, clock=clock, budget_ms=100.0).samples == timing.MIN_SAMPLES


def test_percentiles():
    found = timing.summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (found.median, found.p20, found.p80, found.samples) == (3.5, 2.0, 5.0, 6)


def test_the_least_work_of_a_class_token_row():
    """Student and teacher keys once, dk once: three units, and little else."""
    shape = shapes.SHAPES["deit_small"]
    row, whole = (OPERATIONS[name].call.at(shape, torch.bfloat16) for name in ("cls_row", "whole_map"))
    unit = shape.batch * shape.heads * shape.tokens * shape.head_dim * 2
    assert 3.0 < sum(row.floors().values()) / unit < 3.2
    assert whole.flops()["forward"] == 2 * 2 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    assert whole.flops()["backward"] == whole.flops()["forward"]


def test_rates_and_speed_up():
    ours = {"ms": {"median": 2.0}, "floor_bytes": 4_000_000_000, "flops": 10**12, "dtype": "bfloat16", "status": "ok"}
    found = report.rates(ours, {"copy_gb_s": 4000.0, "matmul_tflop_s_bfloat16": 1000.0})
    assert found == {"gb_s": 2000.0, "tflop_s": 500.0, "copy_share": 0.5, "matmul_share": 0.5}
    assert report.speed_up({"ms": {"median": 3.0}}, ours) == 1.5
    assert report.speed_up({"status": "OOM"}, ours) is None


# --- files ------------------------------------------------------------------------------------------------------------------


def _machine(device: str = "NVIDIA Test") -> dict[str, Any]:
    return {
        "device": device, "details": "sm_90", "toolkit": "CUDA 0", "driver": "0", "system": "Linux", "versions": {"torch": "0"},
        "commit": "0000000000",
    }  # fmt: skip


def _record(implementation: str, ms: float | None, shape: str = "deit_small", **more: Any) -> dict[str, Any]:
    batch, tokens = more.pop("batch", 8), more.pop("tokens", 197)
    dims = {"heads": 6, "teacher_heads": 12, "tokens": tokens, "head_dim": 64, "batch": batch}
    record = {
        "operation": "cls_row", "shape": shape, "dims": dims, "dtype": "bfloat16", "mode": "both", "implementation": implementation,
        "status": "ok" if ms else "OOM", "floor_bytes": batch * tokens * 4000, "flops": batch * tokens * 9000,
    }  # fmt: skip
    if ms:
        record |= {
            "ms": {"median": ms, "p20": ms, "p80": ms, "samples": 20},
            "peak_bytes": int(batch * tokens * 3000 * ms),
        }
    return record | more


def _results(kind: str, records: list[dict[str, Any]], device: str = "NVIDIA Test") -> dict[str, Any]:
    ceilings = {"copy_gb_s": 4000.0, "matmul_tflop_s_bfloat16": 700.0}
    return schema.document(kind, _machine(device), "python -m benchmarks run", {"ceilings": ceilings}, records)


def _made_up() -> dict[str, dict[str, Any]]:
    """Result files with invented numbers, one of every kind that can be drawn."""
    names = {"ours": 1.0, "eager_map": 7.0, "compile_map": 4.0, "compile_row": 0.8, "flex": None}
    operations = [_record(n, t, shape) for shape in ("deit_small", "vit_small_8") for n, t in names.items()]
    scaling = [_record(n, t and t * b, batch=b) for n, t in names.items() for b in (1, 8, 64)]
    scaling += [
        _record(n, t and (t * N / 64 if N < 4096 else None), f"n{N}", tokens=N)
        for n, t in names.items()
        for N in (64, 512, 4096)
    ]
    steps = [
        {"pair": pair.name, "variant": v, "batch": 8, "dtype": "bfloat16 autocast", "status": "ok", "images_per_s": 1000.0 / (i + 1),
         "peak_bytes": 2**30 * (i + 1), "ms": {"median": 8.0 * (i + 1), "p20": 8.0, "p80": 80.0, "samples": 10}}
        for pair in training.PAIRS for i, v in enumerate(training.VARIANTS)
    ]  # fmt: skip
    growth = [
        {"group": "growth", "batch": 1, "tokens": n, "rows": 0, "divergence": "forward_kl", "merge": None, "implementation": name,
         "status": "ok", "ms": {"median": n * f, "p20": n * f, "p80": n * f, "samples": 5}, "extra_mib": n * f}
        for name, f in (("eager", 2.0), ("chunked", 1.0)) for n in (512, 1024, 2048)
    ]  # fmt: skip
    return {
        kind: _results(kind, r)
        for kind, r in (("operations", operations), ("scaling", scaling), ("training", steps), ("cpu", growth))
    }


@pytest.mark.parametrize(
    "path", sorted(schema.RESULTS.rglob("*.json")), ids=lambda p: str(p.relative_to(schema.RESULTS))
)
def test_committed_results_follow_the_schema(path):
    result = schema.load(path)
    assert result["kind"] == path.stem.removesuffix("-selection")
    assert not [r for r in result["records"] if r.get("status") == "FAIL" and schema.is_ours(r)]


def test_results_survive_the_file(tmp_path):
    for kind, result in _made_up().items():
        schema.save(tmp_path / f"{kind}.json", result)
        assert schema.load(tmp_path / f"{kind}.json") == result


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.pop("machine"), "machine is missing"),
        (lambda r: r["machine"].pop("commit"), "commit is missing"),
        (lambda r: r.update(schema=2), "expected schema 1, got 2"),
        (lambda r: r["records"][0].pop("dims"), "record 0: dims is missing"),
        (lambda r: r["records"][0].update(status="fine"), "status: expected one of ok, FAIL"),
        (lambda r: r["records"][0].update(status="FAIL"), "a case that is FAIL has a time"),
        (lambda r: r["records"][0]["ms"].update(p20=2.0), "expected 0 < p20 <= median <= p80"),
    ],
)
def test_a_file_that_does_not_follow_the_schema_is_refused(spoil, message, tmp_path):
    result = _results("operations", [_record("ours", 1.0)])
    spoil(result)
    with pytest.raises(ValueError, match=message):
        schema.save(tmp_path / "x.json", result)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=message):
        schema.load(tmp_path / "x.json")


# --- compare ----------------------------------------------------------------------------------------------------------------


def _compare(tmp_path: Path, before: list, after: list, *flags: str, device: str = "NVIDIA Test") -> int:
    schema.save(tmp_path / "a.json", _results("operations", before))
    schema.save(tmp_path / "b.json", _results("operations", after, device))
    return main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *flags])


@pytest.mark.parametrize(
    "after, code, words",
    [
        ([_record("ours", 1.04), _record("eager_map", 5.0)], 0, "of ours 0 grew"),
        ([_record("ours", 1.2), _record("eager_map", 5.0)], 1, "+20.0%"),
        ([_record("ours", 1.0), _record("eager_map", 9.0)], 0, "(opponent)"),
        ([_record("ours", 1.0, peak_bytes=10**9), _record("eager_map", 5.0)], 1, "peak_bytes"),
        ([_record("ours", None), _record("eager_map", 5.0)], 1, "BROKEN"),
        ([_record("eager_map", 5.0)], 1, "gone"),
    ],
    ids=["within", "slower", "opponent slower", "more memory", "fails now", "missing"],
)
def test_compare_finds_what_became_worse(after, code, words, tmp_path, capsys):
    before = [_record("ours", 1.0), _record("eager_map", 5.0)]
    assert _compare(tmp_path, before, after, "--fail-above", "5%") == code
    assert words in capsys.readouterr().out
    assert _compare(tmp_path, before, after) == 0  # without a threshold it only tells


def test_compare_refuses_two_devices(tmp_path, capsys):
    one = [_record("ours", 1.0)]
    assert _compare(tmp_path, one, one, "--fail-above", "5%", device="NVIDIA Other") == 2
    assert "of one device" in capsys.readouterr().err


# --- tables and plots -------------------------------------------------------------------------------------------------------


def test_no_table_in_the_documentation_is_stale(capsys):
    assert main(["table", "--check"]) == 0, capsys.readouterr()


def test_tables_are_written_between_their_markers(tmp_path):
    for kind, result in _made_up().items():
        schema.save(tmp_path / f"{kind}.json", result)
    page = "before `<!-- table:NAME -->`\n<!-- table:operations results=operations.json operation=cls_row -->\nold\n<!-- /table -->\nafter\n"
    fresh = table.render(page, tmp_path)
    assert (
        "old" not in fresh
        and fresh.startswith("before `<!-- table:NAME -->`\n<!-- table:operations")
        and fresh.endswith("<!-- /table -->\nafter\n")
    )
    assert "| deit_small, B 8, N 197 | 1.000 ms | 5 MiB |" in fresh
    assert "| 7.00x | 4.00x | **0.80x** | OOM |" in fresh  # slower is bold, a failure is told
    assert "NVIDIA Test" in fresh and "commit 0000000000" in fresh
    assert table.render(fresh, tmp_path) == fresh
    schema.save(tmp_path / "operations.json", _results("operations", [_record("ours", 2.0), _record("eager_map", 7.0)]))
    assert table.render(fresh, tmp_path) != fresh


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- table:nonsense -->\n<!-- /table -->", "table: expected one of"),
        ("<!-- table:operations results=none.json -->\n<!-- /table -->", "no such file under benchmarks/results"),
        ("<!-- table:operations results=operations.json dtype=int4 -->\n<!-- /table -->", "has nothing for"),
        ("<!-- table:operations -->\nno end", "has no <!-- /table --> after it"),
    ],
)
def test_a_marker_that_cannot_be_served_is_an_error(page, message, tmp_path):
    schema.save(tmp_path / "operations.json", _made_up()["operations"])
    with pytest.raises(ValueError, match=message):
        table.render(page, tmp_path)


def test_every_kind_of_table_can_be_made(tmp_path):
    made = _made_up()
    made["first_call"] = _results("first_call", [
        {"operation": "cls_row", "implementation": "ours", "cache": c, "status": "ok", "import_s": 1.0, "first_call_s": 2.0,
         "second_call_ms": 0.5} for c in ("cold", "warm")
    ])  # fmt: skip
    made["traffic"] = _results("traffic", [
        {"call": "cls", "pass": p, "launches": ["k"], "floor": 100, "moved": 104, "touched": 100} for p in ("forward", "backward")
    ])  # fmt: skip
    made["aot"] = _results("aot", [
        {"kernel": "_k", "target": t, "registers": 64, "programs": 8, "spills": 0, "faults": []} for t in ("sm80", "sm90")
    ])  # fmt: skip
    counted = table._COUNTED | table._COUNTED_ONE_PASS
    made["counts"] = made["one_pass"] = _results("aot", [
        {"kernel": kernel, "call": call, "target": "sm90", "registers": 64, "programs": 8, "spills": 0, "faults": [],
         "loops": [{"exponentials": 32, "fp32": 64, "issued": 160}], "last_loop": {"products": 2, "pairs": 32.0}}
        for kernel, call in {part[:2] for parts in counted.values() for part in parts}
    ])  # fmt: skip
    made["matrix"] = _results("matrix", [
        {"environment": "t", "status": "ok", "created": "2026-01-01T00:00:00", "commit": "0", "versions": {"torch": "0"},
         "tests": {"passed": 1, "skipped": 0, "failed": []}, "minutes": 1.0,
         "aot": {"compiled": 1, "failed": [], "remarked": 0, "spilled": 0}}
    ])  # fmt: skip
    for name in table.TABLES:
        schema.save(tmp_path / f"{name}.json", made[name])
        text = table.make_table(name, {"results": f"{name}.json"}, tmp_path)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) >= 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1, text


def test_every_figure_can_be_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made = _made_up()
    for kind, result in made.items():
        schema.save(tmp_path / f"{kind}.json", result)
    assert main(["plot", *(str(tmp_path / f"{kind}.json") for kind in made)]) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"speedup_cls_row_both.png", "scaling_cls_row.png", "training.png", "cpu_growth.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    schema.save(tmp_path / "traffic.json", _results("traffic", []))
    assert main(["plot", str(tmp_path / "traffic.json")]) == 2
    assert "nothing to plot" in capsys.readouterr().err


def test_every_implementation_has_a_style_of_its_own():
    for operation in OPERATIONS.values():
        styles = [plot._style(i.name) for i in operation.implementations]
        assert len(set(styles)) == len(styles)
        assert len({colour for colour, _, _ in styles}) == len(styles)


def test_the_roofline_is_the_larger_floor():
    ceilings = {"copy_gb_s": 1000.0, "matmul_tflop_s_bfloat16": 1.0}
    assert plot.floor_ms({"floor_bytes": 10**9, "flops": 1, "dtype": "bfloat16"}, ceilings) == 1.0
    assert plot.floor_ms({"floor_bytes": 1, "flops": 10**9, "dtype": "bfloat16"}, ceilings) == 1.0
    assert plot.floor_ms({"floor_bytes": 1, "flops": 1, "dtype": "float32"}, ceilings) is None


# --- tune -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tunable", [pytest.param(t, id=t.kernel) for t in tune.tunables()])
def test_the_search_reaches_the_launch_and_leaves_nothing_behind(tunable):
    """What the search replaces is what the launcher reads."""
    operation = OPERATIONS[tunable.operation]
    expected = judge.truth(operation.call.at(shapes.SMOKE, torch.float32), DEVICE)
    config = tunable.candidates()[0]
    replaced = [(importlib.import_module(module), attribute) for module, attribute, _ in tunable.apply(config)]
    usual = [getattr(module, attribute) for module, attribute in replaced]
    read: set[str] = set()
    replay._plans["launches", "of the usual configuration"] = print
    with tune.configured(tunable, config):
        assert not replay._plans
        replay._plans["launches", "of this configuration"] = print
        for module, attribute in replaced:
            _watch(module, attribute, read)
        ours = operation.implementations[0]
        found = measure.Run(expected.call, ours, SETTINGS).once(expected.upstream)
    assert _right(expected.judge(ours, *found)) and not replay._plans
    assert [getattr(module, attribute) for module, attribute in replaced] == usual
    functions = {attribute for module, attribute in replaced if callable(getattr(module, attribute))}
    if tunable.kernel.startswith("map_"):
        assert tunable.kernel.removeprefix("map_") in read, f"the launcher of {tunable.operation} asked for {read} only"
    elif tunable.kernel != "row_kl_split":  # its shapes are longer than this one
        assert functions <= read


def _watch(module: Any, attribute: str, read: set[str]) -> None:
    """Notes what a replaced function is called for; ``configured`` puts the original back."""
    function = getattr(module, attribute)
    if callable(function):

        def watched(*args: Any) -> Any:
            read.add(args[0] if attribute == "pick_tile" else attribute)
            return function(*args)

        setattr(module, attribute, watched)


# --- commands ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m benchmarks {command}" in capsys.readouterr().out


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
def test_without_a_gpu_run_refuses_in_one_line(capsys):
    assert main(["run"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(word in said for word in ("GPU", "traffic", "aot", "cpu", "--smoke"))


def test_a_gpu_by_name_becomes_the_current_one(monkeypatch):
    """PyTorch's set_device refuses 'cuda' without an index, which is what `--device` is by default."""
    current = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device("cuda", device)))
    assert (
        [machine.use_gpu(name) for name in ("cuda", "cuda:1")] == current == [torch.device("cuda", i) for i in (3, 1)]
    )
    with pytest.raises(ValueError, match="device: expected a GPU such as cuda or cuda:1, got cpu"):
        machine.use_gpu("cpu")


def test_a_run_without_flags_has_few_opponents_to_compile(monkeypatch):
    """Compiling takes seconds for each; everything is measured with --full."""

    def compilations(*flags: str) -> dict[str, int]:
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        _, suites = run.plan(parser.parse_args(flags), torch.device("cpu"))
        found = {}
        for suite in ("operations", "scaling"):
            seen.clear()
            for _, measured in suites[suite]:
                measured()
            found[suite] = sum(seen)
        return found

    seen: list[int] = []

    def measure_case(operation: Any, shape: Any, dtype: Any, how: Any, names: tuple[str, ...]) -> None:
        assert names and names[0] in ("ours", "sdpa")  # attention alone is a row of its own
        seen.append(sum(i.compiled and i.name in names for i in operation.implementations))

    monkeypatch.setattr(measure, "measure_case", measure_case)
    short, full = compilations(), compilations("--full")
    assert sum(short.values()) < 80 < 3 * sum(short.values()) < sum(full.values())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--operations", "nonsense"], "operation: expected one of all, headline, cls_row"),
        (["--shapes", "nonsense"], "shape: expected one of deit_tiny"),
        (["--dtypes", "int8"], "dtype: expected one of bf16, fp16, fp32"),
        (["--implementations", "nonsense"], "implementation: expected one of"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(flags, message, capsys):
    assert main(["run", "--smoke", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_smoke_run_of_every_suite(capsys):
    flags = [
        "--operations",
        "cls_row",
        "--implementations",
        "ours",
        "eager_row",
        "off",
        "--pairs",
        "0",
        "--modes",
        "both",
    ]
    assert main(["run", "--smoke", *flags]) == 0
    said = capsys.readouterr().out
    assert "commit" in said.splitlines()[0]
    for word in (
        "== operations",
        "== training",
        "== first_call",
        "== scaling",
        "eager_row",
        "cold  right",
        "warm  right",
    ):
        assert word in said
    assert " ms (" not in said and "images/s" not in said


@pytest.mark.gpu
def test_a_smoke_run_on_the_gpu_times_everything_and_tells_no_number(capsys):
    assert main(["run", "--smoke", "--operations", "headline"]) == 0
    assert " ms (" not in capsys.readouterr().out


@pytest.mark.gpu
def test_device_time_grows_with_the_work():
    clock = timing.GpuClock(DEVICE)
    times = []
    for size in (1 << 27, 1 << 29):
        source, target = (
            torch.ones(size, dtype=torch.int8, device=DEVICE),
            torch.empty(size, dtype=torch.int8, device=DEVICE),
        )
        times.append(timing.measure(lambda _, s=source, t=target: t.copy_(s), clock=clock, budget_ms=50).median)
    assert 3.0 < times[1] / times[0] < 5.0


@pytest.mark.gpu
def test_memory_and_launches_are_counted():
    source = torch.ones(1 << 24, device=DEVICE)
    assert measure.peak_bytes(lambda x: x + 1, lambda: source + 1, DEVICE) == 2 * source.numel() * 4
    assert measure.peak_bytes(lambda _: source + 1, lambda: None, DEVICE) == source.numel() * 4
    assert measure.count_launches(lambda _: source.add_(1).mul_(2), lambda: None, DEVICE)["launches"] == 2


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "test_operation[cls_row- and both-ours"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=root, capture_output=True, text=True, env=environment
    )
    shapes = 2 if HAS_GPU else 1
    assert done.returncode == 0 and f"{shapes} passed" in done.stdout, done.stdout + done.stderr


# --- thirty minutes of a GPU ------------------------------------------------------------------------------------------------


def test_a_run_that_must_end_lists_what_it_left_out():
    left_out: list[str] = []
    assert list(run._before(time.monotonic() - 1, lambda: iter([{"n": 1}]), "late", left_out)) == []
    assert list(run._before(time.monotonic() + 60, lambda: iter([{"n": 1}, {"n": 2}]), "early", left_out)) == [
        {"n": 1},
        {"n": 2},
    ]

    def slow():
        yield {"n": 1}
        time.sleep(0.3)
        yield {"n": 2}
        raise AssertionError("begun after the time was over")

    assert list(run._before(time.monotonic() + 0.2, slow, "cut", left_out)) == [{"n": 1}, {"n": 2}]
    assert left_out == ["late", "cut"]


def test_headline_operations_come_first():
    headline = [operation.headline for operation in OPERATIONS.values()]
    assert headline == sorted(headline, reverse=True)
    assert list(OPERATIONS)[:4] == ["cls_row", "cls_row_logsum", "whole_map", "attention_alone"]


def test_the_state_of_a_gpu_is_read_from_what_nvidia_smi_says():
    state = conditions.parse("1755, 1980, 2619, 690.51, 700.00, 71, 5120, 0x0000000000000024\n", "11\n12\n13\n", own=12)
    assert state == {
        "sm_mhz": 1755.0, "sm_max_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 690.51, "power_limit_w": 700.0,
        "temperature_c": 71.0, "memory_used_mib": 5120.0, "slowed_by": ["power cap", "thermal (software)"], "others": 2,
    }  # fmt: skip
    assert "slowed by power cap, thermal (software)" in conditions.line(
        state
    ) and "2 other processes" in conditions.line(state)
    idle = conditions.parse("345, [N/A], 405, [Not Supported], 250.00, 30, 0, 0x0000000000000001\n", "", own=12)
    assert (idle["sm_max_mhz"], idle["power_w"], idle["slowed_by"], idle["others"]) == (None, None, [], 0)
    assert "345 MHz of ? MHz" in conditions.line(idle) and "not slowed" in conditions.line(idle)
    unknown = conditions.parse("No devices were found\n", "", own=12)
    assert list(unknown) == ["absent"] and "unknown" in conditions.line(unknown)
