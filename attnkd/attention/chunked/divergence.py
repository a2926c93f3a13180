"""The divergence of one block of rows, and its derivative by the student's logits, in plain PyTorch and in place.

A block holds whole rows, so each softmax is finished inside it: with u = z − max z, e = exp(u) and l = Σ e (keys j are the
last dimension throughout) p = e / l and log p = u − log l, but neither is ever written. The normalisers are constant along
a row and leave the sums: Σ p_t log(p_t / p_s) = Σ e_t (u_t − u_s) / l_t + log l_s − log l_t. Differences of u are differences
relative to the rows' maxima, so a common offset of the logits costs no precision.

The derivative leaves as ``ds`` and a factor per row: ∂row/∂z_s = factor · ds, so that the factor can be multiplied with the
upstream gradient first.

Shapes: z, ds [P, r, N], rows, factor [P, r, 1]; P: images and heads of the block in one dimension, r: its query rows. Hidden
keys have z = −inf. Arguments named ``z`` are overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""A probability below this adds nothing, in float64 either: all implementations agree on which rows are infinite."""


class Softmax:
    """softmax(z) in pieces, each made when it is first asked for.

    shifted: u = z − max z, in the memory of z [P, r, N]; −inf at hidden keys.
    exp: e^u [P, r, N], 0 at hidden keys; in ``scratch()``, or with :meth:`exp_` in the place of ``shifted``.
    total: Σ e^u [P, r, 1]; 1 in rows that see no key.
    lse: log Σ e^z [P, r, 1] where it is known; it takes the place of max z. :meth:`found_lse` tells whether it is right.
    masked: keys may be hidden.  alive [P, r, 1]: the row sees a key; None where nothing is masked.
    """

    def __init__(self, z: Tensor, scratch: Callable[[], Tensor], masked: bool, lse: Tensor | None = None) -> None:
        top = z.amax(-1, keepdim=True) if lse is None else lse.to(z.dtype, copy=True)
        self.alive = ~torch.isneginf(top) if masked else None
        if lse is not None:
            top.masked_fill_(torch.isinf(top), 0.0)  # where a key is visible all the same, found_lse() shows it
        elif self.alive is not None:
            top.masked_fill_(~self.alive, 0.0)
        self.top = top
        self.shifted = z.sub_(top)
        self.masked = masked
        self._scratch = scratch
        self._exp: Tensor | None = None

    @staticmethod
    def of_probs(probs: Tensor, out: Tensor, scratch: Callable[[], Tensor]) -> Softmax:
        """Given rows, not necessarily normalised; a key of probability 0 is hidden, a negative one makes its row NaN."""
        return Softmax(out.copy_(probs).log_(), scratch, masked=True)

    @property
    def exp(self) -> Tensor:
        if self._exp is None:
            self._exp = torch.exp(self.shifted, out=self._scratch())
        return self._exp

    def spend_shifted(self) -> Tensor:
        """``shifted``, to be overwritten by the caller."""
        _ = self.exp  # made from it, so made first
        return self.shifted

    def exp_(self) -> Tensor:
        """``exp``, after which ``shifted`` must not be used any more."""
        if self._exp is None:
            self._exp = self.shifted.exp_()
        return self._exp

    @cached_property
    def _sum(self) -> Tensor:
        return self.exp.sum(-1, keepdim=True)

    @cached_property
    def total(self) -> Tensor:
        return self._sum if self.alive is None else self._sum.masked_fill(~self.alive, 1.0)

    def found_lse(self) -> Tensor:
        """log Σ e^z [P, r, 1]; −inf in rows that see no key."""
        return self.top + self._sum.log()

    def hidden(self) -> Tensor | None:
        return torch.isneginf(self.shifted) if self.masked else None


