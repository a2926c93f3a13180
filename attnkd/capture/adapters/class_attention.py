"""Models of timm that add their class token late, in attentions of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters.timm_models import Timm

_LISTS = {"cait": ("Cait", "blocks_token_only"), "xcit": ("Xcit", "cls_attn_blocks")}
"""By module of timm: the class, and its list of blocks that have the class token."""


class ClassAttention(Timm):
    """``timm.models.cait.Cait`` and ``timm.models.xcit.Xcit``: blocks of patches, and after them blocks in which the class token reads the
    patches. The attention of those has one row, the class token's."""

    family = "CaiT and XCiT of timm"

    def takes(self, model: nn.Module) -> bool:
        return any(
            base.__module__ == f"timm.models.{module}" and base.__name__ == name
            for base in type(model).__mro__
            for module, (name, _) in _LISTS.items()
        )

    def blocks(self, model: nn.Module) -> list[str]:
        names = ["blocks", *(name for _, name in _LISTS.values() if hasattr(model, name))]
        listed: dict[str, Any] = {name: getattr(model, name) for name in names}
        return [f"{name}.{index}" for name, blocks in listed.items() for index in range(len(blocks))]

    def block_tokens(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A block of CaiT that is called with (patches, class token) puts out the class token alone; the patches stay what they were."""
        alone = len(args) == 2 and isinstance(args[1], Tensor)
        return torch.cat([output, args[0]], 1) if alone else output
