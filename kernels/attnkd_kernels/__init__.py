"""Triton kernels of attnkd and their launchers. Validation and autograd live in the attnkd package.

Import the module of the operation you need; importing this package imports no kernel.
"""
