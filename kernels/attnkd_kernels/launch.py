"""What every launcher needs: the launch; from tensors to sides and specs; sizes and splits; the device."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from attnkd_kernels import language, replay
from attnkd_kernels.language import HeadSpec, Operand, Side

LOG2E = language.LOG2E.value
OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch: multiply-adds may fuse, whatever Triton's default becomes."""

_HERE = contextlib.nullcontext()


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """``kernel[grid](*args, **named)`` on the tensors' device.

    Triton binds and hashes all arguments and compares the kernel's globals, to find the compiled kernel; :mod:`attnkd_kernels.replay` keeps
    what it found.

    Args:
        kernel: its constants are its last parameters.
        args: what is known at run time: tensors, numbers, None, and named tuples of them; at least one tensor.
        named: the constants and the compiler's options.
    """
    with _on_device(_first_tensor(args)):
        compiled = kernel[grid](*args, **named, **OPTIONS)
    if isinstance(compiled, CompiledKernel):
        constants = tuple(named[name] for name in kernel.arg_names[len(args) :])
        replay.launched(compiled[(*grid, 1, 1)[:3]], args, constants)
    else:  # interpreted, or not launched
        replay.launched(None, args, ())


def _first_tensor(args: tuple) -> Any:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, tuple):
            found = _first_tensor(arg)
            if found is not None:
                return found
    return None


def cdiv(size: int, by: int) -> int:
    """size / by, up. (Triton's own, and its next power of two, take microseconds outside of a kernel.)"""
    return -(-size // by)


def padded(size: int, at_least: int = 16) -> int:
    """The next power of two, which is what a Triton tile can span."""
    return max(1 << (size - 1).bit_length(), at_least)


def operand(tensor: Tensor) -> Operand:
    """A tensor [B, H, rows, columns] with any strides."""
    return Operand(tensor, *tensor.stride())


def row_strides(grad: Tensor) -> tuple[int, int, int]:
    """The strides of an upstream gradient of rows [B, Ho, M]; one number, [], is that of every row."""
    batch, head, row = grad.stride() or (0, 0, 0)
    return batch, head, row


def mask_operand(mask: Tensor) -> Operand:
    """A mask, of size 1 where it is broadcast over [B, H, M, N]; boolean ones are read as bytes."""
    strides = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return Operand(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)


def mask_kind(mask: Tensor | None) -> str:
    """Which of the masks of :mod:`attnkd_kernels.language` a tensor [B|1, H|1, M|1, N|1] is."""
    if mask is None:
        kind = language.NO_MASK
    elif mask.dtype == torch.bool:
        kind = language.BOOL_ROW if mask.shape[2] == 1 else language.BOOL_MASK
    else:
        kind = language.FLOAT_ROW if mask.shape[2] == 1 else language.FLOAT_MASK
    return kind.value


def row_side(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, temperature: float, wide: bool, unit: float = LOG2E
) -> tuple[Side, HeadSpec]:
    """One model's side of a row kernel.

    Args:
        query: [B, H, M, D].
        key: [B, H, N, D].
        mask: [B, Ho, M, N] view, or None.
        wide: whether the H heads are one wide head (Ho = 1).
        unit: logits per nat: log2(e) for logits in units of log 2, 1 for nats.
    """
    heads = query.shape[1] if wide else 1
    masked = operand(query) if mask is None else mask_operand(mask)
    side = Side(operand(query), operand(key), masked, scale * unit / temperature, unit / temperature)
    return side, head_spec(heads, query.shape[3], mask_kind(mask))


def given_rows(probs: Tensor) -> tuple[Side, HeadSpec]:
    """A side of finished probabilities [B, Ho, M, N]: no query, no keys, no factors."""
    rows = operand(probs)
    return Side(rows, rows, rows, 1.0, 1.0), head_spec(1, 1, language.GIVEN_ROWS.value)


@cache
def head_spec(heads: int, dim: int, mask: str) -> HeadSpec:
    """The compile-time part of a side: a wide head of ``heads`` × ``dim`` dims and the kind of its mask."""
    width = heads * dim
    return HeadSpec(*(tl.constexpr(x) for x in (heads, dim, width, padded(width), mask)))


def split(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """(splits, tiles a split): enough programs for four a processor, never less than two tiles each."""
    splits = max(1, min(cdiv(4 * processors, programs), tiles // 2))
    per_split = cdiv(tiles, splits)
    return cdiv(tiles, per_split), per_split


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's GPU, which need not be the current one."""
    index = tensor.get_device()  # -1 on the CPU
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


@cache
def architecture(device: torch.device) -> str:
    """'sm80', 'sm90', 'sm100', 'sm120', 'gfx942', or 'cpu' for the interpreter; the nearest entry for other GPUs."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12 or (major, minor) in ((8, 6), (8, 9)):
        return "sm120"  # about 100 KB of shared memory
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(major, "sm80")


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; 1 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1
