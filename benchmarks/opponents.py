"""The opponents: the same mathematics in plain PyTorch, each written as well as we know how.

Two ways to the scores: a matrix product in the input's precision, whose result is rounded to it (what eager PyTorch is best
at), and multiply-and-sum in fp32 over one query row (what torch.compile turns into a single kernel without rounding). Whole
maps use matrix products only. Everything after the scores is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

Scores = Callable[[Tensor, Tensor, bool], Tensor]


def matmul_scores(query: Tensor, key: Tensor, wide: bool) -> Tensor:
    """scale·q·k [B, H, M, N] in the input's precision; ``wide`` sums over heads, [B, 1, M, N]."""
    scale = query.shape[-1] ** -0.5
    if wide:  # a token's heads lie side by side in a packed projection: a view
        query, key = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (query, key))
    return (query * scale) @ key.mT


def row_scores(query: Tensor, key: Tensor, wide: bool) -> Tensor:
    """The same for one query row, [B, H, 1, N] or [B, 1, 1, N], multiplied and summed in fp32."""
    products = query.float() * key.float()
    total = products.sum((1, 3), keepdim=True) if wide else products.sum(3, keepdim=True)
    return total.mT * query.shape[-1] ** -0.5


def merged_scores(scores: Scores, query: Tensor, key: Tensor, merge: str | None, temperature: float) -> Tensor:
    """Scores whose softmax is the (merged) attention, [B, Ho, M, N]."""
    z = scores(query, key, merge == "logsum")
    z = z if temperature == 1.0 else z / temperature
    return z if merge in (None, "logsum") else merge_log_probs(F.log_softmax(z, -1, dtype=torch.float32), merge)


def first_row_of_maps(query: Tensor, key: Tensor, merge: str | None, temperature: float) -> Tensor:
    """The same for the first row, as published code does it: softmax maps of all rows, of which one is taken."""
    row = F.log_softmax(matmul_scores(query, key, False), -1, dtype=torch.float32)[:, :, :1]
    row = row if temperature == 1.0 else row / temperature
    return row if merge is None else merge_log_probs(row if merge == "logsum" else row.log_softmax(-1), merge)


def merge_log_probs(log_p: Tensor, merge: str | None) -> Tensor:
    """[B, H, M, N] to [B, 1, M, N], not normalised."""
    if merge == "logsum":
        return log_p.sum(1, keepdim=True)
    if merge == "mean":
        return log_p.logsumexp(1, keepdim=True)
    return log_p.amax(1, keepdim=True) if merge == "max" else log_p.amin(1, keepdim=True)


def total_divergence(z_s: Tensor, z_t: Tensor, kind: str) -> Tensor:
    """Sum over rows of the divergence of softmax(z_s) and softmax(z_t)."""
    keys = z_s.shape[-1]
    if kind == "logit_mse":
        return (z_s.float() - z_t.float()).square().sum() / keys
    log_s, log_t = (F.log_softmax(z, -1, dtype=torch.float32) for z in (z_s, z_t))
    if kind == "forward_kl":
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    if kind == "reverse_kl":
        return F.kl_div(log_t, log_s, reduction="sum", log_target=True)
    if kind == "cross_entropy":
        return -(log_t.exp() * log_s).sum()
    if kind == "mse":
        return (log_s.exp() - log_t.exp()).square().sum() / keys
    log_m = torch.logaddexp(log_s, log_t) - math.log(2.0)
    halves = [F.kl_div(log_m, log, reduction="sum", log_target=True) for log in (log_s, log_t)]
    return 0.5 * (halves[0] + halves[1])


