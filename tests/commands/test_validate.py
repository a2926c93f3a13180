"""`attnkd validate`: passes on honest kernels, fails on a broken one, and its failures can be run again alone."""

import json
import random
import subprocess
import sys

import pytest
import torch

from attnkd.attention.chunked import sweep as chunked_sweep
from attnkd.commands import cli, validate
from attnkd.testing import cases, generate

HAS_GPU = torch.cuda.is_available()


def test_every_case_has_a_line_that_brings_it_back():
    rng = random.Random(0)
    drawn = list(generate.fixed("triton", small=True)) + [
        generate.draw(rng, "chunked", small=False) for _ in range(200)
    ]
    assert all(cases.parse(str(case)) == case for case in drawn)
    assert len({str(case) for case in drawn}) > 0.95 * len(drawn)


@pytest.mark.parametrize("impl", generate.IMPLS)
def test_fixed_cases_cover_what_is_promised(impl):
    fixed = list(generate.fixed(impl, small=True))
    for operation in ("row", "map", "rows", "relation"):
        for dtype in cases.DTYPES:
            here = [c for c in fixed if (c.operation, c.dtype) == (operation, dtype)]
            if impl == "triton" and dtype == "fp64":
                assert not here
                continue
            assert {c.layout for c in here} == set(cases.LAYOUTS)
            if operation == "relation":
                assert {c.normalize_dim for c in here} == ({-1} if impl == "triton" else {-1, -2})
                continue
            assert {c.mask.partition("@")[0] for c in here} == set(cases.MASKS)
            rows_only = impl == "triton" and operation == "map"
            assert {c.merge for c in here} == set(cases.MERGES) - ({"max", "min"} if rows_only else set())
            if operation != "rows":
                assert {c.divergence for c in here} == set(cases.DIVERGENCES)
                assert {c.target for c in here} == ({"keys"} if rows_only else set(cases.TARGETS))
                assert {c.reduction for c in here} == set(cases.REDUCTIONS)
    others = {c.operation for c in fixed} - {"row", "map", "rows", "relation"}
    assert others == (set() if impl == "triton" else {"merge", "resample"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("M=two", "expected M to be a int"),
        ("heads=3", "expected fields among"),
        ("dtype=int8", "expected dtype to be one of"),
        ("mask=bool@X", "expected mask to be one of"),
        ("operation=resample,grid=3", "expected grid like 3x4"),
    ],
)
def test_bad_cases_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        cases.parse(text)


def test_passes_and_writes_json(tmp_path, capsys):
    file = tmp_path / "outcomes.json"
    case = "merge=logsum,dtype=bf16,layout=packed_qkv,N=40,D=32,Dt=48,Ht=2"
    assert cli.main(["validate", "--case", case, "--json", str(file)]) == 0
    (outcome,) = json.loads(file.read_text())["outcomes"]
    assert outcome["ok"] and outcome["deterministic"] and 0 < outcome["ratio"] <= 1
    assert 0 < outcome["memory"] <= outcome["promise"]
    out = capsys.readouterr().out
    assert "1 passed, 0 failed" in out and (HAS_GPU or "No GPU: the kernels run in Triton's interpreter" in out)


