"""The matrix of versions: what fails is counted, and an environment in which nothing ran does not pass."""

import sys
from pathlib import Path

import pytest

from benchmarks import matrix, schema, table

TOY = """
import pytest
def test_right(): pass
def test_wrong(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "test_toy.py"
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "TESTS", (str(path),))
    return path


def test_an_environment_with_a_failed_test_fails(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    toy.write_text(TOY)
    compiled = {"compiled": 2, "failed": [], "remarked": 1, "spilled": 40, "spare": 15}
    monkeypatch.setattr(matrix, "compile_ahead", lambda environment, python: compiled)
    record = matrix.prove(matrix.Environment("toy"), sys.executable)
    assert record["status"] == "FAIL" and record["tests"]["passed"] == 1 and record["tests"]["skipped"] == 1
    assert [name.split("::")[1] for name in record["tests"]["failed"]] == ["test_wrong", "test_error"]
    result = schema.document("matrix", matrix.facts(), "", {}, [record])
    assert schema.check(result) == []
    assert table.matrix(result, {})[1][6:13] == ["1", "2", "2", "0", "1", "40", "15"]


def test_an_environment_in_which_no_test_ran_does_not_pass(toy: Path, capsys) -> None:
    toy.write_text("")
    record = matrix.prove(matrix.Environment("toy"), sys.executable)
    assert record["status"] == "error" and "status 5" in record["detail"]


def test_only_what_the_gate_faults_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks aot` decides; the matrix counts."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    kernel = {
        "target": "sm90",
        "kernel": "_k",
        "call": "c",
        "registers": 240,
        "spills": 40,
        "faults": [],
        "remarks": ["spills 40 bytes"],
    }

    def compiled(*records: dict):
        def step(environment: matrix.Environment, name: str, python: str, arguments: list[str]) -> None:
            schema.save(Path(arguments[-1]), schema.document("aot", matrix.facts(), "", {}, list(records)))

        return step

    monkeypatch.setattr(matrix, "_step", compiled(kernel, kernel | {"spills": 0, "remarks": []}))
    found = matrix.compile_ahead(matrix.Environment("toy"), sys.executable)
    assert found == {"compiled": 2, "failed": [], "remarked": 1, "spilled": 40, "spare": 15}
    monkeypatch.setattr(matrix, "_step", compiled(kernel | {"faults": ["does not compile"]}))
    found = matrix.compile_ahead(matrix.Environment("toy"), sys.executable)
    assert found["failed"] == ["sm90 _k [c]: does not compile"]
    monkeypatch.setattr(matrix, "_step", compiled())
    with pytest.raises(ValueError, match="no kernel was compiled"):
        matrix.compile_ahead(matrix.Environment("toy"), sys.executable)


def test_a_wrong_request_is_named(capsys) -> None:
    from benchmarks.__main__ import main

    for request in (["oldest=/no/such/python"], ["oldest"], [f"latest={sys.executable}"]):
        assert main(["matrix", "--use", *request]) == 2
        assert "an interpreter that exists" in capsys.readouterr().err
    assert main(["matrix", "--only", "newest", "--use", f"oldest={sys.executable}"]) == 2
    assert "an environment that runs (newest)" in capsys.readouterr().err
