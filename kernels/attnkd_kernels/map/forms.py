"""The divergences of whole maps, as small forms that the sweeps share; ``DIV`` names one (attnkd_kernels.divergences).

With logits z in log2 units and p the softmax, a row's value and its gradient with respect to the student's logits are

    form            value                               term_j                              weight
    forward_kl      Σ p_t (log p_t − log p_s)           −p_t                                1
    cross_entropy   −Σ p_t log p_s                      −p_t                                1
    reverse_kl      Σ p_s (log p_s − log p_t)           p_s (log p_s − log p_t)             1
    js              ½ Σ p_t log p_t/m + p_s log p_s/m   ½ p_s log p_s/m,  m = ½ (p_s + p_t) 1
    mse             mean (p_s − p_t)²                   p_s (p_s − p_t)                     2 / count
    logit_mse       mean (z_s − z_t)²                   z_s − z_t                           2 / count

    dz_s,j = weight · (term_j − p_s,j · centre),   centre = Σ_k term_k   (0 for logit_mse)

so one saved number per row (``centre``) turns the recomputed logits into the gradient of any of them. When the student
is the mean of H heads, head h has term^h_j = (p^h_j / p_s,j) · term_j and the whole gradient is divided by H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import LN2, TINY, shown


@triton.jit
def online_kl(
    w, v, factor_w, factor_v, top_w, top_v, sum_w, sum_v, cross, both, clash, MASKED: tl.constexpr, CROSS: tl.constexpr
):
    """One tile of Σ p_w (log p_w − log p_v), or of −Σ p_w log p_v (CROSS), relative to the running maxima.

    w·factor_w [BM, BN]: logits of the side that weighs, v·factor_v: of the other; multiplied here, where the product fuses
    with a subtraction (factors > 0, or 1 for finished logits). cross = Σ 2^(z_w−top_w) · ((z_w − top_w) − (z_v − top_v)) over
    the keys that both see; both and clash split sum_w into the keys that the other side sees and those that it does not.
    """
    new_w = tl.maximum(top_w, tl.max(w, 1) * factor_w)
    new_v = tl.maximum(top_v, tl.max(v, 1) * factor_v)
    step_w = top_w - new_w
    step_v = top_v - new_v
    shrink_w = tl.exp2(step_w)
    shrink_v = tl.exp2(step_v)
    dw = w * factor_w - new_w[:, None]
    dv = v * factor_v - new_v[:, None]
    ew = tl.exp2(dw)
    ev = tl.exp2(dv)
    if CROSS:
        difference = -dv
        step = -step_v
    else:
        difference = dw - dv
        step = step_w - step_v
    sum_v = sum_v * shrink_v + tl.sum(ev, 1)
    if MASKED:
        sees_w = shown(w)
        sees_v = shown(v)
        lost = tl.where(sees_w & (sees_v == 0), ew, 0.0)
        ew = tl.where(sees_w & sees_v, ew, 0.0)
        cross = shrink_w * (cross + both * step) + tl.sum(ew * difference, 1)
        both = both * shrink_w + tl.sum(ew, 1)
        clash = clash * shrink_w + tl.sum(lost, 1)
        sum_w = both + clash
    else:
        cross = shrink_w * (cross + sum_w * step) + tl.sum(ew * difference, 1)
        sum_w = sum_w * shrink_w + tl.sum(ew, 1)
    return new_w, new_v, sum_w, sum_v, cross, both, clash


@triton.jit
def finish_kl(sum_w, sum_v, cross, both, clash, REVERSE: tl.constexpr, MASKED: tl.constexpr, CROSS: tl.constexpr):
    """(value, centre) of the row from :func:`online_kl`; +inf where the weighing side has mass on keys hidden to the other.

    The finite part covers the keys both see; their share of the weighing side is ``share`` (1 without a clash).
    """
    sum_w = tl.maximum(sum_w, TINY)
    share = sum_w / sum_w
    if MASKED:
        share = both / sum_w
    if CROSS:
        logs = tl.log2(sum_v)
    else:
        logs = tl.log2(sum_v) - tl.log2(sum_w)
    value = LN2 * (cross / sum_w + share * logs)
    if REVERSE:
        centre = value + share - 1.0
    else:
        centre = -share
    if MASKED:
        value = tl.where(clash > 0.0, float("inf"), value)
    return value, centre


@triton.jit
def online_mse(
    s, t, factor_s, factor_t, top_s, top_t, sum_s, sum_t, square, slope, teacher, count, MASKED: tl.constexpr
):
    """One tile of square = Σ (p_s − p_t)², slope = Σ p_t (p_s − p_t), teacher = Σ p_t², p normalised by what was seen so far.

    More keys turn p_s into x·p_s and p_t into y·p_t; the sums follow without ever subtracting two large ones.
    """
    new_s = tl.maximum(top_s, tl.max(s, 1) * factor_s)
    new_t = tl.maximum(top_t, tl.max(t, 1) * factor_t)
    old_s = sum_s * tl.exp2(top_s - new_s)
    old_t = sum_t * tl.exp2(top_t - new_t)
    es = tl.exp2(s * factor_s - new_s[:, None])
    et = tl.exp2(t * factor_t - new_t[:, None])
    sum_s = old_s + tl.sum(es, 1)
    sum_t = old_t + tl.sum(et, 1)
    over_s = 1.0 / sum_s
    over_t = 1.0 / sum_t
    x = old_s * over_s
    y = old_t * over_t
    pt = et * over_t[:, None]
    gap = es * over_s[:, None] - pt
    if MASKED:
        seen = shown(s) & shown(t)
        pt = tl.where(seen, pt, 0.0)
        gap = tl.where(seen, gap, 0.0)
        count += tl.sum(seen.to(tl.float32), 1)
    square = x * x * square + (x - y) * (2.0 * x * slope + (x - y) * teacher) + tl.sum(gap * gap, 1)
    slope = y * (x * slope + (x - y) * teacher) + tl.sum(pt * gap, 1)
    teacher = y * y * teacher + tl.sum(pt * pt, 1)
    return new_s, new_t, sum_s, sum_t, square, slope, teacher, count


@triton.jit
def gap_of_logits(s, t, MASKED: tl.constexpr):
    """z_s − z_t over the keys that both see, in units of the natural logarithm."""
    gap = (s - t) * LN2
    if MASKED:
        gap = tl.where(shown(s) & shown(t), gap, 0.0)
    return gap


@triton.jit
def value_terms(ps, pt, ls, lt, DIV: tl.constexpr, MASKED: tl.constexpr):
    """[BM, BN]: a key's share of the row's value from probabilities and their log2; mse is left to be divided by count."""
    if DIV == "forward_kl":
        value = LN2 * pt * (lt - ls)
    elif DIV == "cross_entropy":
        value = -LN2 * pt * ls
    elif DIV == "reverse_kl":
        value = LN2 * ps * (ls - lt)
    elif DIV == "js":
        middle = tl.log2(tl.maximum(ps + pt, TINY)) - 1.0
        value = (0.5 * LN2) * (pt * (lt - middle) + ps * (ls - middle))
    else:
        tl.static_assert(DIV == "mse")
        value = (ps - pt) * (ps - pt)
    if MASKED:
        if DIV != "js":
            value = tl.where(shown(ls) & shown(lt), value, 0.0)
    return value


@triton.jit
def terms(lh, ls, lt, DIV: tl.constexpr, MASKED: tl.constexpr, MERGED: tl.constexpr):
    """(term_j, p^h_j) [BL, BR] of the gradient; lh: log2 p of the head, ls: of the (merged) student, lt: of the teacher."""
    ph = tl.exp2(lh)
    if DIV == "forward_kl" or DIV == "cross_entropy":
        term = -tl.exp2(lt)
        if MERGED:
            term = term * tl.exp2(lh - ls)  # p^h / p_s, at most H
        if MASKED:
            term = tl.where(shown(ls) & shown(lt), term, 0.0)
    elif DIV == "reverse_kl":
        term = LN2 * ph * (ls - lt)
        if MASKED:
            term = tl.where(shown(ls) & shown(lt), term, -ph)
    else:
        if MERGED:
            ps = tl.exp2(ls)
        else:
            ps = ph
        pt = tl.exp2(lt)
        if DIV == "js":
            term = (0.5 * LN2) * ph * (ls + 1.0 - tl.log2(tl.maximum(ps + pt, TINY)))
        else:
            tl.static_assert(DIV == "mse")
            gap = ps - pt
            if MASKED:
                gap = tl.where(shown(ls) & shown(lt), gap, 0.0)
            term = ph * gap
    return term, ph
