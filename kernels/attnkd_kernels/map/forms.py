"""The divergences as small forms that the sweeps share; ``DIVERGENCE`` picks one at compile time.

With known normalisers every one is a sum over the keys. With p the softmax, a row's value and its gradient with respect to the
student's logits are

    form            value                               term_j                              weight
    forward_kl      Σ p_t (log p_t − log p_s)           −p_t                                1
    cross_entropy   −Σ p_t log p_s                      −p_t                                1
    reverse_kl      Σ p_s (log p_s − log p_t)           p_s (log p_s − log p_t)             1
    js              ½ Σ p_t log p_t/m + p_s log p_s/m   ½ p_s log p_s/m,  m = ½ (p_s + p_t) 1
    mse             mean (p_s − p_t)²                   p_s (p_s − p_t)                     2 / count
    logit_mse       mean (z_s − z_t)²                   z_s − z_t                           2 / count

    dz_s,j = weight · (term_j − p_s,j · centre),   centre = Σ_k term_k   (−1 for the first two, 0 for logit_mse)

so one number per row (``centre``) turns the recomputed logits into the gradient of any of them. When the student is the mean
of H heads, head h has term^h_j = (p^h_j / p_s,j) · term_j and the whole gradient is divided by H.

A normaliser is one fp32 number, so where logits are large every p of a row is off by one common factor. The sums of p are
therefore added up as well (1, but for that factor), and the value is divided by what they say: it is *self-normalising*.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnkd_kernels.language import LN2, TINY, log2_of_normal, shown
from attnkd_kernels.map.tile import fold


class Sums(NamedTuple):
    """What a sweep adds up of every row, in LANES partial sums. The first three in units of log 2 where they are logarithms."""

    value: Any  # Σ of the value's terms; js: those of p_t
    slope: Any  # js: Σ p_s log p_s/m; mse: Σ p_t (p_s − p_t)
    square: Any  # mse: Σ p_t²
    sum_s: Any  # Σ p_s
    sum_t: Any  # Σ p_t
    clash: Any  # Σ of the weighing side's p over keys that the other side hides
    count: Any  # keys that both see; the two MSEs, with masks


@triton.jit
def over_mean(ls, lt):
    """(log2 p_s/m, log2 p_t/m), m = (p_s + p_t) / 2. From the difference alone: its logarithm is one of a number between 1 and 2,
    and nothing large cancels."""
    gap = ls - lt
    half = 1.0 - log2_of_normal(1.0 + tl.exp2(-tl.abs(gap)))
    return half + tl.minimum(gap, 0.0), half - tl.maximum(gap, 0.0)


@triton.jit
def no_sums(SWEEP: tl.constexpr):
    zero = tl.zeros([SWEEP.BL, SWEEP.LANES], tl.float32)
    return Sums(zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def add_keys(sums, ls, lt, ps, pt, MASKED: tl.constexpr, SWEEP: tl.constexpr):
    """The sums after one more tile of log2 p and p [BM, BN] of both sides. MASKED: some key of it may be hidden."""
    DIVERGENCE: tl.constexpr = SWEEP.DIVERGENCE
    value, slope, square, sum_s, sum_t, clash, count = sums
    if DIVERGENCE == "logit_mse":
        gap = gap_of_logits(ls, lt, MASKED)
        value += fold(gap * gap, SWEEP)
    else:
        sum_s += fold(ps, SWEEP)
        sum_t += fold(pt, SWEEP)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
        both = where_shown(pt, ls, MASKED)
        if MASKED:
            clash += fold(pt - both, SWEEP)
        if DIVERGENCE == "forward_kl":
            value += fold(both * (lt - ls), SWEEP)
        else:
            value += fold(both * -ls, SWEEP)
    elif DIVERGENCE == "reverse_kl":
        both = where_shown(ps, lt, MASKED)
        if MASKED:
            clash += fold(ps - both, SWEEP)
        value += fold(both * (ls - lt), SWEEP)
    elif DIVERGENCE == "js":
        over_s, over_t = over_mean(ls, lt)
        value += fold(pt * over_t, SWEEP)
        slope += fold(ps * over_s, SWEEP)
    elif DIVERGENCE == "mse":
        gap = gap_of_probs(ps, pt, ls, lt, MASKED)
        pt = where_shown(pt, ls, MASKED)
        value += fold(gap * gap, SWEEP)
        slope += fold(pt * gap, SWEEP)
        square += fold(pt * pt, SWEEP)
    if MASKED and (DIVERGENCE == "mse" or DIVERGENCE == "logit_mse"):
        count += fold((shown(ls) & shown(lt)).to(tl.float32), SWEEP)
    return Sums(value, slope, square, sum_s, sum_t, clash, count)


@triton.jit
def finish(sums, counted, MASKED: tl.constexpr, SWEEP: tl.constexpr):
    """(value, centre, weight) [BM] of rows all of whose keys were added, in nats; +inf where the weighing side gives weight to
    a key that the other one hides. counted: keys that both see and that ``sums.count`` leaves out."""
    DIVERGENCE: tl.constexpr = SWEEP.DIVERGENCE
    value = tl.sum(sums.value, 1)
    slope = tl.sum(sums.slope, 1)
    square = tl.sum(sums.square, 1)
    sum_s = tl.sum(sums.sum_s, 1)
    sum_t = tl.sum(sums.sum_t, 1)
    clash = tl.sum(sums.clash, 1)
    count = tl.sum(sums.count, 1) + counted
    centre = value
    weight = value
    if DIVERGENCE == "logit_mse" or DIVERGENCE == "mse":
        weight = 2.0 / tl.maximum(count, 1.0)
        if DIVERGENCE == "mse":
            # Σ (x p_s − y p_t)² with x = 1/Σp_s, y = 1/Σp_t, without ever subtracting two large numbers
            x = 1.0 / sum_s
            y = 1.0 / sum_t
            value = x * x * value + (x - y) * (2.0 * x * slope + (x - y) * square)
            centre = value + y * (x * slope + (x - y) * square)
        value = 0.5 * weight * value
    elif DIVERGENCE == "js":
        centre = 0.5 * LN2 * slope / sum_s
        value = 0.5 * LN2 * value / sum_t + centre
    else:
        if DIVERGENCE == "reverse_kl":
            total, other = sum_s, sum_t
        else:
            total, other = sum_t, sum_s
        logs = tl.log2(other)
        if DIVERGENCE != "cross_entropy":
            logs -= tl.log2(total)
        share = 1.0 - clash / total
        value = LN2 * (value / total + share * logs)
        centre = value + share - 1.0
        if MASKED:
            value = tl.where(clash >= TINY, float("inf"), value)
    return value, centre, weight


@triton.jit
def gap_of_logits(s, t, MASKED: tl.constexpr):
    """z_s − z_t over the keys that both see, in nats."""
    gap = (s - t) * LN2
    if MASKED:
        gap = tl.where(shown(s) & shown(t), gap, 0.0)
    return gap


@triton.jit
def gap_of_probs(ps, pt, ls, lt, MASKED: tl.constexpr):
    """p_s − p_t over the keys that both see."""
    gap = ps - pt
    if MASKED:
        gap = tl.where(shown(ls) & shown(lt), gap, 0.0)
    return gap


@triton.jit
def where_shown(p, other, MASKED: tl.constexpr):
    """p over the keys that the other side, of log-probabilities ``other``, sees. (p itself is 0 where its own side hides.)"""
    if MASKED:
        p = tl.where(shown(other), p, 0.0)
    return p


@triton.jit
def terms(lh, ls, lt, MASKED: tl.constexpr, MERGED: tl.constexpr, DIVERGENCE: tl.constexpr):
    """(term_j, p^h_j) [BL, BR] of the gradient; lh: log2 p of the head, ls: of the (merged) student, lt: of the teacher."""
    ph = tl.exp2(lh)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "cross_entropy":
        pt = tl.exp2(lt)
        if MERGED:
            pt = pt * tl.exp2(lh - ls)  # p^h / p_s, at most H; anything where the student hides the key
        term = -where_shown(pt, ls, MASKED)
    elif DIVERGENCE == "js":
        over_s, _over_t = over_mean(ls, lt)
        term = (0.5 * LN2) * ph * over_s
    elif DIVERGENCE == "reverse_kl":
        term = LN2 * ph * (ls - lt)
        if MASKED:
            term = tl.where(shown(lt), term, -ph)
    else:
        tl.static_assert(DIVERGENCE == "mse")
        ps = ph
        if MERGED:
            ps = tl.exp2(ls)
        term = ph * gap_of_probs(ps, tl.exp2(lt), ls, lt, MASKED)
    return term, ph
