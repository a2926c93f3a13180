"""The six divergences of one query row, named the same in every kernel and launcher.

With p = softmax(z) of the student (s) and the teacher (t), and log-ratios r = log p_s − log p_t, ρ = log p_s − log ½(p_s + p_t):

    name            loss                                          ∂loss/∂z_s,j
    forward_kl      Σ p_t (log p_t − log p_s)                     p_s − p_t
    cross_entropy   −Σ p_t log p_s                                p_s − p_t
    reverse_kl      Σ p_s (log p_s − log p_t)                     p_s (r − loss)
    js              ½ KL(p_t ‖ ½(p_s + p_t)) + ½ KL(p_s ‖ ½(p_s + p_t))   ½ p_s (ρ − Σ p_s ρ)
    mse             mean (p_s − p_t)²                             p_s (g − Σ p_s g),  g = 2 (p_s − p_t)/count
    logit_mse       mean (z_s − z_t)²                             2 (z_s − z_t)/count

The means are over the ``count`` keys that both sides see.

* :func:`row_divergence` takes a whole row: any of the six.
* :func:`more_keys` takes the row piece by piece (forward_kl and cross_entropy), keeping

      cross = Σ 2^(t − top_t) · difference,   difference = (t − top_t) − (s − top_s),  or −(s − top_s) for the cross-entropy

  relative to the largest logits so far, so that no two large numbers are ever subtracted. (:mod:`attnkd_kernels.map.forms`
  holds the forms of whole maps.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import HIDDEN, LN2, TINY, Stats, hidden, row_is_dead, shown


@triton.jit
def row_divergence(s, t, HIDES: tl.constexpr, DIVERGENCE: tl.constexpr):
    """The loss of one whole row in nats (scalar) and ∂loss/∂z_s [BN] (z_s in nats), from logits s, t [BN] in units of log 2.
    HIDES: whether the student may hide keys that the teacher sees."""
    m_s = tl.max(s, 0)
    m_t = tl.max(t, 0)
    e_s = tl.exp2(s - m_s)
    e_t = tl.exp2(t - m_t)
    l_s = tl.sum(e_s, 0)
    l_t = tl.sum(e_t, 0)
    p_s = e_s / l_s
    p_t = e_t / l_t
    both = shown(s) & shown(t)
    count = tl.maximum(tl.sum(both.to(tl.float32), 0), 1.0)
    delta = (t - m_t) - (s - m_s)
    if DIVERGENCE == "forward_kl":
        loss = (tl.sum(e_t * delta, 0) / l_t - tl.log2(l_t) + tl.log2(l_s)) * LN2
        coef = p_s - p_t
    elif DIVERGENCE == "cross_entropy":
        loss = (-tl.sum(e_t * (s - m_s), 0) / l_t + tl.log2(l_s)) * LN2
        coef = p_s - p_t
    elif DIVERGENCE == "reverse_kl":
        impossible = hidden(t) & shown(s) & (e_s >= TINY)
        log_ratio = tl.where(hidden(t), 0.0, -delta - tl.log2(l_s) + tl.log2(l_t))
        loss = tl.sum(p_s * log_ratio, 0) * LN2
        coef = p_s * (log_ratio * LN2 - loss)
        loss = tl.where(tl.max(impossible.to(tl.int32), 0) > 0, float("inf"), loss)
    elif DIVERGENCE == "js":
        log_m = tl.log2(tl.maximum(0.5 * (p_s + p_t), TINY))
        ratio_s = (s - m_s) - tl.log2(l_s) - log_m
        ratio_t = (t - m_t) - tl.log2(l_t) - log_m
        half_s = 0.5 * LN2 * tl.sum(p_s * ratio_s, 0)
        loss = half_s + 0.5 * LN2 * tl.sum(p_t * ratio_t, 0)
        coef = p_s * (0.5 * LN2 * ratio_s - half_s)
    elif DIVERGENCE == "mse":
        gap = tl.where(both, p_s - p_t, 0.0)
        loss = tl.sum(gap * gap, 0) / count
        slope = 2.0 * gap / count
        coef = p_s * (slope - tl.sum(p_s * slope, 0))
    else:
        tl.static_assert(DIVERGENCE == "logit_mse")
        gap = tl.where(both, (s - t) * LN2, 0.0)
        loss = tl.sum(gap * gap, 0) / count
        coef = 2.0 * gap / count
    if HIDES and (DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy"):
        loss = tl.where(tl.max(lost(s, e_t), 0) >= TINY, loss + float("inf"), loss)  # NaN stays
    dead = row_is_dead(m_s, l_s, m_t, l_t)
    return tl.where(dead, 0.0, loss), tl.where(dead, 0.0, coef)


@triton.jit
def lost(s, e_t):
    """The teacher's weight on keys that the student hides. Where it is that of a number the loss is +inf; a loss that is only
    large does not tell, since HIDDEN times a small weight is of any size."""
    return tl.where(hidden(s), e_t, 0.0)


@triton.jit
def no_keys(ROWS: tl.constexpr):
    """The statistics [ROWS] of rows of which no key was seen."""
    zero = tl.zeros([ROWS], tl.float32)
    lowest = tl.full([ROWS], HIDDEN, tl.float32)
    return Stats(lowest, zero, lowest, zero, zero)


@triton.jit
def relative_to(stats, top_s, top_t, DIVERGENCE: tl.constexpr):
    """The same statistics relative to larger maxima. With drop = old − new maximum, the difference of every key seen shifts by
    drop_t − drop_s (the cross-entropy's by −drop_s), and its weight by 2^drop_t."""
    drop_s = stats.top_s - top_s
    drop_t = stats.top_t - top_t
    a_s = tl.exp2(drop_s)
    a_t = tl.exp2(drop_t)
    shift = drop_t - drop_s if DIVERGENCE == "forward_kl" else -drop_s
    return Stats(top_s, stats.sum_s * a_s, top_t, stats.sum_t * a_t, a_t * (stats.cross + stats.sum_t * shift))


@triton.jit
def more_keys(stats, s, t, DIVERGENCE: tl.constexpr):
    """The statistics [ROWS] after one more key of each row, with logits s, t [ROWS]; and the weights [ROWS] that earlier sums
    (a_s, a_t) and the new key (e_s, e_t) have relative to the new maxima. The order of the steps saves registers."""
    tl.static_assert(DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy")
    top_s = tl.maximum(stats.top_s, s)
    top_t = tl.maximum(stats.top_t, t)
    a_s = tl.exp2(stats.top_s - top_s)
    a_t = tl.exp2(stats.top_t - top_t)
    e_s = tl.exp2(s - top_s)
    e_t = tl.exp2(t - top_t)
    if DIVERGENCE == "forward_kl":
        cross = a_t * (stats.cross + stats.sum_t * ((stats.top_t - top_t) - (stats.top_s - top_s)))
        cross += e_t * ((t - top_t) - (s - top_s))
    else:
        cross = a_t * (stats.cross - stats.sum_t * (stats.top_s - top_s))
        cross -= e_t * (s - top_s)
    return Stats(top_s, stats.sum_s * a_s + e_s, top_t, stats.sum_t * a_t + e_t, cross), a_s, a_t, e_s, e_t


@triton.jit
def online_loss(stats, DIVERGENCE: tl.constexpr):
    """The loss in nats of a row all of whose keys were seen: cross/sum_t − log sum_t + log sum_s."""
    loss = stats.cross / stats.sum_t + tl.log2(stats.sum_s)
    if DIVERGENCE == "forward_kl":
        loss -= tl.log2(stats.sum_t)
    return loss * LN2