def divergence(scores: Scores | None, merge: str | None, kind: str, temperature: float) -> Callable[..., Tensor]:
    """attention_divergence(..., reduction='batchmean') of (student_query, student_key, teacher_query, teacher_key).

    ``scores`` None: whole maps are computed, of which the first row is compared.
    """

    def function(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
        z = []
        for query, key in ((student_query, student_key), (teacher_query, teacher_key)):
            if scores is None:
                z.append(first_row_of_maps(query, key, merge, temperature))
            else:
                z.append(merged_scores(scores, query, key, merge, temperature))
        return total_divergence(z[0], z[1], kind) / student_query.shape[0]

    return function


def rows(scores: Scores | None, merge: str | None, temperature: float) -> Callable[..., Tensor]:
    """attention_rows of (student_query, student_key): probabilities in fp32; ``scores`` None as above."""

    def function(student_query: Tensor, student_key: Tensor) -> Tensor:
        if scores is None:
            return first_row_of_maps(student_query, student_key, merge, temperature).softmax(-1)
        return merged_scores(scores, student_query, student_key, merge, temperature).softmax(-1, dtype=torch.float32)

    return function


def against_rows(scores: Scores) -> Callable[..., Tensor]:
    """Forward KL of (student_query, student_key, teacher_probs)."""

    def function(student_query: Tensor, student_key: Tensor, teacher_probs: Tensor) -> Tensor:
        log_s = F.log_softmax(scores(student_query, student_key, False), -1, dtype=torch.float32)
        return F.kl_div(log_s, teacher_probs, reduction="sum") / student_query.shape[0]

    return function


def flex_divergence(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """Forward KL from a fused attention's output and log-sum-exp, with V = [k_t | k_s]:

    Σ_j p_t (z_t − z_s) = scale·(q_t·E_t[k_t] − q_s·E_t[k_s]). No map is written, but the expectations are rounded to the
    input's precision and two large numbers are subtracted.
    """
    head_dim = student_key.shape[-1]
    value = torch.cat([teacher_key, student_key], -1)
    want = AuxRequest(lse=True)
    expected, aux_t = flex_attention(teacher_query, teacher_key, value, return_aux=want)
    _, aux_s = flex_attention(student_query, student_key, student_key, return_aux=want)
    of_teacher, of_student = expected.float().split(head_dim, -1)
    gap = (teacher_query.float() * of_teacher - student_query.float() * of_student).sum(-1) * head_dim**-0.5
    return (gap - aux_t.lse + aux_s.lse).sum() / student_query.shape[0]


def relation(whole: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """relation_row_loss of (student_features, teacher_features), from the Gram matrix or from its first row only."""

    def function(student_features: Tensor, teacher_features: Tensor) -> Tensor:
        rows = []
        for features in (student_features, teacher_features):
            if whole:
                normal = F.normalize(features, dim=-1)
                rows.append((normal @ normal.mT)[:, 0, 1:].float())
            else:
                normal = F.normalize(features.float(), dim=-1)
                rows.append((normal[:, :1] * normal[:, 1:]).sum(-1))
        return F.mse_loss(rows[0], rows[1])

    return function


def attention_from_maps(rows: int | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Both models' attention outputs and the divergence of their first ``rows`` rows (None: all), from stored maps.

    The maps that the loss needs are the ones that the outputs are made of, as with ``fused_attn = False``.
    """

    def function(
        student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor,
        student_value: Tensor, teacher_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        z_s, z_t = matmul_scores(student_query, student_key, False), matmul_scores(teacher_query, teacher_key, False)
        out_s, out_t = z_s.softmax(-1) @ student_value, z_t.softmax(-1) @ teacher_value
        loss = total_divergence(z_s[:, :, :rows], z_t[:, :, :rows], "forward_kl") / z_s.shape[0]
        return out_s, out_t, loss

    return function


def attention_and_scores(scores: Scores, rows: int | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The same with fused attention for the outputs, and the compared rows computed a second time beside it."""

    def function(
        student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor,
        student_value: Tensor, teacher_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out_s = F.scaled_dot_product_attention(student_query, student_key, student_value)
        out_t = F.scaled_dot_product_attention(teacher_query, teacher_key, teacher_value)
        z_s = scores(student_query[:, :, :rows], student_key, False)
        z_t = scores(teacher_query[:, :, :rows], teacher_key, False)
        return out_s, out_t, total_divergence(z_s, z_t, "forward_kl") / z_s.shape[0]

    return function
