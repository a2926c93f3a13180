"""Sets the attention of chosen heads to zero while a model runs, for one head, or for each head in its own copy of the batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnkd.capture.blocks import block_around
from attnkd.methods.whole_map import num_heads


@contextmanager
def silenced(model: nn.Module, heads: dict[str, int | None], at_once: int | None = None) -> Iterator[None]:
    """While open, heads of attentions give zero in this thread: probabilities set to zero, no renormalisation.

    Args:
        heads: for every attention path the head to silence, or None for each in turn: there the batch [B, …] becomes
            [B·H, …], copy h of an image with head h silenced. The outputs of several such blocks are ordered
            [B, H of the first, H of the second, …]. At most one attention a block, in running order.
        at_once: the number of images that the model gets, of which each is there :func:`copies` times, one after the other, so that no
            block multiplies them: the same outputs, where outputs of several blocks are put together, whose batches would differ.
    """
    mode, handles, switched = _Silence(), [], []
    device = next(model.parameters()).device
    spread = {path: num_heads(model, path) for path, head in heads.items() if head is None}
    try:
        for path, head in heads.items():
            attention: Any = model.get_submodule(path)
            if getattr(attention, "fused_attn", None) is False:  # its SDPA path exists but is switched off
                attention.fused_attn = True
                switched.append(attention)
            keep = 1 - torch.eye(num_heads(model, path), device=device)
            if head is not None:
                keep = keep[head : head + 1]
            elif at_once is not None:
                keep = keep[_turns(list(spread.values()), list(spread).index(path)).to(device)]
                mode.batch = at_once
            else:
                block = model.get_submodule(block_around(model, path))
                handles.append(block.register_forward_pre_hook(mode.here(mode.spread(spread[path]))))
            handles.append(attention.register_forward_pre_hook(mode.here(mode.arm(keep))))
            handles.append(attention.register_forward_hook(mode.here(mode.check(path))))
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in switched:
            attention.fused_attn = False


def copies(model: nn.Module, heads: dict[str, int | None]) -> int:
    """How many copies of an image :func:`silenced` makes of it: the product of the numbers of heads that take turns."""
    return math.prod(num_heads(model, path) for path, head in heads.items() if head is None)


class _Silence(TorchFunctionMode):
    """Multiplies the next attention output by ``keep`` [copies, H]: row c for the images c, c + copies, … of a batch of ``batch``."""

    keep: Tensor | None = None
    batch = 0

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def here(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook for this thread alone: another one may run the same model."""
        return lambda *args: hook(*args) if threading.get_ident() == self.thread else None

    def arm(self, keep: Tensor) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.keep = keep

        return hook

    def spread(self, copies: int) -> Callable[..., tuple]:
        """Before a block: every image of the batch ``copies`` times, one after the other."""

        def hook(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not args or not isinstance(args[0], Tensor):
                raise RuntimeError(f"{type(block).__name__}: expected to be called with [B, …] tokens first")
            images = args[0].repeat_interleave(copies, 0)
            self.batch = len(images)
            return images, *args[1:]

        return hook

    def check(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.keep is not None:
                self.keep = None
                raise RuntimeError(f"{path}: its forward made no call to F.scaled_dot_product_attention")

        return hook

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention or self.keep is None:
            return output
        keep, self.keep = self.keep.to(output.dtype), None
        windows = (
            len(output) // self.batch if len(keep) > 1 else 1
        )  # they lie in the batch, those of an image one after the other
        apart = output.unflatten(0, (-1, len(keep), windows))
        return (apart * keep.view(len(keep), 1, -1, *[1] * (output.ndim - 2))).flatten(0, 2)


def _turns(counts: Sequence[int], position: int) -> Tensor:
    """[product of counts] int64: the head that is silent in attention ``position``, for every combination in row-major order."""
    return torch.arange(math.prod(counts)) // math.prod(counts[position + 1 :]) % counts[position]
