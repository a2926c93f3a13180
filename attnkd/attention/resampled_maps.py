"""Whole maps of two patch grids: the teacher's map is resized to the student's grid, a few rows at a time.

A student patch looks at a place between teacher patches. Its target row is the bilinear mean of the rows of the teacher patches
around it, with the weights w that resizing an image of the teacher's grid has there:

    p̃_i = resize(Σ_r w_ir · p_t[r])    Σ_r w_ir = 1

where resize is :func:`attnkd.attention.resample.resample_attention` over the keys. A mean of distributions is a distribution, so p̃ is one. The class
token's row has no place and is only resized over the keys. A strip of the student's grid (one row of patches) is made at a time, from the
strips of the teacher's grid around it: memory grows with N, not with N².
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention


def resampled_map_divergence(
    student: AttentionCall,
    teacher: AttentionCall,
    *,
    mode: str = "bicubic",
    merge: str | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    divergence: str = "forward_kl",
    padded: Tensor | None = None,
) -> Tensor:
    """The divergence of every query row of the student from the teacher's map, resized to the student's grid.

    Args:
        student, teacher: cut to class token and patches (or to patches alone, both), with a row for each and a ``grid``.
        mode: how rows are resized over the keys: 'bicubic', 'bilinear' or 'area'.
        merge, temperature, impl, divergence: see :func:`attnkd.attention_divergence`; not 'logit_mse', because only
            probabilities can be resized.
        padded: [B or 1, N] boolean, tokens of padding in the student. Resizing gives every token something; these get 0.

    Returns:
        [B, H, N], or [B, 1, N] with a merge, N tokens of the student; float32 (float64 for float64 inputs).

    Raises:
        ValueError: 'logit_mse'.
    """
    if divergence == "logit_mse":
        raise ValueError(
            "divergence: 'logit_mse' compares scores, which cannot be resized to another patch grid; use a divergence of "
            "probabilities, or a teacher with the student's grid"
        )
    options: dict[str, Any] = {"merge": merge, "temperature": temperature, "divergence": divergence, "impl": impl}
    losses = []
    for rows, target in _targets(student, teacher, mode, merge, temperature, impl):
        if padded is not None:
            target = target.masked_fill(padded[:, None, None], 0.0)
        mask = student.mask
        if mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
            mask = mask[..., rows, :]
        loss = attention_divergence(
            student.query[:, :, rows],
            student.key,
            teacher_probs=target,
            student_mask=mask,
            student_scale=student.scale,
            reduction="none",
            **options,
        )
        losses.append(loss)
    return torch.cat(losses, 2)


@torch.no_grad()
def _targets(
    student: AttentionCall, teacher: AttentionCall, mode: str, merge: str | None, temperature: float, impl: str
) -> Iterator[tuple[slice, Tensor]]:
    """Student rows and the teacher's probabilities [B, H, rows, N] for them: the class token's row, then strip by strip."""
    assert student.grid is not None and teacher.grid is not None
    (height, width), (teacher_height, teacher_width) = student.grid, teacher.grid
    first = int(bool(student.has_cls))

    def probabilities(rows: Tensor | slice) -> Tensor:
        mask = teacher.mask
        if mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
            mask = mask[..., rows, :]
        return attention_rows(
            teacher.query[:, :, rows],
            teacher.key,
            scale=teacher.scale,
            mask=mask,
            temperature=temperature if merge is None else 1.0,  # merging applies it to the finished rows
            impl=impl,
        )

    def resized(rows: Tensor) -> Tensor:
        if not first:  # resizing wants the class token's entry in front
            rows = F.pad(rows, (1, 0))
        rows = resample_attention(rows, (teacher_height, teacher_width), (height, width), mode)
        rows = rows if first else rows[..., 1:]
        return rows if merge is None else merge_attention(rows, merge, temperature)

    if first:
        yield slice(0, 1), resized(probabilities(slice(0, 1)))
    down, across = _weights(teacher_height, height), _weights(teacher_width, width)
    for strip in range(height):
        around = down[strip].nonzero().flatten().tolist()
        start, stop = around[0], around[-1] + 1
        rows = probabilities(slice(first + start * teacher_width, first + stop * teacher_width))
        rows = rows.unflatten(2, (stop - start, teacher_width))
        weight_down, weight_across = (w.to(rows) for w in (down[strip, start:stop], across))
        target = torch.einsum("bhrcn,r,wc->bhwn", rows, weight_down, weight_across)
        yield slice(first + strip * width, first + (strip + 1) * width), resized(target)


def _weights(size: int, new_size: int) -> Tensor:
    """[new_size, size]: row i has the weights of the old places in new place i (linear, align_corners=False)."""
    return F.interpolate(torch.eye(size, dtype=torch.float64)[None], size=new_size, mode="linear").squeeze(0).T
