"""Logit distillation: the student learns the teacher's class probabilities (Hinton, Vinyals, Dean, 2015, arXiv:1503.02531)."""

from __future__ import annotations

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
