"""What every launcher needs: sizes, padding, device selection, the code of a divergence."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "js": 2, "cross_entropy": 3, "mse": 4, "logit_mse": 5}
OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch: multiply-adds may fuse, whatever Triton's default becomes."""

MASK_NONE, MASK_ADDITIVE, MASK_BOOLEAN, MASK_PROBS = 0, 1, 2, 3


def padded(size: int, at_least: int = 16) -> int:
    """The next power of two, which is what a Triton tile can span."""
    return max(triton.next_power_of_2(size), at_least)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's GPU, which need not be the current one."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; 1 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def mask_argument(mask: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, tuple[int, int, int, int]]:
    """The pointer, kind and strides of a mask [B, H, M, N] view (boolean masks are read as bytes)."""
    if mask is None:
        return stand_in, MASK_NONE, (0, 0, 0, 0)
    b, h, m, n = mask.stride()
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), MASK_BOOLEAN, (b, h, m, n)
    return mask, MASK_ADDITIVE, (b, h, m, n)
