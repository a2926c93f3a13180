"""`python -m benchmarks table`: writes the tables of README and docs from the committed result files.

A table stands between two lines, `<!-- table:NAME key=value ... -->` and `<!-- /table -->`. NAME is an entry of
:data:`TABLES`; `results=FOLDER/FILE` names the result file under benchmarks/results where the default is not meant.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnkd import files
from benchmarks import report, schema
from benchmarks.machine import ROOT, headline

MARKED = re.compile(
    r"^(?P<head><!-- table:(?P<name>[\w-]+)(?P<options>(?: \w+=[^\s>]+)*) -->\n).*?(?P<tail><!-- /table -->)",
    re.S | re.M,
)

Options = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is stale")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 when --check found a stale table, 2 when a marker cannot be served."""
    stale = 0
    for path in pages(ROOT):
        text = path.read_text()
        try:
            fresh = render(text)
        except (ValueError, OSError) as error:
            print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if fresh == text:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)}: {'stale' if args.check else 'written'}")
        if not args.check:
            files.write_text(path, fresh)
    return 1 if args.check and stale else 0


def pages(root: Path) -> list[Path]:
    """The Markdown files that may have tables."""
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.exists()]


def render(text: str, results: Path | None = None) -> str:
    """The page with every marked table written again.

    Raises:
        ValueError: an unknown table, a result file that is missing or does not fit, an unclosed marker.
    """
    folder = schema.RESULTS if results is None else results

    def one(match: re.Match) -> str:
        options = dict(word.split("=", 1) for word in match["options"].split())
        return match["head"] + make_table(match["name"], options, folder) + match["tail"]

    closed = MARKED.sub(one, text)
    if len(re.findall("^<!-- table:", text, re.M)) != len(MARKED.findall(text)):
        raise ValueError("a table marker is malformed or has no <!-- /table --> after it")
    return closed


def make_table(name: str, options: Options, results: Path) -> str:
    """The Markdown of one table and the line that says where it comes from."""
    if name not in TABLES:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {name!r}")
    default, build = TABLES[name]
    path = results / options.get("results", default)
    if not path.exists():
        raise ValueError(
            f"table {name}: results={options.get('results', default)}: no such file under benchmarks/results"
        )
    result = schema.load(path)
    rows = build(result, options)
    if len(rows) < 2:
        raise ValueError(f"table {name}: {path.name} has nothing for {options}")
    source = f"`{result['command']}`, {headline(result['machine'])}; benchmarks/results/{path.relative_to(results)}"
    return f"{markdown(rows)}\n\n<sub>{source}</sub>\n"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head, all columns but the first are right-aligned."""
    head, *body = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    rule = "|".join(["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join([f"| {head} |", f"|{rule}|", *[f"| {line} |" for line in body]])


def operations(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row a shape: our time and how many times faster than each opponent. Options: operation, mode, dtype, shape."""
    wanted = {"mode": options.get("mode", "both"), "dtype": options.get("dtype", "bfloat16")}
    wanted |= {name: options[name] for name in ("operation", "shape") if name in options}
    records = [r for r in result["records"] if all(r[name] == value for name, value in wanted.items())]
    names = [n for n in dict.fromkeys(r["implementation"] for r in records) if n != "ours"]
    first = "operation" if "shape" in options else "shape"
    rows = [[first, "ours", "peak", "of copy", "of matmul", *names]]
    for key in dict.fromkeys((r["operation"], r["shape"]) for r in records):
        found = {r["implementation"]: r for r in records if (r["operation"], r["shape"]) == key}
        ours = found.get("ours")
        if ours is None:
            continue
        d = ours["dims"]
        what = key[0] if first == "operation" else f"{key[1]}, B {d['batch']}, N {d['tokens']}"
        what = what if first == "operation" or "operation" in options else f"{key[0]}, {what}"
        cells = [what, _time(ours), _memory(ours)]
        rate = report.rates(ours, result["settings"].get("ceilings", {}))
        cells += [f"{rate[share]:.0%}" if share in rate else "–" for share in ("copy_share", "matmul_share")]
        cells += [_against(found.get(name), ours) for name in names]
        rows.append(cells)
    return rows


