"""Head merging on finished rows: small tensors, plain PyTorch (AttnDistill, Sec. 3.3 and its ablation in Sec. 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnkd.attention.checks import check_choice, check_temperature, check_tensor
from attnkd.attention.problem import MERGES


def merge_attention(probs: Tensor, merge: str, temperature: float = 1.0) -> Tensor:
    """Merge the heads' attention rows into one row.

    logsum: softmax_j((1/T)·Σ_h log p_j^h). mean, max, min: the mean, max or min over heads of softmax(log p^h / T),
    renormalised to sum 1. A key with probability 0 in any head has probability 0 after ``logsum`` and ``min``. A row that is
    0 in any head stays 0.

    Args:
        probs: [B, H, M, N] probabilities, each row summing to 1.
        merge: 'logsum', 'mean', 'max' or 'min'.
        temperature: T > 0.

    Returns:
        [B, 1, M, N] probabilities in ``probs.dtype`` (float32 for half precision input).

    Raises:
        TypeError, ValueError: wrong type, rank, dtype or option.
    """
    check_tensor("probs", probs, 4, "[B, H, M, N]")
    check_choice("merge", merge, MERGES[1:])
    check_temperature(temperature)
    work = probs if probs.dtype == torch.float64 else probs.float()
    zero = work == 0  # no logarithm, and none of its infinite gradient
    log_p = torch.where(zero, -math.inf, torch.where(zero, 1.0, work).log())
    return softmax_or_zero(merge_logits(log_p / temperature, merge))


def merge_logits(logits: Tensor, merge: str) -> Tensor:
    """[B, H, M, N] logits of the heads (−inf = hidden key) → [B, 1, M, N] logits of the merged row.

    A row that some head cannot see at all is −inf throughout.
    """
    hidden = logits.isneginf()
    if merge == "logsum":
        return logits.sum(1, keepdim=True).masked_fill(hidden.any(1, keepdim=True), -math.inf)
    dead = hidden.all(-1, keepdim=True)
    log_p = logits.masked_fill(dead, 0.0).log_softmax(-1).masked_fill(hidden, -math.inf)
    if merge == "mean":
        nowhere = hidden.all(1, keepdim=True)
        merged = log_p.masked_fill(nowhere, 0.0).logsumexp(1, keepdim=True) - math.log(logits.shape[1])
        merged = merged.masked_fill(nowhere, -math.inf)
    elif merge == "max":
        merged = log_p.amax(1, keepdim=True)
    else:
        merged = log_p.amin(1, keepdim=True).masked_fill(hidden.any(1, keepdim=True), -math.inf)  # −inf beside NaN too
    return merged.masked_fill(dead.any(1, keepdim=True), -math.inf)


def softmax_or_zero(logits: Tensor) -> Tensor:
    """softmax over the last dimension; a hidden key (−inf) has 0 whatever the others are, and a row of nothing else no gradient."""
    hidden = logits.isneginf()
    return logits.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(hidden, 0.0)
