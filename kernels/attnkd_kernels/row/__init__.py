"""Kernels of a few query rows: the class token's row."""
