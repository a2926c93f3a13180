"""The specification: plain PyTorch that materialises everything and computes in float64 (or in a precision asked for).

Nothing here is fast and nothing fast imports it. It is written to be compared with the papers line by line, and imports torch
only. Its own results are tested against :mod:`attnkd.testing.oracle`, like those of every implementation.

Notation: z = (scale · q·k + mask) / T are the logits, p = softmax(z), s the student, t the teacher.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnkd.attention.checks import check_lse

if TYPE_CHECKING:
    from attnkd.attention.problem import Problem, Side

HIDDEN_BELOW = -1e30  # an additive mask at or below this hides the key, like −inf
TINY = torch.finfo(torch.float32).tiny  # a probability below this is none, as it is in float32


def per_row(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The divergence of every query row, [B, Ho, M], float32 (float64 for float64 inputs).

    A row that sees no key on either side has the value 0 and no gradient. A row where one side gives weight to a key that
    the other hides is +inf, and its gradient has no meaning.

    Args:
        problem: the validated inputs.
        dtype: precision of the computation. With another one than float64 this is usual eager code; the tolerances are
            measured with it.
    """
    z_s, visible_s = side_logits(problem.student, problem.merge, problem.temperature, dtype)
    z_t, visible_t = side_logits(problem.teacher, problem.merge, problem.temperature, dtype)
    _check_lse("student_lse", problem.student, z_s, visible_s)
    _check_lse("teacher_lse", problem.teacher, z_t, visible_t)
    loss = divergence(z_s, visible_s, z_t.detach(), visible_t, problem.divergence)
    assert problem.student.query is not None
    return loss if problem.student.query.dtype == torch.float64 else loss.float()


