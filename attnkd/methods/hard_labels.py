"""Hard labels of a further teacher: DeiT's hard-label distillation and its distillation token (Touvron et al., ICML 2021,
arXiv:2012.12877, equation 3).

    class loss = (1 − w) · criterion(z, y) + w · cross-entropy(z_d, argmax of z_t)

with the true labels y, the label teacher's scores z_t [B, K], and the student's scores z of the class token's head and z_d of the
distillation token's. A student without a distillation token has one head, which learns both: z_d = z.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.capture.models import num_classes, resolve_model
from attnkd.capture.outputs import BlockOutputs
from attnkd.methods.schedule import Schedule, Schedules
from attnkd.methods.student_teacher import FrozenTeacher
from attnkd.methods.task import DistillTask, check_same_inputs

ROLE = "label_teacher"
LABEL_WEIGHT = 0.5
"""w of DeiT."""


def resolve_label_teacher(
    student: nn.Module,
    label_teacher: str | nn.Module | None,
    label_weight: float | Schedule,
    schedules: Schedules,
    criterion: nn.Module | None,
) -> nn.Module | None:
    """The label teacher's model, if one is asked for, and checks of all that is said about it.

    Args:
        student: with a classifier.
        label_teacher: any model that returns class scores [B, K], nothing of it is captured; by timm name it has its published weights
            and classifier.
        label_weight: w as given. schedules: of the task, with 'label_weight'.

    Raises:
        ValueError: no class loss, a weight of 0, other classes or none, other images than the student's.
    """
    if label_teacher is None:
        if label_weight != LABEL_WEIGHT:
            raise ValueError(f"label_weight: got {label_weight}, but label_teacher is None, whose labels it weights")
        return None
    if criterion is None:
        raise ValueError(
            "label_teacher: its labels take a share of the class loss, but criterion is None; give one, or leave the label teacher out"
        )
    if min(schedules.numbers["label_weight"].reached) == 0:
        raise ValueError(
            f"label_weight: expected a number above 0 at all times, got {label_weight}; without its labels the label teacher is of no use, and "
            "a distillation token would learn nothing"
        )
    model = resolve_model(label_teacher, pretrained=True, num_classes=None)
    check_same_inputs(student, ROLE, model)
    classes, theirs = num_classes(student), num_classes(model)
    if theirs is not None and theirs != classes:
        raise ValueError(
            f"label_teacher: expected a classifier of the student's {classes} classes, the num_classes of {type(model).__name__} is {theirs}"
        )
    return model


def frozen_label_teacher(model: nn.Module | None, input_norm: Any) -> dict[str, FrozenTeacher]:
    """The label teacher under its name among a task's teachers, the last of them; empty without one. Freezes the model.

    Args:
        input_norm: see :class:`attnkd.methods.student_teacher.FrozenTeacher`.
    """
    return {} if model is None else {ROLE: FrozenTeacher(BlockOutputs(model, []), input_norm)}


def two_scores(task: DistillTask, output: Any) -> tuple[Any, Any]:
    """The scores [B, K] of the class token's head and of what learns the label teacher's labels: the distillation token's head if the
    student has one, else the same. In evaluation mode, for losses on held-out images, both are the student's one output.

    Raises:
        ValueError: two heads, and no teacher for the second.
    """
    if not isinstance(output, (tuple, list)):
        return output, output
    if ROLE not in task.teachers:
        raise ValueError(
            f"student: {type(task.student).__name__} returns the scores of two heads (distilled_training is on), and without a label_teacher "
            "the second would learn nothing; give one, or call student.set_distilled_training(False)"
        )
    scores, label_scores = output
    return scores, label_scores


def class_losses(
    task: DistillTask, images: Tensor, targets: Tensor | None, scores: Tensor, label_scores: Tensor
) -> dict[str, tuple[float, Tensor]]:
    """The parts of the class loss by name, each with its share: 'task_loss' and, with a label teacher, 'label_loss'.

    Args:
        images: [B, C, H, W] as the student saw them, mixed ones too: the label teacher labels what the student sees.
        targets: what the task's criterion takes.
        scores, label_scores: [B, K], see :func:`two_scores`.

    Raises:
        ValueError: a label teacher of other classes, where it did not say its number.
    """
    assert task.criterion is not None
    task_loss = task.criterion(scores, targets)
    if ROLE not in task.teachers:
        return {"task_loss": (1.0, task_loss)}
    weight = task.schedules["label_weight"]
    teacher_scores = task.teachers[ROLE](images)[0]
    if teacher_scores.shape != label_scores.shape:
        raise ValueError(
            f"label_teacher: expected scores {tuple(label_scores.shape)} [B, classes] as the student's, got {tuple(teacher_scores.shape)}"
        )
    label_loss = F.cross_entropy(label_scores.float(), teacher_scores.argmax(1))
    return {"task_loss": (1.0 - weight, task_loss), "label_loss": (weight, label_loss)}
