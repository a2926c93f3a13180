"""MiniLM and MiniLMv2: a student learns how the queries, the keys and the values of a teacher's attention relate to each other.

Wang, Wei, Dong, Bao, Yang, Zhou: MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers, NeurIPS 2020 (arXiv:2002.10957), the value relation. Wang, Bao, Huang, Dong, Wei: MiniLMv2: Multi-Head
Self-Attention Relation Distillation for Compressing Pretrained Transformers, Findings of ACL 2021 (arXiv:2012.15828), section 3:
all relations, and relation heads. The formulas: docs/methods/minilm.md.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.call import AttentionCall
from attnkd.attention.checks import check_choice, integer
from attnkd.attention.resample import MODES as RESAMPLE_MODES
from attnkd.capture.blocks import Blocks
from attnkd.capture.models import resolve_model
from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import padding, token_layout
from attnkd.methods.schedule import Schedule
from attnkd.methods.student_teacher import FrozenTeacher, TappedStudent
from attnkd.methods.task import DistillTask, build_student, check_numbers, check_pair, check_student
from attnkd.methods.whole_map import compared_maps, num_heads, whole_map_divergence

_logger = logging.getLogger(__name__)

RELATIONS = tuple(rows + keys for rows, keys in itertools.product("qkv", repeat=2))
"""'qq', 'qk', ... 'vv': what the rows and what the keys of a relation are, queries, keys or values."""
_FIELDS = {"q": "query", "k": "key", "v": "value"}


def relation(call: AttentionCall, name: str, heads: int | None = None) -> AttentionCall:
    """A self-attention relation as the call of an attention: its map is softmax(A_i · A_jᵀ / √d), one a relation head.

    :func:`attnkd.attention_divergence` compares two of them, and stores no map. Nothing is copied where the heads of the attention lie
    side by side in memory, as the projections put them out. Padding that the attention's mask hides from all rows stays hidden; a
    position bias or window of the attention has no part in a relation.

    Args:
        call: of a self-attention, whole; with its values (``AttentionTap(values=True)``) for a relation that has a 'v'.
        name: one of :data:`RELATIONS`.
        heads: R, the number of relation heads: the attention's heads one after the other are a vector of width H·D a token, which is cut
            in R parts of d = H·D / R channels. None: the attention's own heads.

    Returns:
        query and key [B, R, N, d], and ``mask`` [B or 1, 1, 1, N] (True = visible) where the attention has one.

    Raises:
        ValueError: no such relation, no values, not one row a key, heads that do not divide the width, or two of different widths.
    """
    check_choice("name", name, RELATIONS)
    if call.query.shape[2] != call.key.shape[2]:
        raise ValueError(
            f"call: relations are between the tokens of a self-attention, but this one has {call.query.shape[2]} rows over "
            f"{call.key.shape[2]} keys"
        )
    found = {letter: _regrouped(getattr(call, _FIELDS[letter]), _FIELDS[letter], heads) for letter in set(name)}
    rows, keys = (found[letter] for letter in name)
    if rows.shape != keys.shape:
        raise ValueError(
            f"name: {name!r} relates vectors of one width, got {tuple(rows.shape)} and {tuple(keys.shape)} [B, R, N, d]"
        )
    padded = padding(call.mask, rows.shape[2])
    mask = None if padded is None else ~padded[:, None, None]
    return AttentionCall(rows, keys, mask, rows.shape[3] ** -0.5, call.num_prefix_tokens, call.has_cls, call.grid)


class MiniLM(DistillTask):
    """The MiniLM training task: loss = relation_weight · Σ over relations of their loss [+ task_loss_weight · criterion].

    The loss of a relation is the mean over images, relation heads and tokens of KL(teacher ‖ student) of its rows. Text encoders and
    Vision Transformers; padding, registers and distillation tokens are left out. Student and teacher may differ in width, depth and
    number of heads.

    Args:
        student: a text encoder, a Vision Transformer, or a timm name (built from scratch; with ``num_classes`` for a ``criterion``).
        teacher: the same, pretrained; by timm name it is built with its pretrained weights. It is frozen in place.
        blocks: of the student: index, sequence of indices, 'all', or module paths. The papers compare the last one alone; with several
            the loss is their mean.
        teacher_blocks: the teacher block for each student block. None: the last for the last. MiniLMv2 takes one from the upper middle of
            a large teacher.
        relations: which, of :data:`RELATIONS`. ('qq', 'kk', 'vv') is MiniLMv2, ('qk', 'vv') MiniLM.
        relation_heads: R, see :func:`relation`; it divides the width of the queries of both. None: the teacher's number of heads.
        relation_weight: of the relations; a number or a :class:`attnkd.methods.schedule.Schedule`.
        criterion: loss of (student output, targets); None (the papers: before any task) trains without labels, and neither model runs
            past its last compared attention.
        task_loss_weight: weight of ``criterion``.
        num_classes: of a student given by name.
        resample_mode: 'bicubic', 'bilinear' or 'area': how the relations of a teacher with another patch grid are resized to the student's,
            as maps are (:mod:`attnkd.attention.resampled_maps`); None refuses such a teacher.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: it gets them as they are.
        impl: see :func:`attnkd.attention_divergence`.
        device, dtype: as in ``timm.task.TrainingTask``; the student's when None.
        verbose: log the pairing.

    Raises:
        TypeError, ValueError: options out of range, models that see other tokens.
        NotImplementedError: attention that cannot be captured, see :class:`attnkd.AttentionTap`.

    Example::

        task = MiniLM(student, teacher, relation_heads=48)      # two BERTs
        task(tokenizer(sentences, padding=True, return_tensors="pt"))["loss"].backward()
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        *,
        blocks: Blocks = -1,
        teacher_blocks: Blocks | None = None,
        relations: Sequence[str] = ("qq", "kk", "vv"),
        relation_heads: int | None = None,
        relation_weight: float | Schedule = 1.0,
        criterion: nn.Module | None = None,
        task_loss_weight: float | Schedule = 1.0,
        num_classes: int | None = None,
        resample_mode: str | None = "bicubic",
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        chosen = [relations] if isinstance(relations, str) else list(relations)
        for name in chosen:
            check_choice("relations", name, RELATIONS)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"relations: expected one or more, every one once, got {relations!r}")
        check_choice("resample_mode", resample_mode, (None, *RESAMPLE_MODES))
        heads = integer(relation_heads)
        if relation_heads is not None and (heads is None or heads < 1):
            raise ValueError(f"relation_heads: expected None or an integer >= 1, got {relation_heads!r}")
        student = build_student(student, criterion, num_classes)
        teacher = resolve_model(teacher, pretrained=True)
        check_pair(student, "teacher", teacher, text=True)
        check_student(student, criterion, impl, device, dtype)
        weights = {"relation_weight": relation_weight, "task_loss_weight": task_loss_weight}
        schedules = check_numbers(weights, one_of=["relation_weight"])
        student_paths, teacher_paths, pairs = pair_blocks(student, teacher, blocks, teacher_blocks)
        values = any("v" in name for name in chosen)
        student_tap = AttentionTap(student, student_paths, stop=criterion is None, values=values)
        teacher_tap = AttentionTap(teacher, teacher_paths, stop=True, values=values)
        counts = [num_heads(teacher, teacher_paths[t]) if heads is None else heads for _, t in pairs]
        super().__init__(
            RelatedStudent(student_tap, chosen, counts, train_head=criterion is not None),
            {"teacher": FrozenTeacher(teacher_tap, input_norm)},
            criterion=criterion,
            schedules=schedules,
            impl=impl,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.relations, self.pairs, self.resample_mode = chosen, pairs, resample_mode
        self.relation_heads = counts
        self.layouts = token_layout(student), token_layout(teacher)
        if verbose:
            for (s, t), count in zip(pairs, counts, strict=True):
                _logger.info(f"MiniLM: {student_paths[s]} <- {teacher_paths[t]}, {chosen} of {count} relation heads")

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student; for text encoders what their tokenizer gives, a dictionary with
                input_ids [B, L] and attention_mask [B, L].
            targets: what ``criterion`` takes; unused without one.

        Returns:
            loss: what to call backward on. relation_loss: Σ of the relations, and each of them under its name (qq_loss, ...), absent
            while the weight is 0, and then the teacher does not run. task_loss and output [B, classes] with ``criterion``.

        Raises:
            ValueError: inputs of another kind than the models take, missing targets, relation heads that do not divide a width.
        """
        self.check_inputs(images, targets)
        output, found = self.run_student(images)
        result: dict[str, Tensor] = {}
        parts = []
        if weight := self.schedules["relation_weight"]:
            _, calls, _ = self.teachers["teacher"](images)
            wanted = [
                _relations("teacher", calls[t], self.relations, heads)
                for (_, t), heads in zip(self.pairs, self.relation_heads, strict=True)
            ]
            for name in self.relations:
                losses = [
                    self._loss(student[name], teacher[name]) for student, teacher in zip(found, wanted, strict=True)
                ]
                result[f"{name}_loss"] = torch.stack(losses).mean()
            result["relation_loss"] = torch.stack(list(result.values())).sum()
            parts.append((weight, result["relation_loss"]))
        if self.criterion is not None:
            result["task_loss"] = self.criterion(output, targets)
            parts.append((self.schedules["task_loss_weight"], result["task_loss"]))
            assert output is not None
            result["output"] = output
        return {"loss": self.total(parts), **result}

    def _loss(self, student: AttentionCall, teacher: AttentionCall) -> Tensor:
        heads = tuple(range(student.query.shape[1]))
        maps = compared_maps(student, teacher, self.layouts, heads, heads, self.resample_mode)
        return whole_map_divergence(*maps, resample_mode=self.resample_mode, impl=self.impl)


class RelatedStudent(TappedStudent):
    """A tapped student that gives its relations: under DistributedDataParallel what is not compared must not be among the outputs.

    Args:
        tap: the student's tap.
        relations: names, see :func:`relation`.
        heads: the number of relation heads in each of its attentions.
        train_head: whether a loss uses the head's output.
    """

    def __init__(self, tap: AttentionTap, relations: Sequence[str], heads: Sequence[int], train_head: bool) -> None:
        super().__init__(tap, train_head=train_head)
        self.relations, self.heads = relations, heads

    def forward(self, images: Tensor) -> tuple[Tensor | None, list[dict[str, AttentionCall]]]:  # type: ignore[override]
        """images [B, C, H, W] or text → head output (None if it is not computed), and the relations of each attention by name."""
        output, _, calls, *_ = super().forward(images)
        return output, [
            _relations("student", call, self.relations, heads) for call, heads in zip(calls, self.heads, strict=True)
        ]


def _relations(role: str, call: AttentionCall, names: Sequence[str], heads: int) -> dict[str, AttentionCall]:
    try:
        return {name: relation(call, name, heads) for name in names}
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from None


def _regrouped(vectors: Any, field: str, heads: int | None) -> Tensor:
    """[B, H, N, D] → [B, R, N, H·D / R]."""
    if vectors is None:
        raise ValueError("call: has no values; capture it with AttentionTap(model, blocks, values=True)")
    batch, own, tokens, dim = vectors.shape
    if heads is None or heads == own:
        return vectors
    if heads < 1 or own * dim % heads:
        raise ValueError(
            f"relation_heads: expected a divisor of {own * dim}, the width of all heads' {field} together, got {heads}"
        )
    return vectors.transpose(1, 2).reshape(batch, tokens, heads, own * dim // heads).transpose(1, 2)
