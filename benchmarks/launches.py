"""Representative calls of the operations: what the ahead-of-time gate compiles and the traffic report meters.

A :class:`Call` is a picklable description of one call of the public API, forward and backward. Running it launches exactly
the kernels, with exactly the arguments, that a user's call would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_DIMS = (32, 64, 80, 128)
WIDE_HEADS = ((3, 64), (6, 64), (12, 64), (16, 64))  # merged widths 192, 384, 768, 1024
DTYPES = ("bfloat16", "float16", "float32")
ROW_DIVERGENCES = ("reverse_kl", "js", "cross_entropy", "mse", "logit_mse")
MAP_DIVERGENCES = ROW_DIVERGENCES


@dataclass(frozen=True)
class Call:
    """One call of ``attention_kl`` (or ``attention_rows``, for rows of one model) and of its backward.

    Attributes:
        rows: number of query rows M; 0 means all N.
        keys: number of keys N.
        heads, dim: the student's heads H and head dim D.
        teacher_heads, teacher_dim: the teacher's, where they differ.
        mask: None, 'bool' [B, 1, 1, N] or 'additive' [1, H, M, N] with a gradient (a relative position bias).
        probs: the teacher comes as given rows.
        one_model: ``attention_rows`` of the student instead of a divergence.
        backward: whether gradients are asked for.
        batch: number of images B.
    """

    rows: int
    keys: int
    heads: int
    dim: int
    dtype: str
    merge: str | None = None
    divergence: str = "forward_kl"
    teacher_heads: int | None = None
    teacher_dim: int | None = None
    mask: str | None = None
    probs: bool = False
    one_model: bool = False
    backward: bool = True
    batch: int = 32

    @property
    def name(self) -> str:
        """Words that tell the call from all others: 'row logsum 6x64 N197 bfloat16'."""
        words = ["rows of one model" if self.one_model else "map" if self.rows == 0 else "row"]
        words += [str(self.rows)] if self.rows > 1 else []
        words += [self.merge] if self.merge else []
        words += [self.divergence] if self.divergence != "forward_kl" else []
        words += [f"{self.heads}x{self.dim}"]
        if self.teacher_heads or self.teacher_dim:
            words += [f"from {self.teacher_heads or self.heads}x{self.teacher_dim or self.dim}"]
        words += ["given rows"] if self.probs else []
        words += [f"{self.mask} mask"] if self.mask else []
        words += [f"N{self.keys}", self.dtype]
        words += [] if self.backward else ["no grad"]
        return " ".join(words)

    @property
    def aligned(self) -> bool:
        """Whether every tile starts at a multiple of 16 bytes: a mask's rows of N elements do not, for most N."""
        return self.mask is None or self.rows == 1

    @property
    def rows_of(self) -> int:
        return self.rows or self.keys

    def tensors(self, filled: bool = True) -> dict[str, object]:
        """The call's tensor arguments by name: q and k are views of packed projections [B, N, 3, H, D], as timm's.

        Args:
            filled: with random values; else the memory is never touched, and costs nothing however large.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        make = torch.randn if filled else torch.empty

        def query_key(heads: int, dim: int, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
            qkv = make(self.batch, self.keys, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
            query, key = qkv[0][:, :, : self.rows_of], qkv[1]
            return query.requires_grad_(grad), key.requires_grad_(grad)

        given: dict[str, object] = {}
        given["student_query"], given["student_key"] = query_key(self.heads, self.dim, self.backward)
        if self.one_model:
            return given
        if self.mask == "bool":
            visible = torch.ones(self.batch, 1, 1, self.keys, dtype=torch.bool)
            given["student_mask"] = given["teacher_mask"] = visible
        elif self.mask == "additive":
            bias = make(1, self.heads, self.rows_of, self.keys, dtype=dtype)
            given["student_mask"] = bias.requires_grad_(self.backward)
        if self.probs:
            outer = self.heads if self.merge is None else 1
            logits = make(self.batch, outer, self.rows_of, self.keys)
            given["teacher_probs"] = logits.softmax(-1) if filled else logits
        else:
            heads, dim = self.teacher_heads or self.heads, self.teacher_dim or self.dim
            given["teacher_query"], given["teacher_key"] = query_key(heads, dim, False)
        return given

    def run(self, given: dict[str, object] | None = None) -> None:
        """Forward and, where asked for, backward on the given tensors (by default on untouched memory)."""
        import torch

        from attnkd import attention_kl, attention_rows

        given = self.tensors(filled=False) if given is None else given
        if self.one_model:
            rows = attention_rows(given["student_query"], given["student_key"], merge=self.merge, impl="triton")
            loss = rows.sum()
        else:
            loss = attention_kl(**given, merge=self.merge, divergence=self.divergence, impl="triton")
        if self.backward:
            torch.autograd.grad(loss, [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad])


def representative() -> list[Call]:
    """One call per kernel and form: what the tests compile."""
    return [
        Call(1, 197, 6, 64, "bfloat16"),
        Call(1, 197, 3, 80, "float32"),
        Call(1, 1370, 12, 64, "bfloat16", teacher_dim=128),  # does not fit one tile: split form
        Call(1, 197, 6, 64, "bfloat16", merge="logsum", teacher_heads=12),
        Call(1, 197, 6, 64, "float16", merge="mean"),
        Call(0, 197, 6, 64, "bfloat16", batch=4),
    ]


def everything() -> Iterator[Call]:
    """The full sweep: every kernel with every dtype, head dim and merged width, and each option once."""
    yield from representative()
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            yield Call(1, 197, 6, dim, dtype)
            yield Call(1, 1370, 6, dim, dtype)
            yield Call(0, 197, 6, dim, dtype, batch=4)
            yield Call(0, 197, 6, dim, dtype, batch=4, divergence="js")
            yield Call(1, 197, 6, dim, dtype, merge="mean")
        for heads, dim in WIDE_HEADS:
            yield Call(1, 197, heads, dim, dtype, merge="logsum")
            yield Call(0, 197, heads, dim, dtype, merge="logsum", batch=4)
    half = Call(1, 197, 6, 64, "bfloat16")
    full = dataclasses.replace(half, rows=0, batch=4)
    for call, divergences in ((half, ROW_DIVERGENCES), (full, MAP_DIVERGENCES)):
        for divergence in divergences:
            yield dataclasses.replace(call, divergence=divergence)
        for mask in ("bool", "additive"):
            yield dataclasses.replace(call, mask=mask)
        yield dataclasses.replace(call, backward=False)
        yield dataclasses.replace(call, teacher_dim=128)
        yield dataclasses.replace(call, merge="logsum", teacher_heads=12)
    yield dataclasses.replace(full, merge="mean", teacher_heads=12)
    yield dataclasses.replace(half, rows=4)
    yield dataclasses.replace(half, probs=True)
    yield dataclasses.replace(half, merge="logsum", probs=True)
    for merge in ("max", "min"):
        yield dataclasses.replace(half, merge=merge, teacher_heads=12)
    yield dataclasses.replace(half, divergence="js", keys=1370)  # not one sweep: finished rows
    yield dataclasses.replace(half, one_model=True)
    yield dataclasses.replace(half, one_model=True, merge="logsum")
