"""The attention of the class token on images in memory, as the demo scores and draws it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.api import attention_rows
from attnkd.attention.call import class_row
from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.capture.models import evaluating
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import patch_grid, token_layout


@torch.no_grad()
def cls_attention(
    model: nn.Module,
    images: Tensor,
    temperature: float,
    grid: tuple[int, int] | None = None,
    resample_mode: str = "bicubic",
) -> Tensor:
    """The class token's attention in the last block, heads merged by 'logsum'.

    Args:
        model: timm Vision Transformer with a class token.
        images: [n, C, H, W].
        temperature: of the merge.
        grid: resize every head's row to this (height, width) in patches before merging, as AttnDistill does.
        resample_mode: how, see :func:`attnkd.resample_attention`.

    Returns:
        [n, 1 + patches]: entry 0 is the class token itself, the rest the patches in row-major order; sums to 1.
    """
    prefix = token_layout(model).num_prefix_tokens
    with evaluating(model):
        _, (call,) = AttentionTap(model, stop=True)(images)
    own_grid = patch_grid(model, (images.shape[-2], images.shape[-1]), call.key.shape[2] - prefix)
    row = class_row(call, prefix)
    rows = attention_rows(row.query, row.key, scale=row.scale, mask=row.mask)
    rows = resample_attention(rows, own_grid, grid or own_grid, resample_mode)
    return merge_attention(rows, "logsum", temperature)[:, 0, 0]


def attention_divergence_per_image(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention rows [n, keys] → [n], in nats."""
    return F.kl_div(student.log(), teacher, reduction="none").sum(-1)
