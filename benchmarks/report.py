"""What a run prints: one block a case, every implementation in it, slower ones and failures included."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    "implementation",
    "mode",
    "ms",
    "p20–p80",
    "graph ms",
    "ours is",
    "peak MiB",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of matmul",
    "launches",
    "host µs",
    "error",
)


def speed_up(record: dict[str, Any], ours: dict[str, Any] | None) -> float | None:
    """How many times faster ours is than ``record`` (below 1: slower); None where one of them has no time."""
    if ours is None or record is ours or not record.get("ms") or not ours.get("ms"):
        return None
    return record["ms"]["median"] / ours["ms"]["median"]


def rates(record: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float]:
    """GB/s and TFLOP/s of the least work the operation takes, and their shares of what the device reaches."""
    if not record.get("ms") or "floor_bytes" not in record:
        return {}
    ms = record["ms"]["median"]
    found = {"gb_s": record["floor_bytes"] / ms / 1e6, "tflop_s": record["flops"] / ms / 1e9}
    if copy := ceilings.get("copy_gb_s"):
        found["copy_share"] = found["gb_s"] / copy
    if matmul := ceilings.get(f"matmul_tflop_s_{record['dtype']}"):
        found["matmul_share"] = found["tflop_s"] / matmul
    return found


def case_line(record: dict[str, Any], ours: dict[str, Any] | None, ceilings: dict[str, float]) -> str:
    """One line of a case's block."""
    head = [record["implementation"], record["mode"]]
    if record["status"] != "ok" or not record.get("ms"):
        word = record["status"] if record["status"] != "ok" else "right"
        detail = record.get("detail", "")
        error = "" if record.get("error") is None else f"error {record['error']:.1e}"
        return _align(head) + f"  {word:<12}{error:<16}{detail}".rstrip()
    ms, rate, faster = record["ms"], rates(record, ceilings), speed_up(record, ours)
    cells = [
        *head,
        f"{ms['median']:.4f}",
        f"{ms['p20']:.4f}–{ms['p80']:.4f}",
        _number(record.get("graph_ms", {}).get("median"), 1, ".4f"),
        "" if faster is None else f"{faster:.2f}x" + (" SLOWER" if faster < 1 else ""),
        _number(record.get("peak_bytes"), 1 / 2**20, ".1f"),
        _number(rate.get("gb_s"), 1, ".0f"),
        _number(rate.get("copy_share"), 100, ".0f", "%"),
        _number(rate.get("tflop_s"), 1, ".2f"),
        _number(rate.get("matmul_share"), 100, ".1f", "%"),
        _number(record.get("launches"), 1, ".0f"),
        _number(record.get("host_us"), 1, ".0f"),
        _number(record.get("error"), 1, ".1e"),
    ]
    return _align(cells)


def case_head(record: dict[str, Any]) -> str:
    d = record["dims"]
    heads = f"H {d['heads']}" + (f" (teacher {d['teacher_heads']})" if d["teacher_heads"] != d["heads"] else "")
    return f"{record['operation']} · {record['shape']} · B {d['batch']}, {heads}, N {d['tokens']}, D {d['head_dim']} · {record['dtype']}"


def step_line(record: dict[str, Any], off: dict[str, Any] | None) -> str:
    """One line of a training pair."""
    cells = f"  {record['variant']:<26}"
    if record["status"] != "ok" or not record.get("ms"):
        word = record["status"] if record["status"] != "ok" else "right"
        error = "" if record.get("error") is None else f"error {record['error']:.1e}"
        return f"{cells}{word:<12}{error:<16}{record.get('detail', '')}".rstrip()
    ms = record["ms"]
    line = f"{cells}{record['images_per_s']:>9.0f} images/s  {ms['median']:>9.2f} ms ({ms['p20']:.2f}–{ms['p80']:.2f})"
    line += f"  peak {record['peak_bytes'] / 2**20:.0f} MiB  {record.get('launches', '?')} launches"
    if off is not None and off is not record and off.get("ms"):
        line += f"  loss costs {ms['median'] - off['ms']['median']:+.2f} ms"
    return line


def first_call_line(record: dict[str, Any]) -> str:
    head = f"  {record['operation']:<18}{record['implementation']:<14}{record['cache']:<6}"
    if record["status"] != "ok" or "first_call_s" not in record:
        return f"{head}{'right' if record['status'] == 'ok' else record['status']}  {record.get('detail', '')}".rstrip()
    return f"{head}import {record['import_s']:.2f} s  first call {record['first_call_s']:.2f} s  second {record['second_call_ms']:.2f} ms"


def columns() -> str:
    return _align(list(COLUMNS))


def _align(cells: list[str]) -> str:
    widths = (15, 5, 10, 18, 10, 14, 9, 7, 8, 8, 10, 9, 8, 8)
    first = f"  {cells[0]:<{widths[0]}} {cells[1] if len(cells) > 1 else '':<{widths[1]}}"
    return first + "".join(f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=False))


def _number(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:{form}}{unit}"
