"""One description of a call of the public API: its tensors, its results, what they should be, and the least work they take.

The gate compiles what a call launches, ``traffic`` counts its bytes, ``run`` judges and times it, and the tests do all of that.
A call is small, frozen and picklable. Running it launches exactly the kernels, with exactly the arguments, that a user's call would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.shapes import Shape

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")


@dataclass(frozen=True)
class Call:
    """What every call offers; see :class:`Attention`, :class:`Relation` and :class:`Block`.

    Attributes:
        name: words that tell the call from all others.
        aligned: whether every tile starts at a multiple of 16 bytes.
        backward: whether gradients are asked for.
        batch: number of images B.
        scale: size of the numbers whose difference a loss is, in the loss's units; 0 where it is no such difference.
    """

    name = ""
    aligned = True
    backward = True
    batch = 32
    dtype = "bfloat16"
    scale = 0.0

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        """The tensor arguments by name, of standard deviation 1; those that get a gradient require it.

        ``filled`` False: untouched memory, which costs nothing however large.
        """
        raise NotImplementedError

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        """What the package returns: a loss as its batch mean, []; rows and attention outputs as they are, of 4 dimensions."""
        raise NotImplementedError

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        """The reference's results, computed in ``precision``: losses of every row, [B, Ho, M], or image, [B], not their sum."""
        raise NotImplementedError

    def floors(self) -> dict[str, int]:
        """The least bytes that each pass ('forward', 'backward') must move, read and written."""
        raise NotImplementedError

    def flops(self) -> dict[str, int]:
        """Arithmetic operations of the products of each pass, none computed twice."""
        raise NotImplementedError

    def at(self, shape: Shape, dtype: torch.dtype) -> Call:
        """The same call at the sizes of a model's block."""
        raise NotImplementedError

    def run(self) -> None:
        """Forward and, where asked for, backward, on untouched memory."""
        given = self.tensors(filled=False)
        results = self.results(given)
        if self.backward:
            gradients(results, given)


