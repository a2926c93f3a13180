"""The tokens that chosen blocks of a Vision Transformer put out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkd.capture.adapters import Adapter, adapter_or_plain
from attnkd.capture.checkpointing import saved_tensors_are_hooked
from attnkd.capture.tokens import Grid, block_layout, input_images, padding


class BlockTokens(NamedTuple):
    """The output of one block. The other fields say which tokens they are; None where it is unknown."""

    tokens: Tensor
    """[B, N, D], with the autograd graph of the model."""
    num_prefix_tokens: int | None
    """Tokens before the first patch: class token, distillation token, registers."""
    has_cls: bool | None
    """Whether token 0 is a class token. Some models (CaiT, XCiT, ConViT) add it after their first blocks."""
    grid: Grid | None
    """(height, width) in patches."""
    padded: Tensor | None = None
    """[B or 1, N] boolean: tokens of padding, which the block's ``attn_mask`` hides from every token; None without a mask."""


class BlockHooks:
    """Forward hooks that keep what chosen blocks of a model put out while :meth:`run` runs it, and do nothing at other times.

    No module: whatever runs the model can have it beside its own capture.

    Args:
        model: with blocks that return [B, N, D].
        paths: of the blocks, see :func:`attnkd.capture.blocks.block_paths`.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model, self.paths = model, list(paths)
        self.keepers = [_Keeper() for _ in self.paths]
        self._handles = [
            model.get_submodule(path).register_forward_hook(keeper, with_kwargs=True)
            for path, keeper in zip(self.paths, self.keepers, strict=True)
        ]

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        compare: Sequence[Callable[[BlockTokens], Any]] | None = None,
    ) -> tuple[Any, list[BlockTokens], list[Any]]:
        """``function(*args)``, which runs the model on the images among ``args``, the tokens [B, N, D] after each block, and what
        ``compare`` makes of them.

        Args:
            compare: one function for each of the blocks, called with its tokens as soon as it has put them out; a block that
                activation checkpointing will run a second time is compared when the model is through.

        Raises:
            RuntimeError: a block did not run, ran several times (shared weights), or ran cut off from the gradient
                (reentrant activation checkpointing).
            TypeError: a block returns something else.
        """
        losses: list[Any] = [None] * len(self.paths)
        images = input_images(args, {})

        def compare_now(index: int, runs: list[_Run]) -> None:
            if compare is not None:
                losses[index] = compare[index](self._tokens(self.paths[index], runs, images))

        adapter = adapter_or_plain(self.model)
        for index, keeper in enumerate(self.keepers):
            keeper.kept.runs, keeper.kept.then = [], functools.partial(compare_now, index)
            keeper.kept.adapter = adapter
        try:
            output = function(*args)
            kept = [keeper.kept.runs for keeper in self.keepers]
        finally:
            for keeper in self.keepers:
                keeper.kept.runs = keeper.kept.then = keeper.kept.adapter = None
        tokens = [self._tokens(*one, images) for one in zip(self.paths, kept, strict=True)]
        if compare is None:
            return output, tokens, []
        return output, tokens, [compare[i](tokens[i]) if loss is None else loss for i, loss in enumerate(losses)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _tokens(self, path: str, kept: list[_Run] | None, images: Tensor | None) -> BlockTokens:
        who = f"{path} of {type(self.model).__name__}"
        if not kept:
            raise RuntimeError(f"{who}: its output is compared, but it did not run")
        if len(kept) > 1:
            raise RuntimeError(
                f"{who}: ran {len(kept)} times in one forward; outputs of blocks that share their weights cannot be told apart"
            )
        tokens, mask, grad = kept[0]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise TypeError(f"{who}: expected a block that returns [B, N, D], got {_shape(tokens)}")
        if grad != torch.is_grad_enabled():
            raise RuntimeError(
                f"{who}: runs without gradient inside a forward that has one. Reentrant activation checkpointing does "
                "this: use use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
            )
        layout = block_layout(self.model, images, tokens.shape[0], tokens.shape[1])
        return BlockTokens(tokens, *layout, padding(mask, tokens.shape[1]))


class BlockOutputs(nn.Module):
    """A model that returns the tokens its blocks put out beside its class scores; of no blocks, the scores alone.

    Args:
        model: a classifier; with blocks that return [B, N, D].
        paths: of the blocks, see :class:`BlockHooks`.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.model, self.hooks = model, BlockHooks(model, paths)

    def forward(self, images: Tensor) -> tuple[Tensor, list[BlockTokens]]:
        """images [B, C, H, W] → the model's output [B, K], the tokens [B, N, D] after each block.

        Raises:
            RuntimeError, TypeError: see :meth:`BlockHooks.run`; the model returns something else.
        """
        return self.compare(images)[:2]

    def compare(
        self, images: Tensor, compare: Sequence[Callable[[BlockTokens], Any]] | None = None
    ) -> tuple[Tensor, list[BlockTokens], list[Any]]:
        """The same, and what ``compare`` makes of the tokens, see :meth:`BlockHooks.run`."""
        run = adapter_or_plain(self.model).forward
        output, tokens, losses = self.hooks.run(run, self.model, images, compare=compare)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise TypeError(f"{type(self.model).__name__}: expected class scores [B, K], got {_shape(output)}")
        return output, tokens, losses

    def close(self) -> nn.Module:
        """Remove the hooks and return the model."""
        self.hooks.close()
        return self.model

    untap = close

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__}: {NO_DATA_PARALLEL}")


class _Run(NamedTuple):
    """What a hook sees of one run of its block."""

    tokens: Any
    mask: Tensor | None
    grad: bool


class _Kept(threading.local):
    """What a hook keeps in this thread: another thread may run the same model at the same time."""

    def __init__(self) -> None:
        self.runs: list[_Run] | None = None
        self.then: Callable[[list[_Run]], None] | None = None
        self.adapter: Adapter | None = None


class _Keeper:
    """A forward hook that keeps a block's output while this thread is in :meth:`BlockHooks.run`.

    An object, so that a copied or pickled model keeps hook and holder together.
    """

    def __init__(self) -> None:
        self.kept = _Kept()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.kept.runs is not None and self.kept.adapter is not None:
            tokens = self.kept.adapter.block_tokens(module, args, output)
            self.kept.runs.append(_Run(tokens, kwargs.get("attn_mask"), torch.is_grad_enabled()))
            if self.kept.then is not None and not saved_tensors_are_hooked():
                self.kept.then(self.kept.runs)

    def __reduce__(self) -> tuple:
        return type(self), ()


NO_DATA_PARALLEL = (
    "nn.DataParallel cannot gather what was captured; use DistributedDataParallel, one process for each GPU"
)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
