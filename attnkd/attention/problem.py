"""One validated attention-divergence problem: what every implementation receives.

All checking of user input happens here, once, so that the kernels and the plain PyTorch implementations can trust
shapes, dtypes and devices. Dimensions: B batch, H heads, M query rows, N keys, D head dim; Ho = 1 when heads are merged,
else H.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnkd.attention.checks import check_choice, check_number, check_temperature, check_tensor, kind

MERGES = (None, "logsum", "mean", "max", "min")
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")
REDUCTIONS = ("none", "sum", "mean", "batchmean")

HIDDEN_BELOW = -1e30
"""An additive mask entry at or below this hides its key (−inf and every dtype's finfo.min except float16's)."""


class Side(NamedTuple):
    """The queries and keys of one model, or its finished rows.

    query: [B, H, M, D] and key: [B, H, N, D] with any strides, or both None when ``probs`` is given.
    mask: [B, H, M, N] expanded view (boolean, True = visible, or additive) or None.
    probs: [B, Ho, M, N] probabilities, or None.
    scale: multiplies the scores before mask and temperature.
    lse: [B, H, M], the logarithm of Σ_j exp(scale · q·k_j + mask_j), or None where nobody knows it or it is of no use: it is that of
        separate heads at temperature 1. It saves work and changes no result; :func:`check_lse` refuses a wrong one.
    """

    query: Tensor | None
    key: Tensor | None
    mask: Tensor | None
    scale: float
    probs: Tensor | None = None
    lse: Tensor | None = None

    @property
    def num_heads(self) -> int:
        tensor = self.probs if self.query is None else self.query
        assert tensor is not None
        return tensor.shape[1]


class Problem(NamedTuple):
    """A student and a teacher :class:`Side` that compare the same M rows over the same N keys."""

    student: Side
    teacher: Side
    merge: str | None
    divergence: str
    temperature: float

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        """(B, Ho, M): the shape of the per-row loss."""
        assert self.student.query is not None
        batch, heads, rows, _ = self.student.query.shape
        return batch, heads if self.merge is None else 1, rows

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss: float64 for a float64 student, else float32."""
        assert self.student.query is not None
        return torch.float64 if self.student.query.dtype == torch.float64 else torch.float32

    @property
    def num_keys(self) -> int:
        assert self.student.key is not None
        return self.student.key.shape[2]


def make_problem(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    teacher_probs: Tensor | None,
    student_scale: float | None,
    teacher_scale: float | None,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    merge: str | None,
    divergence: str,
    temperature: float,
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | None = None,
) -> Problem:
    """Check everything and return the problem; the teacher is detached.

    Raises:
        TypeError: an argument that is not a tensor, or has an unsupported dtype.
        ValueError: a wrong rank, shape, device or option; the message names the argument, what was expected and what came.
    """
    check_choice("merge", merge, MERGES)
    check_choice("divergence", divergence, DIVERGENCES)
    check_temperature(temperature)
    student = make_side("student", student_query, student_key, student_scale, student_mask, student_lse)
    batch, _, rows, _ = student_query.shape
    num_keys = student_key.shape[2]

    if teacher_probs is not None:
        beside = (teacher_query, teacher_key, teacher_scale, teacher_mask, teacher_lse)
        if any(x is not None for x in beside):
            raise ValueError(
                "teacher_probs: expected alone, got it together with teacher_query, teacher_key, teacher_scale, teacher_mask or "
                "teacher_lse; the rows of a teacher are given either as probabilities or as queries and keys"
            )
        if divergence == "logit_mse":
            raise ValueError("divergence: 'logit_mse' compares scores before the softmax, but teacher_probs has none")
        teacher = _detached(_probs_side(teacher_probs, student_query, student_key, merge))
    else:
        if teacher_query is None or teacher_key is None:
            raise ValueError(
                "teacher_query, teacher_key: expected both (or teacher_probs instead), got "
                f"teacher_query={kind(teacher_query)}, teacher_key={kind(teacher_key)}"
            )
        teacher = _detached(make_side("teacher", teacher_query, teacher_key, teacher_scale, teacher_mask, teacher_lse))
        _match("teacher_query", "batch size B", teacher_query.shape[0], batch, "student_query")
        if teacher_key.shape[2] != num_keys:
            raise ValueError(
                f"teacher_key: expected N = {num_keys} keys like student_key, got N = {teacher_key.shape[2]}; for another "
                "patch grid take the teacher's rows with attention_rows, resize them with resample_attention and pass them "
                "as teacher_probs; prefix tokens that only one model has must be left out of both"
            )
        _match("teacher_query", "number of query rows M", teacher_query.shape[2], rows, "student_query")
        if merge is None and teacher_query.shape[1] != student_query.shape[1]:
            raise ValueError(
                f"teacher_query: expected H = {student_query.shape[1]} heads like student_query, got H = "
                f"{teacher_query.shape[1]}; choose heads by slicing views, or merge them (merge='logsum')"
            )
    _check_devices(student, teacher)
    if merge is not None:
        _check_merged_masks(student, teacher)
        if divergence == "logit_mse" and merge != "logsum":
            raise ValueError(
                f"divergence: 'logit_mse' has no scores to compare after merge={merge!r}; use None or 'logsum'"
            )
    if merge is not None or temperature != 1 or divergence == "logit_mse":
        student, teacher = student._replace(lse=None), teacher._replace(lse=None)
    return Problem(student, teacher, merge, divergence, temperature)


