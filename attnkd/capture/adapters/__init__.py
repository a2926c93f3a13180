"""What a model is, for every family of models that can be distilled: one :class:`Adapter` a family.

Everything else in the package asks :func:`adapter_for` and knows no library by its attributes.
"""

from __future__ import annotations

from torch import nn

from attnkd.capture.adapters.base import Adapter, Grid, TokenLayout
from attnkd.capture.adapters.class_attention import ClassAttention
from attnkd.capture.adapters.dino_hub import DinoHub
from attnkd.capture.adapters.hugging_face import HuggingFace
from attnkd.capture.adapters.open_clip import OpenClip
from attnkd.capture.adapters.staged import Hiera, MaxxVit, PiT, Swin
from attnkd.capture.adapters.text import TextEncoder
from attnkd.capture.adapters.timm_models import Timm
from attnkd.capture.adapters.torchvision_models import Torchvision

__all__ = [
    "Adapter",
    "Grid",
    "TokenLayout",
    "adapter_for",
    "adapter_or_plain",
    "find_adapter",
    "register_adapter",
]

_ADAPTERS: list[Adapter] = [
    HuggingFace(),
    Torchvision(),
    OpenClip(),
    DinoHub(),
    TextEncoder(),
    Swin(),
    PiT(),
    Hiera(),
    MaxxVit(),
    ClassAttention(),
    Timm(),
]


_PLAIN = Adapter()


def register_adapter(adapter: Adapter) -> None:
    """Let an adapter of your own speak for its models, before those of the package.

    Raises:
        TypeError: not an :class:`Adapter`.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an attnkd.capture.adapters.Adapter, got {type(adapter).__name__}")
    _ADAPTERS.insert(0, adapter)


def find_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that speaks for a model; None where no family is known."""
    for adapter in _ADAPTERS:
        if adapter.takes(model):
            return adapter
    return None


def adapter_or_plain(model: nn.Module) -> Adapter:
    """The adapter that speaks for a model, or one that knows of it what any classifier says; for models whose tokens are not compared."""
    return find_adapter(model) or _PLAIN


def adapter_for(model: nn.Module, label: str = "model") -> Adapter:
    """The adapter that speaks for a model.

    Args:
        label: the argument that messages begin with.

    Raises:
        TypeError: no family is known.
    """
    adapter = find_adapter(model) if isinstance(model, nn.Module) else None
    if adapter is None:
        if hasattr(model, "get_base_model"):  # peft
            raise TypeError(
                f"{label}: expected a Vision Transformer, got {type(model).__name__} around one; give {label}.get_base_model(), which has "
                "the adapters' weights in it, and trains them alone"
            )
        raise TypeError(
            f"{label}: expected a Vision Transformer or text encoder of a known family, or a timm name, got {type(model).__name__}"
            f"{_why_not(model)}. Known families: {', '.join(one.family for one in _ADAPTERS)}. Another model needs an adapter of some "
            "twenty lines (attnkd.capture.adapters.register_adapter, docs/models.md), or compare it in a loop of your own with "
            "AttentionTap and attention_divergence"
        )
    return adapter


def _why_not(model: object) -> str:
    """What is known of a model that no adapter speaks for: the reason, and its parts that some adapter speaks for."""
    if not isinstance(model, nn.Module):
        return ""
    reasons = [reason for one in _ADAPTERS if (reason := one.refuses(model)) is not None]
    parts: list[str] = []
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{known}.") for known in parts)
        if path and not inside and find_adapter(part) is not None:
            parts.append(path)
    if parts:
        reasons.append(f"its part {' and '.join(map(repr, parts[:3]))} is of a known family: give that")
    return "".join(f"; {reason}" for reason in reasons)
