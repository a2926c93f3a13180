"""attnkd: fused attention distillation for Vision Transformers."""

from attnkd.functional import attention_kl, attention_rows
from attnkd.merging import merge_attention
from attnkd.resample import resample_attention

__version__ = "0.1.0"

__all__ = ["attention_kl", "attention_rows", "merge_attention", "resample_attention"]
