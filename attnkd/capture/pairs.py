"""Pairs the blocks of a student with those of a teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from attnkd.capture.adapters import find_adapter
from attnkd.capture.blocks import Blocks, attention_paths, block_indices, block_stack, check_once, listed_blocks


def pair_blocks(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Blocks,
    teacher_blocks: Blocks | None = None,
    find: Callable[[nn.Module, Blocks, str], list[str]] = attention_paths,
    teacher_name: str = "teacher",
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Which student block learns from which teacher block.

    Args:
        blocks: of the student: index, sequence of indices, 'all', or module paths.
        teacher_blocks: the same for the teacher, one for each student block, repeats allowed. None spreads the
            student's blocks over the teacher's depth: block i of Ls learns from ⌈(i + 1)·Lt/Ls⌉ − 1, last from last.
        find: :func:`attention_paths`, or :func:`block_paths` for the blocks themselves.
        teacher_name: for messages.

    Returns:
        Paths to observe in the student, those in the teacher, and pairs (index into the first, index into the second).
    """
    theirs = f"{teacher_name}_blocks"
    wanted = listed_blocks(student, blocks, "blocks")
    if teacher_blocks is not None:
        teacher_wanted = listed_blocks(teacher, teacher_blocks, theirs)
    elif any(isinstance(block, str) for block in wanted):
        raise ValueError(f"{theirs}: needed when blocks are module paths, got None")
    else:
        depths = _depths(student, teacher, theirs)
        teacher_wanted = [
            _counterpart(index, depths) for index in block_indices(sum(a for a, _ in depths), wanted, "blocks")
        ]
    if len(teacher_wanted) != len(wanted):
        raise ValueError(f"{theirs}: expected {len(wanted)}, one for each of blocks, got {len(teacher_wanted)}")
    student_paths = [path for block in wanted for path in find(student, block, "blocks")]
    check_once(student_paths, blocks, "blocks")
    teacher_paths = [path for block in teacher_wanted for path in find(teacher, block, theirs)]
    for path, other in zip(student_paths, teacher_paths, strict=True):
        _check_same_tokens(student, path, teacher, other, teacher_name, attend=find is attention_paths)
    observed = list(dict.fromkeys(teacher_paths))
    return student_paths, observed, [(index, observed.index(path)) for index, path in enumerate(teacher_paths)]


def _depths(student: nn.Module, teacher: nn.Module, theirs: str) -> list[tuple[int, int]]:
    """(the student's, the teacher's) number of blocks, of each stage where both have the same number of stages."""
    stages = [None if (one := find_adapter(model)) is None else one.stages(model) for model in (student, teacher)]
    if stages[0] is not None and stages[1] is not None and len(stages[0]) == len(stages[1]):
        return list(zip(*stages, strict=True))
    return [(len(block_stack(student, "blocks")), len(block_stack(teacher, theirs)))]


def _counterpart(index: int, depths: list[tuple[int, int]]) -> int:
    """The teacher's block for a student's: in its stage, the last for the last."""
    before = 0
    for depth, teacher_depth in depths:
        if index < depth:
            break
        index, before = index - depth, before + teacher_depth
    return before - (-(index + 1) * teacher_depth // depth) - 1


def _check_same_tokens(student: nn.Module, path: str, teacher: nn.Module, other: str, name: str, attend: bool) -> None:
    """Refuse attentions that run over different parts of the tokens, and blocks whose tokens lie in different orders: equal numbers do
    not make equal tokens."""
    said = []
    for model, at in ((student, path), (teacher, other)):
        adapter = find_adapter(model)
        said.append(None if adapter is None else adapter.window(model, at) if attend else adapter.order(model, at))
    if said[0] != said[1]:
        plain = "all of them" if attend else "in the order of the image"
        raise ValueError(
            f"blocks, {name}_blocks: {path} of the student and {other} of the {name} "
            f"{'attend over' if attend else 'put out'} different tokens: {said[0] or plain} and {said[1] or plain}; pair blocks with the same"
        )
