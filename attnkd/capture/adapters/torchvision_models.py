"""The Vision Transformers of torchvision (``vit_b_16`` and the others)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout, cut


class Torchvision(Adapter):
    """``torchvision.models.VisionTransformer``."""

    family = "torchvision (vit_*)"

    def takes(self, model: nn.Module) -> bool:
        return any(
            base.__name__ == "VisionTransformer" and base.__module__.startswith("torchvision.")
            for base in type(model).__mro__
        )

    def layout(self, model: nn.Module) -> TokenLayout:
        width: Any = model.hidden_dim
        return TokenLayout(1, True, width)

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        return cut(size, model.patch_size)

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        patches = model._process_input(images)
        return model.encoder(torch.cat([model.class_token.expand(len(images), -1, -1), patches], 1))

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.heads(tokens[:, 0])

    def num_classes(self, model: nn.Module) -> int | None:
        last = list(model.get_submodule("heads").modules())[-1]
        return last.out_features if isinstance(last, nn.Linear) else 0

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        size: Any = model.image_size
        return size, size

    def embedding(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("conv_proj")
