"""The operations once more, from the papers' formulas in float64: the truth that every implementation is judged by.

It shares no code with the package, the reference included, so that a mistake in a formula becomes visible. It is written for reading: a row
is handled on the keys that it sees, and a head at a time where heads matter. Gradients are those of autograd through these
formulas. Arguments are named as the public functions name theirs; all of them may have any floating point dtype, the results
are float64 on the inputs' device.

Sources: AttnDistill (arXiv:2210.00944) Sec. 3.3 and 4.3 for merging and resizing; head-specific knowledge distillation, Eq. 2.8
to 2.11, for the divergences of a row; Attention Probe (ICASSP 2022) for the relation row. The rules for masks and for rows that
see nothing are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOTHING = -math.inf  # the logarithm of the probability of a hidden key
HIDES = -1e30  # an additive mask at or below this hides its key
CUBIC = -0.75  # A of the bicubic kernel
NO_WEIGHT = 2.0**-126  # a probability below this: float32 has no smaller normal number
NO_DIRECTION = 1e-12  # a vector with a norm up to this


def attention_divergence(*, row_weight: Tensor | None = None, reduction: str = "mean", **arguments: Any) -> Tensor:
    """As :func:`attnkd.attention_divergence`, with arguments by name: float64, scalar or [B, Ho, M]."""
    return reduce_rows(*divergence_rows(**arguments), row_weight, reduction)


def divergence_rows(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor | None = None,
    teacher_key: Tensor | None = None,
    *,
    teacher_probs: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    merge: str | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The rows [B, Ho, M], and whether both sides see a key in them."""
    of = log_attention if divergence != "logit_mse" else _scores_to_compare
    log_s = of(student_query, student_key, student_scale, student_mask, merge, temperature)
    if teacher_probs is not None:
        log_t = log_normalise(_log(teacher_probs.detach()))
    else:
        assert teacher_query is not None and teacher_key is not None
        log_t = of(teacher_query, teacher_key, teacher_scale, teacher_mask, merge, temperature).detach()
    return row_divergence(log_s, log_t, divergence)


