"""Vision Transformers of timm, read off their attributes; nothing of timm is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout, cut


class Timm(Adapter):
    """Models that say ``num_prefix_tokens`` and ``num_features`` and run in ``forward_features`` and ``forward_head``."""

    family = "timm"

    def takes(self, model: nn.Module) -> bool:
        return hasattr(model, "forward_features") and isinstance(getattr(model, "num_features", None), int)

    def layout(self, model: nn.Module) -> TokenLayout:
        prefix, width = getattr(model, "num_prefix_tokens", None), getattr(model, "num_features", None)
        if not isinstance(prefix, int) or not isinstance(width, int):
            raise TypeError(
                f"model: {type(model).__name__} does not say what its tokens are (num_prefix_tokens of a plain Vision Transformer of timm), "
                "and no adapter does: tokens of stages and windows are others in every block. Write an adapter "
                "(attnkd.capture.adapters.register_adapter, docs/models.md), or compare attentions over the same tokens in a loop of "
                "your own: AttentionTap with their paths, and attention_divergence"
            )
        owner = model if hasattr(model, "cls_token") else getattr(model, "embeds", None)  # NaFlexVit keeps it in embeds
        return TokenLayout(prefix, prefix > 0 and getattr(owner, "cls_token", None) is not None, width)

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        """Worked out from the input, because ``patch_embed.grid_size`` stays at its first value under ``dynamic_img_size``."""
        embed: Any = self.embedding(model)
        feat_size = getattr(embed, "dynamic_feat_size", None)
        if feat_size is not None:
            height, width = feat_size(size)
            return height, width
        patch = getattr(embed, "patch_size", None)  # XCiT's stem of convolutions
        return cut(size, patch) if isinstance(patch, int) else None

    def drops_patches(self, model: nn.Module) -> bool:
        """Patch dropout is on: in training, with a rate above 0."""
        dropout: Any = getattr(model, "patch_drop", None)
        return bool(getattr(dropout, "prob", 0.0)) and dropout.training

    def pooling(self, model: nn.Module) -> str | None:
        return None if getattr(model, "attn_pool", None) is None else "attn_pool"

    def class_token_pools(self, model: nn.Module) -> bool:
        return super().class_token_pools(model) and getattr(model, "global_pool", "token") in ("", "token")

    def tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        tokens = model.forward_features(images)  # type: ignore[operator]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"{type(model).__name__}.forward_features: expected [B, N, D] tokens, got {got}")
        return tokens

    def normalised(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """timm normalises all tokens (``norm``) or, in models that pool patches, the pooled feature (``fc_norm``);
        whichever of the two the model has is applied once, token by token."""
        if not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
            return tokens
        self.check_features("model", model)
        fc_norm: Any = model.fc_norm
        return fc_norm(tokens)

    def head(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model.forward_head(tokens)  # type: ignore[operator]

    def separate_heads(self, model: nn.Module, apart: bool) -> bool | None:
        if getattr(model, "head_dist", None) is None:
            return None
        before: Any = model.distilled_training
        model.set_distilled_training(apart)  # type: ignore[operator]
        return before

    def check_features(self, label: str, model: nn.Module) -> None:
        """Refuse RADIO, InternViT and others that have neither ``norm`` nor ``fc_norm``."""
        norms = (getattr(model, name, nn.Identity()) for name in ("norm", "fc_norm"))
        if all(isinstance(norm, nn.Identity) for norm in norms):
            raise ValueError(
                f"{label}: the features of {type(model).__name__} are not normalised (it has neither norm nor fc_norm), so "
                "its class token and patch tokens cannot be compared; pa_weight=0 and patch_weight=0 compare attention alone"
            )

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        if size is None or not getattr(embed, "strict_img_size", False) or getattr(model, "dynamic_img_size", False):
            return None
        return tuple(size)

    def input_channels(self, model: nn.Module) -> int | None:
        channels = getattr(model, "in_chans", None)
        if channels is None:
            channels = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "in_channels", None)
        if channels is None and not hasattr(model, "num_prefix_tokens"):  # a CNN: its stem comes first
            stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
            channels = None if stem is None else stem.in_channels
        return channels if isinstance(channels, int) else None

    def embedding(self, model: nn.Module) -> nn.Module | None:
        return getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
