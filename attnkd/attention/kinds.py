"""Calls of one kind are checked once: same shapes, dtypes, devices and options, same answer.

Checking the arguments and choosing the implementation looks at no value in a tensor, and takes as long as a launch. So an operation puts
both into one function of its tensors and options, and :func:`once_a_kind` remembers what it returned. It remembers no error: a wrong
call is looked at, and refused, each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from attnkd.attention.dispatch import transforming

Decision = TypeVar("Decision")
MOST = 1024
"""Kinds of an operation that are remembered; then all are forgotten, since sizes that never come again would stay."""


_memories: list[dict[tuple, Any]] = []


def forget() -> None:
    """The next call of every kind is looked at again; for whoever changes what else decides, such as the interpreter."""
    for known in _memories:
        known.clear()


def once_a_kind(decide: Callable[..., Decision]) -> Callable[..., Decision]:
    """Decorates a function of tensors, numbers, words and None, called without keywords, whose result holds no tensor and depends on nothing
    of the tensors but what is described here. Anything else among the arguments, a tensor of another type or layout, a transform of
    torch.func or a compiler is asked about each time."""
    known: dict[tuple, Decision] = {}
    _memories.append(known)

    @functools.wraps(decide)
    def decided(*args: object) -> Decision:
        if torch.compiler.is_compiling() or transforming():
            return decide(*args)
        described: list[object] = []
        for arg in args:
            what = type(arg)
            if what is Tensor or what is Parameter:
                assert isinstance(arg, Tensor)
                if arg.is_nested:  # has no shape
                    return decide(*args)
                described += (arg.shape, arg.dtype, arg.device, arg.layout)
            elif arg is None or what is str or what is float or what is int or what is bool:
                described += (what, arg)  # True is not 1.0
            else:
                return decide(*args)
        kind = tuple(described)
        decision = known.get(kind)
        if decision is None:  # no decision is None
            decision = decide(*args)
            if len(known) >= MOST:
                known.clear()
            known[kind] = decision
        return decision

    return decided
