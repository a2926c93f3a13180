"""The rows that guide a student where there is no class token, and their divergence: Σ_heads of the mean over rows ÷ the batch size.

AttnDistill guides with the class token's row (the paper). Other rows that sum the image up:

* 'pool': the row that pools, over the patches: that of the attention pooling's own query (SigLIP), or the class token's where
  that pools;
* 'mean': the mean of all patches' rows, over the patches. Both models' maps are computed for it;
* 'all': every patch's row, and the class token's where both have one; their mean. No map is stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall, class_row, shared_tokens
from attnkd.attention.merging import merge_attention, merge_logits
from attnkd.attention.resample import resample_attention
from attnkd.attention.resampled_maps import resampled_map_divergence
from attnkd.capture.tokens import padding


def guided_divergence(
    student: AttentionCall,
    teacher: AttentionCall,
    rows: str,
    *,
    merge: str | None,
    temperature: float,
    mode: str,
    impl: str,
) -> Tensor:
    """KL(teacher ‖ student) of the chosen rows, a scalar.

    Args:
        student, teacher: with their prefix tokens and ``grid`` filled in.
        rows: 'pool', 'mean' or 'all', see above.
        merge, temperature, impl: see :func:`attnkd.attention_divergence`.
        mode: how a teacher's rows over another patch grid are resized, see :func:`attnkd.attention.resample.resample_attention`.

    Raises:
        ValueError: tokens that do not fit ``rows``.
    """
    for role, call in (("student", student), ("teacher", teacher)):
        if rows != "pool" and call.query.shape[2] != call.key.shape[2]:
            raise ValueError(
                f"{role}: rows={rows!r} compares the rows of all patches, but this attention has {call.query.shape[2]} over "
                f"{call.key.shape[2]} tokens (class attention, or pooling); rows='cls' and rows='pool' compare its own"
            )
    same = student.grid == teacher.grid
    options: dict[str, Any] = {"merge": merge, "temperature": temperature, "impl": impl}
    if rows == "mean":
        return _of_means(student, teacher, merge, temperature, mode)
    if rows == "all":
        keep_cls = bool(student.has_cls and teacher.has_cls)
        s, t = shared_tokens(student, keep_cls), shared_tokens(teacher, keep_cls)
        padded = padding(s.mask, s.key.shape[2])
        losses = (
            attention_divergence(s, t, reduction="none", **options)
            if same
            else resampled_map_divergence(s, t, mode=mode, padded=padded, **options)
        )
        if padded is None:
            return losses.sum() / (losses.shape[0] * losses.shape[2])
        counts = (~padded)[:, None].expand(losses.shape)
        return torch.where(counts, losses / counts.sum(2, keepdim=True), 0.0).sum() / len(losses)
    s, t = _pooling_row(student), _pooling_row(teacher)
    if same:
        return attention_divergence(s, t, reduction="batchmean", **options)
    with torch.no_grad():
        warm = temperature if merge is None else 1.0  # merging applies it to the finished rows
        probs = _resized(attention_rows(t, temperature=warm, impl=impl), teacher, student, mode)
        probs = probs if merge is None else merge_attention(probs, merge, temperature)
    return attention_divergence(s, teacher_probs=probs, reduction="batchmean", **options)


def _of_means(
    student: AttentionCall, teacher: AttentionCall, merge: str | None, temperature: float, mode: str
) -> Tensor:
    """KL of the mean patch rows [B, H, 1, N]. In logarithms: a probability that float32 cannot hold is not 0."""
    warm = temperature if merge is None else 1.0
    log_row = _log_mean_row(student, warm)
    with torch.no_grad():
        log_target = _log_mean_row(teacher, warm)
        if teacher.grid != student.grid:
            log_target = _resized(log_target.exp(), teacher, student, mode).log()
    if merge is not None:
        log_row, log_target = (merge_logits(x / temperature, merge).log_softmax(-1) for x in (log_row, log_target))
    target = log_target.exp()
    gap = torch.where(target > 0, log_target - log_row, 0.0)
    return (target * gap).sum() / len(log_row)


def _log_mean_row(call: AttentionCall, temperature: float) -> Tensor:
    """log of the mean over patches of their rows, [B, H, 1, N]; patches of padding have no part in the mean. Makes the map."""
    call = shared_tokens(call, False)
    query, key = call.query, call.key
    with torch.autocast(query.device.type, enabled=False):
        exact = torch.promote_types(query.dtype, torch.float32)
        logits = call.scale * query.to(exact) @ key.to(exact).mT
        if call.mask is not None:
            mask = call.mask
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        padded = padding(call.mask, key.shape[2])
        rows = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if padded is None else ~padded
        log_p = torch.where(rows[:, None, :, None], logits / temperature, 0.0).log_softmax(-1)
        log_p = log_p.masked_fill(~rows[:, None, :, None], -math.inf)
        nowhere = log_p.isneginf().all(2, keepdim=True)  # no logarithm of 0, and none of its infinite gradient
        mean = log_p.masked_fill(nowhere, 0.0).logsumexp(2, keepdim=True).masked_fill(nowhere, -math.inf)
        return mean - rows.sum(1)[:, None, None, None].to(exact).log()


def _resized(probs: Tensor, teacher: AttentionCall, student: AttentionCall, mode: str) -> Tensor:
    """The teacher's rows over its patches as rows over the student's; its patches of padding get nothing."""
    assert teacher.grid is not None and student.grid is not None
    # Resizing wants a class token's entry in front.
    probs = resample_attention(F.pad(probs, (1, 0)), teacher.grid, student.grid, mode)[..., 1:]
    padded = padding(student.mask, student.key.shape[2])
    if padded is None:
        return probs
    probs = probs.masked_fill(padded[:, None, None, -probs.shape[-1] :], 0.0)
    return probs / probs.sum(-1, keepdim=True)


def _pooling_row(call: AttentionCall) -> AttentionCall:
    """The row [B, H, 1, D] that pools, over the patches alone.

    Raises:
        ValueError: several queries pool.
    """
    assert call.grid is not None
    patches = call.grid[0] * call.grid[1]
    if call.query.shape[2] == call.key.shape[2]:  # the block's own attention: its class token pools
        call = class_row(call)
    elif call.query.shape[2] != 1:
        raise ValueError(f"rows: 'pool' needs a pooling of one query, this attention pools with {call.query.shape[2]}")
    first = call.key.shape[2] - patches
    mask = call.mask
    if mask is not None and mask.ndim and mask.shape[-1] != 1:
        mask = mask[..., first:]
    key = call.key[:, :, first:]
    lse = call.lse if first == 0 else None  # of other keys
    return call._replace(key=key, mask=mask, lse=lse, num_prefix_tokens=0, has_cls=False)
