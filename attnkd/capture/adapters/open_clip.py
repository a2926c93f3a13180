"""The image towers of open_clip: ``model.visual``. A timm tower is ``model.visual.trunk``, a timm model like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout, cut


class OpenClip(Adapter):
    """``open_clip.transformer.VisionTransformer``."""

    family = "open_clip (model.visual)"

    def takes(self, model: nn.Module) -> bool:
        return any(
            base.__name__ == "VisionTransformer" and base.__module__.startswith("open_clip.")
            for base in type(model).__mro__
        )

    def layout(self, model: nn.Module) -> TokenLayout:
        return TokenLayout(1, True, model.get_submodule("conv1").out_channels)  # type: ignore[arg-type]

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        return cut(size, model.patch_size)

    def drops_patches(self, model: nn.Module) -> bool:
        dropout: Any = model.patch_dropout
        return bool(getattr(dropout, "prob", 0.0)) and dropout.training

    def class_token_pools(self, model: nn.Module) -> bool:
        return model.attn_pool is None and model.pool_type == "tok"

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        output = model(images)
        return output[0] if isinstance(output, tuple) else output  # with output_tokens

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        return model.transformer(model._embeds(images))

    def normalised(self, model: Any, tokens: Tensor) -> Tensor:
        return model.ln_post(tokens)

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        pooled = model._pool(tokens)[0]
        return pooled if model.proj is None else pooled @ model.proj

    def check_features(self, label: str, model: nn.Module) -> None:
        if model.attn_pool is not None:
            raise ValueError(
                f"{label}: this open_clip tower pools with an attention of its own and has no norm for its tokens, so they "
                "cannot be compared; pa_weight=0 and patch_weight=0 compare attention alone"
            )

    def num_classes(self, model: nn.Module) -> int | None:
        return 0

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        height, width = model.image_size  # type: ignore[misc]
        return height, width

    def embedding(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("conv1")
