"""Representative calls of the operations: what the ahead-of-time gate compiles and the traffic report meters.

A call is a small picklable description of one call of the public API, forward and backward. Running it launches exactly
the kernels, with exactly the arguments, that a user's call would. It also knows its floor: the least bytes it must move.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIMS = (16, 32, 64, 80, 128, 256)
WIDE_HEADS = ((3, 64), (6, 64), (12, 64), (16, 64))  # merged widths 192, 384, 768, 1024
CHANNELS = ((192, 384), (384, 768), (768, 768), (1024, 1280))
DTYPES = ("bfloat16", "float16", "float32")
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")


class Call:
    """What every call offers; see :class:`Attention` and :class:`Relation`.

    Attributes:
        name: words that tell the call from all others.
        backward: whether gradients are asked for.
        aligned: whether every tile starts at a multiple of 16 bytes.
    """

    name: str
    backward: bool
    aligned: bool

    def tensors(self, filled: bool) -> dict[str, Tensor]:
        """The tensor arguments by name; untouched memory, which costs nothing however large, unless ``filled``."""
        raise NotImplementedError

    def loss(self, given: dict[str, Tensor]) -> Tensor:
        """The forward: a scalar."""
        raise NotImplementedError

    def floors(self) -> dict[str, int]:
        """The least bytes that each pass must move, read and written."""
        raise NotImplementedError

    def run(self) -> None:
        """Forward and, where asked for, backward, on untouched memory."""
        given = self.tensors(filled=False)
        loss = self.loss(given)
        if self.backward:
            gradients(loss, given)


def gradients(loss: Tensor, given: dict[str, Tensor]) -> None:
    import torch

    torch.autograd.grad(loss, [tensor for tensor in given.values() if tensor.requires_grad])


@dataclass(frozen=True)
class Attention(Call):
    """``attention_divergence`` (or ``attention_rows``, for rows of one model).

    Attributes:
        rows: number of query rows M; 0 means all N.
        keys: number of keys N.
        heads, dim: the student's heads H and head dim D.
        teacher_heads, teacher_dim: the teacher's, where they differ.
        mask: None, 'bool' [B, 1, 1, N] on both sides, 'full' [B, H, M, N] on both sides (boolean, every query its own keys),
            'additive' [1, H, M, N] with a gradient (the student's relative position bias) or 'biases' (both models').
        probs: the teacher comes as given rows.
        one_model: ``attention_rows`` of the student instead of a divergence.
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
    def name(self) -> str:  # type: ignore[override]
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
    def aligned(self) -> bool:  # type: ignore[override]
        """The tiles of a mask are not, for most N."""
        return self.mask is None or self.rows == 1

    def tensors(self, filled: bool) -> dict[str, Tensor]:
        """q and k are views of packed projections [B, N, 3, H, D], as timm's."""
        import torch

        dtype = getattr(torch, self.dtype)
        make: Any = torch.randn if filled else torch.empty
        rows = self.rows or self.keys

        def query_key(heads: int, dim: int, grad: bool) -> tuple[Tensor, Tensor]:
            qkv = make(self.batch, self.keys, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
            return qkv[0][:, :, :rows].requires_grad_(grad), qkv[1].requires_grad_(grad)

        given: dict[str, Tensor] = {}
        given["student_query"], given["student_key"] = query_key(self.heads, self.dim, self.backward)
        if self.one_model:
            return given
        if self.mask == "bool":
            visible = torch.ones(self.batch, 1, 1, self.keys, dtype=torch.bool)
            given["student_mask"], given["teacher_mask"] = visible, visible.clone()
        elif self.mask == "full":
            visible = torch.ones(self.batch, 1 if self.merge else self.heads, rows, self.keys, dtype=torch.bool)
            given["student_mask"], given["teacher_mask"] = visible, visible.clone()
        elif self.mask in ("additive", "biases"):
            bias = make(1, self.heads, rows, self.keys, dtype=dtype)
            given["student_mask"] = bias.requires_grad_(self.backward)
        if self.mask == "biases":
            given["teacher_mask"] = make(1, self.teacher_heads or self.heads, rows, self.keys, dtype=dtype)
        if self.probs:
            outer = self.heads if self.merge is None else 1
            logits = make(self.batch, outer, rows, self.keys)
            given["teacher_probs"] = logits.softmax(-1) if filled else logits
        else:
            heads, dim = self.teacher_heads or self.heads, self.teacher_dim or self.dim
            given["teacher_query"], given["teacher_key"] = query_key(heads, dim, False)
        return given

    def loss(self, given: dict[str, Tensor]) -> Tensor:
        from attnkd import attention_divergence, attention_rows

        if self.one_model:
            query, key = given["student_query"], given["student_key"]
            return attention_rows(query, key, merge=self.merge, impl="triton").square().sum()
        arguments: dict[str, Any] = {**given}
        return attention_divergence(**arguments, merge=self.merge, divergence=self.divergence, impl="triton")

    def floors(self) -> dict[str, int]:
        """The forward reads both models' queries, keys and masks (or the given rows) once and writes the loss.

        A few rows: with a gradient, the forward also writes the coefficient rows (of every head that has logits of its own)
        and the unit query gradient, both fp32. The backward reads those, the student's query and the upstream gradient (one
        number), and writes the gradients: it need not read a key. Whole maps keep no rows, so their backward reads all
        queries and keys once more. So does that of ``attention_rows``, whose upstream gradient has a value per key.
        """
        size = SIZES[self.dtype]
        B, H, M, N, D = self.batch, self.heads, self.rows or self.keys, self.keys, self.dim
        outer = 1 if self.merge else H
        student = B * H * (M + N) * D * size
        rows = B * (1 if self.merge == "logsum" else H) * M * N * 4
        bias = H * M * N * size if self.mask in ("additive", "biases") else 0  # and so much for its gradient
        theirs = (self.teacher_heads or H) * M * N * size
        boolean = {None: 0, "bool": 2 * B * N, "full": 2 * B * outer * M * N}
        masks = (boolean | {"additive": bias, "biases": bias + theirs})[self.mask]
        if self.one_model:
            return {"forward": student + rows, "backward": student + rows + student}
        teacher = B * (self.teacher_heads or H) * (M + N) * (self.teacher_dim or D) * size
        if self.probs:
            teacher = B * outer * M * N * 4
        forward = student + teacher + masks + B * outer * M * 4
        if not self.backward:
            return {"forward": forward}
        if self.rows == 0:
            return {"forward": forward, "backward": student + teacher + masks + 4 + student + bias}
        kept = rows + B * H * M * D * 4
        return {"forward": forward + kept, "backward": kept + B * H * M * D * size + 4 + student + bias}


@dataclass(frozen=True)
class Relation(Call):
    """``relation_row_loss`` of features [B, N, C] whose first token is the class token."""

    tokens: int
    channels: int
    teacher_channels: int
    dtype: str
    backward: bool = True
    batch: int = 32
    aligned: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"relation {self.channels} from {self.teacher_channels} B{self.batch} N{self.tokens} {self.dtype}"

    def tensors(self, filled: bool) -> dict[str, Tensor]:
        import torch

        dtype = getattr(torch, self.dtype)
        make: Any = torch.randn if filled else torch.empty
        student = make(self.batch, self.tokens, self.channels, dtype=dtype).requires_grad_(self.backward)
        teacher = make(self.batch, self.tokens, self.teacher_channels, dtype=dtype)
        return {"student_features": student, "teacher_features": teacher}

    def loss(self, given: dict[str, Tensor]) -> Tensor:
        from attnkd.relation.api import relation_row_loss

        return relation_row_loss(given["student_features"], given["teacher_features"], impl="triton")

    def floors(self) -> dict[str, int]:
        """Features read once and the loss; two fp32 numbers per patch kept for the backward, which writes one gradient."""
        size = SIZES[self.dtype]
        student = self.batch * self.tokens * self.channels * size
        teacher = self.batch * self.tokens * self.teacher_channels * size
        kept = self.batch * (2 * (self.tokens - 1) + 1) * 4
        return {"forward": student + teacher + self.batch * 4 + kept, "backward": student + kept + 4 + student}


def representative() -> list[Call]:
    """One call per kernel and form: what the tests compile."""
    return [
        Attention(1, 197, 6, 64, "bfloat16"),
        Attention(1, 197, 3, 80, "float32"),
        Attention(1, 1370, 12, 64, "bfloat16", teacher_dim=128),  # does not fit one tile: split form
        Attention(1, 197, 6, 64, "bfloat16", merge="logsum", teacher_heads=12),
        Attention(1, 197, 6, 64, "float16", merge="mean"),
        Attention(0, 197, 6, 64, "bfloat16", batch=4),
        Attention(0, 197, 6, 32, "bfloat16", batch=4, divergence="js", mask="additive"),  # the most registers
        Attention(0, 197, 6, 64, "bfloat16", batch=4, merge="mean", mask="bool"),
        Relation(197, 384, 768, "bfloat16"),
    ]


def everything() -> Iterator[Call]:
    """The full sweep: every divergence with every dtype and head dim, every merged width, and each other option once."""
    yield from representative()
    for dtype, dim in itertools.product(DTYPES, HEAD_DIMS):
        for divergence in DIVERGENCES:
            yield Attention(1, 197, 6, dim, dtype, divergence=divergence)
            yield Attention(0, 197, 6, dim, dtype, divergence=divergence, batch=4)
        yield Attention(1, 1370, 6, dim, dtype)
        yield Attention(1, 197, 6, dim, dtype, merge="mean")
    for dtype in DTYPES:
        for heads, dim in WIDE_HEADS:
            yield Attention(1, 197, heads, dim, dtype, merge="logsum")
            yield Attention(0, 197, heads, dim, dtype, merge="logsum", batch=4)
        for channels, teacher_channels in CHANNELS:
            yield Relation(197, channels, teacher_channels, dtype)
    row = Attention(1, 197, 6, 64, "bfloat16")
    whole = dataclasses.replace(row, rows=0, batch=4)
    for call in (row, whole):
        for mask in ("bool", "additive"):
            yield dataclasses.replace(call, mask=mask)
        yield dataclasses.replace(call, backward=False)
        yield dataclasses.replace(call, teacher_dim=128)
        yield dataclasses.replace(call, merge="logsum", teacher_heads=12)
    yield dataclasses.replace(whole, merge="mean", teacher_heads=12)
    yield from _crowded_maps()
    yield dataclasses.replace(row, rows=4)
    yield dataclasses.replace(row, probs=True)
    yield dataclasses.replace(row, merge="logsum", probs=True)
    for merge in ("max", "min"):
        yield dataclasses.replace(row, merge=merge, teacher_heads=12)
    yield dataclasses.replace(row, divergence="js", keys=1370)  # not one sweep: finished rows
    yield dataclasses.replace(row, one_model=True)
    yield dataclasses.replace(row, one_model=True, merge="logsum")
    yield Relation(197, 384, 768, "bfloat16", batch=1)  # few programs: the patches are split


def _crowded_maps() -> Iterator[Call]:
    """Whole maps with several options at once: the calls that need the most registers."""
    whole = Attention(0, 197, 6, 64, "bfloat16", batch=4)
    for dim in (32, 64, 128):
        yield dataclasses.replace(whole, dim=dim, divergence="js", mask="bool")
        for divergence, mask in itertools.product(("js", "mse"), ("full", "additive", "biases")):
            yield dataclasses.replace(whole, dim=dim, divergence=divergence, mask=mask)
    yield dataclasses.replace(whole, mask="biases")
    yield dataclasses.replace(whole, merge="mean", divergence="js")
    for dim, mask in itertools.product((32, 64), ("bool", "full", "biases")):
        yield dataclasses.replace(whole, dim=dim, merge="mean", divergence="js", mask=mask)
    single = dataclasses.replace(whole, dtype="float32")
    for mask in ("bool", "full", "additive", "biases"):
        yield dataclasses.replace(single, divergence="js", mask=mask)
    yield dataclasses.replace(single, divergence="mse", mask="additive")
    for mask in ("bool", "biases"):
        yield dataclasses.replace(single, merge="mean", divergence="js", mask=mask)
    for call, mask in itertools.product((whole, single), ("full", "additive", "biases")):
        yield dataclasses.replace(call, merge="logsum", divergence="js", mask=mask)


def metered() -> list[Call]:
    """Small calls, run element by element in the interpreter by the traffic report."""
    row = Attention(1, 197, 6, 64, "bfloat16", batch=2)
    wide = dataclasses.replace(row, merge="logsum", teacher_heads=12)
    whole = Attention(0, 197, 2, 64, "bfloat16", batch=1)
    return [
        row,
        dataclasses.replace(row, dim=80, dtype="float32"),
        dataclasses.replace(row, keys=577),
        dataclasses.replace(row, heads=3, keys=1370, teacher_dim=128),
        dataclasses.replace(row, rows=4),
        dataclasses.replace(row, mask="additive"),
        dataclasses.replace(row, probs=True),
        wide,
        dataclasses.replace(wide, keys=577),
        dataclasses.replace(wide, probs=True, teacher_heads=None),
        dataclasses.replace(row, merge="mean"),
        dataclasses.replace(row, divergence="js"),
        dataclasses.replace(row, divergence="js", keys=577),
        dataclasses.replace(row, backward=False),
        dataclasses.replace(row, one_model=True),
        Relation(197, 192, 384, "bfloat16", batch=2),
        whole,
        dataclasses.replace(whole, divergence="js"),
        dataclasses.replace(whole, merge="logsum"),
    ]
