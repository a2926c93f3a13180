"""Head-specific knowledge distillation: chosen attention heads of a student learn the maps of chosen teacher heads.

The formulas, the choice of heads and blocks, and the weights: docs/methods/head_kd.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.call import AttentionCall, take_heads
from attnkd.attention.checks import check_choice
from attnkd.attention.problem import DIVERGENCES
from attnkd.attention.resample import MODES as RESAMPLE_MODES
from attnkd.capture.adapters import adapter_for
from attnkd.capture.adapters.text import is_text
from attnkd.capture.blocks import Blocks
from attnkd.capture.models import num_classes, resolve_model
from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tap import AttentionTap, Wanted
from attnkd.capture.tokens import filled_in, token_layout
from attnkd.methods.attention_transfer import attention_transfer_loss, blocks_of
from attnkd.methods.hard_labels import (
    LABEL_WEIGHT,
    class_losses,
    frozen_label_teacher,
    resolve_label_teacher,
    two_scores,
)
from attnkd.methods.logits import KD_TEMPERATURE, check_classes, kd_loss
from attnkd.methods.schedule import Schedule
from attnkd.methods.student_teacher import FrozenTeacher, TappedStudent
from attnkd.methods.task import DistillTask, build_student, check_numbers, check_pair, check_student
from attnkd.methods.whole_map import Heads, check_heads, compared_maps, map_rows, num_heads, whole_map_divergence

_logger = logging.getLogger(__name__)

MODES = ("head_to_head", "block_to_block", "encoder_to_encoder")

ALPHAS: dict[str, tuple[float, ...]] = {"logit_mse": (1.5e-4, 0.015), "cross_entropy": (0.5,), "forward_kl": (0.5,)}
"""The paper's α by divergence, the default first. Cross-entropy differs from KL by the teacher's entropy, which has no
gradient, so it shares KL's α."""

CROSS_ENTROPY = nn.CrossEntropyLoss()


