"""requirements.lock installs a known set: everything that pyproject.toml asks for, once for each Python, with hashes."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gate import COMPILER

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
ENTRY = re.compile(r"^([\w.-]+==[^\\\n]+?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
LOCKED = [Requirement(match[1]) for match in ENTRY.finditer(LOCK)]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def asked() -> list[Requirement]:
    """What the package and its extras ask for, except the package itself (one extra names another)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [wanted for wanted in map(Requirement, texts) if wanted.name != project["name"]]


def test_every_entry_has_hashes_and_none_a_place():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(lines) == len(LOCKED) > 50
    assert "://" not in LOCK and "file:" not in LOCK


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_locked_once(python, system):
    platform = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    here |= {"sys_platform": system, "platform_system": platform}
    for wanted in asked():
        if wanted.marker and not wanted.marker.evaluate(here):
            continue
        found = [
            lock for lock in LOCKED if lock.name == wanted.name and (not lock.marker or lock.marker.evaluate(here))
        ]
        assert len(found) == 1, f"{wanted}: {[str(lock) for lock in found]}; run make lock"
        version = next(iter(found[0].specifier)).version
        assert wanted.specifier.contains(version), f"{wanted}: {version} is locked; run make lock"


def test_the_gate_asserts_the_locked_compiler():
    assert [str(lock.specifier) for lock in LOCKED if lock.name == "triton"] == [f"=={COMPILER}"]
