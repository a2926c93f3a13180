"""SSTA: a self-supervised model as teaching assistant beside a supervised teacher.

Wu et al.: Self-supervised Models are Good Teaching Assistants for Vision Transformers, ICML 2022. The formulas, the defaults
and how heads are chosen: docs/methods/ssta.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnkd.attention.call import AttentionCall
from attnkd.attention.checks import check_choice
from attnkd.attention.problem import DIVERGENCES
from attnkd.attention.resample import MODES as RESAMPLE_MODES
from attnkd.capture.blocks import Blocks
from attnkd.capture.models import resolve_model
from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import TokenLayout, token_layout
from attnkd.methods.attention_transfer import attention_transfer_loss, blocks_of
from attnkd.methods.hard_labels import (
    LABEL_WEIGHT,
    class_losses,
    frozen_label_teacher,
    resolve_label_teacher,
    two_scores,
)
from attnkd.methods.head_kd import CROSS_ENTROPY
from attnkd.methods.logits import KD_TEMPERATURE, check_classes, kd_loss
from attnkd.methods.schedule import Schedule, Schedules
from attnkd.methods.student_teacher import FrozenTeacher, TappedStudent
from attnkd.methods.task import DistillTask, build_student, check_numbers, check_pair, check_student
from attnkd.methods.whole_map import Heads, check_heads, compared_maps, num_heads, whole_map_divergence

_logger = logging.getLogger(__name__)

WEIGHTS = {"teacher": "beta", "assistant": "lam"}
"""The teachers' names in results and logs, and the names of their weights."""


