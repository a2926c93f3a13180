"""The shapes that are measured: named models, batch sizes, sequence lengths."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Attention of one block of a student and its teacher.

    heads, teacher_heads: H and Ht; head by head comparisons use ``heads`` for both.
    tokens: N, class token and patches.
    """

    name: str
    heads: int
    teacher_heads: int
    tokens: int
    head_dim: int = 64
    batch: int = 64

    def dims(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}

    @property
    def label(self) -> str:
        return f"{self.name} B{self.batch}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("deit_tiny", 3, 6, 197, batch=512),  # DeiT-T/16 at 224 (merged: from DeiT-S)
        Shape("deit_small", 6, 12, 197, batch=256),  # DeiT-S/16 at 224 (merged: from DeiT-B)
        Shape("deit_base", 12, 16, 197, batch=128),  # DeiT-B/16 = ViT-B/16 at 224 (merged: from ViT-L)
        Shape("vit_base_384", 12, 16, 577, batch=32),  # ViT-B/16 at 384 (merged: from ViT-L)
        Shape("vit_small_8", 6, 12, 785, batch=64),  # ViT-S/8 at 224 (merged: from ViT-B/8)
        Shape("dinov2_518", 12, 16, 1370, batch=16),  # DINOv2 ViT-B/14 at 518 (merged: from ViT-L)
    )
}
SMOKE = Shape("smoke", 2, 4, 21, head_dim=16, batch=2)
"""Tiny, for correctness only: H, Ht, N and D are all different, N is odd and no multiple of anything."""

BATCH_SWEEP = tuple(2**power for power in range(10))  # 1 to 512
TOKEN_SWEEP = (64, 128, 197, 256, 577, 785, 1024, 1370, 2048, 4096, 8192, 16384)
SHORT_SHAPES = ("deit_small", "vit_base_384")
SHORT_BATCH_SWEEP = (1, 16, 256)
SHORT_TOKEN_SWEEP = (197, 785, 4096, 16384)
"""What is measured unless everything is asked for: a compiled opponent takes seconds to compile for each of them."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("fwd", "bwd", "both")


def find_shape(name: str) -> Shape:
    """A shape by name.

    Raises:
        ValueError: no such shape; the message lists them.
    """
    known = SHAPES | {SMOKE.name: SMOKE}
    if name not in known:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    return known[name]


def batch_sweep(name: str, full: bool) -> list[Shape]:
    return [replace(find_shape(name), batch=batch) for batch in (BATCH_SWEEP if full else SHORT_BATCH_SWEEP)]


def token_sweep(heads: int, batch: int, full: bool) -> list[Shape]:
    tokens = TOKEN_SWEEP if full else SHORT_TOKEN_SWEEP
    return [Shape(f"n{n}", heads, 2 * heads, n, batch=batch) for n in tokens]


def parse_dtype(name: str) -> torch.dtype:
    """Raises ValueError with the known names."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def describe(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    return {"shape": shape.name, "dims": shape.dims(), "dtype": str(dtype)[6:]}
