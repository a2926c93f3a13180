"""Cases of the operations: one line of text each, so that any of them can be run again alone.

:mod:`attnkd.testing.generate` draws them, :mod:`attnkd.testing.proof` judges them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnkd.attention.problem import DIVERGENCES, MERGES, REDUCTIONS
from attnkd.attention.resample import MODES
from attnkd.testing.guard import LAYOUTS, lay_out

OPERATIONS = ("row", "map", "rows", "relation", "merge", "resample")
"""``row``: attention_divergence of up to 16 query rows. ``map``: of more. ``rows``: attention_rows. ``relation``:
relation_row_loss of N tokens, M of them prefix tokens, with D and Dt channels. ``merge``: merge_attention. ``resample``:
resample_attention from ``grid`` to ``to``."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
MASKS = ("none", "bool", "deadbool", "bias", "hide", "deadhide")
"""Boolean, additive, or additive with −inf; with 'dead' some rows see nothing. ``kind@dims``, such as ``bias@HMN`` or ``bool@BN``:
the dimensions of [B, H, M, N] that the mask has, the others are broadcast."""
RELATED = ("same", "within")
"""What a teacher's mask can be besides: the student's, or one that shows no more keys than the student's."""
TARGETS = ("keys", "probs", "counts", "sparse")
"""The teacher: queries and keys, or rows; ``counts`` are not normalised, ``sparse`` ones have zeros, and rows of nothing else."""
WEIGHTS = ("none", "float", "bool")
"""Of the rows, as ``kind@dims`` of [B, H, M]; some are 0."""
POISONS = ("none", "student_query", "student_key", "student_mask", "teacher_query", "teacher_key", "teacher_probs",
           "student_features", "teacher_features")  # fmt: skip
"""The argument whose first number is NaN: what it touches must be NaN, and nothing else."""


