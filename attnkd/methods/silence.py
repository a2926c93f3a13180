"""Sets the attention of chosen heads to zero while a model runs, for one head or for every head in turn at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnkd.methods.whole_map import num_heads


@contextmanager
def silenced(model: nn.Module, heads: dict[str, int | None]) -> Iterator[None]:
    """While open, heads of attentions give zero: probabilities set to zero, no renormalisation.

    Args:
        heads: for every attention path the head to silence, or None for each in turn: there the batch [B, …] becomes
            [B·H, …], copy h of an image with head h silenced. The outputs of several such blocks are ordered
            [B, H of the first, H of the second, …]. At most one attention a block, in running order.
    """
    mode, handles, switched = _Silence(), [], []
    try:
        for path, head in heads.items():
            attention: Any = model.get_submodule(path)
            if getattr(attention, "fused_attn", None) is False:  # its SDPA path exists but is switched off
                attention.fused_attn = True
                switched.append(attention)
            count = num_heads(model, path)
            keep = 1 - torch.eye(count, device=next(model.parameters()).device)
            if head is None:
                handles.append(model.get_submodule(block_path(path)).register_forward_pre_hook(_spread(count)))
            else:
                keep = keep[head : head + 1]
            handles.append(attention.register_forward_pre_hook(mode.arm(keep)))
            handles.append(attention.register_forward_hook(mode.check(path)))
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in switched:
            attention.fused_attn = False


class _Silence(TorchFunctionMode):
    """Multiplies the next attention output by ``keep`` [copies, H]: row c for the images c, c + copies, …"""

    keep: Tensor | None = None

    def arm(self, keep: Tensor) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.keep = keep

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
        return (output.unflatten(0, (-1, len(keep))) * keep[..., None, None]).flatten(0, 1)


def _spread(copies: int) -> Callable[..., tuple]:
    """Before a block: every image of the batch ``copies`` times, one after the other."""
    return lambda _, args: (args[0].repeat_interleave(copies, 0), *args[1:])


def block_path(path: str) -> str:
    """The path of the block that an attention belongs to: where the residual stream enters."""
    match = re.match(r"(.*\.)?blocks\.\d+", path)
    if match is None:
        raise ValueError(f"blocks: expected attentions inside a list named 'blocks', got {path!r}")
    return match.group()
