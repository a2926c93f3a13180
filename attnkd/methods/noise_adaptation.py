"""Learning from the labels of a fallible teacher: a matrix of class confusions between the student and the loss.

Used by Attention Probe (ICASSP 2022); docs/methods/attention_probe.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.checks import number


class NoiseAdaptation(nn.Module):
    """Q [K, K]: row i holds the chances that the teacher calls an image of class i class j.

    Args:
        num_classes: K ≥ 2.
        accuracy: the teacher's, in (0, 1]; the diagonal of Q. The rest of a row, 1 − accuracy, is shared out by a learned
            softmax over the other classes, at first evenly.

    Raises:
        ValueError: accuracy outside (0, 1], fewer than two classes.
    """

    def __init__(self, num_classes: int, accuracy: float) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        share = number(accuracy)
        if share is None or not 0 < share <= 1:
            raise ValueError(f"teacher_accuracy: expected a number in (0, 1], such as 0.97 for 97 %, got {accuracy!r}")
        self.accuracy = share
        self.weight = nn.Parameter(torch.zeros(num_classes, num_classes - 1))

    def forward(self) -> Tensor:
        """log Q [K, K] in float32 (float64 for float64 weights); −inf beside the diagonal where the accuracy is 1."""
        classes = len(self.weight)
        rest = math.log(1 - self.accuracy) if self.accuracy < 1 else -math.inf
        others = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).log_softmax(1) + rest
        # Row by row, between two diagonal entries of a K×K matrix lie K others.
        diagonal = others.new_full((1,), math.log(self.accuracy))
        between = F.pad(others.reshape(classes - 1, classes), (0, 1), value=math.log(self.accuracy))
        return torch.cat([diagonal, between.flatten()]).view(classes, classes)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.weight)}, accuracy={self.accuracy}"


def noisy_cross_entropy(output: Tensor, labels: Tensor, log_q: Tensor) -> Tensor:
    """−log Σ_i p_i Q_i,label averaged over the batch.

    Args:
        output: class scores [B, K]; p is their softmax, the true class as the student sees it.
        labels: [B] class indices, as a fallible teacher sees them.
        log_q: [K, K], see :class:`NoiseAdaptation`.
    """
    return -(output.float().log_softmax(1) + log_q.T[labels]).logsumexp(1).mean()
