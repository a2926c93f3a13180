"""Tools that prove kernels: an exact interpreter, one tolerance, counted bytes, guarded memory.

The submodules are imported on their own (``attnkd.testing.interpreter`` before any kernel module, the others whenever):

* :mod:`attnkd.testing.interpreter`: makes Triton's interpreter exact in bfloat16 and strict about overflow.
* :mod:`attnkd.testing.tolerance`: decides whether a result is right.
* :mod:`attnkd.testing.traffic`: counts the bytes a kernel moves and proves that no access leaves its tensor.
* :mod:`attnkd.testing.guard`: tensors in awkward layouts, inside NaN; outputs between canaries.
"""
