"""DINOv2 and DINOv3 as torch.hub gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout, cut


class DinoHub(Adapter):
    """``DinoVisionTransformer`` of facebookresearch/dinov2 and facebookresearch/dinov3."""

    family = "DINOv2 and DINOv3 of torch.hub"

    def takes(self, model: nn.Module) -> bool:
        return any(base.__name__ == "DinoVisionTransformer" for base in type(model).__mro__)

    def blocks(self, model: nn.Module) -> list[str] | None:
        """DINOv2 can keep its blocks in chunks, each filled up with identities in front: 'blocks.1.6' is block 6."""
        listed: Any = model.blocks
        if not getattr(model, "chunked_blocks", False):
            return [f"blocks.{index}" for index in range(len(listed))]
        return [
            f"blocks.{chunk}.{index}"
            for chunk, blocks in enumerate(listed)
            for index, block in enumerate(blocks)
            if not isinstance(block, nn.Identity)
        ]

    def layout(self, model: nn.Module) -> TokenLayout:
        registers: Any = getattr(model, "num_register_tokens", None)
        if registers is None:
            registers = getattr(model, "n_storage_tokens", 0)
        width: Any = model.embed_dim
        return TokenLayout(1 + registers, True, width)

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        return cut(size, model.patch_size)

    def tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        found = model.forward_features(images)  # type: ignore[operator]
        registers = found["x_norm_regtokens" if "x_norm_regtokens" in found else "x_storage_tokens"]
        return torch.cat([found["x_norm_clstoken"][:, None], registers, found["x_norm_patchtokens"]], 1)

    def head(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model.head(tokens[:, 0])  # type: ignore[operator]

    def num_classes(self, model: nn.Module) -> int | None:
        head: Any = model.head
        return 0 if isinstance(head, nn.Identity) else getattr(head, "out_features", None)

    def embedding(self, model: nn.Module) -> nn.Module | None:
        found: Any = model.patch_embed
        return found
