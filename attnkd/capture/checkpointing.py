"""Whether a block runs inside activation checkpointing, and may be run again in the backward."""

from __future__ import annotations

import torch


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves goes through hooks now, as in a checkpointed block. A loss computed there would be computed a
    second time, from a block that does not know of it."""
    if torch.compiler.is_compiling():  # a compiled checkpoint repeats the operations, not the module's forward
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
