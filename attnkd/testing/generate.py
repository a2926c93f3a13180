"""Draws cases: every operation, dtype, merge, divergence, mask, weight, layout and size that an implementation covers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from attnkd.attention.dispatch import MAX_ROWS
from attnkd.attention.problem import DIVERGENCES, MERGES, REDUCTIONS
from attnkd.attention.resample import MODES
from attnkd.testing.cases import DTYPES, MASKS, OPERATIONS, POISONS, RELATED, TARGETS, WEIGHTS, Case
from attnkd.testing.guard import LAYOUTS

IMPLS = ("triton", "chunked", "reference")
HEAD_DIMS = (16, 20, 32, 48, 64, 72, 80, 96, 128)
KEYS = (1, 2, 13, 16, 17, 31, 32, 33, 47, 64, 65)  # around powers of two, and primes
LONG = (127, 128, 197, 257, 577, 1024, 1031)


def exists(case: Case, impl: str) -> bool:
    """Whether the operation is defined for the case and covered by the implementation."""
    if impl == "triton" and (case.operation in ("merge", "resample") or "fp64" in (case.dtype, case.teacher_dtype)):
        return False
    if case.poison != "none" and not _has(case, case.poison):
        return False
    if _ties(case):
        return False
    if case.operation == "resample":  # on the same grid rows come back as they are, in their own dtype
        return case.grid != case.to or case.dtype in ("fp32", "fp64")
    if case.operation == "merge":
        return case.merge is not None
    if case.operation == "relation":
        directed = case.normalize_dim == -1 or impl != "triton"
        return directed and case.merge is None and case.N > case.M and case.reduction != "batchmean"
    if not _masks_exist(case):
        return False
    if case.operation == "rows":
        return True
    if case.divergence == "logit_mse" and (case.merge not in (None, "logsum") or case.target != "keys"):
        return False
    if case.merge is None and case.Ht != case.H:
        return False
    if impl == "triton" and case.M > MAX_ROWS:
        return case.merge not in ("max", "min") and case.target == "keys"
    return True


def _ties(case: Case) -> bool:
    """Whether rounding decides which of equal heads is the largest: the gradient may go to any of them."""
    return case.merge in ("max", "min") and case.layout == "expanded_heads" and case.H > 1


def _has(case: Case, argument: str) -> bool:
    """Whether the call has an argument of that name, in floating point."""
    if case.operation == "relation":
        return argument.endswith("features")
    if case.operation not in ("row", "map", "rows"):
        return False
    return {
        "student_query": True,
        "student_key": True,
        "student_mask": "bool" not in case.mask and case.mask != "none",
        "teacher_query": case.operation != "rows" and case.target == "keys",
        "teacher_key": case.operation != "rows" and case.target == "keys",
        "teacher_probs": case.operation != "rows" and case.target != "keys",
    }.get(argument, False)


def _masks_exist(case: Case) -> bool:
    alone = case.operation == "rows" or case.target != "keys"
    if alone and case.teacher_mask != "none":
        return False
    related = case.teacher_mask in RELATED
    if related and (case.mask == "none" or ("H" in case.mask.partition("@")[2] and case.Ht != case.H)):
        return False
    if case.merge is None or case.operation == "rows":
        return case.merge is None or not ("bool" in case.mask and "H" in case.mask.partition("@")[2])
    # Merged heads form one distribution: one boolean mask for all of them, and on both sides.
    specs = [case.mask, case.mask if related else case.teacher_mask]
    if any("bool" in spec and "H" in spec.partition("@")[2] for spec in specs):
        return False
    return alone or len({"bool" in spec for spec in specs}) == 1


def fixed(impl: str, small: bool) -> Iterator[Case]:
    """Every operation × dtype × merge × divergence, and every layout, mask, target, weight and reduction with each operation and
    dtype.

    The cases with merges and divergences take the layouts, masks and head dims in turn. ``small`` sizes suit the interpreter.
    """
    turn = itertools.count()
    for operation, dtype, merge in itertools.product(OPERATIONS, DTYPES, MERGES):
        for divergence in DIVERGENCES if operation in ("row", "map") else DIVERGENCES[:1]:
            i = next(turn)
            case = replace(_sized(Case(operation, dtype, merge=merge, divergence=divergence), i, small),
                           layout=LAYOUTS[i % len(LAYOUTS)], temperature=1 + 0.5 * (i % 3))  # fmt: skip
            if operation in ("row", "map", "rows"):
                case = replace(case, **_mask_turns(case)[i % len(_mask_turns(case))])
            if _ties(case):
                case = replace(case, layout="contiguous")
            if merge is not None and operation != "merge":
                case = replace(case, Ht=1 + i % 4, Dt=HEAD_DIMS[(i + 3) % len(HEAD_DIMS)])
            if exists(case, impl):
                yield case
    for operation, dtype in itertools.product(OPERATIONS, DTYPES):
        plain = Case(operation, dtype, merge="logsum" if operation == "merge" else None)
        variants: list[dict[str, Any]] = [{"layout": x} for x in LAYOUTS]
        if operation in ("row", "map", "rows"):
            variants += _mask_turns(plain)
        if operation in ("row", "map"):
            variants += [{"target": x} for x in TARGETS[1:]] + [
                {"weight": f"{x}@HM", "reduction": "mean"} for x in WEIGHTS[1:]
            ]
        if operation in ("row", "map", "relation"):
            variants += [{"reduction": x} for x in REDUCTIONS[1:]]
        if operation == "relation":
            variants += [{"normalize_dim": -2}, {"teacher_prefix": 2}]
        if operation == "resample":
            variants = [{"mode": x, "grid": "7x5", "to": to} for x in MODES for to in ("4x6", "14x3", "1x1")]
        for variant in variants:
            case = replace(_sized(plain, next(turn), small), **variant)
            if exists(case, impl):
                yield case


def draw(rng: random.Random, impl: str, small: bool) -> Case:
    """A random case."""
    while True:
        case = _draw(rng, small)
        if rng.random() < 0.15:
            case = replace(case, poison=rng.choice(POISONS))
        if exists(case, impl):
            return case


def _draw(rng: random.Random, small: bool) -> Case:
    operation = rng.choices(OPERATIONS, (6, 4, 2, 2, 1, 1))[0]
    merge, H = rng.choice(MERGES), rng.randint(1, 3 if small else 4)
    common = {
        "operation": operation, "dtype": rng.choices(list(DTYPES), (4, 3, 4, 1))[0], "layout": rng.choice(LAYOUTS),
        "B": rng.randint(1, 2 if small else 3), "H": H, "Ht": H, "D": rng.choice((*HEAD_DIMS, rng.randint(1, 100))),
        "N": rng.choice((*KEYS, *(() if small else LONG), rng.randint(1, 50 if small else 1100))),
        "M": _some_rows(rng, operation, small), "seed": rng.randrange(10**6),
    }  # fmt: skip
    Dt = common["D"] if rng.random() < 0.5 else rng.choice((*HEAD_DIMS, rng.randint(1, 100)))
    if operation == "relation":
        prefix = rng.choice((common["M"], rng.randint(1, 4)))
        return Case(**common, Dt=Dt, teacher_prefix=prefix, normalize_dim=rng.choice((-1, -2)),
                    reduction=rng.choice(REDUCTIONS), closeness=rng.choice((0.0, 0.01)))  # fmt: skip
    if operation == "resample":
        grid, to = (f"{rng.randint(1, 9)}x{rng.randint(1, 9)}" for _ in range(2))
        return Case(**common, grid=grid, to=to, mode=rng.choice(MODES))
    options = common | {
        "merge": merge,
        "temperature": rng.choice((0.5, 1.0, 4.0, 10.0)),
        "std": rng.choice((0.3, 1.0, 3.0)),
    }
    if operation == "merge":
        return Case(**options, target=rng.choice(("probs", "sparse")))
    mask = _some_mask(rng)
    if operation == "rows":
        return Case(**options, mask=mask, scale=rng.choice((None, 0.125)))
    if merge is not None and rng.random() < 0.7:
        options["Ht"] = rng.randint(1, 4)
    return Case(
        **options, Dt=Dt, divergence=rng.choice(DIVERGENCES), mask=mask,
        teacher_mask=rng.choice(("none", *RELATED, _some_mask(rng))), mask_dtype=rng.choice(("fp32", "fp32", common["dtype"])),
        teacher_dtype=rng.choice((None, None, None, *DTYPES)), teacher_layout=rng.choice((None, *LAYOUTS)),
        target=rng.choices(TARGETS, (5, 1, 1, 1))[0], weight=_spec(rng, WEIGHTS, "BHM"), reduction=rng.choice(REDUCTIONS),
        scale=rng.choice((None, None, 1.0, 0.1, -0.2, 0.0)), teacher_scale=rng.choice((None, None, 0.1)),
        closeness=rng.choice((0.0, 0.0, 0.03)),
    )  # fmt: skip


def smallest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A simpler case that still fails: fields go back to their defaults and sizes down, one at a time, while it does."""
    changed = True
    while changed:
        changed = False
        for simpler in _simpler(case):
            if fails(simpler):
                case, changed = simpler, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    for f in fields(Case):
        value = getattr(case, f.name)
        if f.name not in ("operation", "seed", "B", "H", "M", "N", "D", "Ht", "Dt") and value != f.default:
            simpler: dict[str, Any] = {f.name: f.default}
            yield replace(case, **simpler)
    least = {"M": MAX_ROWS + 1 if case.operation == "map" else 1}
    for name in ("B", "H", "Ht", "M", "N", "D", "Dt"):
        size = getattr(case, name)
        for less in sorted({least.get(name, 1), size // 2, size - 1}):
            if least.get(name, 1) <= less < size:
                yield replace(case, **{name: less})
                if name == "H" and case.merge is None and case.Ht == case.H:
                    yield replace(case, H=less, Ht=less)


def _some_rows(rng: random.Random, operation: str, small: bool) -> int:
    if operation == "map":
        return rng.choice((MAX_ROWS + 1, rng.randint(MAX_ROWS + 1, 30 if small else 300)))
    if operation == "relation":
        return rng.randint(1, 4)
    return rng.choice((1, 1, 2, 3, MAX_ROWS - 1, MAX_ROWS))


def _some_mask(rng: random.Random) -> str:
    return _spec(rng, MASKS, "BHMN")


def _spec(rng: random.Random, kinds: tuple[str, ...], dims: str) -> str:
    """``none`` or ``kind@dims``, with any of the dims."""
    if rng.random() < 0.3:
        return "none"
    return f"{rng.choice(kinds[1:])}@{''.join(dim for dim in dims if rng.random() < 0.6)}"


def _mask_turns(case: Case) -> list[dict[str, Any]]:
    """One mask of every kind, broadcast in different ways."""
    merged, alone = case.merge is not None, case.operation == "rows"
    found = [{"mask": f"{kind}@{dims}"} for kind, dims in
             (("bias", "HMN"), ("hide", "BN"), ("deadhide", "HMN"), ("bias", "MN"), ("hide", "BHMN"))]  # fmt: skip
    for dims in ("BN", "MN") if merged else ("BN", "BHMN", "H"):
        found += [
            {"mask": f"{kind}@{dims}", "teacher_mask": "none" if alone else "within"} for kind in ("bool", "deadbool")
        ]
    if not alone:
        found += [{"mask": "hide@BN", "teacher_mask": "same"}, {"teacher_mask": "bias@MN"}]
    return [{}, *found]


def _sized(case: Case, turn: int, small: bool) -> Case:
    D = HEAD_DIMS[turn % len(HEAD_DIMS)]
    keys = ((33, 50, 70) if small else (65, 197, 257, 785))[turn % (3 if small else 4)]
    rows = 1 + turn % 2 if case.operation != "map" else min(keys, 20 if small else 785)
    return replace(case, B=2, H=2 + turn % 2, Ht=2 + turn % 2, N=keys, M=rows, D=D, Dt=D, seed=turn)
