"""Finds the blocks and attentions that a choice means, refuses attentions that q and k do not tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

from attnkd.attention.checks import integer
from attnkd.capture.adapters import find_adapter

Blocks = int | str | Sequence[int] | Sequence[str]


def attention_paths(model: nn.Module, blocks: Blocks, name: str = "blocks") -> list[str]:
    """The paths of the attentions that ``blocks`` means: given paths in their order, indices in ascending order.

    Args:
        blocks: index, sequence of indices, 'all', or module paths.
        name: of the argument, for messages.

    Raises:
        TypeError, ValueError: blocks of the wrong kind, out of range, repeated, ambiguous, not found, or weight-shared.
        NotImplementedError: a block without an attention that can be tapped.
    """
    return _paths(model, blocks, name, _attention_in, _check_attention)


def block_paths(model: nn.Module, blocks: Blocks, name: str = "blocks") -> list[str]:
    """The same for the blocks themselves, whatever is in them."""
    attentions = set(attentions_of(model))

    def check(path: str, module: nn.Module) -> None:
        block, _, _ = path.rpartition(".")
        if path in attentions and not isinstance(model.get_submodule(block), (nn.ModuleList, nn.Sequential)):
            there = f"its block {block!r}" if block else "a block"
            raise ValueError(f"{name}: what blocks put out is compared, but {path} is an attention; give {there}")

    return _paths(model, blocks, name, lambda path, block: path, check)


def default_blocks(model: nn.Module, count: int) -> list[int]:
    """Indices at 1/3, 2/3 (and 3/3) of a model's depth, the first ``count`` of them: 3, 7 and 11 of 12."""
    depth = len(block_stack(model, "blocks"))
    return sorted({-(-k * depth // 3) - 1 for k in range(1, count + 1)})  # −(−a // b) is ⌈a / b⌉


def block_index(model: nn.Module, path: str) -> int:
    """The index of the block that a module path lies in."""
    return next(index for index, block in enumerate(block_stack(model)) if f"{path}.".startswith(f"{block}."))


def block_around(model: nn.Module, path: str) -> str:
    """The path of the block that an attention lies in, for any family of models; the attention's own where that is a block.

    Raises:
        ValueError: it lies in none.
    """
    try:
        stack = block_stack(model)
    except ValueError:  # several lists of blocks
        stack = [path for name, part in _lists(model).items() for path in _children(name, part)]
    around = [block for block in stack if f"{path}.".startswith(f"{block}.")]
    if not around:
        raise ValueError(f"blocks: {path} lies in none of the blocks of {type(model).__name__} ({_shortened(stack)})")
    return max(around, key=lambda block: (block.split(".")[-2:-1] == ["blocks"], len(block)))


def block_owner(model: nn.Module, path: str) -> str:
    """The path of the smallest part of ``model`` that some adapter speaks for and that has ``path`` in it; '' if none does."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if find_adapter(model.get_submodule(prefix)) is not None:
            return prefix
    return ""


def plain_class(module: object) -> type:
    """The class of a module as its author wrote it, also while it is tapped."""
    return getattr(type(module), "_plain_class", type(module))


def _paths(
    model: nn.Module,
    blocks: Blocks,
    name: str,
    find: Callable[[str, nn.Module], str],
    check: Callable[[str, nn.Module], None],
) -> list[str]:
    listed = listed_blocks(model, blocks, name)
    if all(isinstance(block, str) for block in listed):
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in listed:
            if path not in modules:
                raise ValueError(
                    f"{name}: {type(model).__name__} has no module at path {path!r}; its attentions are {attentions_in_words(model)}"
                )
        paths = [str(path) for path in listed]
    else:
        stack = block_stack(model, name)
        paths = []
        for index in sorted(block_indices(len(stack), listed, name)):
            paths.append(find(stack[index], model.get_submodule(stack[index])))
            _check_shared(name, paths[-1], model, stack)
    check_once(paths, blocks, name)
    for path in paths:
        check(path, model.get_submodule(path))
    return paths


def check_once(paths: list[str], blocks: Blocks, name: str) -> None:
    if len(set(paths)) != len(paths):
        raise ValueError(f"{name}: expected every block once, got {blocks!r}")


def _check_shared(name: str, path: str, model: nn.Module, stack: list[str]) -> None:
    """One module in several blocks runs several times in a forward: which of its runs is meant?"""
    module = model.get_submodule(path)
    owners = [
        index
        for index, block in enumerate(stack)
        if any(part is module for part in model.get_submodule(block).modules())
    ]
    if len(owners) > 1:
        raise ValueError(
            f"{name}: {path} is weight-shared: blocks {', '.join(map(str, owners))} use one module, whose runs in a forward "
            "cannot be told apart. Give every compared block a module of its own, or choose blocks that are not shared"
        )


def listed_blocks(model: nn.Module, blocks: Blocks, name: str) -> list:
    if isinstance(blocks, str) and blocks == "all":
        return list(range(len(block_stack(model, name))))
    given: Sequence = blocks if isinstance(blocks, Sequence) and not isinstance(blocks, str) else [blocks]
    if not len(given):
        raise ValueError(f"{name}: expected at least one, got none")
    listed = [block if isinstance(block, str) else integer(block) for block in given]
    if {type(block) for block in listed} not in ({int}, {str}):
        raise TypeError(f"{name}: expected int, a sequence of int, 'all', or module paths (str), got {blocks!r}")
    return listed


def block_indices(depth: int, listed: list, name: str) -> list[int]:
    for index in listed:
        if not -depth <= index < depth:
            raise ValueError(f"{name}: expected indices in [{-depth}, {depth - 1}] for {depth} blocks, got {index}")
    return [index % depth for index in listed]


def block_stack(model: nn.Module, name: str = "blocks") -> list[str]:
    """The paths of a model's blocks in running order: what its adapter says, else the one list named 'blocks', else the one
    list of modules that have one attention each.

    Raises:
        ValueError: none, or several; names the attentions there are.
    """
    adapter = find_adapter(model)
    known = None if adapter is None else adapter.blocks(model)
    if known is not None:
        return known
    lists = _lists(model)
    stacks = [path for path in lists if path == "blocks"]
    stacks = stacks or [path for path in lists if path.split(".")[-1] == "blocks"]
    stacks = stacks or [path for path, module in lists.items() if all(attentions_of(block) for block in module)]
    if len(stacks) == 1:
        return _children(stacks[0], lists[stacks[0]])
    found = f"its lists of blocks are {', '.join(stacks)}" if stacks else "it has none"
    raise ValueError(
        f"{name}: indices need a model with one list of blocks, {type(model).__name__}: {found}; give module paths. Its "
        f"attentions are {attentions_in_words(model)}"
    )


def _lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def _children(path: str, module: nn.Module) -> list[str]:
    """Paths of a module's children, those that are one module in several places too."""
    return [f"{path}.{child}" if path else child for child in module._modules]


def attentions_in_words(model: nn.Module) -> str:
    """The paths of a model's attentions, for messages."""
    shown = _shortened([path or "the module itself" for path in attentions_of(model)])
    return shown or "none that calls scaled_dot_product_attention (Hugging Face models need attn_implementation='sdpa')"


def _shortened(paths: list[str]) -> str:
    return ", ".join(paths if len(paths) <= 8 else [*paths[:4], "…", *paths[-3:]])


def _attention_in(path: str, block: nn.Module) -> str:
    """The path of a block's one attention: a submodule, or the block itself (timm's ParallelScalingBlock)."""
    named = [(f"{path}.{name}" if name else path, module) for name, module in block.named_modules()]
    found = [f"{path}.{name}" if name else path for name in attentions_of(block)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"blocks: {path} has {len(found)} attentions ({', '.join(found)}); give module paths")
    for name, module in named:
        _check_attention(name, module)
    raise NotImplementedError(
        f"{path} ({type(block).__name__}): none of its modules "
        f"({', '.join(type(module).__name__ for module in block.children())}) has a scaled_dot_product_attention path. "
        "If one calls it through other code, give its module path"
    )


def attentions_of(module: nn.Module) -> list[str]:
    """Paths of the attentions inside a module that can be tapped: those with timm's flag, else those whose code says so."""
    named = list(module.named_modules())
    flagged = [name for name, part in named if hasattr(part, "fused_attn")]
    return flagged or [name for name, part in named if _names_sdpa(part)]


_SDPA_NAMES = {
    "scaled_dot_product_attention",
    "ALL_ATTENTION_FUNCTIONS",  # Hugging Face transformers
    "multi_head_attention_forward",  # torch.nn.MultiheadAttention
}


_MACHINERY = ("builtins", "torch.nn.modules.module", "transformers.modeling_utils")
"""Where the bases of all modules are, which name attentions that they do not compute."""


def _names_sdpa(module: nn.Module) -> bool:
    """Whether a method of the module's class calls ``scaled_dot_product_attention`` by name: models without timm's flag."""
    bases = [base for base in plain_class(module).__mro__ if base.__module__ not in _MACHINERY]
    functions = [value for base in bases for value in vars(base).values() if inspect.isfunction(value)]
    return any(not _SDPA_NAMES.isdisjoint(inspect.unwrap(function).__code__.co_names) for function in functions)


_REFUSED = {
    "XCA": "it attends over channels (cross-covariance attention), not over tokens",
    "TalkingHeadAttn": "it mixes heads before and after the softmax (talking heads); q and k do not determine its map",
    "DiffAttention": "its attention is a difference of two softmaxes (differential attention)",
    "DiffParallelScalingBlock": "its attention is a difference of two softmaxes (differential attention)",
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
