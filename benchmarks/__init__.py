"""Proofs and measurements of the kernels: `python -m benchmarks COMMAND`."""
