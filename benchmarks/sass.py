"""The loops of NVIDIA machine code that hold matrix instructions, and what a thread issues in one pass of each."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass

MATRIX = ("HGMMA", "HMMA")
FP32 = ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FADD2", "FMUL2", "FFMA2", "FMNMX3")


@dataclass(frozen=True)
class Loop:
    """Instructions that a thread issues in one pass of a loop.

    Attributes:
        issued: all.
        matrix: matrix instructions.
        exponentials: MUFU.EX2; other: the other results of the special function unit (logarithms, reciprocals).
        fp32: additions, multiplications, comparisons and selections in single precision.
        shared: loads and stores of shared memory.  shuffles: exchanges between threads.
        fences: of groups of matrix instructions (sm_90), one before a group and one after. Twice as many as matrix instructions:
            they run one at a time, which ptxas calls serialised (notes C7510, C7515).
    """

    issued: int
    matrix: int
    exponentials: int
    other: int
    fp32: int
    shared: int
    shuffles: int
    fences: int


def matrix_loops(sass: str) -> list[dict[str, int]]:
    """The innermost loops with matrix instructions, in the order of the code, as dicts of :class:`Loop`.

    Args:
        sass: what ``nvdisasm -c`` prints.
    """
    code, labels = _parse(sass)
    spans = [
        (labels[target], i) for i, (op, rest) in enumerate(code) if op == "BRA" and (target := _target(rest)) in labels
    ]
    spans = [
        (start, end) for start, end in spans if start <= end and any(_is_matrix(op) for op, _ in code[start : end + 1])
    ]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [asdict(_count([code[i] for i in range(start, end + 1)])) for start, end in sorted(inner)]


def _parse(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode without its predicate, operands) of every instruction, and where the labels point."""
    code: list[tuple[str, str]] = []
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append((found[1], found[2]))
    return code, labels


def _target(rest: str) -> str:
    found = re.search(r"\.L_\w+", rest)
    return found[0] if found else ""


def _is_matrix(op: str) -> bool:
    return op.partition(".")[0] in MATRIX


def _count(code: list[tuple[str, str]]) -> Loop:
    names = Counter(op.partition(".")[0] for op, _ in code)
    exponentials = sum(op.startswith("MUFU.EX2") for op, _ in code)
    return Loop(
        issued=len(code),
        matrix=sum(names[name] for name in MATRIX),
        exponentials=exponentials,
        other=names["MUFU"] - exponentials,
        fp32=sum(names[name] for name in FP32),
        shared=sum(names[name] for name in ("LDS", "LDSM", "STS", "STSM")),
        shuffles=names["SHFL"],
        fences=names["WARPGROUP"],
    )