def unchecked(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, student_scale: float,
    teacher_scale: float, merge: str | None, divergence: str, temperature: float,
) -> Problem:  # fmt: skip
    """The problem of queries and keys alone that :func:`make_problem` made of others of the same kind."""
    student = Side(student_query, student_key, None, student_scale)
    teacher = Side(_cut(teacher_query), _cut(teacher_key), None, teacher_scale)
    return Problem(student, teacher, merge, divergence, temperature)


def make_side(
    name: str, query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None, lse: Tensor | None = None
) -> Side:
    """Check one model's queries [B, H, M, D], keys [B, H, N, D], mask and normalisers [B, H, M]; ``name`` is 'student', 'teacher' or ''."""
    prefix = f"{name}_" if name else ""
    check_tensor(f"{prefix}query", query, 4, "[B, H, M, D]")
    check_tensor(f"{prefix}key", key, 4, "[B, H, N, D]")
    (batch, heads, rows, dim), (key_batch, key_heads, keys, key_dim) = query.shape, key.shape
    if (key_batch, key_heads, key_dim) != (batch, heads, dim):
        like = f"{prefix}query"
        _match(f"{prefix}key", "batch size B", key_batch, batch, like)
        _match(f"{prefix}key", "number of heads H", key_heads, heads, like)
        _match(f"{prefix}key", "head dim D", key_dim, dim, like)
    if key.dtype != query.dtype:
        raise TypeError(f"{prefix}key: expected dtype {query.dtype} like {prefix}query, got {key.dtype}")
    if key_dim == 0 or keys == 0 or key_heads == 0:
        what = "head dim D" if key_dim == 0 else "number of keys N" if keys == 0 else "number of heads H"
        raise ValueError(f"{prefix}key: expected a {what} of at least 1, got shape {tuple(key.shape)}")
    if scale is None:
        scale = dim**-0.5
    check_number(f"{prefix}scale", scale)
    if not -math.inf < scale < math.inf:  # not isfinite: under torch.compile a scale can be symbolic
        raise ValueError(f"{prefix}scale: expected a finite number, got {scale}")
    if mask is not None:
        mask = _expand_mask(f"{prefix}mask", mask, (batch, heads, rows, keys))
    if lse is not None:
        check_tensor(f"{prefix}lse", lse, 3, "[B, H, M]")
        if lse.dtype not in (torch.float32, torch.float64):  # half precision is off by percents
            raise TypeError(f"{prefix}lse: expected dtype float32 or float64, got {lse.dtype}")
        if tuple(lse.shape) != (batch, heads, rows):
            raise ValueError(
                f"{prefix}lse: expected [B, H, M] = {(batch, heads, rows)} like {prefix}query, got {tuple(lse.shape)}"
            )
        lse = lse.detach()
    return Side(query, key, mask, scale, lse=lse)


def _detached(side: Side) -> Side:
    """The teacher gets no gradient."""
    query, key, mask, scale, probs, lse = side
    return Side(_cut(query), _cut(key), _cut(mask), scale, _cut(probs), lse)


def _cut(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def stored_mask(mask: Tensor) -> Tensor:
    """A mask without its broadcast dimensions: size 1 where the expanded view [B, H, M, N] repeats itself."""
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if size > 1 and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.detach()


def _expand_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor that broadcasts to [B, H, M, N], got {kind(mask)}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{name}: expected bool (True = visible) or an additive floating point mask, got {mask.dtype}")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [B, H, M, N] = {shape}, got {tuple(mask.shape)}"
        ) from None


def _probs_side(probs: Tensor, query: Tensor, key: Tensor, merge: str | None) -> Side:
    check_tensor("teacher_probs", probs, 4, "[B, H, M, N], or [B, 1, M, N] with a merge")
    expected = (query.shape[0], query.shape[1] if merge is None else 1, query.shape[2], key.shape[2])
    if tuple(probs.shape) != expected:
        hint = "" if merge is None else "; merge the teacher's heads first with merge_attention"
        raise ValueError(
            f"teacher_probs: expected shape {expected} for merge={merge!r}, got {tuple(probs.shape)}{hint}"
        )
    return Side(None, None, None, 1.0, probs)


def _match(name: str, dim: str, got: int, expected: int, like: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected {dim} = {expected} like {like}, got {got}")


def _check_devices(student: Side, teacher: Side) -> None:
    assert student.query is not None
    device = student.query.device
    for side, name, tensor in (
        ("student", "key", student.key),
        ("student", "mask", student.mask),
        ("student", "lse", student.lse),
        ("teacher", "query", teacher.query),
        ("teacher", "key", teacher.key),
        ("teacher", "mask", teacher.mask),
        ("teacher", "lse", teacher.lse),
        ("teacher", "probs", teacher.probs),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{side}_{name}: expected device {device} like student_query, got {tensor.device}")


def _check_merged_masks(student: Side, teacher: Side) -> None:
    """Merged heads form one distribution: every head must see the same keys, and both models the same set."""
    boolean = {}
    for name, side in (("student", student), ("teacher", teacher)):
        mask = side.mask
        boolean[name] = mask is not None and mask.dtype == torch.bool
        if boolean[name] and mask is not None and mask.shape[1] > 1 and mask.stride(1) != 0:
            raise ValueError(
                f"{name}_mask: expected one boolean mask for all heads (a size of 1 in dimension H) when heads are merged, "
                f"got H = {mask.shape[1]}"
            )
    if boolean["student"] != boolean["teacher"] and teacher.probs is None:
        missing = "teacher" if boolean["student"] else "student"
        raise ValueError(
            f"{missing}_mask: expected a boolean mask on both sides when heads are merged (the merged rows must cover the "
            f"same keys), got none for the {missing}"
        )
