"""The divergence of one block of rows, and its derivative by the student's logits, in plain PyTorch and in place.

A block holds whole rows, so each softmax is finished inside it: with u = z − max z, e = exp(u) and l = Σ e (keys j are the
last dimension throughout) p = e / l and log p = u − log l, but neither is ever written. The normalisers are constant along
a row and leave the sums: Σ p_t log(p_t / p_s) = Σ e_t (u_t − u_s) / l_t + log l_s − log l_t. Differences of u are differences
relative to the rows' maxima, so a common offset of the logits costs no precision.

The derivative leaves as ``ds`` and a factor per row: ∂row/∂z_s = factor · ds. The factor is applied to [.., D]
queries later instead of [.., N] rows here.

Shapes: z, ds [b, h, r, N]; rows, factor [b, h, r, 1]; b, h, r: the images, heads and query rows of the block (h = 1 where
heads are merged). Hidden keys have z = −inf. Arguments named ``z`` are overwritten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """softmax(z) in pieces: ``shifted`` u = z − max z, ``exp`` e^u (both [b, h, r, N]) and ``total`` Σ e^u [b, h, r, 1].

    ``masked``: keys may be hidden; there u = −inf and e = 0. ``alive`` [b, h, r, 1]: the row sees a key; None = all do.
    """

    shifted: Tensor
    exp: Tensor
    total: Tensor
    masked: bool = False
    alive: Tensor | None = None

    def hidden(self) -> Tensor | None:
        return torch.isneginf(self.shifted) if self.masked else None


def softmax_(z: Tensor, exp: Tensor, masked: bool) -> Softmax:
    """z becomes ``shifted``; ``exp`` is written."""
    top = z.amax(-1, keepdim=True)
    if masked:
        top.masked_fill_(torch.isneginf(top), 0.0)
    z.sub_(top)
    torch.exp(z, out=exp)
    return _softmax(z, exp, masked)


def softmax_of_probs(probs: Tensor, log: Tensor, exp: Tensor) -> Softmax:
    """Given rows, not necessarily normalised; a key of probability 0 is hidden."""
    torch.clamp(exp.copy_(probs), min=0.0, out=exp)
    return _softmax(torch.log(exp, out=log), exp, masked=True)


def _softmax(shifted: Tensor, exp: Tensor, masked: bool) -> Softmax:
    total = exp.sum(-1, keepdim=True)
    if not masked:
        return Softmax(shifted, exp, total)
    alive = total > 0
    return Softmax(shifted, exp, total.masked_fill_(~alive, 1.0), True, alive)


def divergence_(kind: str, s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, ds, factor) of every kind but logit_mse. Overwrites both sides; ds is one of the student's buffers."""
    rows, ds, factor = _KINDS[kind](s, t)
    return _drop_dead(rows, ds, factor, s.alive, t.alive)