def attention_rows(side: Side, merge: str | None, temperature: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The attention probabilities, [B, Ho, M, N], computed in ``dtype``; rows that see no key are 0."""
    z, visible = side_logits(side, merge, temperature, dtype)
    return torch.where(visible, _log_softmax(z, visible).exp(), 0.0)


def side_logits(side: Side, merge: str | None, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose softmax is the (merged) attention, and which keys are visible; both [B, Ho, M, N]."""
    if side.probs is not None:  # finished rows: softmax(log p) normalises them
        probs = _in(side.probs, dtype)
        visible = probs != 0  # NaN stays visible
        return torch.where(visible, torch.where(visible, probs, 1.0).log(), 0.0), visible
    assert side.query is not None and side.key is not None
    z = _in(side.query, dtype) @ _in(side.key, dtype).transpose(-2, -1) * side.scale
    visible = torch.ones_like(z, dtype=torch.bool)
    if side.mask is not None and side.mask.dtype == torch.bool:
        visible = _in(side.mask, torch.bool)
    elif side.mask is not None:
        visible = ~(side.mask <= HIDDEN_BELOW)  # NaN stays visible
        z = z + torch.where(visible, _in(side.mask, dtype), 0.0)
    z = torch.where(visible, z / temperature, 0.0)
    return (z, visible) if merge is None else merge_heads(z, visible, merge)


def merge_heads(z: Tensor, visible: Tensor, merge: str) -> tuple[Tensor, Tensor]:
    """Logits [B, H, M, N] of the heads → logits [B, 1, M, N] of the merged row (AttnDistill, Sec. 3.3 and 4.3).

    logsum: softmax_j Σ_h log p_j^h, in which every head's normaliser is constant in j and cancels.
    mean, max, min: the mean, max or min over heads of p^h, renormalised to sum 1.

    p^h is 0 where head h hides a key: logsum and min hide it then, mean and max only if all heads do. A row that some head
    cannot see at all is hidden.
    """
    if merge == "logsum":
        seen = visible.all(1, keepdim=True)
        return torch.where(seen, z.sum(1, keepdim=True), 0.0), seen
    seen = visible.all(1, keepdim=True) if merge == "min" else visible.any(1, keepdim=True)
    seen = seen & visible.any(-1, keepdim=True).all(1, keepdim=True)
    log_p = torch.where(visible, _log_softmax(z, visible), -math.inf)
    log_p = torch.where(seen, log_p, 0.0)
    if merge == "mean":
        merged = log_p.logsumexp(1, keepdim=True) - math.log(z.shape[1])
    else:
        merged = log_p.amax(1, keepdim=True) if merge == "max" else log_p.amin(1, keepdim=True)
    return torch.where(seen, merged, 0.0), seen


def divergence(z_s: Tensor, visible_s: Tensor, z_t: Tensor, visible_t: Tensor, kind: str) -> Tensor:
    """[B, Ho, M]: the divergence of every row.

    forward_kl     Σ_j p_t (log p_t − log p_s)                  head-specific KD, Eq. 2.11; AttnDistill, Eq. 6
    reverse_kl     Σ_j p_s (log p_s − log p_t)
    js             ½ KL(p_t‖m) + ½ KL(p_s‖m),  m = ½ (p_s + p_t)
    cross_entropy  −Σ_j p_t log p_s                             head-specific KD, Eq. 2.10
    mse            mean over keys visible to both of (p_s − p_t)²
    logit_mse      mean over keys visible to both of (z_s − z_t)²   head-specific KD, Eq. 2.8–2.9
    """
    both = visible_s & visible_t
    alive = visible_s.any(-1) & visible_t.any(-1)
    count = both.sum(-1).clamp_min(1)
    log_s, log_t = _log_softmax(z_s, visible_s), _log_softmax(z_t, visible_t)
    p_s, p_t = torch.where(visible_s, log_s.exp(), 0.0), torch.where(visible_t, log_t.exp(), 0.0)
    if kind == "forward_kl":
        row = _expectation(p_t, log_t - log_s, visible_t, visible_s)
    elif kind == "reverse_kl":
        row = _expectation(p_s, log_s - log_t, visible_s, visible_t)
    elif kind == "cross_entropy":
        row = _expectation(p_t, -log_s, visible_t, visible_s)
    elif kind == "js":
        either = visible_s | visible_t
        log_m = torch.where(either, (0.5 * (p_s + p_t)).clamp_min(torch.finfo(p_s.dtype).tiny).log(), 0.0)
        row = 0.5 * (
            _expectation(p_t, log_t - log_m, visible_t, either) + _expectation(p_s, log_s - log_m, visible_s, either)
        )
    elif kind == "mse":
        row = torch.where(both, (p_s - p_t).square(), 0.0).sum(-1) / count
    elif kind == "logit_mse":
        row = torch.where(both, (z_s - z_t).square(), 0.0).sum(-1) / count
    else:
        raise ValueError(f"divergence: unknown kind {kind!r}")
    return torch.where(alive, row, 0.0)


def _check_lse(name: str, side: Side, z: Tensor, visible: Tensor) -> None:
    if side.lse is not None:
        check_lse(name, side.lse, torch.where(visible, z.detach(), -math.inf).logsumexp(-1))


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; a copy of one made under inference_mode, which autograd refuses to keep."""
    return tensor.to(dtype, copy=not torch.compiler.is_compiling() and tensor.is_inference())


def _expectation(p: Tensor, value: Tensor, visible: Tensor, defined: Tensor) -> Tensor:
    """Σ_j p_j·value_j over visible keys; +inf when p_j meets a key for which the value is not defined."""
    terms = torch.where(visible & defined, p * value, 0.0)
    return torch.where(visible & ~defined & (p >= TINY), math.inf, terms).sum(-1)


def _log_softmax(z: Tensor, visible: Tensor) -> Tensor:
    """log softmax over the visible keys; 0 at hidden keys and in rows that see none."""
    alive = visible.any(-1, keepdim=True)
    masked = torch.where(visible, z, -math.inf)
    log_p = torch.where(alive, masked, 0.0).log_softmax(-1)
    return torch.where(visible, log_p, 0.0)