class HeadKD(DistillTask):
    """Head-specific knowledge distillation: loss = α · class loss + (1 − α) · attention loss
    [+ logit loss] [+ attention transfer].

    The attention loss is the mean over block pairs of the divergence between whole attention maps, itself the mean over
    images, heads and query rows. Maps run over class token and patches; registers and distillation tokens are left out.

    Args:
        student: a timm Vision Transformer, or its name (built from scratch with ``num_classes`` classes).
        teacher: a timm Vision Transformer, or its name (built with pretrained weights, without
            classifier). Its parameters are frozen in place.
        mode: 'head_to_head': one student head of a block learns from one teacher head. 'block_to_block': all m heads of
            a student block learn from m of the teacher block's n heads. 'encoder_to_encoder': that in every student
            block.
        blocks: of the student: index, sequence of indices, 'all', or module paths. None is the last block, or every
            block for 'encoder_to_encoder', which takes nothing else.
        teacher_blocks: the teacher block for each student block, in the same order. None: student block i of Ls learns
            from teacher block ⌈(i + 1)·Lt/Ls⌉ − 1, so the last from the last, and i from i when depths are equal.
        heads: 'head_to_head' only: the student head, or one for each block. None is head 0.
        teacher_heads: 'head_to_head': the teacher head, or one for each block; None is head 0. Otherwise: m distinct
            heads of the teacher block for the student's heads 0 … m−1, or such a sequence for each block; None is the
            first m.
        divergence: 'forward_kl', 'cross_entropy', 'logit_mse' (the paper's MSE on scores before the softmax), or any
            other of :func:`attnkd.attention_divergence`.
        alpha: α in [0, 1], a number or a :class:`attnkd.methods.schedule.Schedule`. None is the first of ``ALPHAS`` for the
            divergence.
        temperature: divides the scores of both sides; a number or a Schedule.
        wrong_teacher_weight: factor in [0, 1] on the attention loss of images that the teacher misclassifies. Below 1
            the teacher must have a classifier for the student's classes.
        wrong_student_weight: the same for images that the student misclassifies now.
        kd_weight: of logit distillation, kd_weight · T²·KL(teacher ‖ student) of the class probabilities, which is added to the
            loss; a number or a Schedule. Above 0 the teacher must have a classifier for the student's classes.
        kd_temperature: its T.
        label_teacher: a third model of any kind that classifies the images, or its timm name (with its published weights and classifier); None
            for no third model. Its hard labels take a share of the class loss (:mod:`attnkd.methods.hard_labels`). With a distillation token,
            as timm's deit_*_distilled_* have one, the student's second head learns them; the task lets both heads train.
        label_weight: that share, above 0, at most 1; the true labels have the rest. DeiT's is 1/2. A number or a Schedule.
        at_weight: β of attention transfer from ``teacher`` (:mod:`attnkd.methods.attention_transfer`), which compares what the paired
            blocks put out and is added to the loss; a number or a Schedule.
        criterion: class loss of (student output, targets); None trains on the attention loss alone.
        num_classes: of a student given by name.
        resample_mode: 'bicubic', 'bilinear' or 'area': how the map of a teacher with another patch grid is resized to the student's
            (see :mod:`attnkd.attention.resampled_maps`); None refuses such a teacher.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: it gets them as they are.
        one_pass: the student's attentions compute the divergences on the way (:meth:`attnkd.AttentionTap.distil`), with the same
            results. The teacher then runs before the student. 'head_to_head' compares one head of a block, beside its attention.
        impl: see :func:`attnkd.attention_divergence`.
        device, dtype: as in ``timm.task.TrainingTask``; the student's when None.
        verbose: log the pairing.

    Raises:
        TypeError, ValueError: options out of range; more student heads than teacher heads; heads that do not exist.
        NotImplementedError: attention that cannot be captured, see :class:`attnkd.AttentionTap`.

    Example::

        task = HeadKD(student, teacher, mode="block_to_block", teacher_heads=[0, 2, 5])
        task(images, targets)["loss"].backward()
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        *,
        mode: str = "encoder_to_encoder",
        blocks: Blocks | None = None,
        teacher_blocks: Blocks | None = None,
        heads: int | Sequence[int] | None = None,
        teacher_heads: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        divergence: str = "forward_kl",
        alpha: float | Schedule | None = None,
        temperature: float | Schedule = 1.0,
        wrong_teacher_weight: float = 1.0,
        wrong_student_weight: float = 1.0,
        kd_weight: float | Schedule = 0.0,
        kd_temperature: float | Schedule = KD_TEMPERATURE,
        label_teacher: str | nn.Module | None = None,
        label_weight: float | Schedule = LABEL_WEIGHT,
        at_weight: float | Schedule = 0.0,
        criterion: nn.Module | None = CROSS_ENTROPY,
        num_classes: int | None = None,
        resample_mode: str | None = "bicubic",
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        one_pass: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("divergence", divergence, DIVERGENCES)
        check_choice("resample_mode", resample_mode, (None, *RESAMPLE_MODES))
        if mode == "encoder_to_encoder" and blocks not in (None, "all"):
            raise ValueError(
                f"blocks: 'encoder_to_encoder' takes every block, got {blocks!r}; use mode='block_to_block'"
            )
        student = build_student(student, criterion, num_classes)
        teacher = resolve_model(teacher, pretrained=True)
        check_pair(student, "teacher", teacher, text=True)
        check_student(student, criterion, impl, device, dtype)
        schedules = check_numbers(
            {"kd_weight": kd_weight, "at_weight": at_weight},
            fractions={
                "alpha": _alpha(alpha, divergence),
                "label_weight": label_weight,
                "wrong_teacher_weight": wrong_teacher_weight,
                "wrong_student_weight": wrong_student_weight,
            },
            temperature=temperature,
            kd_temperature=kd_temperature,
        )
        learns_logits, transfers = (not schedules.numbers[name].off for name in ("kd_weight", "at_weight"))
        if learns_logits:
            check_classes(student, teacher)
        if min(schedules.numbers["alpha"].reached) == 1 and criterion is None:
            raise ValueError("alpha: 1 leaves the class loss alone, but criterion is None")
        _check_wrong_weights(student, teacher, wrong_teacher_weight, wrong_student_weight, criterion)
        if blocks is None:
            blocks = "all" if mode == "encoder_to_encoder" else -1
        student_paths, teacher_paths, pairs = pair_blocks(student, teacher, blocks, teacher_blocks)
        chosen: list[tuple[Heads, Heads]] = []
        for index, (s, t) in enumerate(pairs):
            ours = _student_heads(mode, student, student_paths[s], index, len(pairs), heads)
            theirs = _teacher_heads(mode, teacher, teacher_paths[t], index, len(pairs), len(ours), teacher_heads)
            chosen.append((ours, theirs))
        classifies = criterion is not None or learns_logits
        labeller = resolve_label_teacher(student, label_teacher, label_weight, schedules, criterion)
        student_blocks = blocks_of(student, student_paths) if transfers else None
        teacher_blocks_kept = blocks_of(teacher, teacher_paths) if transfers else None
        student_tap = AttentionTap(student, student_paths, stop=not classifies and not transfers)
        teacher_stops = wrong_teacher_weight == 1 and not learns_logits and not transfers
        teacher_tap = AttentionTap(teacher, teacher_paths, stop=teacher_stops)
        super().__init__(
            TappedStudent(student_tap, train_head=classifies, blocks=student_blocks, label_token=labeller is not None),
            {
                "teacher": FrozenTeacher(teacher_tap, input_norm, teacher_blocks_kept),
                **frozen_label_teacher(labeller, input_norm),
            },
            criterion=criterion,
            schedules=schedules,
            impl=impl,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.divergence, self.pairs, self.heads, self.one_pass = divergence, pairs, chosen, one_pass
        self.mode, self.resample_mode = mode, resample_mode
        self.layouts = token_layout(student), token_layout(teacher)
        if verbose:
            for (s, t), (ours, theirs) in zip(pairs, self.heads, strict=True):
                _logger.info(
                    f"HeadKD: {student_paths[s]} heads {list(ours)} <- {teacher_paths[t]} heads {list(theirs)}, "
                    f"{divergence}"
                )

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student; for text encoders what their tokenizer gives, a dictionary with
                input_ids [B, L] and attention_mask [B, L].
            targets: what ``criterion`` takes: [B] class indices, or [B, classes] probabilities.

        Returns:
            loss: what to call backward on. attn_loss, task_loss, label_loss, kd_loss, at_loss: its unweighted parts. attn_loss is absent
            while α is 1, kd_loss and at_loss while their weights are 0, and while all are the teacher does not run; task_loss and output
            [B, classes], of two heads the class token's, are absent without ``criterion``, label_loss without ``label_teacher``.
            attn_sample_weight [B]: the images' weights, if ``wrong_teacher_weight`` or ``wrong_student_weight`` is below 1.

        Raises:
            ValueError: images of another rank, missing targets, maps of different sizes.
        """
        self.check_inputs(images, targets)
        alpha, kd_weight, at_weight = (self.schedules[name] for name in ("alpha", "kd_weight", "at_weight"))
        options: dict[str, Any] = {
            "divergence": self.divergence,
            "temperature": self.schedules["temperature"] if alpha < 1 else 1.0,
            "impl": self.impl,
        }
        taught = alpha < 1 or kd_weight != 0 or at_weight != 0
        target_output: Any = None
        teacher_calls, teacher_blocks, wanted = [], [], None
        if taught and self.one_pass:
            target_output, teacher_calls, teacher_blocks = self.teachers["teacher"](images)
            if alpha < 1:
                size = None if is_text(images) else images.shape[-2:]
                wanted = [self._wanted(pair, teacher_calls, size, options) for pair in range(len(self.pairs))]
        output, _, student_calls, rows, blocks = self.run_student(images, teacher=wanted, block_tokens=at_weight != 0)
        output, label_output = two_scores(self, output)
        if taught and not self.one_pass:
            target_output, teacher_calls, teacher_blocks = self.teachers["teacher"](images)
        result: dict[str, Tensor] = {}
        parts = []
        if kd_weight:
            result["kd_loss"] = kd_loss(output, target_output, self.schedules["kd_temperature"])
            parts.append((kd_weight, result["kd_loss"]))
        if at_weight:
            compared = [(blocks[s], teacher_blocks[t]) for s, t in self.pairs]
            result["at_loss"] = attention_transfer_loss(compared, self.layouts, self.resample_mode)
            parts.append((at_weight, result["at_loss"]))
        if alpha < 1:
            weight = self.sample_weight(output, target_output, targets)
            losses = [
                whole_map_divergence(
                    *compared_maps(student_calls[s], teacher_calls[t], self.layouts, *heads, self.resample_mode),
                    sample_weight=weight,
                    rows=rows[s] if wanted else None,
                    resample_mode=self.resample_mode,
                    **options,
                )
                for (s, t), heads in zip(self.pairs, self.heads, strict=True)
            ]
            result["attn_loss"] = torch.stack(losses).mean()
            parts.append((1 - alpha, result["attn_loss"]))
            if weight is not None:
                result["attn_sample_weight"] = weight
        if self.criterion is not None:
            for name, (share, loss) in class_losses(self, images, targets, output, label_output).items():
                result[name] = loss
                parts.append((alpha * share, loss))
            result["output"] = output
        return {"loss": self.total(parts), **result}

    def _wanted(
        self, pair: int, teacher_calls: list[AttentionCall], size: Sequence[int] | None, options: dict[str, Any]
    ) -> Wanted:
        """What the student's attention of a pair compares its rows with, see :meth:`attnkd.AttentionTap.distil`."""
        (_, t), (ours, theirs) = self.pairs[pair], self.heads[pair]
        teacher = teacher_calls[t]
        grid = None if size is None else adapter_for(self.student).grid(self.student, size)
        if self.mode != "head_to_head" and teacher.grid in (grid, None):  # all of the student's heads, and no resizing
            return take_heads(filled_in(teacher, self.layouts[1]), theirs), options | {"reduction": "none"}

        def beside(student: AttentionCall) -> Tensor:
            maps = compared_maps(student, teacher, self.layouts, ours, theirs, self.resample_mode)
            return map_rows(*maps, None, self.resample_mode, **options)

        return beside

    def sample_weight(
        self, output: Tensor | None, target_output: Tensor | None, targets: Tensor | None
    ) -> Tensor | None:
        """[B] factors of the images' attention losses; None when all are 1."""
        weight = None
        scored = {"wrong_teacher_weight": target_output, "wrong_student_weight": output}
        for name, scores in scored.items():
            factor = self.schedules[name]
            if factor == 1:
                continue
            assert scores is not None and targets is not None
            classes = targets if targets.ndim == 1 else targets.argmax(-1)
            wrong = scores.detach().argmax(-1) != classes
            own = torch.where(wrong, factor, 1.0)
            weight = own if weight is None else weight * own
        return weight


