"""The state of the GPU during a run: clocks, power, temperature, what slows it down, and who else uses it.

Asked of ``nvidia-smi``, which comes with the driver. Where there is none (ROCm, a container without it), the record says so and the
run goes on: a time without its conditions is still a time, but nobody can tell whether the GPU was throttled.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

FIELDS = {
    # name of a record: what nvidia-smi calls it
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "memory_used_mib": "memory.used",
    "reasons": "clocks_throttle_reasons.active",
}
SLOWING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""Bits of ``reasons`` that make a GPU slower than it can be; the others are idleness and clocks that someone set."""


def read(device: torch.device) -> dict[str, Any]:
    """The GPU's state now: :data:`FIELDS` (``reasons`` in words), ``others``: processes beside this one, or ``absent``: why not."""
    if torch.version.hip:
        return {"absent": "ROCm: nvidia-smi does not know this GPU"}
    which = str(torch.cuda.get_device_properties(device).uuid)
    which = which if which.startswith("GPU-") else f"GPU-{which}"
    try:
        state = _smi(which, f"--query-gpu={','.join(FIELDS.values())}")
        users = _smi(which, "--query-compute-apps=pid")
    except (OSError, subprocess.SubprocessError) as error:
        return {"absent": f"nvidia-smi: {type(error).__name__}"}
    return parse(state, users, os.getpid())


def parse(state: str, users: str, own: int) -> dict[str, Any]:
    """What nvidia-smi's two answers say, as numbers; None for what this GPU does not tell.

    In a container the processes have other numbers inside than outside; then this process counts as one of the others.
    """
    words = [word.strip() for word in state.splitlines()[0].split(",")] if state.strip() else []
    if len(words) != len(FIELDS):
        return {"absent": f"nvidia-smi said {state.strip()[:80]!r}"}
    found: dict[str, Any] = {}
    for name, word in zip(FIELDS, words, strict=True):
        try:
            found[name] = int(word, 16) if name == "reasons" else float(word)
        except ValueError:  # [N/A], [Not Supported]
            found[name] = None
    active = found.pop("reasons")
    found["slowed_by"] = None if active is None else [word for bit, word in SLOWING.items() if active & bit]
    pids = [int(line) for line in users.split() if line.isdigit()]
    found["others"] = len([pid for pid in pids if pid != own])
    return found


def line(state: dict[str, Any]) -> str:
    """The state in one line."""
    if "absent" in state:
        return f"clocks, power and temperature: unknown ({state['absent']})"

    def number(name: str, unit: str) -> str:
        return f"{'?' if state[name] is None else format(state[name], '.0f')} {unit}"

    parts = [
        f"{number('sm_mhz', 'MHz')} of {number('sm_max_mhz', 'MHz')}",
        f"{number('power_w', 'W')} of {number('power_limit_w', 'W')}",
        number("temperature_c", "°C"),
        f"slowed by {', '.join(state['slowed_by'])}" if state["slowed_by"] else "not slowed",
        f"{state['others']} other processes",
    ]
    return " · ".join(parts)


def _smi(which: str, query: str) -> str:
    command = ["nvidia-smi", f"--id={which}", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
