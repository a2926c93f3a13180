"""`python -m benchmarks matrix`: kernels and capture with the oldest, a middle, the locked and the newest versions that are allowed.

In every environment the tests of :data:`TESTS` run (kernels in Triton's interpreter where there is no GPU) and the representative
launches are compiled for every GPU target. An environment fails when a test fails or when ``python -m benchmarks aot`` fails.
Environments are made with uv below ``.matrix``, which git ignores. A row of the result file stays as it was until its environment
runs again; each row has its own date and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, schema, table
from benchmarks.machine import ROOT

FOLDER = ROOT / ".matrix"
RESULT = schema.RESULTS / "matrix" / "matrix.json"
TESTS = (
    "tests/kernels",
    "tests/relation",
    "tests/attention/test_errors.py",
    "tests/capture/test_tap.py",
    "tests/methods/test_recipes.py",
    "tests/benchmarks/test_host.py",  # launches go around Triton's own: by what this release of it keeps where
)
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
LIMIT = 2 * 3600  # seconds for one step: what takes longer hangs


@dataclass(frozen=True)
class Environment:
    """Versions to prove. python: the wished Python, where the machine has it; install: what uv adds to pyproject.toml's ranges,
    None for the environment that runs this command, which `make` installs from requirements.lock."""

    name: str
    python: str = ""
    install: tuple[str, ...] | None = None


ENVIRONMENTS = (
    Environment("oldest", "3.10", ("--resolution", "lowest-direct")),
    Environment("middle", "3.12", ("torch==2.13.*", "triton==3.7.*", "timm==1.0.29")),
    Environment("locked"),
    Environment("newest", "3.13", ("--upgrade",)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--use",
        nargs="+",
        default=[],
        metavar="NAME=PYTHON",
        help="an interpreter that has the versions already; nothing is installed",
    )
    parser.add_argument(
        "--json", type=Path, default=RESULT, metavar="FILE", help="result file (default: the committed one)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 when an environment failed, 2 when the request is wrong."""
    given = dict(text.partition("=")[::2] for text in args.use)
    unknown = set(given) - set(args.only)
    missing = [path for path in given.values() if not os.access(path, os.X_OK)]
    if unknown or missing:
        print(
            f"--use: expected NAME=PYTHON, with an environment that runs ({', '.join(args.only)}) and an interpreter that exists, "
            f"got {' '.join(args.use)}",
            file=sys.stderr,
        )
        return 2
    records = (
        {record["environment"]: record for record in schema.load(args.json)["records"]} if args.json.exists() else {}
    )
    for environment in ENVIRONMENTS:
        if environment.name not in args.only:
            continue
        started = time.monotonic()
        record = prove(environment, given.get(environment.name, ""))
        records[environment.name] = record | {"minutes": round((time.monotonic() - started) / 60, 1)}
        print(f"{environment.name}: {record['status']} {record['detail']}".rstrip(), flush=True)
        ordered = [records[e.name] for e in ENVIRONMENTS if e.name in records]
        result = schema.document("matrix", facts(), "python -m benchmarks matrix", {"tests": list(TESTS)}, ordered)
        schema.save(args.json, result)
    print(table.markdown(table.matrix(result, {})))
    return 1 if any(records[name]["status"] != "ok" for name in args.only) else 0


def facts() -> dict[str, Any]:
    import torch

    return machine.describe(torch.device("cpu"))


def prove(environment: Environment, python: str = "") -> dict[str, Any]:
    """One row: what ran with which versions, and what failed; ``status`` is "ok", "FAIL", or "error" where nothing could run."""
    record: dict[str, Any] = {
        "environment": environment.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": {},
        "status": "error",
        "detail": "",
    }
    FOLDER.mkdir(exist_ok=True)
    try:
        python = python or build(environment)
        record["versions"] = versions(python)
        record["tests"] = run_tests(environment, python)
        record["aot"] = compile_ahead(environment, python)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError, ValueError) as error:
        return record | {"detail": str(error)}
    wrong = [*record["tests"]["failed"], *record["aot"]["failed"]]
    return record | {"status": "FAIL" if wrong else "ok", "detail": "; ".join(wrong)}