def gradients(
    results: Sequence[Tensor], given: dict[str, Tensor], upstream: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the tensors that require one; ``upstream`` (default: ones) belongs to the results that need one."""
    needed = [result for result in results if result.requires_grad]
    upstream = [torch.ones_like(result) for result in needed] if upstream is None else upstream
    return torch.autograd.grad(needed, [tensor for tensor in given.values() if tensor.requires_grad], upstream)


class _Maker:
    """Makes a call's tensors, random or untouched."""

    def __init__(self, call: Call, device: torch.device | str, seed: int, filled: bool) -> None:
        self.dtype = getattr(torch, call.dtype)
        self.device, self.filled = device, filled
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        options: dict[str, Any] = {"dtype": dtype or self.dtype, "device": self.device}
        return torch.randn(shape, generator=self.generator, **options) if self.filled else torch.empty(shape, **options)

    def packed(self, batch: int, tokens: int, heads: int, dim: int) -> tuple[Tensor, ...]:
        """q, k and v, [B, H, N, D]: views of one packed projection [B, N, 3, H, D], as timm's."""
        return self(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)


@torch.no_grad()
def _lse(query: Tensor, key: Tensor, filled: bool) -> Tensor:
    """[B, H, M] fp32: the normalisers of queries and keys at the usual scale."""
    if not filled:
        return query.new_empty(query.shape[:3], dtype=torch.float32)
    z = query.float() @ key.float().mT * query.shape[3] ** -0.5
    return z.logsumexp(-1)


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
        known: both models' LSEs are given, as their own attention computes them.
    """

    rows: int = 1
    keys: int = 197
    heads: int = 6
    dim: int = 64
    dtype: str = "bfloat16"
    merge: str | None = None
    divergence: str = "forward_kl"
    temperature: float = 1.0
    teacher_heads: int | None = None
    teacher_dim: int | None = None
    mask: str | None = None
    probs: bool = False
    one_model: bool = False
    known: bool = False
    backward: bool = True
    batch: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        words = ["rows of one model" if self.one_model else "map" if self.rows == 0 else "row"]
        words += [str(self.rows)] if self.rows > 1 else []
        words += [self.merge] if self.merge else []
        words += [self.divergence] if self.divergence != "forward_kl" else []
        words += [f"T{self.temperature:g}"] if self.temperature != 1.0 else []
        words += [f"{self.heads}x{self.dim}"]
        if self.teacher_heads or self.teacher_dim:
            words += [f"from {self.teacher_heads or self.heads}x{self.teacher_dim or self.dim}"]
        words += ["given rows"] if self.probs else []
        words += ["known LSEs"] if self.known else []
        words += [f"{self.mask} mask"] if self.mask else []
        words += [f"N{self.keys}", self.dtype]
        words += [] if self.backward else ["no grad"]
        return " ".join(words)

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        """The tiles of a mask are not, for most N."""
        return self.mask is None or self.rows == 1

    @property
    def scale(self) -> float:  # type: ignore[override]
        """A row's loss is a difference of logarithms of order one."""
        outer, rows = 1 if self.merge else self.heads, self.rows or self.keys
        return 0.0 if self.one_model or self.divergence in ("mse", "logit_mse") else float(outer * rows)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        return {"merge": self.merge, "divergence": self.divergence, "temperature": self.temperature}

    def at(self, shape: Shape, dtype: torch.dtype) -> Attention:
        teacher_heads = shape.teacher_heads if self.merge and not (self.one_model or self.probs) else None
        sizes = {"keys": shape.tokens, "heads": shape.heads, "dim": shape.head_dim, "batch": shape.batch}
        return replace(self, **sizes, teacher_heads=teacher_heads, dtype=str(dtype)[6:])

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        make = _Maker(self, device, seed, filled)
        rows = self.rows or self.keys
        query, key, _ = make.packed(self.batch, self.keys, self.heads, self.dim)
        given = {
            "student_query": query[:, :, :rows].requires_grad_(self.backward),
            "student_key": key.requires_grad_(self.backward),
        }
        if self.one_model:
            return given
        outer = 1 if self.merge else self.heads
        if self.mask in ("bool", "full"):
            size = (1, 1, self.keys) if self.mask == "bool" else (outer, rows, self.keys)
            visible = torch.ones(self.batch, *size, dtype=torch.bool, device=device)
            given["student_mask"], given["teacher_mask"] = visible, visible.clone()
        elif self.mask:
            given["student_mask"] = make(1, self.heads, rows, self.keys).requires_grad_(self.backward)
        if self.mask == "biases":
            given["teacher_mask"] = make(1, self.teacher_heads or self.heads, rows, self.keys)
        if self.probs:
            logits = make(self.batch, outer, rows, self.keys, dtype=torch.float32)
            given["teacher_probs"] = logits.softmax(-1) if filled else logits
        else:
            packed = make.packed(self.batch, self.keys, self.teacher_heads or self.heads, self.teacher_dim or self.dim)
            given["teacher_query"], given["teacher_key"] = packed[0][:, :, :rows], packed[1]
        for side in ("student", "teacher") if self.known else ():
            given[f"{side}_lse"] = _lse(given[f"{side}_query"], given[f"{side}_key"], filled)
        return given

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        import attnkd

        arguments: dict[str, Any] = {**given, "impl": impl}
        if self.one_model:
            query, key = arguments.pop("student_query"), arguments.pop("student_key")
            return (attnkd.attention_rows(query, key, merge=self.merge, temperature=self.temperature, impl=impl),)
        return (attnkd.attention_divergence(**arguments, **self.options, reduction="batchmean"),)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        from attnkd.testing import proof

        return ((proof.probabilities if self.one_model else proof.per_row)({**given, **self.options}, precision),)

    def floors(self) -> dict[str, int]:
        """The forward reads both models' queries, keys and masks (or the given rows) once and writes the loss.

        A few rows: with a gradient, the forward also writes the coefficient rows (of every head that has logits of its own)
        and the unit query gradient, both fp32. The backward reads those, the student's query and the upstream gradient (one
        number), and writes the gradients: it need not read a key. Whole maps keep no rows, so their backward reads all
        queries and keys once more; their forward writes the unit query gradient where it knows it (map/value.py). The backward of
        ``attention_rows``, whose upstream gradient has a value per key, reads all queries and keys too.
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
        forward = student + teacher + masks + B * outer * M * 4 + (2 * B * H * M * 4 if self.known else 0)
        if not self.backward:
            return {"forward": forward}
        if self.rows == 0:
            known = self.merge is None and D <= 128 and self.divergence in ("forward_kl", "cross_entropy", "logit_mse")
            unit = B * H * M * D * size if known else 0
            return {"forward": forward + unit, "backward": student + teacher + masks + 4 + unit + student + bias}
        kept = rows + B * H * M * D * 4
        return {"forward": forward + kept, "backward": kept + B * H * M * D * size + 4 + student + bias}

    def flops(self) -> dict[str, int]:
        pairs = 2 * self.batch * (self.rows or self.keys) * self.keys
        student = pairs * self.heads * self.dim
        teacher = pairs * (self.teacher_heads or self.heads) * (self.teacher_dim or self.dim)
        return {"forward": student + (0 if self.probs or self.one_model else teacher), "backward": 2 * student}


@dataclass(frozen=True)
class Block(Attention):
    """Attention outputs of both models and the divergence: what a block computes when it is distilled."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"attention and {super().name}"

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        """All queries, and the values too; ``rows`` of them are compared."""
        make = _Maker(self, device, seed, filled)
        given = {}
        for side, grad in (("student", self.backward), ("teacher", False)):
            packed = make.packed(self.batch, self.keys, self.heads, self.dim)
            for what, tensor in zip(("query", "key", "value"), packed, strict=True):
                given[f"{side}_{what}"] = tensor.requires_grad_(grad)
        return given

    def _compared(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = slice(self.rows or self.keys)
        return {n: x[:, :, rows] if "query" in n else x for n, x in given.items() if "value" not in n}

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        outputs = (_attend(given, side) for side in ("student", "teacher"))
        return *outputs, *super().results(self._compared(given), impl)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        outputs = (_attended(given, side, precision) for side in ("student", "teacher"))
        return *outputs, *super().reference(self._compared(given), precision)

    def floors(self) -> dict[str, int]:
        """q, k, v and the output of both; then q, k, v, the output and the gradients of all four of the student, and for all
        rows the teacher's q and k once more."""
        one = self.batch * self.heads * self.keys * self.dim * SIZES[self.dtype]
        return {"forward": 8 * one, "backward": (8 if self.rows == 1 else 10) * one}

    def flops(self) -> dict[str, int]:
        product = 2 * self.batch * self.heads * self.keys**2 * self.dim
        return {"forward": 4 * product, "backward": 4 * product}


@dataclass(frozen=True)
class Alone(Block):
    """The student's attention output alone, which every loss runs beside: what a loss is small or large against."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"attention alone {self.heads}x{self.dim} N{self.keys} {self.dtype}"

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        return {n: x for n, x in super().tensors(device, seed, filled).items() if n.startswith("student")}

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        return (_attend(given, "student"),)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        return (_attended(given, "student", precision),)

    def floors(self) -> dict[str, int]:
        one = self.batch * self.heads * self.keys * self.dim * SIZES[self.dtype]
        return {"forward": 4 * one, "backward": 8 * one}

    def flops(self) -> dict[str, int]:
        product = 2 * self.batch * self.heads * self.keys**2 * self.dim
        return {"forward": 2 * product, "backward": 4 * product}


def _attend(given: dict[str, Tensor], side: str) -> Tensor:
    inputs = (given[f"{side}_{what}"] for what in ("query", "key", "value"))
    return torch.nn.functional.scaled_dot_product_attention(*inputs)


def _attended(given: dict[str, Tensor], side: str, precision: torch.dtype) -> Tensor:
    """The same, by stored maps."""
    from attnkd.testing import proof

    one = {"student_query": given[f"{side}_query"], "student_key": given[f"{side}_key"]}
    return proof.probabilities(one, precision) @ given[f"{side}_value"].to(precision)


@dataclass(frozen=True)
class OnePass(Attention):
    """``attention_with_divergence`` of a packed student, all rows. Divergence 'none': the same kernels as a plain attention.

    mask: None or 'bool'; with others the divergence is computed beside PyTorch's attention. known: the teacher's LSE is given.
    """

    rows: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"one pass {super().name}"

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        loose = super().tensors(device, seed, filled)
        make = _Maker(self, device, seed, filled)
        given = {"qkv": make(self.batch, self.keys, 3, self.heads, self.dim).requires_grad_(self.backward)}
        beside = (
            "student_mask",
            *(["teacher_query", "teacher_key", "teacher_mask", "teacher_lse"] if self.divergence != "none" else []),
        )
        return given | {name: loose[name].detach() for name in beside if name in loose}

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        from attnkd import AttentionCall, attention_with_divergence

        mask = given.get("student_mask")
        if self.divergence == "none":
            return (_plain_attention(given["qkv"], mask),)
        scale = (self.teacher_dim or self.dim) ** -0.5
        teacher = AttentionCall(
            given["teacher_query"], given["teacher_key"], given.get("teacher_mask"), scale, lse=given.get("teacher_lse")
        )
        options = {**self.options, "reduction": "batchmean", "impl": impl}
        return attention_with_divergence(given["qkv"], teacher=teacher, mask=mask, **options)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        from attnkd.testing import proof

        query, key, value = given["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
        student = {"student_query": query, "student_key": key, "student_mask": given.get("student_mask")}
        output = proof.probabilities(student, precision) @ value.to(precision)
        if self.divergence == "none":
            return (output,)
        teacher = {name: tensor for name, tensor in given.items() if name.startswith("teacher")}
        return output, proof.per_row({**student, **teacher, **self.options}, precision)

    def floors(self) -> dict[str, int]:
        """The forward reads q, k, v and the teacher's q and k once, and writes output, loss and the student's normalisers. The backward
        reads all of them but the loss, and the output's gradient, and writes one packed gradient."""
        size = SIZES[self.dtype]
        one = self.batch * self.heads * self.keys * self.dim * size
        rows = self.batch * self.heads * self.keys * 4
        teacher = 0
        if self.divergence != "none":
            teacher = 2 * self.batch * self.heads * self.keys * (self.teacher_dim or self.dim) * size
        forward = 3 * one + teacher + one + rows + (rows if teacher else 0) + (rows if self.known else 0)
        if not self.backward:
            return {"forward": forward}
        return {"forward": forward, "backward": 3 * one + teacher + 2 * one + rows + (4 if teacher else 0) + 3 * one}

    def flops(self) -> dict[str, int]:
        """Products computed once: scores and output; dP, dq, dk and dv."""
        product = 2 * self.batch * self.heads * self.keys**2 * self.dim
        theirs = 0 if self.divergence == "none" else product * (self.teacher_dim or self.dim) // self.dim
        return {"forward": 2 * product + theirs, "backward": 4 * product}


@dataclass(frozen=True)
class ClassRow(Block):
    """``attention_with_divergence`` of the class token's row: PyTorch's attention, and beside it the row, whose gradients are added into
    the attention's. Floors and products are those of our kernels alone."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"beside {Attention.name.fget(self)}"  # type: ignore[attr-defined]

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        """Three student leaves, and the teacher's class-token query and keys."""
        given = super().tensors(device, seed, filled)
        given.pop("teacher_value")
        return given | {"teacher_query": given["teacher_query"][:, :, :1]}

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        from attnkd import AttentionCall, attention_with_divergence

        teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, self.dim**-0.5)
        student = AttentionCall(given["student_query"], given["student_key"], None, self.dim**-0.5)
        options = {**self.options, "rows": "cls", "reduction": "batchmean", "impl": impl}
        # As in a model, the gradients go on to whatever made the three.
        student = student._replace(query=student.query * 1.0, key=student.key * 1.0)
        return attention_with_divergence(student, value=given["student_value"] * 1.0, teacher=teacher, **options)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        return _attended(given, "student", precision), *Attention.reference(self, self._compared(given), precision)

    def floors(self) -> dict[str, int]:
        """The forward is a row's. The backward reads what it left and one query, and reads and writes the attention's gradients of that
        query and of all keys."""
        row = Attention.floors(self)
        added = 2 * self.batch * self.heads * (1 + self.keys) * self.dim * SIZES[self.dtype]
        if not self.backward:
            return row
        written = self.batch * self.heads * (1 + self.keys) * self.dim * SIZES[self.dtype]
        return {"forward": row["forward"], "backward": row["backward"] - written + added}

    def flops(self) -> dict[str, int]:
        return Attention.flops(self)


def _plain_attention(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """The output [B, H, N, D] of the one pass's kernels without a divergence."""
    from attnkd.attention import fused_attention
    from attnkd.attention.problem import Problem, make_side

    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    side = make_side("", query, key, None, mask)
    return fused_attention.attend([qkv], Problem(side, side, None, "none", 1.0))[0]


@dataclass(frozen=True)
class Relation(Call):
    """``relation_row_loss`` of features [B, N, C] whose first token is the class token."""

    tokens: int = 197
    channels: int = 384
    teacher_channels: int = 768
    dtype: str = "bfloat16"
    backward: bool = True
    batch: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"relation {self.channels} from {self.teacher_channels} B{self.batch} N{self.tokens} {self.dtype}"

    def at(self, shape: Shape, dtype: torch.dtype) -> Relation:
        channels, teacher_channels = shape.heads * shape.head_dim, shape.teacher_heads * shape.head_dim
        return Relation(shape.tokens, channels, teacher_channels, str(dtype)[6:], self.backward, shape.batch)

    def tensors(self, device: torch.device | str = "cpu", seed: int = 0, filled: bool = True) -> dict[str, Tensor]:
        make = _Maker(self, device, seed, filled)
        student = make(self.batch, self.tokens, self.channels).requires_grad_(self.backward)
        return {"student_features": student, "teacher_features": make(self.batch, self.tokens, self.teacher_channels)}

    def results(self, given: dict[str, Tensor], impl: str = "triton") -> tuple[Tensor, ...]:
        from attnkd.relation.api import relation_row_loss

        return (relation_row_loss(**given, impl=impl),)

    def reference(self, given: dict[str, Tensor], precision: torch.dtype) -> tuple[Tensor, ...]:
        from attnkd.testing import proof

        return (proof.per_image(given, precision),)

    def floors(self) -> dict[str, int]:
        """Features read once and the loss; two fp32 numbers per patch kept for the backward, which writes one gradient."""
        size = SIZES[self.dtype]
        student = self.batch * self.tokens * self.channels * size
        teacher = self.batch * self.tokens * self.teacher_channels * size
        kept = self.batch * (2 * (self.tokens - 1) + 1) * 4
        return {"forward": student + teacher + self.batch * 4 + kept, "backward": student + kept + 4 + student}

    def flops(self) -> dict[str, int]:
        """A norm and a product with the class token on each side."""
        student, teacher = (self.batch * self.tokens * channels for channels in (self.channels, self.teacher_channels))
        return {"forward": 4 * (student + teacher), "backward": 8 * student}
