"""Resizing of a teacher's attention rows to the student's patch grid (AttnDistill, Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.attention.checks import check_choice, check_number, check_tensor, integer

MODES = ("bicubic", "bilinear", "area")


def resample_attention(
    rows: Tensor,
    teacher_grid: tuple[int, int],
    student_grid: tuple[int, int],
    mode: str = "bicubic",
    floor: float = 1e-5,
) -> Tensor:
    """Resize the patch part of attention rows from one patch grid to another.

    Per head the class entry a_0 is kept, the patch probabilities are resized as an image (PyTorch's convention:
    align_corners=False, no antialias), clamped from below to ``floor`` and rescaled to sum to 1 − a_0. The clamp comes
    before the rescale because bicubic weights are negative in places: without it practically every peaked row has a
    negative entry, whose logarithm is NaN.

    Args:
        rows: [B, H, M, 1 + Ht·Wt] probabilities; entry 0 is the class token, the rest the patches in row-major order.
        teacher_grid: (Ht, Wt), the grid of ``rows``.
        student_grid: (Hs, Ws), the grid wanted.
        mode: 'bicubic', 'bilinear' or 'area'; the last two cannot go negative.
        floor: smallest patch probability before the rescale.

    Returns:
        [B, H, M, 1 + Hs·Ws] probabilities, float32 (float64 for float64 rows). Rows on the same grid come back as they are.

    Raises:
        TypeError, ValueError: wrong type, rank, size, option or floor.
    """
    check_tensor("rows", rows, 4, "[B, H, M, 1 + patches]")
    check_choice("mode", mode, MODES)
    teacher_grid, student_grid = _check_grid("teacher_grid", teacher_grid), _check_grid("student_grid", student_grid)
    keys = 1 + teacher_grid[0] * teacher_grid[1]
    if rows.shape[-1] != keys:
        raise ValueError(
            f"rows: expected 1 + {teacher_grid[0]}·{teacher_grid[1]} = {keys} keys for teacher_grid={teacher_grid}, "
            f"got {rows.shape[-1]}"
        )
    check_number("floor", floor)
    if not 0 < floor < 1:
        raise ValueError(f"floor: expected a number between 0 and 1, got {floor}")
    if teacher_grid == student_grid:
        return rows
    batch, heads, queries, _ = rows.shape
    work = rows if rows.dtype == torch.float64 else rows.float()
    cls, patches = work[..., :1], student_grid[0] * student_grid[1]
    if work.numel() == 0:  # which interpolate refuses
        return torch.cat([cls, cls.expand(-1, -1, -1, patches)], -1)
    images = work[..., 1:].reshape(batch * heads, queries, *teacher_grid)
    corners = {} if mode == "area" else {"align_corners": False}
    resized = F.interpolate(images, size=student_grid, mode=mode, **corners)
    resized = resized.reshape(batch, heads, queries, patches).clamp_min(floor)
    rest = (1 - cls).clamp_min(0.0)  # a class entry of 1 that was rounded up leaves nothing, not less than nothing
    return torch.cat([cls, resized * (rest / resized.sum(-1, keepdim=True))], -1)


def _check_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(integer, grid)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected (height, width) in patches, got {grid!r}") from None
    if height is None or width is None or height < 1 or width < 1:
        raise ValueError(f"{name}: expected two positive integers (height, width), got {grid!r}")
    return height, width
