"""Memory that reveals faults of a kernel: NaN around inputs, canaries around outputs, and every layout that models produce.

A kernel that reads outside its tensor reads NaN, one that writes outside its output changes a canary, one that leaves an element
unwritten returns NaN, and one that assumes a layout gets another. Unlike :class:`attnkd.testing.traffic.Meter` all of this
works on a GPU too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnkd.attention.dispatch import TRITON_INSTALLED

__all__ = ["LAYOUTS", "canaries", "guarded", "lay_out", "poisoned_empty"]

LAYOUTS = ("contiguous", "packed_qkv", "transposed", "guarded", "padded_dim", "expanded_batch", "expanded_heads")
"""What :func:`lay_out` knows."""

_CANARY = 0x5A
_BAND = 256  # bytes on each side; a multiple of 16, so that canaries do not change an output's alignment


def guarded(tensor: Tensor, band: int = 3) -> Tensor:
    """A copy of the tensor as a view into a larger buffer that holds NaN everywhere else.

    Args:
        tensor: floating point, any shape [..., N, D].
        band: how many rows before and after, and columns after, each row are NaN. Rows start where a GPU's vector loads
            need them to only by accident, as in a sliced tensor.

    Returns:
        A tensor equal to ``tensor`` whose neighbours in memory are NaN in every dimension.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating point dtype, which has NaN, got {tensor.dtype}")
    buffer = tensor.new_full([size + 2 * band for size in tensor.shape], torch.nan)
    view = buffer[tuple(slice(band, band + size) for size in tensor.shape)]
    return view.copy_(tensor)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor [B, H, N, D] in another memory layout.

    Args:
        tensor: floating point [B, H, N, D].
        layout: one of :data:`LAYOUTS`:

            * ``contiguous``: strides (HND, ND, D, 1);
            * ``packed_qkv``: the k of a packed projection [B, N, 3, H, D], strides (3NHD, D, 3HD, 1), as timm's; q and v
              are NaN;
            * ``transposed``: memory [B, N, H, D], as flash attention's;
            * ``guarded``: see :func:`guarded`;
            * ``padded_dim``: rows of D in memory rows of a multiple of 128 bytes and then some, NaN between;
            * ``expanded_batch``, ``expanded_heads``: stride 0; every image (head) has the values of the first.

    Returns:
        A tensor with the values of ``tensor`` (of its first slice, where expanded).
    """
    B, H, N, D = tensor.shape
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "packed_qkv":
        key = tensor.new_full((B, N, 3, H, D), torch.nan).permute(2, 0, 3, 1, 4)[1]
        return key.copy_(tensor)
    if layout == "transposed":
        return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    if layout == "guarded":
        return guarded(tensor)
    if layout == "padded_dim":
        line = 128 // tensor.element_size()
        width = math.ceil(D / line) * line + 8
        return tensor.new_full((B, H, N, width), torch.nan)[..., :D].copy_(tensor)
    if layout == "expanded_batch":
        return tensor[:1].clone().expand(B, H, N, D)
    if layout == "expanded_heads":
        return tensor[:, :1].clone().expand(B, H, N, D)
    raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` returns NaN (for integers the largest value), so that an unwritten element is visible.

    PyTorch's deterministic mode does this; the state before is restored on leaving.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def canaries() -> Iterator[list[Tensor]]:
    """Every tensor that Python code allocates uninitialised inside starts as NaN and lies between canaries.

    ``torch.empty``, ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` are replaced while it lasts, which is what
    launchers allocate outputs and scratch with.

    Yields:
        The tensors allocated so far, in order.

    Raises:
        AssertionError: on leaving, if a byte beside one of the tensors was overwritten.
    """
    allocated: list[Tensor] = []
    bands: list[tuple[Tensor, Tensor]] = []
    empty, empty_strided = torch.empty, torch.empty_strided
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def between_canaries(like: Tensor) -> Tensor:
        if like.numel() == 0:
            return like
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        end = _BAND + span * like.element_size()
        buffer = empty(end + _BAND, dtype=torch.uint8, device=like.device).fill_(_CANARY)
        inside = buffer[_BAND:end].view(like.dtype)
        if like.is_floating_point():
            inside.fill_(torch.nan)
        tensor = inside.as_strided(like.shape, like.stride())
        bands.append((buffer[:_BAND], buffer[end:]))
        allocated.append(tensor)
        return tensor

    def wrap(function: Any) -> Any:
        return lambda *args, **kwargs: between_canaries(function(*args, **kwargs))

    with (
        _as_launched(),
        mock.patch.object(torch, "empty", wrap(empty)),
        mock.patch.object(torch, "empty_like", wrap(empty_like)),
        mock.patch.object(torch, "empty_strided", wrap(empty_strided)),
        mock.patch.object(Tensor, "new_empty", wrap(new_empty)),
    ):
        yield allocated
    for tensor, around in zip(allocated, bands, strict=True):
        for side, band in zip(("before", "after"), around, strict=True):
            if (dead := band != _CANARY).any():
                raise AssertionError(
                    f"{int(dead.sum())} bytes {side} an output of shape {tuple(tensor.shape)} and dtype {tensor.dtype} "
                    "were overwritten"
                )


def _as_launched() -> contextlib.AbstractContextManager[None]:
    """A recorded call would allocate what it allocated before."""
    if not TRITON_INSTALLED:
        return contextlib.nullcontext()
    from attnkd_kernels import replay

    return replay.as_launched()
