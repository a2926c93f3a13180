"""attnkd: fused attention distillation for Vision Transformers.

The operations import torch (and triton); what needs timm is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall
from attnkd.attention.merging import merge_attention
from attnkd.attention.one_pass import attention_with_divergence
from attnkd.attention.resample import resample_attention
from attnkd.relation.api import relation_row_loss

if TYPE_CHECKING:
    from attnkd.capture.tap import AttentionTap
    from attnkd.capture.weights import load_weights
    from attnkd.methods.attention_probe import AttentionProbe
    from attnkd.methods.attn_distill import AttnDistill
    from attnkd.methods.head_importance import head_importance, select_heads
    from attnkd.methods.head_kd import HeadKD
    from attnkd.methods.minilm import MiniLM
    from attnkd.methods.pos_embed import sincos_pos_embed_
    from attnkd.methods.recipes import AttnDistillRecipe
    from attnkd.methods.schedule import Schedule
    from attnkd.methods.ssta import SSTA

__version__ = "0.1.0"

__all__ = [
    "SSTA",
    "AttentionCall",
    "AttentionProbe",
    "AttentionTap",
    "AttnDistill",
    "AttnDistillRecipe",
    "HeadKD",
    "MiniLM",
    "Schedule",
    "attention_divergence",
    "attention_rows",
    "attention_with_divergence",
    "head_importance",
    "load_weights",
    "merge_attention",
    "relation_row_loss",
    "resample_attention",
    "select_heads",
    "sincos_pos_embed_",
]

_LAZY = {
    "AttentionTap": "attnkd.capture.tap",
    "AttentionProbe": "attnkd.methods.attention_probe",
    "AttnDistill": "attnkd.methods.attn_distill",
    "AttnDistillRecipe": "attnkd.methods.recipes",
    "HeadKD": "attnkd.methods.head_kd",
    "MiniLM": "attnkd.methods.minilm",
    "Schedule": "attnkd.methods.schedule",
    "load_weights": "attnkd.capture.weights",
    "head_importance": "attnkd.methods.head_importance",
    "select_heads": "attnkd.methods.head_importance",
    "SSTA": "attnkd.methods.ssta",
    "sincos_pos_embed_": "attnkd.methods.pos_embed",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'attnkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
