"""Device functions shared by the row kernels: one query row against a tile of keys.

A *wide* head is `HEADS` heads of `D` dims side by side (log-sum merging); with HEADS = 1 it is an ordinary head. W =
HEADS·D, padded to WP. Logits are kept in units of log 2 so that exponentials are single `exp2` instructions.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # finite stand-in for −inf
ALIVE = tl.constexpr(-1e29)  # a row whose maximum is above this sees at least one key
IMPOSSIBLE = tl.constexpr(
    1e12
)  # Σ p·Δ beyond this can only come from a key that one side hides: the divergence is +inf
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def wide_offsets(stride_h, stride_d, HEADS: tl.constexpr, D: tl.constexpr, WP: tl.constexpr):
    """Offsets [WP] of the W concatenated dims of a token, and which of the padded dims exist."""
    w = tl.arange(0, WP)
    if HEADS == 1:
        offsets = w * stride_d
    else:
        offsets = (w // D).to(tl.int64) * stride_h + (w % D) * stride_d
    return offsets, w < HEADS * D


@triton.jit
def load_keys(base, n, n_valid, stride_n, offsets, w_valid, EVEN_W: tl.constexpr):
    """K tile [BN, WP] in its own dtype; rows and dims that do not exist are 0."""
    pointers = base + n.to(tl.int64)[:, None] * stride_n + offsets[None, :]
    if EVEN_W:
        return tl.load(pointers, mask=n_valid[:, None], other=0.0)
    return tl.load(pointers, mask=n_valid[:, None] & w_valid[None, :], other=0.0)


@triton.jit
def masked_logits(scores, mask_base, n, n_valid, stride_n, mask_mul, KIND: tl.constexpr):
    """Scores [BN] plus mask, HIDDEN where the key is hidden or does not exist. KIND is one of launch.MASK_*."""
    if KIND == 1:
        bias = tl.load(mask_base + n.to(tl.int64) * stride_n, mask=n_valid, other=0.0).to(tl.float32)
        scores = tl.where(bias <= HIDDEN, HIDDEN, scores + bias * mask_mul)  # NaN must not pass for hidden
    if KIND == 2:
        visible = tl.load(mask_base + n.to(tl.int64) * stride_n, mask=n_valid, other=0)
        scores = tl.where(visible != 0, scores, HIDDEN)
    if KIND == 3:
        probs = tl.load(mask_base + n.to(tl.int64) * stride_n, mask=n_valid, other=0.0).to(tl.float32)
        scores = log2_of_probs(probs)
    return tl.where(n_valid, scores, HIDDEN)


@triton.jit
def log2_of_probs(p):
    """log2 p, HIDDEN where p is 0; NaN and negative ones stay visible as NaN. A GPU's logarithm takes subnormal p for 0."""
    subnormal = p < TINY
    log_p = tl.log2(tl.where(subnormal, p * 18446744073709551616.0, p)) - tl.where(subnormal, 64.0, 0.0)  # 2^64
    return tl.where(p == 0.0, HIDDEN, log_p)


@triton.jit
def row_divergence(s, t, KIND: tl.constexpr):
    """Divergence of one whole row and its gradient coefficients, from logits s, t [BN] in units of log 2.

    Returns the loss in nats (scalar) and dL/dz [BN], z being the student's logit in nats. KIND: launch.DIVERGENCES.
    """
    m_s = tl.max(s, 0)
    m_t = tl.max(t, 0)
    e_s = tl.exp2(s - m_s)
    e_t = tl.exp2(t - m_t)
    l_s = tl.sum(e_s, 0)
    l_t = tl.sum(e_t, 0)
    p_s = e_s / l_s
    p_t = e_t / l_t
    both = (s > ALIVE) & (t > ALIVE)
    count = tl.maximum(tl.sum(both.to(tl.float32), 0), 1.0)
    delta = (t - m_t) - (s - m_s)
    if KIND == 0:  # Σ p_t (log p_t − log p_s)
        loss = (tl.sum(e_t * delta, 0) / l_t - tl.log2(l_t) + tl.log2(l_s)) * LN2
        coef = p_s - p_t
    elif KIND == 1:  # Σ p_s (log p_s − log p_t)
        impossible = (t <= ALIVE) & (e_s > 0)
        log_ratio = tl.where(t <= ALIVE, 0.0, -delta - tl.log2(l_s) + tl.log2(l_t))
        loss = tl.sum(p_s * log_ratio, 0) * LN2
        coef = p_s * (log_ratio * LN2 - loss)
        loss = tl.where(tl.max(impossible.to(tl.int32), 0) > 0, float("inf"), loss)
    elif KIND == 2:  # ½ KL(p_t‖m) + ½ KL(p_s‖m)
        log_m = tl.log2(tl.maximum(0.5 * (p_s + p_t), TINY))
        ratio_s = (s - m_s) - tl.log2(l_s) - log_m
        ratio_t = (t - m_t) - tl.log2(l_t) - log_m
        half_s = 0.5 * LN2 * tl.sum(p_s * ratio_s, 0)
        loss = half_s + 0.5 * LN2 * tl.sum(p_t * ratio_t, 0)
        coef = p_s * (0.5 * LN2 * ratio_s - half_s)
    elif KIND == 3:  # −Σ p_t log p_s
        loss = (-tl.sum(e_t * (s - m_s), 0) / l_t + tl.log2(l_s)) * LN2
        coef = p_s - p_t
    elif KIND == 4:  # mean (p_s − p_t)²
        gap = tl.where(both, p_s - p_t, 0.0)
        loss = tl.sum(gap * gap, 0) / count
        slope = 2.0 * gap / count
        coef = p_s * (slope - tl.sum(p_s * slope, 0))
    else:  # mean (z_s − z_t)²
        gap = tl.where(both, (s - t) * LN2, 0.0)
        loss = tl.sum(gap * gap, 0) / count
        coef = 2.0 * gap / count
    dead = row_is_dead(m_s, l_s, m_t, l_t)
    loss = tl.where(loss > IMPOSSIBLE, float("inf"), loss)
    return tl.where(dead, 0.0, loss), tl.where(dead, 0.0, coef)


@triton.jit
def row_is_dead(m_s, l_s, m_t, l_t):
    """No key visible on one of the sides. Maxima skip NaN, so the sums decide that a row with NaN is not dead."""
    return ((m_s <= ALIVE) | (m_t <= ALIVE)) & (l_s == l_s) & (l_t == l_t)