def _student_heads(
    mode: str, student: nn.Module, path: str, index: int, pairs: int, heads: int | Sequence[int] | None
) -> Heads:
    count = num_heads(student, path)
    if mode != "head_to_head":
        if heads is not None:
            raise ValueError(f"heads: {mode!r} distils all heads of a student block, got {heads!r}")
        return tuple(range(count))
    return check_heads("heads", [_one(heads, "heads", index, pairs)], count, path)


def _teacher_heads(
    mode: str,
    teacher: nn.Module,
    path: str,
    index: int,
    pairs: int,
    wanted: int,
    heads: int | Sequence[int] | Sequence[Sequence[int]] | None,
) -> Heads:
    count = num_heads(teacher, path)
    if mode == "head_to_head":
        return check_heads("teacher_heads", [_one(heads, "teacher_heads", index, pairs)], count, path)
    if wanted > count:
        raise ValueError(
            f"{mode}: the student block has m = {wanted} heads and {path} of the teacher n = {count}; every "
            "student head needs a teacher head of its own, m <= n. Distil single heads with mode='head_to_head'"
        )
    if heads is None:
        return tuple(range(wanted))
    if not isinstance(heads, Sequence):
        heads = [heads]
    if heads and isinstance(heads[0], Sequence):
        if len(heads) != pairs:
            raise ValueError(f"teacher_heads: expected one sequence for each of {pairs} blocks, got {len(heads)}")
        heads = heads[index]
    chosen = check_heads("teacher_heads", heads, count, path)  # type: ignore[arg-type]
    if len(chosen) != wanted:
        raise ValueError(f"teacher_heads: expected m = {wanted} heads like the student block, got {list(chosen)}")
    return chosen


