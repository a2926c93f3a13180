"""Swin Transformers of timm: every attention sees a window of one stage's grid, so what is compared is the map of a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters.base import Grid, TokenLayout
from attnkd.capture.adapters.timm_models import Timm


class Swin(Timm):
    """``timm.models.swin_transformer.SwinTransformer``. Windows lie in the batch: a call's B is images times windows."""

    family = "Swin of timm (whole maps of windows: HeadKD and SSTA)"

    def takes(self, model: nn.Module) -> bool:
        return any(
            base.__name__ == "SwinTransformer" and base.__module__ == "timm.models.swin_transformer"
            for base in type(model).__mro__
        )

    def stages(self, model: nn.Module) -> list[int]:
        layers: Any = model.layers
        return [len(layer.blocks) for layer in layers]

    def blocks(self, model: nn.Module) -> list[str]:
        return [f"layers.{stage}.blocks.{i}" for stage, depth in enumerate(self.stages(model)) for i in range(depth)]

    def layout(self, model: nn.Module) -> TokenLayout:
        width: Any = model.num_features
        return TokenLayout(0, False, width)

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        """None: there is one for each stage, and an attention sees a window of it."""
        return None

    def window(self, model: nn.Module, path: str) -> Any:
        block: Any = model.get_submodule(path.rpartition(".")[0])
        return tuple(map(tuple, (block.input_resolution, block.window_size, block.shift_size)))

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        return model.forward_features(images).flatten(1, 2)  # [B, H, W, D]

    def run(self, model: Any, images: Tensor, train_head: bool) -> tuple[Tensor, Tensor | None]:
        features = model.forward_features(images)
        with torch.set_grad_enabled(train_head and torch.is_grad_enabled()):
            return features.flatten(1, 2), model.forward_head(features)
