"""Attention transfer: where a block's activations are large (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, equation 2).

    Q_i = Σ_c A_ic²          of patch i, A [N, D] the tokens that a block puts out
    AT  = ½ · Σ over pairs of blocks of ‖Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖‖,  averaged over the images

with Euclidean norms over the patches; the paper's β is the task's ``at_weight``. Activation-based, F²_sum of section 3.1. No class
token, distillation token or register has a part in Q: they are no places of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.capture.adapters import adapter_for
from attnkd.capture.blocks import block_around
from attnkd.capture.outputs import BlockHooks, BlockTokens
from attnkd.capture.tokens import TokenLayout, check_same_grid, filled_in
from attnkd.methods.alignment import resize_tokens


def blocks_of(model: nn.Module, paths: Sequence[str]) -> BlockHooks:
    """Hooks on the blocks that attentions lie in, one for each of their ``paths``.

    Raises:
        ValueError: a text encoder, or an attention outside the model's blocks.
    """
    if adapter_for(model).vocabulary(model) is not None:
        raise ValueError(f"at_weight: compares the patches of images, but {type(model).__name__} is a text encoder")
    return BlockHooks(model, [block_around(model, path) for path in paths])


def attention_transfer_loss(
    pairs: Sequence[tuple[BlockTokens, BlockTokens]],
    layouts: tuple[TokenLayout, TokenLayout],
    resample_mode: str | None = None,
) -> Tensor:
    """AT, a scalar; in float32 at least. Patches of padding count as places without activation.

    Args:
        pairs: the student's block and the teacher's, as :meth:`attnkd.capture.outputs.BlockHooks.run` returns them.
        layouts: student's and teacher's, for tokens that do not say what they are.
        resample_mode: how Q of a teacher with another patch grid is resized to the student's, as an image
            (:func:`attnkd.methods.alignment.resize_tokens`); None refuses such a teacher.

    Raises:
        ValueError: other patches.
    """
    losses = []
    for student, teacher in pairs:
        ours, theirs = _places(student, layouts[0]), _places(teacher, layouts[1])
        if resample_mode is not None and None not in (student.grid, teacher.grid):
            theirs = resize_tokens(theirs[..., None], teacher.grid, student.grid, resample_mode)[..., 0]  # type: ignore[arg-type]
        else:
            check_same_grid(student, teacher)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"at_weight: compares blocks patch by patch, but the student's has {ours.shape[1]} patches and the teacher's "
                f"{theirs.shape[1]}"
            )
        if student.padded is not None:
            padded = student.padded[:, -ours.shape[1] :]
            ours, theirs = ours.masked_fill(padded, 0.0), theirs.masked_fill(padded, 0.0)
        gap = F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)
        losses.append(torch.linalg.vector_norm(gap, dim=1).mean() / 2)
    return torch.stack(losses).sum()


def _places(block: BlockTokens, layout: TokenLayout) -> Tensor:
    """Q [B, patches]."""
    patches = block.tokens[:, filled_in(block, layout).num_prefix_tokens :]
    return patches.to(torch.promote_types(patches.dtype, torch.float32)).square().sum(-1)
