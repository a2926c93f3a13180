"""What a measurement was made on: device, driver, versions, commit. The first line of every report."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from attnkd.commands.info import versions

ROOT = Path(__file__).resolve().parent.parent


class DeviceLost(RuntimeError):
    """The device answers no more; nothing that is measured after this would mean anything."""


def describe(device: torch.device) -> dict[str, Any]:
    """The facts that a result file is stamped with, for a GPU or the CPU."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }
    if device.type != "cuda":
        return {
            "device": cpu_name(),
            "details": f"{torch.get_num_threads()} threads",
            "toolkit": "CPU",
            "driver": None,
        } | facts
    p = torch.cuda.get_device_properties(device)
    hip = torch.version.hip
    arch = p.gcnArchName.split(":")[0] if hip else f"sm_{p.major}{p.minor}"
    return {
        "device": p.name,
        "details": f"{arch}, {p.multi_processor_count} processors, {p.total_memory / 2**30:.0f} GiB",
        "toolkit": f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
        "driver": driver(),
    } | facts


def use_gpu(name: str) -> torch.device:
    """Make the GPU of that name the current one; 'cuda' alone is the one that is current already.

    Returns:
        The device with its index.

    Raises:
        ValueError: the name of something else.
    """
    device = torch.device(name)
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU such as cuda or cuda:1, got {name}")
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def headline(machine: dict[str, Any]) -> str:
    """One line: device, driver, versions, commit."""
    v = machine["versions"]
    parts = [f"{machine['device']} ({machine['details']})"]
    if machine["driver"]:
        parts.append(f"driver {machine['driver']}")
    parts.append(machine["toolkit"])
    parts += [f"{name} {v[name]}" for name in ("torch", "triton", "timm", "attnkd") if name in v]
    parts.append(f"commit {machine['commit']}")
    return " · ".join(parts)


def slug(name: str) -> str:
    """A device's folder under benchmarks/results: 'NVIDIA H200' -> 'nvidia-h200'."""
    name = re.sub(r"\((r|tm)\)|@.*|\b(processor|cpu)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@functools.cache
def commit() -> str:
    """Short hash of the checkout's commit, with ' (dirty)' when tracked files differ from it; 'unknown' outside git."""
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    # Result files are what a run writes: they do not make the code that was measured another one.
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{head} (dirty)" if changed else head


@functools.cache
def driver() -> str:
    """The GPU driver's version."""
    if torch.version.hip:
        module = Path("/sys/module/amdgpu/version")
        return module.read_text().strip() if module.exists() else f"Linux {platform.release()}"
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "unknown"


@functools.cache
def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
