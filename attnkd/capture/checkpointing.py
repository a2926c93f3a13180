"""Activation checkpointing: switches it on in a model, and tells whether a block runs inside it now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def recompute_blocks(model: nn.Module, label: str = "model") -> None:
    """Let a model keep each block's input alone for the backward, and run the block again there: less memory, more time.

    By the model's own switch: timm's and OpenCLIP's ``set_grad_checkpointing``, Hugging Face's
    ``activation_checkpointing_enable``. The gradients are the same; dropout draws the same numbers again.

    Args:
        label: the argument that messages begin with.

    Raises:
        ValueError: a model without such a switch, or whose switch refuses.
    """
    who, switches = type(model).__name__, ("set_grad_checkpointing", "activation_checkpointing_enable")
    own: Any = getattr(model, switches[0], None)
    # The older name last: it warns where both are.
    other: Any = getattr(model, switches[1], None) or getattr(model, "gradient_checkpointing_enable", None)
    if own is None and other is None:
        raise ValueError(
            f"{label}: {who} cannot recompute its activations; it has neither {switches[0]} (timm, OpenCLIP) nor {switches[1]} "
            "(Hugging Face)"
        )
    try:
        if own is not None:
            own(True)
        else:
            other({"use_reentrant": False})
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{label}: {who} cannot recompute its activations ({error})") from None


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through hooks now, as in a checkpointed block. A loss computed there would be computed a
    second time, from a block that does not know of it."""
    if torch.compiler.is_compiling():  # a compiled checkpoint repeats the operations, not the module's forward
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