def training(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row a pair and variant."""
    rows = [["step", "images/s", "ms (p20–p80)", "peak"]]
    for record in result["records"]:
        what = f"{record['pair']}, batch {record['batch']}: {record['variant']}"
        if not record.get("ms"):
            rows.append([what, record["status"], "", ""])
            continue
        ms = record["ms"]
        rows.append(
            [
                what,
                f"{record['images_per_s']:.0f}",
                f"{ms['median']:.1f} ({ms['p20']:.1f}–{ms['p80']:.1f})",
                _memory(record),
            ]
        )
    return rows


def first_call(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row an operation and implementation: cold and warm caches."""
    rows = [["first call", "empty caches", "warm caches", "second call"]]
    for key in dict.fromkeys((r["operation"], r["implementation"]) for r in result["records"]):
        found = {r["cache"]: r for r in result["records"] if (r["operation"], r["implementation"]) == key}
        cells = [_seconds(found.get(cache)) for cache in ("cold", "warm")]
        warm = found.get("warm", {})
        rows.append(
            [f"{key[0]}, {key[1]}", *cells, f"{warm['second_call_ms']:.2f} ms" if "second_call_ms" in warm else "–"]
        )
    return rows


def cpu(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row a case: chunked against eager PyTorch, and against torch.compile of it. Option: group."""
    names = ("eager", "compile", "chunked")
    rows = [
        [
            "case",
            "eager",
            "torch.compile",
            "chunked",
            "faster",
            "than compile",
            "eager's memory",
            "compile's",
            "chunked's",
        ]
    ]
    fields = ("group", "batch", "tokens", "rows", "divergence", "merge")
    records = [r for r in result["records"] if options.get("group", r["group"]) == r["group"]]
    for key in dict.fromkeys(tuple(r[f] for f in fields) for r in records):
        found = {r["implementation"]: r for r in records if tuple(r[f] for f in fields) == key}
        _, batch, tokens, query_rows, divergence, merge = key
        what = f"{'all rows' if query_rows == 0 else f'{query_rows} row' + ('s' if query_rows > 1 else '')}, B {batch}, N {tokens}"
        what += f", {divergence}" + (f", {merge}" if merge else "")
        every = [found.get(name, {}) for name in names]
        times = [_cpu_ms(r) if r.get("ms") else None for r in every]
        own = times[-1]
        rows.append(
            [
                what,
                *["–" if ms is None else f"{ms:.1f} ms" for ms in times],
                *["" if None in (ms, own) else f"{ms / own:.1f}x" for ms in times[:-1]],  # type: ignore[operator]
                *[f"{r['extra_mib']:.0f} MiB" if "extra_mib" in r else "" for r in every],
            ]
        )
    return rows


def traffic(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row a call: bytes moved over the least possible, forward and backward."""
    rows = [["call", "launches", "forward ÷ floor", "backward ÷ floor"]]
    match = options.get("match", "").replace("+", " ")
    records = [r for r in result["records"] if match in r["call"]]
    for call in dict.fromkeys(r["call"] for r in records):
        found = {r["pass"]: r for r in records if r["call"] == call}
        launches = " + ".join(str(len(r["launches"])) for r in found.values())
        ratios = [
            f"{found[p]['moved'] / found[p]['floor']:.2f}" if p in found else "–" for p in ("forward", "backward")
        ]
        rows.append([call, launches, *ratios])
    return rows


def aot(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row a kernel: registers (most) per target and programs that a processor holds then, spills and failures over all."""
    records = result["records"]
    targets = list(dict.fromkeys(r["target"] for r in records))
    rows = [["kernel", "variants", *[f"{t} registers" for t in targets], "spilled bytes", "failed"]]
    for kernel in sorted({r["kernel"] for r in records}):
        group = [r for r in records if r["kernel"] == kernel]
        cells = []
        for target in targets:
            used = [(r["registers"], r["programs"]) for r in group if r["target"] == target and "registers" in r]
            cells.append(f"{max(used)[0]} ({min(n for _, n in used)})" if used else "–")
        spills = sum(r.get("spills", 0) for r in group)
        rows.append([f"`{kernel}`", str(len(group)), *cells, str(spills), str(sum(bool(r["faults"]) for r in group))])
    return rows


_PLAIN, _MAP = "plain attention 64", "map 6x64 N197 bfloat16"
_KNOWN, _MASKED = "map 6x64 known LSEs N197 bfloat16", "map 6x64 known LSEs bool mask N197 bfloat16"
_ONE_PASS, _ONE_PASS_KNOWN = "one pass map 6x64 N197 bfloat16", "one pass map 6x64 known LSEs N197 bfloat16"
_NO_DIVERGENCE = "one pass map none 6x64 N197 bfloat16"


def _one_pass(forward: str, backward: str) -> tuple[tuple[str, str, int], ...]:
    return (
        ("_attention_fwd_kernel", forward, 1),
        ("_attention_dq_kernel", backward, 1),
        ("_attention_dkv_kernel", backward, 1),
    )


_COUNTED = {  # a sum, and what it is of: (kernel, call, how often)
    "attention, forward and backward": (
        ("_plain_forward_kernel", _PLAIN, 1), ("_plain_keys_kernel", _PLAIN, 1), ("_plain_queries_kernel", _PLAIN, 1),
    ),
    "whole map, LSEs known": (("_map_value_kernel", _KNOWN, 1), ("_map_gradient_kernel", _MAP, 1)),
    "whole map": (("_map_normaliser_kernel", _MAP, 2), ("_map_value_kernel", _MAP, 1), ("_map_gradient_kernel", _MAP, 1)),
    "whole map, LSEs known, mask of keys": (("_map_value_kernel", _MASKED, 1), ("_map_gradient_kernel", _MASKED, 1)),
}  # fmt: skip
_COUNTED_ONE_PASS = {
    "with the divergence, the teacher's LSE known": _one_pass(_ONE_PASS_KNOWN, _ONE_PASS),
    "with the divergence": (("_map_normaliser_kernel", _MAP, 1), *_one_pass(_ONE_PASS, _ONE_PASS)),
    "the same kernels without a divergence": _one_pass(_NO_DIVERGENCE, _NO_DIVERGENCE),
}


def counts(result: dict[str, Any], options: Options) -> list[list[str]]:
    """Whole maps beside plain attention."""
    return _counts(result, _COUNTED)


def one_pass(result: dict[str, Any], options: Options) -> list[list[str]]:
    """Attention with its divergence beside the same kernels without."""
    return _counts(result, _COUNTED_ONE_PASS)


def _counts(result: dict[str, Any], counted: dict[str, tuple[tuple[str, str, int], ...]]) -> list[list[str]]:
    """Instructions per pair of query and key in the loop over wide tiles (sm_90, D 64)."""
    records = {(r["kernel"], r["call"]): r for r in result["records"] if r["target"] == "sm90"}
    what = ("exponentials", "fp32", "issued")
    rows = [["kernel", "products", *what, "registers", "programs"]]
    for name, parts in counted.items():
        sums = dict.fromkeys(("products", *what), 0.0)
        for kernel, call, times in parts:
            record = records[kernel, call]
            loop, source = record["loops"][-1], record["last_loop"]
            each = {"products": float(source["products"])} | {n: loop[n] / source["pairs"] for n in what}
            sums = {n: sums[n] + times * each[n] for n in sums}
            label = f"`{kernel}`" + (f", {times} times" if times > 1 else "")
            rows.append([label, *_per_pair(each), str(record["registers"]), str(record["programs"])])
        rows.append([f"**{name}**", *(f"**{cell}**" for cell in _per_pair(sums)), "", ""])
    return rows


def _per_pair(numbers: dict[str, float]) -> list[str]:
    return [f"{n:.0f}" if name == "products" else f"{n:.1f}" for name, n in numbers.items()]


def matrix(result: dict[str, Any], options: Options) -> list[list[str]]:
    """One row an environment: its versions, what passed and what failed."""
    names = ("python", "torch", "triton", "timm", "numpy")
    counted = (
        "tests passed",
        "failed",
        "kernels compiled",
        "failed",
        "with remarks",
        "most bytes spilled",
        "registers to spare",
    )
    rows = [["environment", *names, *counted, "run"]]
    for record in result["records"]:
        tests, aot = record.get("tests"), record.get("aot")
        cells = [record["versions"].get(name, "–") for name in names]
        cells += [str(tests["passed"]), str(len(tests["failed"]))] if tests else ["–", record["status"]]
        cells += [str(aot["compiled"]), str(len(aot["failed"]))] if aot else ["–", record["status"]]
        cells += [str(aot["remarked"]), str(aot["spilled"]), str(aot.get("spare", "–"))] if aot else ["–"] * 3
        rows.append([record["environment"], *cells, f"{record['created'][:10]}, {record['commit']}"])
    return rows


TABLES: dict[str, tuple[str, Callable[[dict[str, Any], Options], list[list[str]]]]] = {
    # name: (result file where the marker names none, what makes its rows)
    "operations": ("nvidia-h200/operations.json", operations),
    "scaling": ("nvidia-h200/scaling.json", operations),
    "training": ("nvidia-h200/training.json", training),
    "first_call": ("nvidia-h200/first_call.json", first_call),
    "cpu": ("cpu/cpu.json", cpu),
    "traffic": ("interpreter/traffic.json", traffic),
    "aot": ("aot/aot.json", aot),
    "counts": ("aot/aot.json", counts),
    "one_pass": ("aot/aot.json", one_pass),
    "matrix": ("matrix/matrix.json", matrix),
}


def _time(record: dict[str, Any]) -> str:
    return f"{record['ms']['median']:.3f} ms" if record.get("ms") else record["status"]


def _cpu_ms(record: dict[str, Any]) -> float:
    """The fastest step where it was kept: on a shared processor the median tells of the others' work."""
    return record["ms"].get("fastest", record["ms"]["median"])


def _memory(record: dict[str, Any]) -> str:
    return f"{record['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in record else "–"


def _seconds(record: dict[str, Any] | None) -> str:
    if record is None or "first_call_s" not in record:
        return "–" if record is None else record["status"]
    return f"{record['first_call_s']:.2f} s"


def _against(record: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    """How many times faster ours is; bold where it is slower, so that nobody overlooks it."""
    if record is None:
        return "–"
    faster = report.speed_up(record, ours)
    if faster is None:
        return record["status"]
    return f"{faster:.2f}x" if faster >= 1 else f"**{faster:.2f}x**"