def build(environment: Environment) -> str:
    """Makes the environment, or brings it up to date, and returns its interpreter."""
    if environment.install is None:
        return sys.executable
    folder = FOLDER / environment.name
    python = str(folder / "bin" / "python")
    uv = [sys.executable, "-m", "uv", "--quiet"]
    create = [*uv, "venv", "--clear", str(folder), "--python"]
    if subprocess.run([*create, environment.python], capture_output=True).returncode:
        print(f"{environment.name}: no Python {environment.python} here, {sys.version.split()[0]} in its place")
        subprocess.run([*create, sys.executable], check=True)
    ranges = ["--requirements", "pyproject.toml", "--extra", "demo"]
    subprocess.run([*uv, "pip", "install", "--python", python, *ranges, *environment.install], cwd=ROOT, check=True)
    subprocess.run([*uv, "pip", "install", "--python", python, *TOOLS], cwd=ROOT, check=True)
    return python


def versions(python: str) -> dict[str, str]:
    """What the environment has, read by its own interpreter."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "names = 'torch', 'triton', 'timm', 'numpy', 'pillow'\n"
        "print(json.dumps({'python': platform.python_version()} | {name: m.version(name) for name in names}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def run_tests(environment: Environment, python: str) -> dict[str, Any]:
    """{'passed': number, 'skipped': number, 'failed': ids of tests}.

    Raises:
        ValueError: no test passed, or pytest stopped before it ran them all.
    """
    report = FOLDER / f"{environment.name}-tests.xml"
    report.unlink(missing_ok=True)
    options = f"-q -p no:cacheprovider -n {min(4, os.cpu_count() or 1)} --dist worksteal".split()
    _step(environment, "tests", python, ["-m", "pytest", *options, f"--junitxml={report}", *TESTS])
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(failed) - skipped
    if not passed:
        raise ValueError("no test passed")
    names = [f"{c.get('classname')}::{c.get('name')}" for c in failed]
    return {"passed": passed, "skipped": skipped, "failed": names}


def compile_ahead(environment: Environment, python: str) -> dict[str, Any]:
    """{'compiled': number, 'failed': faults of the gate, 'remarked': number with remarks, 'spilled': most bytes of a kernel, 'spare':
    registers that the kernel with the most of them leaves free on NVIDIA GPUs}.

    Raises:
        ValueError: no kernel was compiled, or the command stopped before it compiled them all.
    """
    found = FOLDER / f"{environment.name}-aot.json"
    found.unlink(missing_ok=True)
    _step(environment, "aot", python, ["-m", "benchmarks", "aot", "--json", str(found)])
    records = schema.load(found)["records"]
    if not records:
        raise ValueError("no kernel was compiled")
    failed = [f"{r['target']} {r['kernel']} [{r['call']}]: {', '.join(r['faults'])}" for r in records if r["faults"]]
    remarked, spilled = sum(bool(r["remarks"]) for r in records), max(r.get("spills", 0) for r in records)
    spare = 255 - max(
        (r["registers"] for r in records if r["target"].startswith("sm") and "registers" in r), default=255
    )
    return {"compiled": len(records), "failed": failed, "remarked": remarked, "spilled": spilled, "spare": spare}


def _step(environment: Environment, name: str, python: str, arguments: Sequence[str]) -> None:
    """Runs the environment's Python on this checkout; its output goes to a file below .matrix.

    Raises:
        ValueError: it ended with another status than 0 (all right) and 1 (it found something wrong).
    """
    log = FOLDER / f"{environment.name}-{name}.log"
    print(f"{environment.name}: {name}, output in {os.path.relpath(log)}", flush=True)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [python, *arguments]
    with open(log, "w") as output:
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | paths, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT
        )
    if ended.returncode not in (0, 1):
        raise ValueError(f"{name} ended with status {ended.returncode}, see {os.path.relpath(log)}")
