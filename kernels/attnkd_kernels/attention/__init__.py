"""Attention that yields its divergence from a teacher's on the way: forward, dq, dk and dv, and their launchers."""
