"""What a compiled kernel is held to: the rules of the gate, and what of them a user's compiler is answerable for.

**Faults** are failures with any compiler: a kernel that does not compile, or wants more shared memory than a program may have,
does not run. **Remarks** are about the quality of the code, which one release of a compiler makes better and the next worse:

* more than :data:`SPILL_LIMIT` bytes of registers are spilled;
* the code has fewer 128-bit loads than the tiles that it loads need, so that some tile of an aligned tensor moves in smaller
  pieces (tiles with less than 128 bits a thread aside); the same for stores, unless a matrix unit laid out what is stored;
* a dot of a 16-bit type does not run on the architecture's matrix unit;
* a loop runs its matrix instructions one at a time, each between fences of its own (ptxas notes C7510 and C7515): an accumulator
  that leaves a loop for a lone product, or a function call, makes the assembler do that.

Remarks are faults with :data:`COMPILER`, the release of Triton that the tiles were chosen with, and are only printed for others.
"""

from __future__ import annotations

from typing import Any

COMPILER = "3.8.0"
"""The Triton of the project's lock (requirements.lock)."""

SPILL_LIMIT = 32
"""Bytes of registers a thread may spill. 32 bytes are 8 of up to 255 registers: a few stores and loads that the first cache
serves, beside the thousands of instructions of a tile, so the time does not show them. A tile that is too large spills hundreds.
The next release of a compiler moves a handful of registers either way, and a limit of 0 would make that a failure."""

SHARED = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx942": 65536}
MATRIX = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTC", "sm120": "HMMA", "gfx942": "v_mfma"}
MATRIX_SMALL = {"sm90": "HMMA", "sm100": "HMMA"}  # tiles of fewer rows than the warp-group instructions take
GROUP_ROWS = 64
TARGETS = tuple(SHARED)


def verdict(record: dict[str, Any], compiler: str) -> dict[str, list[str]]:
    """``faults`` (the kernel fails; empty when it passes) and ``remarks`` of a record, compiled by that Triton."""
    faults, remarks = broken(record), [] if "error" in record else poor(record)
    return (
        {"faults": faults + remarks, "remarks": []} if compiler == COMPILER else {"faults": faults, "remarks": remarks}
    )


def broken(record: dict[str, Any]) -> list[str]:
    """Why the kernel cannot run."""
    if "error" in record:
        return [record["error"]]
    limit = SHARED[record["target"]]
    return [f"shared memory {record['shared']} of {limit} bytes"] if record["shared"] > limit else []


def poor(record: dict[str, Any]) -> list[str]:
    """What the compiler made badly."""
    found = []
    target = record["target"]
    if record["spills"] > SPILL_LIMIT:
        found.append(f"spills {record['spills']} bytes")
    for direction in directions(record):
        if record["aligned"] and (share := wide_share(record, direction)) < 1:
            found.append(f"128-bit {direction}s cover {share:.0%} of the tiles: {record[direction + 's']}")
    for dot in record["dots"]:
        shape, dtype = dot.split()
        if dtype not in ("f16", "bf16"):
            continue  # fp32 products are IEEE by choice and have no matrix unit
        rows = int(shape.split("x")[0])
        kinds = [MATRIX[target], *([MATRIX_SMALL[target]] if target in MATRIX_SMALL and rows < GROUP_ROWS else [])]
        if not any(used.startswith(kind) for kind in kinds for used in record["matrix"]):
            found.append(f"dot {dot} without {' or '.join(kinds)}: {record['matrix'] or 'no matrix instruction'}")
    for i, loop in enumerate(record.get("loops", [])):
        several = loop["matrix"] > record.get("last_loop", {}).get(
            "products", 1
        )  # a product of few channels is one instruction
        if several and loop["fences"] >= 2 * loop["matrix"]:  # one before and one after each
            found.append(f"matrix loop {i} is serialised: {loop['fences']} fences for {loop['matrix']} products")
    return found


def wide_share(record: dict[str, Any], direction: str) -> float:
    """How much of the tiles that a kernel loads (stores) its 128-bit instructions can move; at most 1."""
    tiles = record["tiles"][direction]
    wide = sum(int(bits) // 8 * count for bits, count in record[direction + "s"].items() if int(bits) >= 128)
    return min(1.0, wide * record["threads"] / tiles) if tiles else 1.0


def directions(record: dict[str, Any]) -> tuple[str, ...]:
    return ("load",) if record["dots"] else ("load", "store")
