"""Logit distillation: the student learns the teacher's class probabilities (Hinton, Vinyals, Dean, 2015, arXiv:1503.02531). And
what a class loss needs: the same classes, and labels of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.capture.models import num_classes

KD_TEMPERATURE = 3.0
"""That of DeiT's soft distillation (Touvron et al., ICML 2021)."""


UNKNOWN_CLASSES = "; None: neither an attribute num_classes of the model nor a method of its adapter says it"


def kd_loss(output: Tensor, target_output: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(target / T) ‖ softmax(output / T)) of scores [B, K], averaged over the batch."""
    log_p, log_t = ((x.float() / temperature).log_softmax(1) for x in (output, target_output))
    return temperature**2 * F.kl_div(log_p, log_t, reduction="batchmean", log_target=True)


def check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that does not classify the student's classes.

    Raises:
        ValueError: naming ``kd_weight``.
    """
    classes, theirs = map(num_classes, (student, teacher))
    if not classes or theirs != classes:
        raise ValueError(
            f"kd_weight: expected student and teacher with classifiers of the same classes, got num_classes {classes} and {theirs}"
            f"{UNKNOWN_CLASSES if None in (classes, theirs) else ''}"
        )


def check_targets(criterion: nn.Module, targets: Any, batch: int, classes: int | None) -> None:
    """Refuse targets that cross-entropy cannot take, before any model runs. What another class loss takes is its own affair.

    Args:
        batch: number of images.
        classes: of the student; None where unknown.

    Raises:
        ValueError: names ``targets``. Indices out of range are named on the CPU alone: on a GPU the host would wait for every batch.
    """
    if type(criterion).forward is not nn.CrossEntropyLoss.forward:
        return
    many = "classes" if classes is None else classes
    expected = f"targets: expected [{batch}] class indices, torch.int64, or [{batch}, {many}] probabilities of floating point, got"
    if not isinstance(targets, Tensor):
        raise ValueError(f"{expected} {type(targets).__name__}")
    indices = targets.ndim == 1 and targets.dtype in (torch.int64, torch.uint8)
    probabilities = targets.ndim == 2 and targets.is_floating_point() and classes in (None, targets.shape[1])
    if not (indices or probabilities) or len(targets) != batch:
        raise ValueError(f"{expected} {targets.dtype} {tuple(targets.shape)}")
    if indices and classes is not None and targets.device.type == "cpu" and not torch.compiler.is_compiling():
        known = targets[targets != criterion.ignore_index]
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < classes:
            raise ValueError(
                f"targets: expected class indices from 0 to {classes - 1}, the student has {classes} classes, got {int(known.min())} to "
                f"{int(known.max())}; build it with another num_classes"
            )