@pytest.mark.parametrize("breakage", ["wrong", "unsteady", "hungry"])
def test_fails_on_a_broken_kernel_and_prints_how_to_run_it_again(monkeypatch, capsys, breakage):
    from attnkd.attention import fused_rows as ops_row

    honest = ops_row.row_kl_bwd
    calls = []

    def broken(*arguments):
        dq, dk, dmask = honest(*arguments)
        calls.append(dk)
        if breakage == "wrong":
            dk = dk * 1.05
        elif breakage == "unsteady":
            dk = dk * (1 + 1e-7 * len(calls)) if len(calls) > 1 else dk
        else:
            torch.empty(1 << 24, device=dk.device).fill_(0)
        return dq, dk, dmask

    library = torch.library.Library("attnkd", "IMPL")
    backend = "CUDA" if HAS_GPU else "CPU"
    library.impl("row_kl_bwd", broken, backend, allow_override=True)
    try:
        assert cli.main(["validate", "--case", "N=40,D=32,Dt=32"]) == 1
    finally:
        library._destroy()
    captured = capsys.readouterr()
    expected = {"wrong": "dstudent_key: WRONG", "unsteady": "two runs differ", "hungry": "bytes allocated, promised"}[
        breakage
    ]
    assert expected in captured.err
    assert "attnkd validate --impl triton --case D=32,N=40" in captured.err or "--case N=40,D=32,Dt=32" in captured.err
    assert "1 FAILED" in captured.out
    assert cli.main(["validate", "--case", "N=40,D=32,Dt=32"]) == 0


def test_a_failing_draw_shrinks_and_both_commands_are_printed(monkeypatch, capsys):
    from attnkd.attention.chunked import divergence

    honest = divergence._KINDS["js"]
    monkeypatch.setitem(
        divergence._KINDS, "js", lambda s, t, need: tuple(x if x is None else 1.1 * x for x in honest(s, t, need))
    )
    assert cli.main(["validate", "--impl", "chunked", "--device", "cpu", "--seed", "203", "--minutes", "0.0001"]) == 1
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "attnkd validate" in line]
    failed, smallest = lines[:2]
    assert "divergence=js" in failed and smallest.startswith(
        "the smallest: attnkd validate --impl chunked --device cpu --case"
    )
    spec = smallest.split("--case ")[1]
    assert cli.main(["validate", "--impl", "chunked", "--device", "cpu", "--case", spec]) == 1
    monkeypatch.undo()
    assert cli.main(["validate", "--impl", "chunked", "--device", "cpu", "--case", spec]) == 0


def test_a_method_alone(capsys):
    assert cli.main(["validate", "--impl", "chunked", "--device", "cpu", "--case", "method=SSTA,seed=5"]) == 0
    assert "SSTA" in capsys.readouterr().out
    assert cli.main(["validate", "--case", "method=KD,seed=5", "--impl", "chunked"]) == 2
    assert "expected method=(HeadKD" in capsys.readouterr().err


def test_blocks_of_logits_are_part_of_the_memory_promise(monkeypatch):
    """As on a GPU, or a CPU with many cores: one block of the chunked implementation holds every logit there is."""
    monkeypatch.setattr(chunked_sweep, "CPU_BLOCK", chunked_sweep.DEVICE_BLOCK)
    case = cases.parse("operation=map,dtype=bf16,divergence=js,M=197,N=197,D=16,Dt=16,B=3")
    outcome = validate.examine(case, "chunked", torch.device("cpu"))
    assert outcome.ok, outcome.failure
    assert outcome.memory > validate.memory_promise(case, [], 0)  # the blocks show


@pytest.mark.skipif(HAS_GPU, reason="with a GPU there is nothing to start over")
def test_without_a_gpu_it_starts_over_in_the_interpreter():
    """As a user runs it: a fresh process without TRITON_INTERPRET; a seeded random case, and a short fuzz."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attnkd", "validate", "--minutes", "0.001", "--seed", "9"]
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", *sys.path])
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No GPU" in result.stdout and "0 failed" in result.stdout


@pytest.mark.skipif(HAS_GPU, reason="with a GPU there is nothing to start over")
def test_a_python_program_that_calls_it_goes_on():
    """It has options of its own, and the interpreter is none of its business."""
    import os

    program = (
        "import os, sys; from attnkd.commands.cli import main\n"
        "status = main(['validate', '--case', 'M=2,N=13'])\n"
        "print('went on', status, os.environ.get('TRITON_INTERPRET'), sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", *sys.path])
    command = [sys.executable, "-c", program, "--epochs", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "went on 0 None ['--epochs', '3']" in result.stdout, result.stdout + result.stderr
    assert "1 passed, 0 failed" in result.stdout