@dataclass(frozen=True)
class Case:
    """One call. ``str(case)`` and :func:`parse` are each other's inverse."""

    operation: str = "row"
    dtype: str = "fp32"
    teacher_dtype: str | None = None
    """None: the student's."""
    merge: str | None = None
    divergence: str = "forward_kl"
    layout: str = "contiguous"
    teacher_layout: str | None = None
    mask: str = "none"
    teacher_mask: str = "none"
    mask_dtype: str = "fp32"
    target: str = "keys"
    weight: str = "none"
    reduction: str = "none"
    B: int = 2
    H: int = 3
    M: int = 1
    N: int = 50
    D: int = 64
    Ht: int = 3
    Dt: int = 64
    scale: float | None = None
    teacher_scale: float | None = None
    temperature: float = 1.0
    std: float = 1.0
    closeness: float = 0.0
    """Above 0: the teacher is the student and that much noise."""
    teacher_prefix: int = 1
    normalize_dim: int = -1
    grid: str = "3x4"
    to: str = "5x2"
    mode: str = "bicubic"
    poison: str = "none"
    seed: int = 0

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    @property
    def heads(self) -> int:
        """Ho: of the rows that are compared."""
        return self.H if self.merge is None else 1

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """The arguments of the call, as its function names them (``rows``: with the student's names)."""
        operation = "row" if self.operation == "map" else self.operation
        given = getattr(self, f"_{operation}")(_Draw(self, device))
        if self.poison != "none":
            poisoned = given[self.poison]
            poisoned[(0,) * poisoned.ndim] = torch.nan
        return given

    def _row(self, draw: _Draw) -> dict[str, Any]:
        given = self._rows(draw) | {"divergence": self.divergence, "reduction": self.reduction}
        query, key, mask = given["student_query"], given["student_key"], given.get("student_mask")
        if self.target == "keys":
            dtype, layout = self.teacher_dtype or self.dtype, self.teacher_layout or self.layout
            given["teacher_query"] = draw.tensor((self.B, self.Ht, self.M, self.Dt), dtype, layout, near=query)
            given["teacher_key"] = draw.tensor((self.B, self.Ht, self.N, self.Dt), dtype, layout, near=key)
            given["teacher_scale"] = self.teacher_scale
            given["teacher_mask"] = draw.teacher_mask(self.teacher_mask, mask)
        else:
            given["teacher_probs"] = draw.probs(self.target, (self.B, self.heads, self.M, self.N), mask)
        if self.weight != "none":
            given["row_weight"] = draw.weight(self.weight)
        return {name: value for name, value in given.items() if value is not None}

    def _rows(self, draw: _Draw) -> dict[str, Any]:
        given = {
            "student_query": draw.tensor((self.B, self.H, self.M, self.D), self.dtype, self.layout),
            "student_key": draw.tensor((self.B, self.H, self.N, self.D), self.dtype, self.layout),
            "student_scale": self.scale,
            "student_mask": draw.mask(self.mask, self.H),
            "merge": self.merge,
            "temperature": self.temperature,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _relation(self, draw: _Draw) -> dict[str, Any]:
        patches = self.N - self.M
        student = draw.tensor((self.B, 1, self.N, self.D), self.dtype, self.layout)
        shape = (self.B, 1, self.teacher_prefix + patches, self.Dt)
        return {
            "student_features": student[:, 0],
            "teacher_features": draw.tensor(shape, self.dtype, self.teacher_layout or self.layout, near=student)[:, 0],
            "student_prefix_tokens": self.M,
            "teacher_prefix_tokens": self.teacher_prefix,
            "normalize_dim": self.normalize_dim,
            "reduction": self.reduction,
        }

    def _merge(self, draw: _Draw) -> dict[str, Any]:
        probs = draw.probs(self.target, (self.B, self.H, self.M, self.N), None)
        return {"probs": probs, "merge": self.merge, "temperature": self.temperature}

    def _resample(self, draw: _Draw) -> dict[str, Any]:
        grid, to = (_grid(text) for text in (self.grid, self.to))
        rows = draw.probs("probs", (self.B, self.H, self.M, 1 + grid[0] * grid[1]), None)
        return {"rows": rows, "teacher_grid": grid, "student_grid": to, "mode": self.mode}


class _Draw:
    """Random tensors of a case, the same on every device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        self.sizes = {"B": case.B, "H": case.H, "M": case.M, "N": case.N}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def chance(self, shape: tuple[int, ...], probability: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < probability

    def tensor(self, shape: tuple[int, ...], dtype: str, layout: str, near: Tensor | None = None) -> Tensor:
        values = self.normal(*shape) * self.case.std
        if near is not None and near.shape == shape and self.case.closeness:
            values = near.cpu().float() + self.case.closeness * values
        return lay_out(values.to(self.device, DTYPES[dtype]), layout)

    def shape(self, dims: str, order: str, heads: int) -> tuple[int, ...]:
        """Sizes of the dimensions named, 1 for those in between, none before the first: ``HN`` is [H, 1, N]."""
        sizes = self.sizes | {"H": heads}
        names = order[order.index(dims[0]) :] if dims else ""
        return tuple(sizes[name] if name in dims else 1 for name in names)

    def visible(self, shape: tuple[int, ...], dead: bool, keys: bool) -> Tensor:
        """Which keys are shown: the first one always, but in dead rows."""
        visible = self.chance(shape, 0.7)
        if keys:
            visible[..., 0] = True
            if dead:
                visible &= self.chance((*shape[:-1], 1), 0.7)
        return visible

    def mask(self, spec: str, heads: int, within: Tensor | None = None) -> Tensor | None:
        """The mask of ``kind@dims`` for that many heads, with the keys that ``within`` hides hidden too."""
        kind, _, dims = spec.partition("@")
        if kind == "none":
            return None
        shape = self.shape(dims, "BHMN", heads)
        visible = self.visible(shape, kind.startswith("dead"), "N" in dims)
        if within is not None:
            visible = visible & (within if within.dtype == torch.bool else ~within.isneginf()).cpu()
        if kind.endswith("bool"):
            return visible.to(self.device)
        values = self.normal(*visible.shape).to(DTYPES[self.case.mask_dtype])
        return (values if kind == "bias" else torch.where(visible, values, -torch.inf)).to(self.device)

    def teacher_mask(self, spec: str, student: Tensor | None) -> Tensor | None:
        if spec == "same":
            return student
        return self.mask(
            self.case.mask if spec == "within" else spec, self.case.Ht, student if spec == "within" else None
        )

    def probs(self, target: str, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        probs = (2 * self.normal(*shape)).softmax(-1)
        if target == "counts":
            probs = probs * (5 * torch.rand((*shape[:-1], 1), generator=self.generator) + 0.1)
        if target == "sparse":
            seen = self.visible(shape, dead=True, keys=True)
            if mask is not None:  # what the student cannot see has no weight, so that the rows are finite
                shown = mask if mask.dtype == torch.bool else ~mask.isneginf()
                shown = shown.cpu().expand(self.case.B, self.case.H, self.case.M, self.case.N)
                seen = seen & (shown if self.case.merge is None else shown.all(1, keepdim=True))
            probs = torch.where(seen, probs, 0.0)
        dtype = self.case.dtype if self.case.operation in ("merge", "resample") else self.case.teacher_dtype or "fp32"
        return probs.to(self.device, DTYPES[dtype])

    def weight(self, spec: str) -> Tensor:
        kind, _, dims = spec.partition("@")
        shape = self.shape(dims, "BHM", self.case.heads)
        counts = self.chance(shape, 0.7)
        if not counts.any():
            counts = torch.ones_like(counts)
        values = torch.rand(shape, generator=self.generator) + 0.1
        return (counts if kind == "bool" else torch.where(counts, values, 0.0)).to(self.device)


def parse(text: str) -> Case:
    """The case that ``str(case)`` wrote.

    Raises:
        ValueError: an unknown field or value.
    """
    values: dict[str, Any] = {}
    kinds = {f.name: str(f.type) for f in fields(Case)}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"case: expected fields among {', '.join(kinds)}, got {name!r}")
        kind: Any = {"str": str, "int": int, "float": float}[kinds[name].split(" ")[0]]
        try:
            values[name] = None if value == "None" and "None" in kinds[name] else kind(value)
        except ValueError:
            raise ValueError(f"case: expected {name} to be a {kind.__name__}, got {value!r}") from None
    case = Case(**values)
    for name, choices in (
        ("operation", OPERATIONS), ("dtype", tuple(DTYPES)), ("teacher_dtype", (None, *DTYPES)), ("merge", MERGES),
        ("divergence", DIVERGENCES), ("layout", LAYOUTS), ("teacher_layout", (None, *LAYOUTS)), ("target", TARGETS),
        ("reduction", REDUCTIONS), ("mask_dtype", tuple(DTYPES)), ("mode", MODES), ("poison", POISONS),
    ):  # fmt: skip
        if getattr(case, name) not in choices:
            raise ValueError(f"case: expected {name} to be one of {choices}, got {getattr(case, name)!r}")
    for name, choices, dims in (
        ("mask", MASKS, "BHMN"), ("teacher_mask", (*MASKS, *RELATED), "BHMN"), ("weight", WEIGHTS, "BHM"),
    ):  # fmt: skip
        kind, _, named = getattr(case, name).partition("@")
        if kind not in choices or not set(named) <= set(dims):
            raise ValueError(
                f"case: expected {name} to be one of {choices} @ some of {dims}, got {getattr(case, name)!r}"
            )
    for name in ("grid", "to"):
        try:
            _grid(getattr(case, name))
        except ValueError:
            raise ValueError(f"case: expected {name} like 3x4, got {getattr(case, name)!r}") from None
    return case


def _grid(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)
