"""The shapes that are measured: named models, batch sizes, sequence lengths; and their random inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Attention of one block of a student and its teacher.

    heads, teacher_heads: H and Ht; head by head comparisons use ``heads`` for both.
    tokens: N, class token and patches.
    """

    name: str
    about: str
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
        Shape("deit_tiny", "DeiT-T/16 at 224 (merged: from DeiT-S)", 3, 6, 197, batch=512),
        Shape("deit_small", "DeiT-S/16 at 224 (merged: from DeiT-B)", 6, 12, 197, batch=256),
        Shape("deit_base", "DeiT-B/16 = ViT-B/16 at 224 (merged: from ViT-L)", 12, 16, 197, batch=128),
        Shape("vit_base_384", "ViT-B/16 at 384 (merged: from ViT-L)", 12, 16, 577, batch=32),
        Shape("vit_small_8", "ViT-S/8 at 224 (merged: from ViT-B/8)", 6, 12, 785, batch=64),
        Shape("dinov2_518", "DINOv2 ViT-B/14 at 518 (merged: from ViT-L)", 12, 16, 1370, batch=16),
    )
}
ALIASES = {"vit_base_224": "deit_base"}
SMOKE = Shape("smoke", "tiny, for correctness only", 2, 4, 21, head_dim=16, batch=2)
"""H, Ht, N and D are all different, N is odd and no multiple of anything."""

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
    name = ALIASES.get(name, name)
    if name not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join([*SHAPES, *ALIASES])}, got {name!r}")
    return SHAPES[name]


def batch_sweep(shape: Shape, full: bool) -> list[Shape]:
    return [replace(shape, batch=batch) for batch in (BATCH_SWEEP if full else SHORT_BATCH_SWEEP)]


def token_sweep(heads: int, batch: int, full: bool) -> list[Shape]:
    tokens = TOKEN_SWEEP if full else SHORT_TOKEN_SWEEP
    return [Shape(f"n{n}", f"{n} tokens", heads, 2 * heads, n, batch=batch) for n in tokens]


@dataclass
class Inputs:
    """Random tensors of one case, by name.

    student, teacher: {'query', 'key', 'value'}, each [B, H, N, D]: views of a packed qkv projection [B, N, 3, H, D], with the
    strides that timm's blocks have and logits of standard deviation 1; or {'features'} [B, N, H·D], contiguous.
    """

    shape: Shape
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]

    def leaves(self, names: tuple[str, ...], rows: int) -> dict[str, Tensor]:
        """The student's tensors as leaves that require grad, their strides kept; the query cut to its first rows."""
        cut = {name: self.student[name][:, :, :rows] if name == "query" else self.student[name] for name in names}
        return {name: tensor.detach().requires_grad_() for name, tensor in cut.items()}


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, names: tuple[str, ...], merged: bool, seed: int
) -> Inputs:
    """Fresh random inputs.

    Args:
        names: what of the student takes part; 'features' alone, or queries, keys and values.
        merged: give the teacher ``teacher_heads`` heads instead of the student's number.
        seed: of the random numbers; every check takes another.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def side(heads: int) -> dict[str, Tensor]:
        size = (shape.batch, shape.tokens, 3, heads, shape.head_dim)
        if names == ("features",):
            size = (shape.batch, shape.tokens, heads * shape.head_dim)
        random = torch.randn(size, generator=generator, dtype=dtype, device=device)
        if names == ("features",):
            return {"features": random}
        return dict(zip(("query", "key", "value"), random.permute(2, 0, 3, 1, 4).unbind(0), strict=True))

    return Inputs(shape, side(shape.heads), side(shape.teacher_heads if merged else shape.heads))


def parse_dtype(name: str) -> torch.dtype:
    """Raises ValueError with the known names."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def describe(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    return {"shape": shape.name, "dims": shape.dims(), "dtype": str(dtype)[6:]}
