"""`python -m benchmarks plot`: figures (PNG) from result files.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; every implementation also has a
hatch or a marker of its own, so that colour is never the only difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report, schema
from benchmarks.machine import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    # implementation: (colour, hatch of its bar, marker of its line)
    "ours": ("#000000", "", "o"),
    "chunked": ("#56B4E9", "...", "P"),
    "eager": ("#D55E00", "//", "s"),
    "eager_map": ("#D55E00", "//", "s"),
    "compile_map": ("#E69F00", "\\\\", "D"),
    "eager_row": ("#CC79A7", "--", "^"),
    "compile_row": ("#0072B2", "xx", "v"),
    "flex": ("#009E73", "oo", "X"),
    "sdpa_eager": ("#CC79A7", "--", "^"),
    "sdpa_compile": ("#0072B2", "xx", "v"),
    "off": ("#999999", "", "o"),
    "maps": ("#D55E00", "//", "s"),
    "maps_last_block": ("#E69F00", "\\\\", "D"),
}
GREY = "#555555"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--output", type=Path, help="folder for the figures (default: beside each result file)")
    parser.add_argument(
        "--mode", choices=("fwd", "bwd", "both"), default="both", help="of the operations (default: both)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 when a file cannot be read or has nothing to plot."""
    for path in args.results:
        try:
            result = schema.load(path)
            figures = list(draw(result, args.mode))
        except (ValueError, OSError) as error:
            print(f"plot: {error}", file=sys.stderr)
            return 2
        if not figures:
            print(f"plot: {path}: nothing to plot in a file of kind {result['kind']!r}", file=sys.stderr)
            return 2
        folder = args.output or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures:
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            print(f"wrote {folder / f'{name}.png'}")
    return 0


def draw(result: dict[str, Any], mode: str = "both") -> Iterator[tuple[str, Figure]]:
    """(name, figure) of everything that can be drawn from a result file."""
    if result["kind"] == "operations":
        for operation in dict.fromkeys(r["operation"] for r in result["records"]):
            figure = speed_ups(result, operation, mode)
            if figure is not None:
                yield f"speedup_{operation}_{mode}", figure
    if result["kind"] == "scaling":
        for operation in dict.fromkeys(r["operation"] for r in result["records"]):
            yield f"scaling_{operation}", curves(result, operation)
    if result["kind"] == "training":
        yield "training", steps(result)
    if result["kind"] == "cpu":
        yield "cpu_growth", cpu_growth(result)


