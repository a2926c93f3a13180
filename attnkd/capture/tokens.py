"""What the tokens of a Vision Transformer are: which one is the class token, which are patches, on which grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkd.attention.problem import HIDDEN_BELOW
from attnkd.capture.adapters import Grid, TokenLayout, adapter_for, find_adapter


class BlockLayout(NamedTuple):
    """The tokens of one block in one forward. None where it is unknown."""

    num_prefix_tokens: int | None = None
    """Tokens before the first patch."""
    has_cls: bool | None = None
    """Whether token 0 of this block is a class token."""
    grid: Grid | None = None
    """(height, width) in patches."""


def token_layout(model: nn.Module) -> TokenLayout:
    """What the tokens are that a model puts out.

    Raises:
        TypeError: no adapter speaks for the model, or it does not say how many prefix tokens it has or how wide they are.
    """
    return adapter_for(model).layout(model)


def block_layout(model: nn.Module, images: Tensor | None, batch: int, count: int) -> BlockLayout:
    """What ``count`` tokens of a block are, while ``model`` runs on ``images``.

    The model's class token need not be there yet: CaiT, XCiT and ConViT add it after some blocks, so what a block's
    tokens are is decided by their number.

    Args:
        model: whose blocks they are.
        images: [B, C, H, W] it was called with; None when it was called with something else.
        batch, count: of the block's tokens [batch, count, D]; windows lie in the batch.
    """
    adapter = find_adapter(model)
    if adapter is None or images is None or batch != images.shape[0]:
        return BlockLayout()
    try:
        layout = adapter.layout(model)
    except TypeError:
        return BlockLayout()
    prefix, has_cls = layout.num_prefix_tokens, layout.has_cls
    if adapter.drops_patches(model):  # the patches that are left are no grid, whatever their number
        return BlockLayout(prefix, has_cls)
    grids = adapter.grids(model, images.shape[-2:])
    for grid in reversed(grids):
        if count == grid[0] * grid[1]:
            return BlockLayout(0, False, grid)
        if count == prefix + grid[0] * grid[1]:
            return BlockLayout(prefix, has_cls, grid)
    if (
        not grids or adapter.stages(model) is not None
    ):  # in another order: the adapter's window says which tokens those are
        return BlockLayout()
    return BlockLayout(prefix, has_cls)


def patch_grid(model: nn.Module, size: Sequence[int], num_patches: int | None = None) -> Grid:
    """(height, width) in patches of the ``num_patches`` tokens that images of ``size`` (height, width in pixels) became; None: that
    they will have become at the end.

    Raises:
        ValueError: the tokens do not form this grid (patch dropout, token pruning, a model that adds tokens).
        TypeError: the model cannot tell its grid.
    """
    adapter = adapter_for(model)
    grids = adapter.grids(model, size)
    if not grids:
        raise TypeError(f"model: {_no_grid(model)}")
    height, width = next((grid for grid in grids if grid[0] * grid[1] == num_patches), grids[-1])
    num_patches = height * width if num_patches is None else num_patches
    if height * width != num_patches or adapter.drops_patches(model):
        raise ValueError(
            f"{type(model).__name__}: expected {height}·{width} = {height * width} patch tokens for images of "
            f"{size[0]}x{size[1]}, its attention has {num_patches}; {NO_GRID}"
        )
    return height, width


def check_rows(label: str, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse attentions whose rows do not run over the model's one patch grid, so that they cannot be resized to another's.

    Raises:
        ValueError: names ``label`` and the reason.
    """
    adapter = adapter_for(model, label)
    if adapter.grid(model, adapter.image_size(model) or (224, 224)) is None:
        raise ValueError(f"{label}: {_no_grid(model)}")
    for path in paths:
        window = adapter.window(model, path)
        if window is not None:
            raise ValueError(
                f"{label}: rows over the whole image are compared, but {path} attends over {window}; choose a block of the last "
                "stage, or compare whole maps (HeadKD)"
            )


def _no_grid(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no patch grid that is known, and the rows of its attentions run over none (a timm model "
        "says it with patch_embed.dynamic_feat_size; windows and text have none). HeadKD compares whole maps"
    )


def padding(mask: Tensor | None, count: int) -> Tensor | None:
    """[B or 1, N] boolean: tokens of padding, which an attention's mask hides as keys from every row of every head.

    None where the mask cannot hide any, or rows and keys are not the same ``count`` tokens.

    Args:
        mask: broadcasts to [B, H, N, N], boolean (True = visible) or additive.
        count: N.
    """
    if (
        mask is None
        or mask.ndim < 2
        or mask.shape[-1] != count
        or mask.shape[-1] == 1
        or mask.shape[-2] not in (1, count)
    ):
        return None
    hidden = ~mask if mask.dtype == torch.bool else mask.detach() <= HIDDEN_BELOW
    hidden = hidden[(None,) * (4 - hidden.ndim)]
    return hidden.flatten(1, 2).all(1)


def padded_patches(call: Any, layout: TokenLayout) -> Tensor | None:
    """[B or 1, patches] boolean: patches of padding, which the mask of an attention hides from every token; None without any.

    Args:
        call: an AttentionCall.
    """
    rows = filled_in(call, layout)
    padded = padding(rows.mask, rows.key.shape[2])
    return None if padded is None else padded[:, rows.num_prefix_tokens :]


def mean_token(tokens: Tensor, padded: Tensor | None) -> Tensor:
    """[B, 1, D]: the mean of patches [B, N, D], without those of padding [B or 1, N]."""
    if padded is None:
        return tokens.mean(1, keepdim=True)
    counts = (~padded).expand(tokens.shape[:2]).unsqueeze(-1)
    return torch.where(counts, tokens, 0.0).sum(1, keepdim=True) / counts.sum(1, keepdim=True)


def filled_in(tokens: Any, layout: TokenLayout) -> Any:
    """Captured tokens whose model could not say what they are, with the layout of the tokens that it puts out.

    Args:
        tokens: an AttentionCall or BlockTokens.
    """
    if tokens.num_prefix_tokens is not None:
        return tokens
    return tokens._replace(num_prefix_tokens=layout.num_prefix_tokens, has_cls=layout.has_cls)


def check_same_grid(student: Any, teacher: Any) -> None:
    """Refuse tokens of two models that are not the same patches: equal numbers do not make equal grids.

    Args:
        student, teacher: an AttentionCall, BlockTokens or :class:`BlockLayout`. Where a model cannot say what its tokens are
            (all of it None), nothing is refused here.

    Raises:
        ValueError: two grids, or patches that are no grid.
    """
    for name, layout in (("student", student), ("teacher", teacher)):
        if layout.grid is None and layout.num_prefix_tokens is not None:
            raise ValueError(f"{name}: its patches do not form the grid that its images are cut into; {NO_GRID}")
    if None not in (student.grid, teacher.grid) and student.grid != teacher.grid:
        (height, width), (teacher_height, teacher_width) = student.grid, teacher.grid
        raise ValueError(
            f"student and teacher cut the images into other patches: the student's grid is {height}x{width} (height x width), "
            f"the teacher's {teacher_height}x{teacher_width}; whole maps and patch tokens need the same patch grid. A method "
            "that compares class-token rows (AttnDistill) can resize them"
        )


NO_GRID = "patch dropout (patch_drop_rate) and token pruning are not supported: set patch_drop_rate=0"


def input_images(args: Iterable[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The images [B, C, H, W] among the arguments of a model's forward, or None."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4]
    return found[0] if found else None
