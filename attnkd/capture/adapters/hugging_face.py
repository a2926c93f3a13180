"""Vision Transformers of Hugging Face transformers, read off their configuration; nothing of the library is imported."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout, cut, pair

_PREFIX = {
    "vit": 1,
    "deit": 2,  # class and distillation token, also where the model has one classifier
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "vit_msn": 1,
    "beit": 1,
    "data2vec-vision": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "ijepa": 0,
}
"""Prefix tokens by ``config.model_type``, without registers. A model is known by being here: others may shuffle their patches
(ViT-MAE), append tokens (YOLOS) or work in windows."""

_WHY_NOT = {
    "vit_mae": "it drops and shuffles its patches (its weights in a ViTModel are taken)",
    "yolos": "it puts tokens behind its patches",
    "swin": "it attends in windows (the Swin of timm is taken)",
    "swinv2": "its attention is one of cosines",
    "siglip2_vision_model": "it takes patches of several grids, with padding",
    "dinov3_convnext": "it has no attention",
}
"""Why no model of a type is taken, by ``config.model_type``."""

_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Take images of any size without being told."""


class HuggingFace(Adapter):
    """A vision model, or an image classifier around one, loaded with ``attn_implementation='sdpa'`` (the default)."""

    family = f"Hugging Face transformers ({', '.join(_PREFIX)})"

    def takes(self, model: nn.Module) -> bool:
        if not any(_is_known(base) for base in type(model).__mro__):
            return False
        config: Any = getattr(_backbone(model), "config", None)
        return getattr(config, "model_type", None) in _PREFIX

    def refuses(self, model: nn.Module) -> str | None:
        return _WHY_NOT.get(str(getattr(getattr(model, "config", None), "model_type", None)))

    def layout(self, model: nn.Module) -> TokenLayout:
        config: Any = _backbone(model).config
        prefix = _PREFIX[config.model_type]
        registers = getattr(config, "num_register_tokens", 0)
        return TokenLayout(prefix + registers, prefix > 0, config.hidden_size)

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        config: Any = _backbone(model).config
        return cut(size, config.patch_size)

    def pooling(self, model: nn.Module) -> str | None:
        backbone = _backbone(model)
        if not hasattr(getattr(backbone, "head", None), "probe"):
            return None
        return next(name for name, module in model.named_modules() if module is backbone.head.attention)  # type: ignore[union-attr]

    def class_token_pools(self, model: nn.Module) -> bool:
        mean = _backbone(model) is not model and model.config.model_type == "clip"  # type: ignore[union-attr]
        mean = mean or getattr(_backbone(model).config, "use_mean_pooling", False)
        return super().class_token_pools(model) and not mean

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        output = model(images, **_sized(model, images))
        return output.logits if self.num_classes(model) else output.last_hidden_state[:, 0]

    def tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        backbone = _backbone(model)
        return backbone(images, **_sized(backbone, images)).last_hidden_state

    def normalised(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """CLIP and mean-pooling BEiT normalise the pooled token alone; the same norm serves all tokens."""
        norm = _late_norm(_backbone(model))
        return tokens if norm is None else norm(tokens)

    def run(self, model: nn.Module, images: Tensor, train_head: bool) -> tuple[Tensor, Tensor | None]:
        """A classifier's head cannot be run on its own: its forward is run whole, and the tokens are taken on their way."""
        if not train_head or not self.num_classes(model):
            return self.tokens(model, images), None
        thread, kept = threading.get_ident(), []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # another thread may run the same model
                kept.append(output.last_hidden_state)

        handle = _backbone(model).register_forward_hook(keep)
        try:
            output = self.forward(model, images)
        finally:
            handle.remove()
        return kept[0], output

    def separate_heads(self, model: nn.Module, apart: bool) -> bool | None:
        if hasattr(model, "distillation_classifier"):
            raise NotImplementedError(
                f"student: {type(model).__name__} returns the mean of its two heads, also in training; timm's deit_*_distilled_* train them apart"
            )
        return None

    def check_features(self, label: str, model: nn.Module) -> None:
        """Refuse BEiT and Data2Vec that normalise the mean of the patches, without the pooler that has the norm."""
        backbone = _backbone(model)
        if isinstance(getattr(backbone, "layernorm", None), nn.Identity) and _late_norm(backbone) is None:
            raise ValueError(
                f"{label}: the features of {type(model).__name__} are not normalised (use_mean_pooling without its pooler), so "
                "they cannot be compared; pa_weight=0 and patch_weight=0 compare attention alone"
            )

    def num_classes(self, model: nn.Module) -> int | None:
        return model.config.num_labels if _backbone(model) is not model else 0  # type: ignore[union-attr, return-value]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        config: Any = _backbone(model).config
        return None if config.model_type in _ANY_SIZE or _can_be_told(model) else pair(config.image_size)

    def input_channels(self, model: nn.Module) -> int | None:
        return getattr(_backbone(model).config, "num_channels", None)

    def embedding(self, model: nn.Module) -> nn.Module | None:
        found: Any = getattr(_backbone(model), "embeddings", None)
        return found


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _is_known(base: type) -> bool:
    """A vision model or an image classifier: not a backbone for detection, a model that fills masks, or one with a projection."""
    ours = base.__module__.startswith("transformers.models.")
    model = base.__name__.endswith("Model") and not base.__name__.endswith("PreTrainedModel")
    return ours and (model or "ForImageClassification" in base.__name__)


def _backbone(model: nn.Module) -> nn.Module:
    """The vision model inside an image classifier; the model itself if it is one."""
    if not hasattr(model, "classifier") and not hasattr(model, "cls_classifier"):
        return model
    inside = [child for child in model.children() if _is_pretrained(child)]
    return inside[0] if len(inside) == 1 else model


def _sized(model: nn.Module, images: Tensor) -> dict[str, bool]:
    """Images of another size than the model was built for: its position embeddings are resized, where it must be told."""
    expected = pair(getattr(_backbone(model).config, "image_size", None))
    if expected is None or tuple(images.shape[-2:]) == expected:
        return {}
    return {"interpolate_pos_encoding": True} if _can_be_told(model) else {}


def _can_be_told(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _late_norm(backbone: nn.Module) -> nn.Module | None:
    config: Any = backbone.config
    if config.model_type == "clip_vision_model":
        return backbone.get_submodule("post_layernorm")
    if config.model_type in ("beit", "data2vec-vision") and isinstance(
        backbone.get_submodule("layernorm"), nn.Identity
    ):
        return getattr(getattr(backbone, "pooler", None), "layernorm", None)
    return None