def speed_ups(result: dict[str, Any], operation: str, mode: str) -> Figure | None:
    """How many times faster ours is than each opponent, by shape; None where nothing was timed."""
    records = [r for r in result["records"] if r["operation"] == operation and r["mode"] == mode]
    dtype = records[0]["dtype"] if records else ""
    records = [r for r in records if r["dtype"] == dtype]
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    names = [n for n in dict.fromkeys(r["implementation"] for r in records) if n != "ours"]
    by = {(r["shape"], r["implementation"]): r for r in records}
    if not any(_speed(by, shape, name) for shape in shapes for name in names):
        return None
    figure, axes = _new(
        1, 1, f"{operation}, {mode}, {dtype}: how many times faster than …", result, (2.5 + 1.6 * len(shapes), 4.2)
    )
    ax = axes[0]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        colour, hatch, _ = _style(name)
        places = [x + (index - (len(names) - 1) / 2) * width for x in range(len(shapes))]
        heights = [_speed(by, shape, name) for shape in shapes]
        ax.bar(places, [h or 0 for h in heights], width, color=colour, hatch=hatch, edgecolor="white", label=name)
        for x, height, shape in zip(places, heights, shapes, strict=True):
            status = by[shape, name]["status"] if (shape, name) in by else ""
            text = f"{height:.1f}" if height else status if status != "ok" else ""
            ax.annotate(
                text, (x, height or 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7,
                rotation=90 if not height else 0, bbox={"color": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0},
            )  # fmt: skip
    ax.axhline(1, color=GREY, linewidth=1, zorder=1.5)
    ax.set_xticks(
        range(len(shapes)),
        [f"{s}\nB {by[s, names[0]]['dims']['batch']}, N {by[s, names[0]]['dims']['tokens']}" for s in shapes],
    )
    ax.set_ylabel("time ÷ our time")
    ax.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def curves(result: dict[str, Any], operation: str) -> Figure:
    """Time and memory against the number of tokens and the batch size, with the roofline of the device."""
    records = [r for r in result["records"] if r["operation"] == operation]
    sweeps = {
        "tokens": [r for r in records if r["shape"].startswith("n")],
        "batch": [r for r in records if not r["shape"].startswith("n")],
    }
    dtype = records[0]["dtype"]
    figure, axes = _new(2, 2, f"{operation}, forward and backward, {dtype}", result, (10, 8))
    for column, (what, found) in enumerate(sweeps.items()):
        found = [r for r in found if r["dtype"] == dtype]
        other = "batch" if what == "tokens" else "tokens"
        fixed = f", {other} {found[0]['dims'][other]}" if found else ""
        _lines(axes[column], found, what, lambda r: r["ms"]["median"] if r.get("ms") else None)
        roof = sorted(
            {
                (r["dims"][what], t)
                for r in found
                if (t := floor_ms(r, result["settings"].get("ceilings", {}))) is not None
            }
        )
        if roof:
            axes[column].plot(
                *zip(*roof, strict=True), color=GREY, linestyle="--", linewidth=1.5, label="least possible (roofline)"
            )
        axes[column].set_ylabel("ms")
        _lines(axes[2 + column], found, what, lambda r: r["peak_bytes"] / 2**20 if "peak_bytes" in r else None)
        axes[2 + column].set_ylabel("extra memory at the peak, MiB")
        for ax in (axes[column], axes[2 + column]):
            ax.set_xlabel(
                ("tokens N" if what == "tokens" else "batch size B") + f" (H {found[0]['dims']['heads']}{fixed})"
                if found
                else what
            )
    axes[0].legend(fontsize=8)
    return figure


def floor_ms(record: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """The larger of the two floors: bytes over the bandwidth of a copy, operations over the rate of a matrix product."""
    copy, matmul = ceilings.get("copy_gb_s"), ceilings.get(f"matmul_tflop_s_{record['dtype']}")
    if not copy or not matmul or "floor_bytes" not in record:
        return None
    return max(record["floor_bytes"] / copy / 1e6, record["flops"] / matmul / 1e9)


def steps(result: dict[str, Any]) -> Figure:
    """Images per second and peak memory of whole training steps."""
    records = result["records"]
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    variants = list(dict.fromkeys(r["variant"] for r in records))
    by = {(r["pair"], r["variant"]): r for r in records}
    figure, axes = _new(1, 2, "whole training steps", result, (11, 4.4))
    width = 0.8 / len(variants)
    for ax, label, value in (
        (axes[0], "images per second", lambda r: r.get("images_per_s")),
        (axes[1], "peak memory, GiB", lambda r: r["peak_bytes"] / 2**30 if "peak_bytes" in r else None),
    ):
        for index, variant in enumerate(variants):
            colour, hatch, _ = _style(variant)
            places = [x + (index - (len(variants) - 1) / 2) * width for x in range(len(pairs))]
            heights = [value(by[pair, variant]) or 0 if (pair, variant) in by else 0 for pair in pairs]
            bars = ax.bar(places, heights, width, color=colour, hatch=hatch, edgecolor="white", label=variant)
            ax.bar_label(bars, fmt=lambda h: (f"{h:,.0f}" if h >= 100 else f"{h:.3g}") if h else "", fontsize=7)
        ax.set_xticks(
            range(len(pairs)),
            [pair.replace("_patch", "/").replace("_224", "").replace(" <- ", "\n← ") for pair in pairs],
        )
        ax.set_ylabel(label)
    axes[0].legend(fontsize=8, ncols=len(variants), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    return figure


def cpu_growth(result: dict[str, Any]) -> Figure:
    """Time and memory of one whole map on the CPU against the number of tokens."""
    found = [r | {"dims": {"tokens": r["tokens"]}} for r in result["records"] if r["group"] == "growth"]
    if not found:
        raise ValueError("no records of group 'growth'")
    figure, axes = _new(1, 2, "whole map on the CPU, forward and backward, float32", result, (10, 4.4))
    _lines(axes[0], found, "tokens", lambda r: r["ms"].get("fastest", r["ms"]["median"]) if r.get("ms") else None)
    _lines(axes[1], found, "tokens", lambda r: r.get("extra_mib"))
    for ax, label in zip(axes, ("ms", "extra memory at the peak, MiB"), strict=True):
        ax.set_xlabel("tokens N")
        ax.set_ylabel(label)
    axes[0].legend(fontsize=8)
    return figure


def _lines(ax: Axes, records: list[dict[str, Any]], what: str, value: Any) -> None:
    """One line an implementation, log-log; where it ran out of memory it ends in a cross."""
    for name in dict.fromkeys(r["implementation"] for r in records):
        mine = sorted((r for r in records if r["implementation"] == name), key=lambda r: r["dims"][what])
        points = [(r["dims"][what], y) for r in mine if (y := value(r)) is not None and y > 0]
        if not points:
            continue
        colour, _, marker = _style(name)
        ax.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2 if name == "ours" else 1.3,
            label=name,
        )
        if any(r["status"] == "OOM" and r["dims"][what] > points[-1][0] for r in mine):
            ax.annotate("OOM", points[-1], xytext=(4, 4), textcoords="offset points", color=colour, fontsize=8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _style(name: str) -> tuple[str, str, str]:
    return STYLES.get(name.removesuffix("_compiled"), (GREY, "||", "*"))


def _speed(by: dict[tuple[str, str], dict[str, Any]], shape: str, name: str) -> float | None:
    record = by.get((shape, name))
    return None if record is None else report.speed_up(record, by.get((shape, "ours")))


def _new(
    rows: int, columns: int, title: str, result: dict[str, Any], size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(headline(result["machine"]), fontsize=7, color=GREY)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
