"""Finds the attention modules that a choice of blocks means, and refuses kinds whose map q and k do not determine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

Blocks = int | str | Sequence[int] | Sequence[str]


def attention_paths(model: nn.Module, blocks: Blocks) -> list[str]:
    """The module paths that ``blocks`` means: given paths in their order, indices in ascending order.

    Raises:
        TypeError, ValueError: blocks of the wrong kind, out of range, repeated, ambiguous or not found.
        NotImplementedError: a block without an attention that can be tapped.
    """
    listed = _listed(model, blocks)
    if all(isinstance(block, str) for block in listed):
        for path in listed:
            if path not in dict(model.named_modules()):
                raise ValueError(f"blocks: {type(model).__name__} has no module at path {path!r}")
        paths = [str(path) for path in listed]
    else:
        prefix, stack = _block_stack(model)
        paths = [_attention_in(f"{prefix}.{i}", stack[i]) for i in sorted(_indices(len(stack), listed))]
    if len(set(paths)) != len(paths):
        raise ValueError(f"blocks: expected every attention once, got {blocks!r}")
    for path in paths:
        _check_attention(path, model.get_submodule(path))
    return paths


def pair_blocks(
    student: nn.Module, teacher: nn.Module, blocks: Blocks, teacher_blocks: Blocks | None = None
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Which student attention learns from which teacher attention.

    Args:
        blocks: of the student: index, sequence of indices, 'all', or module paths.
        teacher_blocks: the same for the teacher, one for each student block, repeats allowed. None spreads the
            student's blocks over the teacher's depth: block i of Ls learns from ⌈(i + 1)·Lt/Ls⌉ − 1, last from last.

    Returns:
        Paths to tap in the student, those in the teacher, and pairs (index into the first, index into the second).
    """
    wanted = _listed(student, blocks)
    if teacher_blocks is not None:
        teacher_wanted = _listed(teacher, teacher_blocks)
    elif any(isinstance(block, str) for block in wanted):
        raise ValueError("teacher_blocks: needed when blocks are module paths, got None")
    else:
        depth, teacher_depth = len(_block_stack(student)[1]), len(_block_stack(teacher)[1])
        # −(−a // b) is ⌈a / b⌉
        teacher_wanted = [-(-(index + 1) * teacher_depth // depth) - 1 for index in _indices(depth, wanted)]
    if len(teacher_wanted) != len(wanted):
        raise ValueError(f"teacher_blocks: expected {len(wanted)}, one for each of blocks, got {len(teacher_wanted)}")
    student_paths = [path for block in wanted for path in attention_paths(student, block)]
    teacher_paths = [path for block in teacher_wanted for path in attention_paths(teacher, block)]
    taps = list(dict.fromkeys(teacher_paths))
    return student_paths, taps, [(index, taps.index(path)) for index, path in enumerate(teacher_paths)]


def plain_class(module: object) -> type:
    """The class of a module as its author wrote it, also while it is tapped."""
    return getattr(type(module), "_plain_class", type(module))


def _listed(model: nn.Module, blocks: Blocks) -> list:
    if blocks == "all":
        return list(range(len(_block_stack(model)[1])))
    listed = list(blocks) if isinstance(blocks, Sequence) and not isinstance(blocks, str) else [blocks]
    if not listed:
        raise ValueError("blocks: expected at least one, got none")
    if {type(block) for block in listed} not in ({int}, {str}):
        raise TypeError(f"blocks: expected int, a sequence of int, 'all', or module paths (str), got {blocks!r}")
    return listed


def _indices(depth: int, listed: list) -> list[int]:
    for index in listed:
        if not -depth <= index < depth:
            raise ValueError(f"blocks: expected indices in [{-depth}, {depth - 1}] for {depth} blocks, got {index}")
    return [index % depth for index in listed]


def _block_stack(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if path.split(".")[-1] == "blocks" and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    ]
    stacks = [stack for stack in stacks if stack[0] == "blocks"] or stacks
    if len(stacks) != 1:
        found = ", ".join(path for path, _ in stacks) or "none"
        raise ValueError(
            f"blocks: indices need a model with one list named 'blocks', {type(model).__name__} has {found}; "
            "give module paths such as 'layers.11.attention'"
        )
    return stacks[0]


def _attention_in(path: str, block: nn.Module) -> str:
    """The path of a block's one attention: a submodule, or the block itself (timm's ParallelScalingBlock)."""
    named = [(f"{path}.{name}" if name else path, module) for name, module in block.named_modules()]
    found = [name for name, module in named if hasattr(module, "fused_attn")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"blocks: {path} has {len(found)} attentions ({', '.join(found)}); give module paths")
    for name, module in named:
        _check_attention(name, module)
    raise NotImplementedError(
        f"{path} ({type(block).__name__}): none of its modules "
        f"({', '.join(type(module).__name__ for module in block.children())}) has a scaled_dot_product_attention path"
    )


_REFUSED = {
    "XCA": "it attends over channels (cross-covariance attention), not over tokens",
    "TalkingHeadAttn": "it mixes heads before and after the softmax (talking heads); q and k do not determine its map",
    "DiffAttention": "its attention is a difference of two softmaxes (differential attention)",
    "DiffParallelScalingBlock": "its attention is a difference of two softmaxes (differential attention)",
    "MultiheadAttention": "torch.nn.MultiheadAttention computes attention below Python, where it cannot be seen",
}


def _check_attention(path: str, attention: nn.Module) -> None:
    name = plain_class(attention).__name__
    for base in type(attention).__mro__:
        if base.__name__ in _REFUSED:
            raise NotImplementedError(f"{path} ({name}): {_REFUSED[base.__name__]}")
    if not hasattr(attention, "fused_attn") and (hasattr(attention, "logit_scale") or hasattr(attention, "tau")):
        raise NotImplementedError(f"{path} ({name}): cosine attention without a scaled_dot_product_attention path")
    if isinstance(attention, torch.jit.ScriptModule):
        raise NotImplementedError(f"{path} ({name}): a scripted module cannot be tapped")
