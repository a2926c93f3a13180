"""Kernels of whole attention maps."""
