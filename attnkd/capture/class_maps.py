"""Where a class token looks: its attention over the patches per head, merged and rolled out, and two models' KL of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall, class_row
from attnkd.attention.checks import check_choice
from attnkd.attention.merging import merge_attention
from attnkd.attention.problem import MERGES
from attnkd.attention.resample import resample_attention
from attnkd.capture.adapters import adapter_for
from attnkd.capture.blocks import attention_paths
from attnkd.capture.models import evaluating
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import TokenLayout, patch_grid, token_layout


@dataclass(frozen=True)
class ClassMaps:
    """One model's class-token attention on a batch of B images, over a grid of h x w patches."""

    call: AttentionCall
    """The class token's query [B, H, 1, D] and the shared keys [B, H, 1 + h·w, D]."""
    rows: Tensor
    """[B, H, 1, 1 + h·w] probabilities: class token, then patches."""
    merged: Tensor
    """[B, T, 1, 1 + h·w]: one for each temperature."""
    rollout: Tensor | None
    """[B, h·w]: shares of the patches, sum 1; None when not asked for."""
    grid: tuple[int, int]

    @property
    def heads_map(self) -> Tensor:
        """[B, H, h, w]: the patches' part of ``rows``."""
        return self.rows[:, :, 0, 1:].unflatten(-1, self.grid)

    @property
    def merged_map(self) -> Tensor:
        """[B, T, h, w]."""
        return self.merged[:, :, 0, 1:].unflatten(-1, self.grid)

    @property
    def rollout_map(self) -> Tensor | None:
        """[B, h, w]."""
        return None if self.rollout is None else self.rollout.unflatten(-1, self.grid)


@torch.no_grad()
def class_maps(
    model: nn.Module,
    images: Tensor,
    block: int = -1,
    merge: str = "mean",
    rollout: bool = True,
    temperatures: Sequence[float] = (1.0,),
    impl: str = "auto",
) -> ClassMaps:
    """The class token's attention in one block, per head and merged, and the rollout of all blocks.

    Args:
        model: with a class token; run in evaluation mode and left as it was.
        images: [B, C, H, W], normalised for the model.
        block: index of the block; negative counts from the end.
        merge: 'mean', 'logsum', 'max' or 'min' of the heads.
        rollout: compute it too; then every block must be one that can be tapped, and [B, 1, N, N] maps fit in memory.
        temperatures: of the merged maps, see :func:`attnkd.attention.merging.merge_attention` (AttnDistill, Fig. 3).

    Raises:
        ValueError: no class token, a block that does not exist, or a rollout through blocks of several grids.
        NotImplementedError: attention that cannot be captured, in any block for the rollout.
    """
    check_choice("merge", merge, MERGES[1:])
    layout = token_layout(model)
    if not layout.has_cls:
        raise ValueError(f"model: {type(model).__name__} has no class token whose attention could be shown")
    wanted = attention_paths(model, block)[0]
    alone = "rollout=False (--no-rollout) shows one block alone"
    if rollout and adapter_for(model).stages(model) is not None:
        raise ValueError(
            f"rollout: goes through all blocks, but the grid of {type(model).__name__} shrinks on the way; {alone}"
        )
    try:
        tap = AttentionTap(model, "all" if rollout else block, stop=True)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"rollout: goes through all blocks, but {error}; {alone}" if rollout else str(error)
        ) from None
    with evaluating(model):
        _, calls = tap.capture(adapter_for(model).forward, model, images)
    call = class_row(calls[tap.paths.index(wanted)], layout.num_prefix_tokens)
    rows = attention_rows(call, rows="cls", impl=impl)
    grid = patch_grid(model, images.shape[-2:], rows.shape[-1] - 1)
    rolled = attention_rollout(calls, layout, impl) if rollout else None
    merged = torch.cat([merge_attention(rows, merge, temperature) for temperature in temperatures], 1)
    return ClassMaps(call, rows, merged, rolled, grid)


@torch.no_grad()
def attention_rollout(calls: Sequence[AttentionCall], layout: TokenLayout, impl: str = "auto") -> Tensor:
    """How much of every patch reaches the class token through all blocks (Abnar and Zuidema, ACL 2020).

    R = Â_L · … · Â_1 with Â = (A + 1) / 2, A the mean of a block's heads: half of every token is what its residual
    connection carries. The class token's row of R over the patches, scaled to sum 1.

    Args:
        calls: all blocks' calls in running order, query and key [B, H, N, D] over all tokens.
        layout: of the model; the other prefix tokens are used in between and left out at the end.

    Returns:
        [B, patches].
    """
    row = None  # from the last block down, only the class token's row is needed
    for call in reversed(calls):
        queries = call.query[:, :, :1] if row is None else call.query
        mask = call.mask if row is not None or call.mask is None or call.mask.ndim < 2 else call.mask[..., :1, :]
        attention = attention_rows(queries, call.key, scale=call.scale, mask=mask, merge="mean", impl=impl)[:, 0]
        if row is None:
            identity = torch.zeros_like(attention)
            identity[..., 0] = 1
            row = (attention + identity) / 2
        else:
            row = (row @ attention + row) / 2
    assert row is not None
    patches = row[:, 0, layout.num_prefix_tokens :]
    return patches / patches.sum(-1, keepdim=True)


@torch.no_grad()
def class_kl(
    student: ClassMaps, teacher: ClassMaps, merge: str = "mean", temperatures: Sequence[float] = (1.0,)
) -> tuple[Tensor | None, Tensor]:
    """KL(teacher ‖ student) of the class token's attention, in nats.

    A teacher on another grid is resized to the student's first, head by head.

    Returns:
        [B, H] head by head (None when the numbers of heads differ) and [B, T] after merging.
    """
    rows = resample_attention(teacher.rows, teacher.grid, student.grid)
    call = student.call
    per_head = None
    if rows.shape[1] == call.query.shape[1]:
        per_head = attention_divergence(
            call,
            rows="cls",
            teacher_probs=rows,
            reduction="none",
        )[..., 0]
    merged = [
        attention_divergence(
            call,
            rows="cls",
            teacher_probs=merge_attention(rows, merge, temperature),
            merge=merge,
            temperature=temperature,
            reduction="none",
        )[:, 0]
        for temperature in temperatures
    ]
    return per_head, torch.cat(merged, 1)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] → [..., H, W], bilinear: from patches to pixels."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)