def _alpha(alpha: float | Schedule | None, divergence: str) -> float | Schedule:
    """α as given, or the paper's for this divergence."""
    if alpha is None and divergence not in ALPHAS:
        raise ValueError(
            f"alpha: needed for divergence={divergence!r}; the paper has values for {', '.join(ALPHAS)} only"
        )
    return ALPHAS[divergence][0] if alpha is None else alpha


def _check_wrong_weights(
    student: nn.Module, teacher: nn.Module, wrong_teacher: float, wrong_student: float, criterion: nn.Module | None
) -> None:
    """Refuse weights of images where one cannot decide whether a model is right."""
    for name, factor in (("wrong_teacher_weight", wrong_teacher), ("wrong_student_weight", wrong_student)):
        if factor != 1 and criterion is None:
            raise ValueError(f"{name}: needs targets and the student's output, but criterion is None")
    classes, theirs = num_classes(student), num_classes(teacher)
    if wrong_teacher != 1 and (not theirs or theirs != classes):
        raise ValueError(
            f"wrong_teacher_weight: expected a teacher that classifies the student's {classes} classes, its num_classes "
            f"is {theirs}"
        )


def _one(heads: object, name: str, index: int, pairs: int) -> int:
    """The head of pair ``index``: head 0 by default, the same for all, or one for each."""
    if heads is None:
        return 0
    if isinstance(heads, Sequence):
        if len(heads) != pairs:
            raise ValueError(
                f"{name}: 'head_to_head' expects one head, or one for each of {pairs} blocks, got {heads!r}"
            )
        heads = heads[index]
    return heads  # type: ignore[return-value]
