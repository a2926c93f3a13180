"""The rows that guide a student where there is no class token, and their divergence: Σ_heads of the mean over rows ÷ the batch size.

AttnDistill guides with the class token's row (the paper). Other rows that sum the image up:

* 'pool': the row that pools, over the patches: that of the attention pooling's own query (SigLIP), or the class token's where
  that pools;
* 'mean': the mean of all patches' rows, over the patches. Both models' maps are computed for it;
* 'all': every patch's row, and the class token's where both have one; their mean. No map is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall, class_row, shared_tokens
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.attention.resampled_maps import resampled_map_divergence


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
    same = student.grid == teacher.grid
    options: dict[str, Any] = {"merge": merge, "temperature": temperature, "impl": impl}
    if rows == "all":
        keep_cls = bool(student.has_cls and teacher.has_cls)
        s, t = shared_tokens(student, keep_cls), shared_tokens(teacher, keep_cls)
        losses = (
            attention_divergence(s, t, reduction="none", **options)
            if same
            else resampled_map_divergence(s, t, mode=mode, **options)
        )
        return losses.sum() / (losses.shape[0] * losses.shape[2])
    if rows == "mean":
        return _of_means(student, teacher, merge, temperature, mode, impl)
    s, t = _pooling_row(student), _pooling_row(teacher)
    if same:
        return attention_divergence(s, t, reduction="batchmean", **options)
    with torch.no_grad():
        warm = temperature if merge is None else 1.0  # merging applies it to the finished rows
        probs = attention_rows(t, temperature=warm, impl=impl)
        probs = _finished(probs, teacher, student, merge, temperature, mode)
    return attention_divergence(s, teacher_probs=probs, reduction="batchmean", **options)


def _of_means(
    student: AttentionCall, teacher: AttentionCall, merge: str | None, temperature: float, mode: str, impl: str
) -> Tensor:
    """KL of the mean patch rows [B, H, 1, N]."""
    warm = temperature if merge is None else 1.0

    def mean_row(call: AttentionCall) -> Tensor:
        return attention_rows(shared_tokens(call, False), temperature=warm, impl=impl).mean(2, keepdim=True)

    row = mean_row(student)
    with torch.no_grad():
        target = _finished(mean_row(teacher), teacher, student, merge, temperature, mode)
    if merge is not None:
        row = merge_attention(row, merge, temperature)
    return F.kl_div(row.log(), target, reduction="sum") / len(row)


def _finished(
    probs: Tensor, teacher: AttentionCall, student: AttentionCall, merge: str | None, temperature: float, mode: str
) -> Tensor:
    """The teacher's rows over its patches as rows over the student's, merged."""
    assert teacher.grid is not None and student.grid is not None
    if teacher.grid != student.grid:  # resizing wants a class token's entry in front
        probs = resample_attention(F.pad(probs, (1, 0)), teacher.grid, student.grid, mode)[..., 1:]
    return probs if merge is None else merge_attention(probs, merge, temperature)


def _pooling_row(call: AttentionCall) -> AttentionCall:
    """The row [B, H, 1, D] that pools, over the patches alone."""
    assert call.grid is not None
    patches = call.grid[0] * call.grid[1]
    if call.query.shape[2] != 1:  # the block's own attention: its class token pools
        call = class_row(call)
    first = call.key.shape[2] - patches
    mask = call.mask
    if mask is not None and mask.ndim and mask.shape[-1] != 1:
        mask = mask[..., first:]
    key = call.key[:, :, first:]
    lse = call.lse if first == 0 else None  # of other keys
    return call._replace(key=key, mask=mask, lse=lse, num_prefix_tokens=0, has_cls=False)