def logit_mse_(z_s: Tensor, z_t: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the keys visible to both of (z_s − z_t)²."""
    count: Tensor | int = z_s.shape[-1]
    alive_s = alive_t = None
    if masked:
        hidden_s, hidden_t = torch.isneginf(z_s), torch.isneginf(z_t)
        alive_s, alive_t = ~hidden_s.all(-1, keepdim=True), ~hidden_t.all(-1, keepdim=True)
        hidden = hidden_s.logical_or_(hidden_t)
        count = _count_visible(hidden)
    ds = z_s.sub_(z_t)
    if masked:
        ds.masked_fill_(hidden, 0.0)
    rows = torch.mul(ds, ds, out=z_t).sum(-1, keepdim=True) / count
    factor = torch.full_like(rows, 2.0) / count
    return _drop_dead(rows, ds, factor, alive_s, alive_t)


def _drop_dead(
    rows: Tensor, ds: Tensor, factor: Tensor, alive_s: Tensor | None, alive_t: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    for alive in (alive_s, alive_t):
        if alive is not None:
            rows, factor = rows.masked_fill(~alive, 0.0), factor.masked_fill(~alive, 0.0)
    return rows, ds, factor


def _forward_kl(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    rows = _expectation(t, t.shifted.sub_(s.shifted)) + s.total.log() - t.total.log()
    return rows, *_towards_teacher(s, t)


def _cross_entropy(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    rows = s.total.log() - _expectation(t, t.shifted.copy_(s.shifted))
    return rows, *_towards_teacher(s, t)


def _towards_teacher(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor]:
    """∂/∂z_s of −Σ p_t log p_s: p_s − p_t. Keys hidden from the student take their p_t with them."""
    hidden = s.hidden()
    if hidden is not None:
        kept = t.exp.masked_fill_(hidden, 0.0).sum(-1, keepdim=True) / t.total
        s.exp.mul_(kept)
    return s.exp.addcmul_(t.exp, s.total / t.total, value=-1.0), s.total.reciprocal()


def _reverse_kl(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    hidden = t.hidden()
    value = s.shifted.sub_(t.shifted)
    constant = t.total.log() - s.total.log()
    mean = _expectation(s, value)
    rows = mean + constant
    if hidden is not None:  # a row that is +inf keeps the gradient of its finite terms
        value.masked_fill_(hidden, 0.0)
        mean = value.sum(-1, keepdim=True) / s.total
        seen = s.exp.masked_fill(hidden, 0.0)
        share = seen.sum(-1, keepdim=True) / s.total
        value.addcmul_(seen.addcmul_(s.exp, share, value=-1.0), constant + 1.0)
    return rows, value.addcmul_(s.exp, mean, value=-1.0), s.total.reciprocal()


def _js(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    ratio = s.total / t.total
    p_t = t.exp.mul_(ratio)  # times l_s, like s.exp = p_s · l_s
    middle = torch.lerp(s.exp, p_t, 0.5).clamp_min_(torch.finfo(p_t.dtype).tiny).log_()
    value_s, value_t = s.shifted.sub_(middle), t.shifted.sub_(middle)
    mean_s, mean_t = _expectation(s, value_s), _expectation(t, value_t) / ratio
    rows = 0.5 * (mean_s + mean_t + ratio.log())
    return rows, value_s.addcmul_(s.exp, mean_s, value=-1.0), 0.5 / s.total


def _mse(s: Softmax, t: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    hidden_s, hidden_t = s.hidden(), t.hidden()
    hidden = hidden_t if hidden_s is None else (hidden_s if hidden_t is None else hidden_s.logical_or_(hidden_t))
    gap = torch.addcmul(s.exp, t.exp, s.total / t.total, value=-1.0, out=t.exp)  # (p_s − p_t) · l_s
    count: Tensor | int = gap.shape[-1]
    if hidden is not None:
        gap.masked_fill_(hidden, 0.0)
        count = _count_visible(hidden)
    scale = 1.0 / (s.total.square() * count)
    rows = torch.mul(gap, gap, out=t.shifted).sum(-1, keepdim=True) * scale
    value = torch.mul(s.exp, gap, out=s.shifted)
    mean = value.sum(-1, keepdim=True) / s.total
    return rows, value.addcmul_(s.exp, mean, value=-1.0), 2.0 * scale


_KINDS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "cross_entropy": _cross_entropy,
    "mse": _mse,
}


def _expectation(side: Softmax, value: Tensor) -> Tensor:
    """Σ p · value, [b, h, r, 1]; a key of probability 0 adds 0 even to an infinite value. ``value`` becomes e · value."""
    value.mul_(side.exp)
    if side.masked or value is not side.shifted:
        value.masked_fill_(side.exp == 0, 0.0)
    return value.sum(-1, keepdim=True) / side.total


def _count_visible(hidden: Tensor) -> Tensor:
    return (hidden.shape[-1] - hidden.sum(-1, keepdim=True)).clamp_min_(1)


@dataclass(frozen=True)
class MergedHeads:
    """The heads of one side, merged by their mean, max or min: ``logits`` [b, 1, r, N] whose softmax is the merged row.

    Kept for the derivative: ``heads`` (``shifted`` now holds log p^h) and the same ``log_merged`` that ``logits`` began as.
    """

    logits: Tensor
    log_merged: Tensor
    heads: Softmax
    hidden: Tensor | None

    @staticmethod
    def of(heads: Softmax, merge: str) -> MergedHeads:
        log_p = heads.shifted.sub_(heads.total.log())
        if merge == "mean":
            merged = log_p.logsumexp(1, keepdim=True)
        else:
            merged = log_p.amax(1, keepdim=True) if merge == "max" else log_p.amin(1, keepdim=True)
        hidden = None
        if heads.masked:
            hidden = torch.isneginf(log_p).any(1, keepdim=True)
            merged.masked_fill_(hidden, -math.inf)
        return MergedHeads(merged.clone(), merged, heads, hidden)

    def backward_(self, ds: Tensor, merge: str) -> Tensor:
        """∂/∂merged logits [b, 1, r, N] → ∂/∂z^h [b, h, r, N] (both without the row's factor)."""
        log_p, p = self.heads.shifted, self.heads.exp
        if merge == "mean":
            share = log_p.sub_(self.log_merged).exp_()
        else:  # ties share equally
            share = torch.eq(log_p, self.log_merged, out=log_p)
            share.div_(share.sum(1, keepdim=True))
        share.mul_(ds)
        if self.hidden is not None:
            share.masked_fill_(self.hidden, 0.0)
        return share.addcmul_(p, share.sum(-1, keepdim=True) / self.heads.total, value=-1.0)