class SSTA(DistillTask):
    """The SSTA training task: loss = α · CE + β · KL_SL + λ · KL_SSL [+ logit loss] [+ attention transfer].

    In every block of L one student head imitates the whole attention map of one head of the supervised teacher (KL_SL), and
    another that of one head of the self-supervised assistant (KL_SSL). Each KL is the mean over the blocks of the mean over
    images and query rows of KL(teacher ‖ student). From epoch ``stop_epoch`` on β = λ = 0 and no teacher runs.

    Give one teacher alone, or two supervised or two self-supervised models, for the paper's ablations.

    Args:
        student: a timm Vision Transformer, or its name (built from scratch with ``num_classes`` classes).
        teacher: supervised timm Vision Transformer, or its name (with pretrained weights), or None.
        assistant: self-supervised one, likewise. One of the two may be None.
        blocks: L, blocks of the student: index, sequence of indices, 'all', or module paths.
        teacher_blocks, assistant_blocks: the block for each of ``blocks``. None: student block i of Ls learns from teacher
            block ⌈(i + 1)·Lt/Ls⌉ − 1, so the last from the last.
        teacher_heads, assistant_heads: the head to imitate in each of ``blocks``, or 'average' for the mean of all heads'
            maps. :func:`attnkd.methods.head_importance.select_heads` finds them.
        student_heads: (head that imitates the teacher, head that imitates the assistant).
        alpha: weight of the class loss.
        beta: weight of KL_SL until ``stop_epoch``. A :class:`attnkd.methods.schedule.Schedule` is used as it is.
        lam: weight λ of KL_SSL, likewise.
        stop_epoch: the epoch from which β = λ = 0. The paper stops at 100 of 300. None: never. With it ``set_epoch`` must
            be called.
        temperature: divides the scores of both sides; a number or a Schedule.
        kd_weight: of logit distillation from ``teacher``, kd_weight · T²·KL(teacher ‖ student) of the class probabilities, which
            is added to the loss and does not end at ``stop_epoch``; a number or a Schedule. Above 0 the teacher must have a
            classifier for the student's classes.
        kd_temperature: its T.
        label_teacher: a third model of any kind that classifies the images, or its timm name (with its published weights and classifier); None
            for no third model. Its hard labels take a share of the class loss (:mod:`attnkd.methods.hard_labels`). With a distillation token,
            as timm's deit_*_distilled_* have one, the student's second head learns them; the task lets both heads train.
        label_weight: that share, above 0, at most 1; the true labels have the rest. DeiT's is 1/2. A number or a Schedule.
        at_weight: β of attention transfer from ``teacher`` (:mod:`attnkd.methods.attention_transfer`), which compares what the paired
            blocks put out, is added to the loss and does not end at ``stop_epoch``; a number or a Schedule.
        divergence: of the maps, see :func:`attnkd.attention_divergence`; the paper's is KL(teacher ‖ student).
        criterion: class loss of (student output, targets); None trains on the maps alone, and then not past ``stop_epoch``.
        num_classes: of a student given by name.
        resample_mode: 'bicubic', 'bilinear' or 'area': how the map of a teacher with another patch grid is resized to the student's
            (see :mod:`attnkd.attention.resampled_maps`); None refuses such a teacher.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; each teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: they get them as they are.
        one_pass: the student's attentions compare their heads while they run (:meth:`attnkd.AttentionTap.distil`), with the same results.
            The teachers then run before the student.
        impl: see :func:`attnkd.attention_divergence`.
        device, dtype: as in ``timm.task.TrainingTask``; the student's when None.
        verbose: log the pairing.

    Raises:
        TypeError, ValueError: options out of range; no teacher; heads that do not exist or one student head for two teachers.
        NotImplementedError: attention that cannot be captured, see :class:`attnkd.AttentionTap`.

    Example::

        task = SSTA(student, teacher, assistant, teacher_heads=[0, 4, 2], assistant_heads=[5, 1, 3], stop_epoch=100)
        for epoch in range(300):
            task.set_epoch(epoch)
            for images, targets in loader:
                task(images, targets)["loss"].backward()
                ...
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module | None = None,
        assistant: str | nn.Module | None = None,
        *,
        blocks: Blocks = (-3, -2, -1),
        teacher_blocks: Blocks | None = None,
        assistant_blocks: Blocks | None = None,
        teacher_heads: Sequence[int] | str | None = None,
        assistant_heads: Sequence[int] | str | None = None,
        student_heads: tuple[int, int] = (0, 1),
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        lam: float | Schedule = 1.0,
        stop_epoch: float | None = 100,
        temperature: float | Schedule = 1.0,
        kd_weight: float | Schedule = 0.0,
        kd_temperature: float | Schedule = KD_TEMPERATURE,
        label_teacher: str | nn.Module | None = None,
        label_weight: float | Schedule = LABEL_WEIGHT,
        at_weight: float | Schedule = 0.0,
        divergence: str = "forward_kl",
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
        check_choice("divergence", divergence, DIVERGENCES)
        check_choice("resample_mode", resample_mode, (None, *RESAMPLE_MODES))
        student = build_student(student, criterion, num_classes)
        given = {
            "teacher": (teacher, teacher_blocks, teacher_heads),
            "assistant": (assistant, assistant_blocks, assistant_heads),
        }
        if len(student_heads) != 2:
            raise ValueError(
                f"student_heads: expected (head for the teacher, head for the assistant), got {student_heads!r}"
            )
        if teacher is None and assistant is None:
            raise ValueError("teacher, assistant: expected at least one of them, got None for both")
        if teacher is not None and assistant is not None and student_heads[0] == student_heads[1]:
            raise ValueError(f"student_heads: expected a head of its own for each teacher, got {student_heads!r}")

        check_student(student, criterion, impl, device, dtype)
        weights = {"alpha": alpha, "beta": _until("beta", beta, stop_epoch), "lam": _until("lam", lam, stop_epoch)}
        weights |= {"kd_weight": kd_weight, "at_weight": at_weight}
        on = [WEIGHTS[name] for name, (source, _, _) in given.items() if source is not None]
        schedules = check_numbers(
            weights,
            one_of=[*(["alpha"] if criterion is not None else []), *on, "kd_weight", "at_weight"],
            fractions={"label_weight": label_weight},
            temperature=temperature,
            kd_temperature=kd_temperature,
        )
        learns_logits, transfers = (not schedules.numbers[name].off for name in ("kd_weight", "at_weight"))
        if learns_logits and teacher is None:
            raise ValueError("kd_weight: above 0, but teacher is None, whose class probabilities would be learnt")
        if transfers and teacher is None:
            raise ValueError("at_weight: above 0, but teacher is None, whose blocks would be compared")
        layouts: dict[str, TokenLayout] = {}
        models: dict[str, tuple[nn.Module, list[str]]] = {}
        links: dict[str, list[_Link]] = {}
        paths: list[str] = []
        for (name, (source, source_blocks, heads)), head in zip(given.items(), student_heads, strict=True):
            if source is None:
                if heads is not None or source_blocks is not None:
                    raise ValueError(f"{name}_heads, {name}_blocks: given, but {name} is None")
                continue
            model = resolve_model(source, pretrained=True)
            check_pair(student, name, model)
            if learns_logits and name == "teacher":
                check_classes(student, model)
            paths, model_paths, pairs = pair_blocks(student, model, blocks, source_blocks, teacher_name=name)
            for path in paths:
                check_heads("student_heads", [head], num_heads(student, path), path)
            chosen = _teacher_heads(name, model, [model_paths[t] for _, t in pairs], heads)
            links[name] = [((head,), t, theirs) for (_, t), theirs in zip(pairs, chosen, strict=True)]
            layouts[name] = token_layout(model)
            models[name] = model, model_paths
            if verbose:
                for path, (ours, t, theirs) in zip(paths, links[name], strict=True):
                    which = "the mean of its heads" if heads == "average" else f"head {theirs[0]}"
                    _logger.info(f"SSTA: {path} head {ours[0]} <- {name} {model_paths[t]} {which}")
        layouts["student"] = token_layout(student)
        classifies = criterion is not None or learns_logits
        labeller = resolve_label_teacher(student, label_teacher, label_weight, schedules, criterion)
        student_blocks = blocks_of(student, paths) if transfers else None
        student_tap = AttentionTap(student, paths, stop=not classifies and not transfers)
        teachers = {}
        for name, (model, model_paths) in models.items():
            whole = (learns_logits or transfers) and name == "teacher"
            kept = blocks_of(model, model_paths) if transfers and name == "teacher" else None
            teachers[name] = FrozenTeacher(AttentionTap(model, model_paths, stop=not whole), input_norm, kept)
        super().__init__(
            TappedStudent(student_tap, train_head=classifies, blocks=student_blocks, label_token=labeller is not None),
            {**teachers, **frozen_label_teacher(labeller, input_norm)},
            criterion=criterion,
            schedules=schedules,
            impl=impl,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.layouts, self.links, self.divergence, self.one_pass = layouts, links, divergence, one_pass
        self.resample_mode = resample_mode
        self.averaged = {name: heads == "average" for name, (_, _, heads) in given.items()}

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student.
            targets: what ``criterion`` takes.

        Returns:
            loss: what to call backward on. teacher_attn_loss, assistant_attn_loss, kd_loss, at_loss, task_loss, label_loss: its unweighted
            parts; absent while their weight is 0, and a teacher none of whose parts is on does not run. output [B, classes], of two heads
            the class token's, with ``criterion``.

        Raises:
            ValueError: images of another rank, missing targets, maps of different sizes.
            RuntimeError: a weight that changes with the epoch before ``set_epoch`` was called; nothing left to train on.
        """
        self.check_inputs(images, targets)
        weights = {name: self.schedules[WEIGHTS[name]] for name in self.links}
        on, kd_weight = [name for name, weight in weights.items() if weight != 0], self.schedules["kd_weight"]
        at_weight = self.schedules["at_weight"]
        taught = [name for name in self.links if name in on or (name == "teacher" and (kd_weight or at_weight))]
        given = {name: self.teachers[name](images) for name in taught} if self.one_pass else {}
        observed = {name: given[name][1] for name in on} if self.one_pass else {}
        wanted = None
        if observed:
            paths = self.student_tap.paths
            wanted = [functools.partial(self.attention_losses, observed=observed, block=i) for i in range(len(paths))]
        output, _, student_calls, losses, blocks = self.run_student(images, teacher=wanted, block_tokens=at_weight != 0)
        output, label_output = two_scores(self, output)
        if not self.one_pass:
            given = {name: self.teachers[name](images) for name in taught}
            observed = {name: given[name][1] for name in on}
            losses = [self.attention_losses(call, observed, i) for i, call in enumerate(student_calls)]
        result: dict[str, Tensor] = {}
        parts = []
        for name in on:
            result[f"{name}_attn_loss"] = torch.stack([loss[name] for loss in losses]).mean()
            parts.append((weights[name], result[f"{name}_attn_loss"]))
        if kd_weight:
            result["kd_loss"] = kd_loss(output, given["teacher"][0], self.schedules["kd_temperature"])
            parts.append((kd_weight, result["kd_loss"]))
        if at_weight:
            layouts, theirs = (self.layouts["student"], self.layouts["teacher"]), given["teacher"][2]
            compared = [(ours, theirs[t]) for ours, (_, t, _) in zip(blocks, self.links["teacher"], strict=True)]
            result["at_loss"] = attention_transfer_loss(compared, layouts, self.resample_mode)
            parts.append((at_weight, result["at_loss"]))
        if self.criterion is not None:
            for name, (share, loss) in class_losses(self, images, targets, output, label_output).items():
                result[name] = loss
                parts.append((self.schedules["alpha"] * share, loss))
            result["output"] = output
        return {"loss": self.total(parts), **result}

    def attention_losses(
        self, student: AttentionCall, observed: Mapping[str, Sequence[AttentionCall]], block: int
    ) -> dict[str, Tensor]:
        """What the attention of the student's compared block number ``block`` differs in from each teacher's, by the teacher's name."""
        found = {}
        for name, calls in observed.items():
            ours, t, theirs = self.links[name][block]
            found[name] = whole_map_divergence(
                *compared_maps(
                    student, calls[t], (self.layouts["student"], self.layouts[name]), ours, theirs, self.resample_mode
                ),
                resample_mode=self.resample_mode,
                merge="mean" if self.averaged[name] else None,
                divergence=self.divergence,
                temperature=self.schedules["temperature"],
                impl=self.impl,
            )
        return found


