"""Plain PyTorch with its own backward and O(N) memory: for CPUs, Apple GPUs, and everything that has no Triton."""

from attnkd.attention.chunked.operation import per_row, row_logits, weighted_sum

__all__ = ["per_row", "row_logits", "weighted_sum"]