def divergence_(kind: str, s: Softmax, t: Softmax, need_ds: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(rows, ds, factor) of every kind but logit_mse; ds and factor are None unless needed. Overwrites both sides."""
    rows, ds, factor = _KINDS[kind](s, t, need_ds)
    return _drop_dead(rows, ds, factor, s.alive, t.alive)


def logit_mse_(z_s: Tensor, z_t: Tensor, masked: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
    rows = _square_sum(ds) / count
    return _drop_dead(rows, ds, torch.full_like(rows, 2.0) / count, alive_s, alive_t)


_Result = tuple[Tensor, Tensor | None, Tensor | None]


def _drop_dead(
    rows: Tensor, ds: Tensor | None, factor: Tensor | None, alive_s: Tensor | None, alive_t: Tensor | None
) -> _Result:
    for alive in (alive_s, alive_t):
        if alive is not None:
            rows = rows.masked_fill(~alive, 0.0)
            factor = None if factor is None else factor.masked_fill(~alive, 0.0)
    return rows, ds, factor


def _forward_kl(s: Softmax, t: Softmax, need_ds: bool) -> _Result:
    mean = _mean(t, t.spend_shifted().sub_(s.shifted), s)
    s.exp_()
    return mean + s.total.log() - t.total.log(), *_gap(s, t, need_ds)


def _cross_entropy(s: Softmax, t: Softmax, need_ds: bool) -> _Result:
    mean = _mean(t, s.shifted, s, out=t.spend_shifted())
    s.exp_()
    return s.total.log() - mean, *_gap(s, t, need_ds)


def _gap(s: Softmax, t: Softmax, need_ds: bool) -> tuple[Tensor | None, Tensor | None]:
    """∂/∂z_s of −Σ p_t log p_s, which is p_s − p_t."""
    if not need_ds:
        return None, None
    return s.exp.addcmul_(t.exp, s.total / t.total, value=-1.0), s.total.reciprocal()


def _reverse_kl(s: Softmax, t: Softmax, need_ds: bool) -> _Result:
    p_s, hidden = s.exp, t.hidden()
    value = s.spend_shifted().sub_(t.shifted)
    t.exp_()
    mean = _mean(s, value, t)
    rows = mean + t.total.log() - s.total.log()
    if not need_ds:
        return rows, None, None
    if hidden is not None:  # a row that is +inf must not make the gradients of others NaN
        mean = value.masked_fill_(hidden, 0.0).sum(-1, keepdim=True) / s.total
    return rows, value.addcmul_(p_s, mean, value=-1.0), s.total.reciprocal()


def _js(s: Softmax, t: Softmax, need_ds: bool) -> _Result:
    p_s, ratio = s.exp, s.total / t.total
    p_t = t.exp.mul_(ratio)  # times l_s, like p_s
    middle = torch.lerp(p_s, p_t, 0.5).clamp_min_(torch.finfo(p_t.dtype).tiny).log_()
    value_s, value_t = s.spend_shifted().sub_(middle), t.spend_shifted().sub_(middle)
    mean_s, mean_t = _mean(s, value_s, t), _mean(t, value_t, s) / ratio
    rows = 0.5 * (mean_s + mean_t + ratio.log())
    if not need_ds:
        return rows, None, None
    return rows, value_s.addcmul_(p_s, mean_s, value=-1.0), 0.5 / s.total


def _mse(s: Softmax, t: Softmax, need_ds: bool) -> _Result:
    hidden_s, hidden_t = s.hidden(), t.hidden()
    hidden = hidden_t if hidden_s is None else (hidden_s if hidden_t is None else hidden_s.logical_or_(hidden_t))
    p_s, p_t = s.exp_(), t.exp_()
    count: Tensor | int = p_s.shape[-1]
    gap = torch.addcmul(p_s, p_t, s.total / t.total, value=-1.0, out=p_t)  # (p_s − p_t) · l_s
    if hidden is not None:
        gap.masked_fill_(hidden, 0.0)
        count = _count_visible(hidden)
    scale = 1.0 / (s.total.square() * count)
    rows = _square_sum(gap) * scale
    if not need_ds:
        return rows, None, None
    value = gap.mul_(p_s)
    mean = value.sum(-1, keepdim=True) / s.total
    return rows, value.addcmul_(p_s, mean, value=-1.0), 2.0 * scale


_KINDS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "cross_entropy": _cross_entropy,
    "mse": _mse,
}


def _mean(side: Softmax, value: Tensor, other: Softmax, out: Tensor | None = None) -> Tensor:
    """Σ p · value, [P, r, 1]; a key of probability 0 adds 0 even to an infinite value (NaN stays). ``out`` (or value) ← e · value."""
    product = torch.mul(side.exp, value, out=value if out is None else out)
    if side.masked or other.masked:
        product.masked_fill_(side.exp < TINY, 0.0)
    return product.sum(-1, keepdim=True) / side.total


def _square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()


def _count_visible(hidden: Tensor) -> Tensor:
    return (hidden.shape[-1] - hidden.sum(-1, keepdim=True)).clamp_min_(1)


class MergedHeads:
    """The heads of one side merged by their mean, max or min, from each head's own finished softmax [b · H, r, N].

    logits: [b, r, N], whose softmax is the merged row (AttnDistill, Sec. 4.3); the caller may overwrite it.
    """

    def __init__(self, softmax: Softmax, merge: str | None, num_heads: int) -> None:
        log_p = softmax.spend_shifted().sub_(softmax.total.log()).unflatten(0, (-1, num_heads))
        if merge == "mean":  # its 1 / H is constant along the row
            merged = log_p.logsumexp(1, keepdim=True)
        else:
            merged = log_p.amax(1, keepdim=True) if merge == "max" else log_p.amin(1, keepdim=True)
        self._hidden = None
        if softmax.alive is not None:  # a row that some head cannot see at all is hidden
            dead = ~softmax.alive.unflatten(0, (-1, num_heads)).all(1, keepdim=True)
            self._hidden = torch.isneginf(merged).logical_or_(dead)
            merged.masked_fill_(self._hidden, -math.inf)
        self._log_p, self._merged, self._softmax, self._merge = log_p, merged, softmax, merge
        self.logits = merged.squeeze(1).clone()

    def backward_(self, ds: Tensor) -> Tensor:
        """∂/∂logits [b, r, N] → ∂/∂z of the heads [b · H, r, N]."""
        if self._merge == "mean":
            share = self._log_p.sub_(self._merged).exp_()
        else:  # ties share equally
            share = self._log_p.copy_(self._log_p == self._merged)
            share.div_(share.sum(1, keepdim=True))
        share.mul_(ds.unsqueeze(1))
        if self._hidden is not None:
            share.masked_fill_(self._hidden, 0.0)
        share = share.flatten(0, 1)
        total = share.sum(-1, keepdim=True) / self._softmax.total
        return share.addcmul_(self._softmax.exp, total, value=-1.0)