_Link = tuple[Heads, int, Heads]
"""A student's head; index of the teacher's attention, its heads."""


def _teacher_heads(name: str, model: nn.Module, paths: list[str], heads: Sequence[int] | str | None) -> list[Heads]:
    """The heads to imitate in each of the teacher's attentions: one, or all of them for 'average'."""
    counts = [num_heads(model, path) for path in paths]
    if heads == "average":
        return [tuple(range(count)) for count in counts]
    if heads is None or isinstance(heads, str):
        raise ValueError(
            f"{name}_heads: expected 'average' or one head for each of {len(paths)} blocks, got {heads!r}; "
            "attnkd.methods.head_importance finds the important ones"
        )
    if len(heads) != len(paths):
        raise ValueError(f"{name}_heads: expected one head for each of {len(paths)} blocks, got {list(heads)}")
    return [
        check_heads(f"{name}_heads", [head], count, path)
        for head, count, path in zip(heads, counts, paths, strict=True)
    ]


def _until(name: str, weight: float | Schedule, stop_epoch: float | None) -> float | Schedule:
    if isinstance(weight, Schedule) or stop_epoch is None:
        return weight
    Schedules(**{name: weight, "stop_epoch": stop_epoch})  # names what is no number
    return Schedule(weight, stop=stop_epoch)
