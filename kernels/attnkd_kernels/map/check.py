"""Stops with an error where a given normaliser is none: the value's sweep (value.py) marks such a row with WRONG.

A kernel of its own, because the call of an error's routine in a sweep makes the assembler serialise its matrix instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnkd_kernels.language import WRONG


@triton.jit
def _map_check_kernel(
    lse_s,  # [B · H · M] fp32, or None where the student's were not given
    lse_t,  # the same of the teacher
    ROWS,
    BLOCK: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if lse_s is not None:
        wrong = tl.load(lse_s + row, mask=row < ROWS, other=0.0) == WRONG
        tl.device_assert(
            wrong == 0, "student_lse: expected log of the sum over j of exp(scale * q k_j + mask_j) of every row"
        )
    if lse_t is not None:
        wrong = tl.load(lse_t + row, mask=row < ROWS, other=0.0) == WRONG
        tl.device_assert(
            wrong == 0, "teacher_lse: expected log of the sum over j of exp(scale * q k_j + mask_j) of every row"
        )
