"""Cases of the attention operations: one line of text each, so that any of them can be run again alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attnkd.attention.problem import DIVERGENCES, MERGES
from attnkd.testing.guard import LAYOUTS, lay_out

OPERATIONS = ("row", "map", "rows", "relation")
"""``row``: attention_divergence of up to 16 query rows. ``map``: attention_divergence of more. ``rows``: attention_rows. ``relation``:
relation_row_loss of N tokens, M of them prefix tokens, with D and Dt channels."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MASKS = ("none", "bool", "bias", "padding")
TARGETS = ("keys", "probs")
HEAD_DIMS = (16, 20, 32, 48, 64, 72, 80, 96, 128)


@dataclass(frozen=True)
class Case:
    """One call. ``str(case)`` and :func:`parse` are each other's inverse."""

    operation: str = "row"
    dtype: str = "fp32"
    merge: str | None = None
    divergence: str = "forward_kl"
    layout: str = "contiguous"
    mask: str = "none"
    target: str = "keys"
    B: int = 2
    H: int = 3
    M: int = 1
    N: int = 50
    D: int = 64
    Ht: int = 3
    Dt: int = 64
    temperature: float = 1.0
    std: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """The arguments of the call, as its function names them (``rows``: as :func:`attnkd.attention_divergence` would)."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = DTYPES[self.dtype]

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator) * self.std
            return lay_out(values.to(device, dtype), self.layout)

        if self.operation == "relation":
            return {
                "student_features": draw(self.B, 1, self.N, self.D)[:, 0],
                "teacher_features": draw(self.B, 1, self.N, self.Dt)[:, 0],
                "student_prefix_tokens": self.M,
                "teacher_prefix_tokens": self.M,
            }
        given: dict[str, Any] = {
            "student_query": draw(self.B, self.H, self.M, self.D),
            "student_key": draw(self.B, self.H, self.N, self.D),
            "merge": self.merge,
            "temperature": self.temperature,
        }
        if self.operation != "rows":
            given["divergence"] = self.divergence
            if self.target == "probs":
                rows = (self.B, self.H if self.merge is None else 1, self.M, self.N)
                probs = (2 * torch.randn(rows, generator=generator)).softmax(-1)
                given["teacher_probs"] = probs.to(device)
            else:
                given["teacher_query"] = draw(self.B, self.Ht, self.M, self.Dt)
                given["teacher_key"] = draw(self.B, self.Ht, self.N, self.Dt)
        given |= self._masks(generator, device)
        return given

    def _masks(self, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        if self.mask == "bias":  # a learned bias of the student, shared by images
            return {"student_mask": torch.randn((self.H, self.M, self.N), generator=generator).to(device)}
        if self.mask == "none":
            return {}
        visible = torch.rand((self.B, 1, 1, self.N), generator=generator) > 0.3
        visible[..., 0] = True
        if self.mask == "padding":  # image 0 is padded throughout: its rows see nothing
            visible[0] = False
        visible = visible.to(device)
        both = (
            ("student_mask", "teacher_mask")
            if self.operation != "rows" and self.target == "keys"
            else ("student_mask",)
        )
        return dict.fromkeys(both, visible)


def parse(text: str) -> Case:
    """The case that ``str(case)`` wrote.

    Raises:
        ValueError: an unknown field or value.
    """
    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {f.name: f.default for f in fields(Case)}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"case: expected fields among {', '.join(kinds)}, got {name!r}")
        kind: Any = str if name == "merge" else type(kinds[name])
        try:
            values[name] = None if name == "merge" and value == "None" else kind(value)
        except ValueError:
            raise ValueError(f"case: expected {name} to be a {kind.__name__}, got {value!r}") from None
    case = Case(**values)
    for name, choices in (
        ("operation", OPERATIONS), ("dtype", tuple(DTYPES)), ("merge", MERGES), ("divergence", DIVERGENCES),
        ("layout", LAYOUTS), ("mask", MASKS), ("target", TARGETS),
    ):  # fmt: skip
        if getattr(case, name) not in choices:
            raise ValueError(f"case: expected {name} to be one of {choices}, got {getattr(case, name)!r}")
    return case


def exists(case: Case, impl: str) -> bool:
    """Whether the operation is defined for the case and covered by the implementation."""
    merged = case.merge is not None
    if case.operation == "relation":
        plain = (case.merge, case.divergence, case.mask, case.target, case.Ht) == (
            None,
            "forward_kl",
            "none",
            "keys",
            case.H,
        )
        return plain and case.N > case.M
    if case.divergence == "logit_mse" and (case.merge not in (None, "logsum") or case.target == "probs"):
        return False
    if case.mask != "none" and case.divergence == "reverse_kl" and case.target == "probs":
        return False  # infinite: the target weighs keys that the student cannot see, or the reverse
    if case.target == "probs" and case.mask in ("bool", "padding"):
        return False
    if not merged and case.Ht != case.H:
        return False
    if case.operation == "map" and impl == "triton":
        return (
            case.merge not in ("max", "min") and case.target == "keys" and (case.merge, case.mask) != ("mean", "bias")
        )  # ops_map.why_not
    return True


def fixed(impl: str, small: bool) -> Iterator[Case]:
    """Every operation × dtype × merge × divergence, and every layout, mask and target with each operation and dtype.

    The cases with merges and divergences take the layouts, masks and head dims in turn. ``small`` sizes suit the interpreter.
    """
    turn = itertools.count()
    for operation, dtype, merge in itertools.product(OPERATIONS, DTYPES, MERGES):
        for divergence in DIVERGENCES if operation in ("row", "map") else DIVERGENCES[:1]:
            i = next(turn)
            case = _sized(Case(operation, dtype, merge, divergence), i, small)
            case = replace(
                case, layout=LAYOUTS[i % len(LAYOUTS)], mask=MASKS[i % len(MASKS)], temperature=1 + 0.5 * (i % 3)
            )
            if merge is not None:
                case = replace(case, Ht=1 + i % 4, Dt=HEAD_DIMS[(i + 3) % len(HEAD_DIMS)])
            if exists(case, impl):
                yield case
    for operation, dtype in itertools.product(OPERATIONS, DTYPES):
        variants: list[dict[str, Any]] = (
            [{"layout": x} for x in LAYOUTS] + [{"mask": x} for x in MASKS] + [{"target": x} for x in TARGETS]
        )
        for variant in variants:
            case = replace(_sized(Case(operation, dtype), next(turn), small), **variant)
            if exists(case, impl):
                yield case


def draw(rng: random.Random, impl: str, small: bool) -> Case:
    """A random case."""
    while True:
        H = rng.randint(1, 4)
        merge = rng.choice(MERGES)
        case = Case(
            operation=rng.choice(OPERATIONS), dtype=rng.choice(list(DTYPES)), merge=merge, divergence=rng.choice(DIVERGENCES),
            layout=rng.choice(LAYOUTS), mask=rng.choice(MASKS), target=rng.choice(TARGETS), B=rng.randint(1, 3), H=H,
            D=rng.choice(HEAD_DIMS), Ht=H if merge is None else rng.randint(1, 4), Dt=rng.choice(HEAD_DIMS),
            temperature=rng.choice((0.5, 1.0, 4.0, 10.0)), std=rng.choice((0.3, 1.0, 3.0)), seed=rng.randrange(10**6),
        )  # fmt: skip
        keys = rng.randint(1, 70 if small else 1100)
        rows = rng.randint(1, 3) if case.operation != "map" else rng.randint(17, 40 if small else 300)
        if case.operation in ("rows", "relation"):
            case = replace(case, divergence="forward_kl", target="keys")
        if case.operation == "relation":
            case = replace(case, merge=None, mask="none", Ht=case.H, temperature=1.0)
        case = replace(case, N=keys, M=rows)
        if exists(case, impl):
            return case


def _sized(case: Case, turn: int, small: bool) -> Case:
    D = HEAD_DIMS[turn % len(HEAD_DIMS)]
    keys = ((33, 50, 70) if small else (65, 197, 257, 785))[turn % (3 if small else 4)]
    rows = 1 + turn % 2 if case.operation != "map" else min(keys, 20 if small else 785)
    return replace(case, B=2, H=2 + turn % 2, Ht=2 + turn % 2, N=keys, M=rows, D=D, Dt=D, seed=turn)
