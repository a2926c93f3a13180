"""The tokens that chosen blocks of a Vision Transformer put out, and which blocks of two models belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Blocks = int | str | Sequence[int]


class BlockOutputs(nn.Module):
    """A Vision Transformer that returns the tokens its blocks put out beside its own output.

    Forward hooks on the blocks keep them; outside this module's forward the hooks do nothing.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        stack = cast(Any, model).blocks
        self.keepers = [_Keeper() for _ in blocks]
        self._handles = [stack[i].register_forward_hook(k) for i, k in zip(blocks, self.keepers, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images [B, C, H, W] → the model's output [B, K], tokens [B, N, D] after each block.

        Raises:
            RuntimeError: a block did not run, or ran cut off from the gradient (reentrant activation checkpointing).
            TypeError: a block or the model returns something else.
        """
        grad = torch.is_grad_enabled()
        for keeper in self.keepers:
            keeper.armed, keeper.tokens = True, None
        try:
            output = self.model(images)
            tokens = [keeper.tokens for keeper in self.keepers]
        finally:
            for keeper in self.keepers:
                keeper.armed, keeper.tokens = False, None
        for keeper, x in zip(self.keepers, tokens, strict=True):
            if x is None:
                raise RuntimeError(f"{type(self.model).__name__}: a block whose output is compared did not run")
            if not isinstance(x, Tensor) or x.ndim != 3:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{type(self.model).__name__}: expected blocks that return [B, N, D], got {got}")
            if keeper.grad != grad:
                raise RuntimeError(
                    f"{type(self.model).__name__}: its blocks run without gradient inside a forward that has one. Reentrant "
                    "activation checkpointing does this: use use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
                )
        if not isinstance(output, Tensor) or output.ndim != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{type(self.model).__name__}: expected class scores [B, K], got {got}")
        return output, cast("list[Tensor]", tokens)

    def close(self) -> nn.Module:
        """Remove the hooks and return the model."""
        for handle in self._handles:
            handle.remove()
        return self.model


class _Keeper:
    """A forward hook; an object, so that a copied or pickled model keeps hook and holder together."""

    def __init__(self) -> None:
        self.armed, self.grad = False, False
        self.tokens: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self.tokens, self.grad = output, torch.is_grad_enabled()


def default_blocks(depth: int, count: int) -> list[int]:
    """Block indices at 1/3, 2/3 (and 3/3) of the depth, the first ``count`` of them: 3, 7 and 11 of 12."""
    return sorted({-(-k * depth // 3) - 1 for k in range(1, count + 1)})


def block_indices(name: str, model: nn.Module, blocks: Blocks) -> list[int]:
    """``blocks`` (index, sequence of indices, negative ones from the end, or 'all') as indices from 0.

    Raises:
        TypeError, ValueError: not indices, out of range, repeated, none.
    """
    depth = block_count(name, model)
    listed = list(range(depth)) if blocks == "all" else [blocks] if isinstance(blocks, (int, str)) else list(blocks)
    if not listed:
        raise ValueError(f"{name}: expected at least one block, got none")
    for block in listed:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"{name}: expected an index, a sequence of indices or 'all', got {blocks!r}")
        if not -depth <= block < depth:
            raise ValueError(f"{name}: expected indices in [{-depth}, {depth - 1}] for {depth} blocks, got {block}")
    return [int(block) % depth for block in listed]


def block_count(name: str, model: nn.Module) -> int:
    stack = getattr(model, "blocks", None)
    if not isinstance(stack, (nn.Sequential, nn.ModuleList)):
        raise TypeError(f"{name}: expected a Vision Transformer with a list of blocks, {type(model).__name__} has none")
    return len(stack)


def pair_block_indices(
    student: nn.Module, teacher: nn.Module, blocks: Blocks | None, teacher_blocks: Blocks | None
) -> tuple[list[int], list[int]]:
    depth, teacher_depth = block_count("student", student), block_count("teacher", teacher)
    ours = default_blocks(depth, 3) if blocks is None else block_indices("blocks", student, blocks)
    if len(set(ours)) != len(ours):
        raise ValueError(f"blocks: expected every block once, got {blocks!r} for {depth} blocks")
    if teacher_blocks is None:
        return ours, [-(-(block + 1) * teacher_depth // depth) - 1 for block in ours]
    theirs = block_indices("teacher_blocks", teacher, teacher_blocks)
    if len(theirs) != len(ours):
        raise ValueError(f"teacher_blocks: expected {len(ours)}, one for each of blocks, got {len(theirs)}")
    return ours, theirs
