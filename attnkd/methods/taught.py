"""What AttnDistill needs of its teacher, as tensors with a row for each image: they can be computed once and kept, where a student
sees the same pixels in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attnkd.capture.tokens import Grid, patch_grid
from attnkd.methods.task import DistillTask
from attnkd.methods.whole_map import num_heads

if TYPE_CHECKING:
    from attnkd.methods.attn_distill import AttnDistill

FEATURES, ROWS = "features", "rows"
TOO_MUCH = {
    "HeadKD": "compares whole maps, of which every image has queries and keys of all compared blocks and heads",
    "SSTA": "compares whole maps, of which every image has queries and keys of all compared blocks",
    "AttentionProbe": "compares the features of all tokens of several blocks",
    "MiniLM": "compares relations of all tokens, of which every image has queries, keys and values",
}


def check_keepable(method: str) -> None:
    """Refuse a method whose teacher cannot be kept.

    Args:
        method: the name of its class.

    Raises:
        NotImplementedError: names the method and the reason.
    """
    if method != "AttnDistill":
        why = TOO_MUCH.get(method, "has none")
        raise NotImplementedError(f"teacher_cache: for AttnDistill only; {method} {why}")


def teacher_needs(task: DistillTask, size: Sequence[int]) -> dict[str, Any]:
    """All that :func:`teach` depends on besides the teacher and the images, as JSON knows it.

    Args:
        size: (height, width) of the images in pixels.

    Raises:
        NotImplementedError: a method or an option whose teacher cannot be kept.
    """
    distill = _attn_distill(task)
    numbers = distill.schedules.numbers
    if distill.rows != "cls":
        raise NotImplementedError(f"teacher_cache: keeps the class token's row, got rows={distill.rows!r}")
    if "temperature" in numbers and not numbers["temperature"].constant:
        raise NotImplementedError("teacher_cache: keeps rows at one temperature, but method.temperature changes")
    needs: dict[str, Any] = {}
    if not numbers["patch_weight"].off:
        needs[FEATURES] = "class token and patches"
    elif not numbers["pa_weight"].off:
        needs[FEATURES] = "class token"
    if not numbers["attn_weight"].off:
        teacher_paths = distill.teacher.tap.paths
        needs[ROWS] = [
            {
                "teacher_block": teacher_paths[t],
                "grid": list(patch_grid(distill.student, size)),
                "merging": list(distill.merging(heads, num_heads(distill.teacher.tap.model, teacher_paths[t]))),
                "resample_mode": distill.resample_mode,
            }
            for (_, t), heads in zip(distill.pairs, _heads(distill), strict=True)
        ]
    return needs


@torch.no_grad()
def teach(task: DistillTask, images: Tensor) -> dict[str, Tensor]:
    """Run the teacher.

    Args:
        images: [B, C, H, W], normalised as the task takes them.

    Returns:
        features: [B, 1, Dt] class token or, if patches are compared, [B, 1 + Nt, Dt]. rows.0, rows.1, …: [B, H or 1, 1, 1 + Ns], the class
        token's row that each pair of attentions is compared with, on the student's grid, merged if heads are. All float32.

    Raises:
        NotImplementedError: a method whose teacher cannot be kept.
    """
    distill = _attn_distill(task)
    needs = teacher_needs(task, images.shape[-2:])
    features, calls = distill.teacher(images, needs.get(FEATURES) == "class token and patches")
    found = {} if FEATURES not in needs else {FEATURES: features.float()}
    if ROWS in needs:
        size = images.shape[-2:]
        grid: Grid = patch_grid(distill.student, size)
        for index, ((_, t), heads) in enumerate(zip(distill.pairs, _heads(distill), strict=True)):
            rows, _ = distill.target(calls[t], size, grid, heads, as_rows=True)
            assert isinstance(rows, Tensor)
            found[f"{ROWS}.{index}"] = rows.float()
    return found


def compared(distill: AttnDistill, taught: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """The rows that were kept, one for each pair, with the options of :func:`attnkd.attention_divergence`."""
    found = []
    for index, ((_, t), heads) in enumerate(zip(distill.pairs, _heads(distill), strict=True)):
        teacher = distill.teacher.tap
        options = distill.comparison(*distill.merging(heads, num_heads(teacher.model, teacher.paths[t])))
        found.append((taught[f"{ROWS}.{index}"], options))
    return found


def _heads(distill: AttnDistill) -> list[int]:
    """The number of the student's heads in each pair."""
    return [num_heads(distill.student, distill.student_tap.paths[s]) for s, _ in distill.pairs]


def _attn_distill(task: DistillTask) -> AttnDistill:
    check_keepable(type(task).__name__)
    return cast("AttnDistill", task)