def reduce_rows(rows: Tensor, alive: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Rows [B, Ho, M] and whether they count in a mean → what ``reduction`` says. A row of weight 0 is left out."""
    w = torch.ones_like(rows) if weight is None else weight.detach().to(rows.dtype).expand(rows.shape)
    weighted = torch.where(w == 0, 0.0, rows) * w
    if reduction == "none":
        return weighted
    divisors: dict[str, Any] = {"sum": 1.0, "batchmean": len(rows), "mean": w[alive].sum()}
    return weighted.sum() / divisors[reduction]


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    merge: str | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """As :func:`attnkd.attention_rows`: float64 [B, Ho, M, N]."""
    return log_attention(query, key, scale, mask, merge, temperature).exp()


def log_attention(
    query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None, merge: str | None, temperature: float
) -> Tensor:
    """[B, Ho, M, N]: the logarithm of the (merged) attention, −inf where a key is hidden."""
    return log_merged(scores(query, key, scale, mask), merge, temperature)


def log_merged(z: Tensor, merge: str | None, temperature: float) -> Tensor:
    """Scores [B, H, M, N] → log of the (merged) attention [B, Ho, M, N]."""
    if merge == "logsum":  # each head's own attention has no temperature; the sum of their logarithms has
        return log_normalise(_sum_of_heads(log_normalise(z)) / temperature)
    log_p = log_normalise(z / temperature)
    return log_p if merge is None else merge_log(log_p, merge)


def merge_attention(probs: Tensor, merge: str, temperature: float = 1.0) -> Tensor:
    """As :func:`attnkd.merge_attention`: float64 [B, 1, M, N]."""
    log_p = _log(probs)
    if merge == "logsum":
        return log_normalise(_sum_of_heads(log_p) / temperature).exp()
    return merge_log(log_normalise(log_p / temperature), merge).exp()


def scores(query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """scale · q·k + mask, [B, H, M, N]; −inf where the mask hides."""
    batch, heads, rows, dim = query.shape
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    z = scale * torch.einsum("bhid,bhjd->bhij", query.double(), key.double())
    if mask is None:
        return z
    mask = mask.expand(z.shape)
    if mask.dtype == torch.bool:
        return torch.where(mask, z, NOTHING)
    hidden = mask.detach().double() <= HIDES
    return torch.where(hidden, NOTHING, z + torch.where(hidden, 0.0, mask.double()))


def log_normalise(z: Tensor) -> Tensor:
    """log(e^z / Σ e^z) over the last dimension, of the keys that are not −inf; a row without any stays −inf."""
    flat = z.reshape(-1, z.shape[-1])
    row, key = (flat != NOTHING).nonzero(as_tuple=True)
    seen = flat[row, key]
    top = flat.detach().amax(1)[row]
    total = torch.zeros(len(flat), dtype=z.dtype, device=z.device).index_add(0, row, (seen - top).exp())
    return torch.full_like(flat, NOTHING).index_put((row, key), seen - top - total[row].log()).view(z.shape)


def merge_log(log_p: Tensor, merge: str) -> Tensor:
    """log of the mean, max or min over heads of p [B, H, M, N], renormalised, [B, 1, M, N].

    Where a head sees nothing the merged row sees nothing.
    """
    b, i, j = (log_p != NOTHING).any(1).nonzero(as_tuple=True)  # keys that some head sees
    heads = log_p[b, :, i, j]
    value = {"mean": _log_mean, "max": lambda x: x.amax(1), "min": _least}[merge](heads)
    merged = torch.full_like(log_p[:, 0], NOTHING).index_put((b, i, j), value)
    blind = (log_p == NOTHING).all(-1).any(1)  # [B, M]
    return log_normalise(torch.where(blind[..., None], NOTHING, merged))[:, None]


def row_divergence(log_s: Tensor, log_t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The divergence of every row, and whether both sides see a key in it; both of the shape before the last dimension.

    Args:
        log_s, log_t: log-probabilities [..., N], −inf where a key is hidden; for ``logit_mse`` scores instead.
        kind: as ``divergence`` of :func:`attnkd.attention_divergence`.
    """
    shape = log_s.shape[:-1]
    log_s, log_t = log_s.reshape(-1, log_s.shape[-1]), log_t.reshape(-1, log_t.shape[-1])
    sees_s, sees_t = log_s != NOTHING, log_t != NOTHING
    alive = sees_s.any(1) & sees_t.any(1)
    both = sees_s & sees_t

    def total(pairs: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ_j term(log_s, log_t) over the keys of each row that ``pairs`` names."""
        row, key = (pairs & alive[:, None]).nonzero(as_tuple=True)
        return torch.zeros_like(log_s[:, 0]).index_add(0, row, term(log_s[row, key], log_t[row, key]))

    def impossible(rows: Tensor, log_p: Tensor, other: Tensor) -> Tensor:
        """+inf where p gives weight to a key that the other side does not see; what is NaN stays NaN."""
        return rows + torch.where(((log_p.exp() >= NO_WEIGHT) & ~other).any(1) & alive, math.inf, 0.0)

    def log_mid(s: Tensor, t: Tensor) -> Tensor:
        return torch.logaddexp(s, t) - math.log(2)

    count = both.sum(1).clamp_min(1)
    if kind == "forward_kl":
        rows = impossible(total(both, lambda s, t: t.exp() * (t - s)), log_t, sees_s)
    elif kind == "cross_entropy":
        rows = impossible(total(both, lambda s, t: -t.exp() * s), log_t, sees_s)
    elif kind == "reverse_kl":
        rows = impossible(total(both, lambda s, t: s.exp() * (s - t)), log_s, sees_t)
    elif kind == "js":
        from_t = total(sees_t, lambda s, t: t.exp() * (t - log_mid(s, t)))
        from_s = total(sees_s, lambda s, t: s.exp() * (s - log_mid(s, t)))
        rows = 0.5 * from_t + 0.5 * from_s
    elif kind == "mse":
        rows = total(both, lambda s, t: (s.exp() - t.exp()) ** 2) / count
    elif kind == "logit_mse":
        rows = total(both, lambda s, t: (s - t) ** 2) / count
    else:
        raise ValueError(f"kind: unknown divergence {kind!r}")
    return rows.view(shape), alive.view(shape)


def resample_attention(
    rows: Tensor,
    teacher_grid: tuple[int, int],
    student_grid: tuple[int, int],
    mode: str = "bicubic",
    floor: float = 1e-5,
) -> Tensor:
    """As :func:`attnkd.resample_attention`: float64 [B, H, M, 1 + patches of student_grid]."""
    rows = rows.double()
    if teacher_grid == student_grid:
        return rows
    cls, resized = rows[..., :1], resized_patches(rows, teacher_grid, student_grid, mode, floor)
    return torch.cat([cls, resized / resized.sum(-1, keepdim=True) * (1 - cls)], -1)


def resized_patches(
    rows: Tensor,
    teacher_grid: tuple[int, int],
    student_grid: tuple[int, int],
    mode: str = "bicubic",
    floor: float = 1e-5,
) -> Tensor:
    """The patches of rows [B, H, M, 1 + patches of teacher_grid] on student_grid, at least ``floor``, before the rescale."""
    down, across = (resize_weights(a, b, mode).to(rows.device) for a, b in zip(teacher_grid, student_grid, strict=True))
    patches = rows.double()[..., 1:].unflatten(-1, teacher_grid)
    resized = torch.einsum("yv,xu,bhmvu->bhmyx", down, across, patches).flatten(-2)
    return torch.where(resized < floor, floor, resized)


def resize_weights(size: int, new_size: int, mode: str) -> Tensor:
    """[new_size, size]: how much each old pixel along one axis weighs in each new one.

    New pixel i has its centre at (i + ½)·size/new_size − ½ of the old axis (align_corners=False). Pixels beyond the border are
    those on it.
    """
    weights = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        if mode == "area":  # the mean of all old pixels that the new one touches
            first, last = (i * size) // new_size, -((-(i + 1) * size) // new_size)
            weights[i, first:last] = 1.0 / (last - first)
            continue
        centre = (i + 0.5) * size / new_size - 0.5
        if mode == "bilinear":
            centre = max(centre, 0.0)
        left = math.floor(centre)
        reach, kernel = (range(-1, 3), _cubic) if mode == "bicubic" else (range(2), _triangle)
        for j in reach:
            weights[i, min(max(left + j, 0), size - 1)] += kernel(abs(centre - (left + j)))
    return weights


def relation_row_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    student_prefix_tokens: int = 1,
    teacher_prefix_tokens: int = 1,
    normalize_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """As :func:`attnkd.relation_row_loss`: float64, scalar or [B]."""
    images = []
    for s, t in zip(student_features.double(), teacher_features.detach().double(), strict=True):
        r_s = relation_row(s[0], s[student_prefix_tokens:], normalize_dim)
        r_t = relation_row(t[0], t[teacher_prefix_tokens:], normalize_dim)
        images.append(torch.stack([(a - b) ** 2 for a, b in zip(r_s, r_t, strict=True)]).mean())
    loss = torch.stack(images)
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def relation_row(cls: Tensor, patches: Tensor, normalize_dim: int) -> list[Tensor]:
    """⟨G_0, G_j⟩ for every patch j, with the class token [C] and the patches [P, C] normalised per token or per channel."""
    if normalize_dim == -1:
        cls, patches = _unit(cls), torch.stack([_unit(patch) for patch in patches])
    else:
        channels = torch.cat([cls[None], patches]).unbind(1)
        tokens = torch.stack([_unit(channel) for channel in channels], 1)
        cls, patches = tokens[0], tokens[1:]
    return [cls @ patch for patch in patches]


def _log(probs: Tensor) -> Tensor:
    """log p in float64; a probability of 0 has no logarithm and no gradient, its key is hidden."""
    zero = probs == 0
    return torch.where(zero, NOTHING, torch.where(zero, 1.0, probs.double()).log())


def _unit(vector: Tensor) -> Tensor:
    norm = vector.square().sum()
    return torch.zeros_like(vector.detach()) if norm.detach() <= NO_DIRECTION**2 else vector / norm.sqrt()


def _scores_to_compare(
    query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None, merge: str | None, temperature: float
) -> Tensor:
    """What ``logit_mse`` compares: each head's scores, or those of the log-sum's softmax, which are their sum."""
    z = scores(query, key, scale, mask) / temperature
    return z if merge is None else _sum_of_heads(z)


def _sum_of_heads(x: Tensor) -> Tensor:
    """Σ_h x^h [B, 1, M, N]; a key that one head hides is −inf, even if another head is NaN there."""
    total = x[:, :1]
    for head in range(1, x.shape[1]):
        total = total + x[:, head : head + 1]
    return torch.where((x == NOTHING).any(1, keepdim=True), NOTHING, total)


def _log_mean(log_p: Tensor) -> Tensor:
    """log of the mean over dimension 1 of e^log_p [P, H]; not all of a line is −inf."""
    return log_p.logsumexp(1) - math.log(log_p.shape[1])


def _least(log_p: Tensor) -> Tensor:
    """[K, H] → [K]; a key that one head hides is hidden, also where another head has NaN."""
    return torch.where((log_p == NOTHING).any(1), NOTHING, log_p.amin(1))


def _cubic(x: float) -> float:
    """Keys' cubic convolution kernel with parameter A."""
    if x <= 1:
        return (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
    return CUBIC * x**3 - 5 * CUBIC * x**2 + 8 * CUBIC * x - 4 * CUBIC if x < 2 else 0.0


def _triangle(x: float) -> float:
    return max(1.0 - x, 0.0)
