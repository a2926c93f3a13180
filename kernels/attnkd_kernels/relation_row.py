"""Squared error between two relation rows, features read once in each direction; no N×N Gram matrix.

    r_j = ⟨F_0, F_j⟩ · v_0 · v_j,   v_j = 1/‖F_j‖  (0 where ‖F_j‖ ≤ eps),   patches j, P of them
    loss = (1/P) Σ_j (r_s,j − r_t,j)²
    e_j = 2 (r_s,j − r_t,j) / P,   a_j = e_j v_0 v_j,   b_j = −e_j r_s,j v_j²,   b_0 = −v_0² Σ_j e_j r_s,j
    backward, with upstream g:   dF_j = g (a_j F_0 + b_j F_j),   dF_0 = g (b_0 F_0 + Σ_j a_j F_j)

Everything but F is a number per patch, so the forward keeps a and b (fp32, 8 bytes a patch against 2·C), and dF is a symmetric
matrix with entries in row 0, column 0 and on the diagonal, times F.

* forward: a program takes BN patches of one image and sweeps their channels in chunks. It reads token 0 as well: a re-read of one
  token in BN, which the other programs of the image have left in L2.
* backward: a program takes BC channels of one image and sweeps the patches, so Σ_j a_j F_j needs no other program. Only where
  that gives too few programs are the patches split in S ranges; their sums are then added by a second launch.

Saved: a, b [B, 2, P] and the forward's partial b_0 [B, blocks], fp32. Tokens between token 0 and the first patch (registers)
are neither read nor part of anything; their gradient is 0. Any strides; fp16, bf16, fp32; fp32 accumulation; deterministic.
Limits: none on C, N or P; norms below 1e19, beyond which a result is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch

TILE = 4096  # elements of a feature tile


@triton.jit
def _chunk(F, start, f_c, C: tl.constexpr, BC: tl.constexpr):
    """Pointers [BC] to the channels from ``start`` on, and which of them exist (all, where C is a multiple of BC)."""
    c = start + tl.arange(0, BC)
    return F + c.to(tl.int64) * f_c, c < C


@triton.jit
def _cosines(F, n, n_valid, f_n, f_c, eps_squared, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """r [BN] between token 0 and the tokens n of one image, v [BN] of those tokens, and v_0."""
    dot = tl.zeros([BN, BC], tl.float32)
    square = tl.zeros([BN, BC], tl.float32)
    square_0 = tl.zeros([BC], tl.float32)
    rows = n.to(tl.int64)[:, None] * f_n
    for start in range(0, C, BC):
        first, c_valid = _chunk(F, start, f_c, C, BC)
        if C % BC == 0:
            cls = tl.load(first).to(tl.float32)
            f = tl.load(first[None, :] + rows, mask=n_valid[:, None], other=0.0).to(tl.float32)
        else:
            cls = tl.load(first, mask=c_valid, other=0.0).to(tl.float32)
            f = tl.load(first[None, :] + rows, mask=n_valid[:, None] & c_valid[None, :], other=0.0).to(tl.float32)
        # Fused multiply-adds by name: written as a * b + c these three crash the compiler of Triton 3.6.
        dot = tl.fma(f, tl.broadcast_to(cls[None, :], f.shape), dot)
        square = tl.fma(f, f, square)
        square_0 = tl.fma(cls, cls, square_0)
    v = _inverse_norm(tl.sum(square, 1), eps_squared)
    v_0 = _inverse_norm(tl.sum(square_0, 0), eps_squared)
    return tl.sum(dot, 1) * v * v_0, v, v_0


@triton.jit
def _inverse_norm(square, eps_squared):
    """1/√square; 0 up to eps², and NaN (not 0) where the square overflowed."""
    return tl.where(square <= eps_squared, 0.0, tl.sqrt(square) / square)


@triton.jit
def _relation_row_fwd_kernel(
    FS,  # [B, Ns, Cs]
    FT,  # [B, Nt, Ct]
    LOSS,  # [B, blocks]: partial sums
    B0,  # [B, blocks]: partial sums
    COEF,  # [B, 2, P]: a, b
    eps_squared,
    inverse_p,  # 1/P
    P,
    blocks,
    fs_b, fs_n, fs_c,
    ft_b, ft_n, ft_c,
    FIRST_S: tl.constexpr,
    FIRST_T: tl.constexpr,
    C_S: tl.constexpr,
    C_T: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BN: tl.constexpr,
    BC_S: tl.constexpr,
    BC_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # b·blocks + block
    b = program // blocks
    p = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    valid = p < P
    r_t, _, _ = _cosines(FT + b * ft_b, p + FIRST_T, valid, ft_n, ft_c, eps_squared, C_T, BN, BC_T)
    r_s, v, v_0 = _cosines(FS + b * fs_b, p + FIRST_S, valid, fs_n, fs_c, eps_squared, C_S, BN, BC_S)
    gap = r_s - r_t  # 0 where there is no patch: both rows are
    tl.store(LOSS + program, tl.sum(tl.where(valid, gap * gap, 0.0), 0) * inverse_p)
    if NEED_GRAD:
        e = 2.0 * inverse_p * gap
        coef = COEF + b * 2 * P + p
        tl.store(coef, e * v * v_0, mask=valid)
        tl.store(coef + P, -e * r_s * v * v, mask=valid)
        tl.store(B0 + program, -v_0 * v_0 * tl.sum(tl.where(valid, e * r_s, 0.0), 0))


@triton.jit
def _relation_row_bwd_kernel(
    G,  # [B] upstream gradient, any stride
    COEF,  # [B, 2, P]
    B0,  # [B, blocks]
    F,  # [B, N, C]
    DF,  # [B, N, C]
    ACC,  # [B, S, C]: Σ_j a_j F_j over a split's patches; only where S > 1
    P,
    blocks,
    num_splits,
    tiles_per_split,
    g_b,
    f_b, f_n, f_c,
    df_b, df_n, df_c,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0).to(tl.int64)  # (b·splits + split)·chunks + chunk
    chunk = (program % chunks).to(tl.int32)
    image_split = program // chunks
    split = (image_split % num_splits).to(tl.int32)
    b = image_split // num_splits
    g = tl.load(G + b * g_b).to(tl.float32)
    features, c_valid = _chunk(F + b * f_b, chunk * BC, f_c, C, BC)
    gradients, _ = _chunk(DF + b * df_b, chunk * BC, df_c, C, BC)
    cls = tl.load(features, mask=c_valid, other=0.0).to(tl.float32)
    acc = tl.zeros([BN, BC], tl.float32)
    first = split * tiles_per_split * BN
    last = tl.minimum(first + tiles_per_split * BN, P)
    for start in range(first, last, BN):
        p = start + tl.arange(0, BN)
        valid = p < P
        coef = COEF + b * 2 * P + p
        a = tl.load(coef, mask=valid, other=0.0)
        diagonal = tl.load(coef + P, mask=valid, other=0.0)
        n = (p + FIRST).to(tl.int64)[:, None]
        mask = valid[:, None]
        if C % BC != 0:
            mask = mask & c_valid[None, :]
        f = tl.load(features[None, :] + n * f_n, mask=mask, other=0.0).to(tl.float32)
        df = g * (a[:, None] * cls[None, :] + diagonal[:, None] * f)
        tl.store(gradients[None, :] + n * df_n, df.to(DF.dtype.element_ty), mask=mask)
        acc += a[:, None] * f
    total = tl.sum(acc, 0)
    if ONE_SPLIT:
        b_0 = _sum_of_blocks(B0 + b * blocks, blocks, BLOCKS)
        tl.store(gradients, (g * (b_0 * cls + total)).to(DF.dtype.element_ty), mask=c_valid)
    else:
        c = chunk * BC + tl.arange(0, BC)
        tl.store(ACC + image_split * C + c, total, mask=c_valid)
    if split == 0:
        for n in range(1, FIRST):  # registers
            tl.store(gradients + n * df_n, tl.zeros([BC], DF.dtype.element_ty), mask=c_valid)


@triton.jit
def _relation_row_cls_kernel(
    G,  # [B]
    ACC,  # [B, S, C]
    B0,  # [B, blocks]
    F,  # [B, N, C]
    DF,  # [B, N, C]
    blocks,
    num_splits,
    g_b,
    f_b, f_c,
    df_b, df_c,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    c = chunk * BC + tl.arange(0, BC)
    g = tl.load(G + b * g_b).to(tl.float32)
    features, c_valid = _chunk(F + b * f_b, chunk * BC, f_c, C, BC)
    gradients, _ = _chunk(DF + b * df_b, chunk * BC, df_c, C, BC)
    total = tl.load(features, mask=c_valid, other=0.0).to(tl.float32) * _sum_of_blocks(B0 + b * blocks, blocks, BLOCKS)
    for split in range(num_splits):
        total += tl.load(ACC + (b * num_splits + split) * C + c, mask=c_valid, other=0.0)
    tl.store(gradients, (g * total).to(DF.dtype.element_ty), mask=c_valid)


@triton.jit
def _sum_of_blocks(X, blocks, BLOCKS: tl.constexpr):
    """Σ of the ``blocks`` ≤ BLOCKS numbers at X."""
    i = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(X + i, mask=i < blocks, other=0.0), 0)


def _block_c(channels: int) -> int:
    """Channels of a tile: two or four whole cache lines of 16-bit features that, if possible, divide the channels."""
    return 128 if channels % 128 == 0 else 64


def _warps(features: Tensor) -> int:
    """The backward's: four where features load in 16 bytes; other tiles, with more pointers or registers, spill with four."""
    return 4 if features.element_size() == 2 and features.stride(2) == 1 and features.stride(1) % 16 == 0 else 8


def _block_n(channels_s: int, channels_t: int) -> int:
    """Patches of a tile in the forward."""
    return TILE // max(_block_c(channels_s), _block_c(channels_t))


def num_blocks(patches: int, channels_s: int, channels_t: int) -> int:
    """How many programs of the forward share an image, and with that the length of the partial sums b_0."""
    return -(-patches // _block_n(channels_s, channels_t))


def relation_row_fwd(
    student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int, eps: float, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], coefficients a and b [B, 2, P] and partial b_0 [B, blocks], fp32 (the last two empty without grad).

    Args:
        student: [B, Ns, Cs]; token 0 is the class token, tokens ``student_prefix``.. are the patches.
        teacher: [B, Nt, Ct], with as many patches.
    """
    B, N, C_S = student.shape
    C_T = teacher.shape[2]
    P = N - student_prefix
    BC_S, BC_T = _block_c(C_S), _block_c(C_T)
    BN, blocks = _block_n(C_S, C_T), num_blocks(P, C_S, C_T)
    new = student.new_empty
    loss = new((B, blocks), dtype=torch.float32)
    b_0 = new((B, blocks) if need_grad else (0,), dtype=torch.float32)
    coef = new((B, 2, P) if need_grad else (0,), dtype=torch.float32)
    if B:
        with launch.on_device(student):
            _relation_row_fwd_kernel[(B * blocks,)](
                student, teacher, loss, b_0, coef, eps * eps, 1.0 / P, P, blocks, *student.stride(), *teacher.stride(),
                FIRST_S=student_prefix, FIRST_T=teacher_prefix, C_S=C_S, C_T=C_T, NEED_GRAD=need_grad,
                BN=BN, BC_S=BC_S, BC_T=BC_T, num_warps=8, **launch.OPTIONS,
            )  # fmt: skip
    return loss.sum(1) if blocks > 1 else loss.view(B), coef, b_0


def relation_row_bwd(grad: Tensor, coef: Tensor, b_0: Tensor, student: Tensor, student_prefix: int) -> Tensor:
    """dF [B, N, C] in the student's dtype and (where dense) layout, from the upstream gradient [B] and what the forward kept."""
    B, N, C = student.shape
    P, blocks = N - student_prefix, b_0.shape[1]
    df = torch.empty_like(student)
    if B == 0:
        return df
    BC = _block_c(C)
    BN = TILE // BC
    chunks = triton.cdiv(C, BC)
    splits, tiles = _split(triton.cdiv(P, BN), B * chunks, launch.num_processors(student.device))
    acc = coef.new_empty((B, splits, C) if splits > 1 else (0,))
    with launch.on_device(student):
        _relation_row_bwd_kernel[(B * splits * chunks,)](
            grad, coef, b_0, student, df, acc, P, blocks, splits, tiles, *grad.stride(), *student.stride(), *df.stride(),
            FIRST=student_prefix, C=C, ONE_SPLIT=splits == 1, BLOCKS=launch.padded(blocks), BN=BN, BC=BC,
            num_warps=_warps(student), **launch.OPTIONS,
        )  # fmt: skip
        if splits > 1:
            (f_b, _, f_c), (df_b, _, df_c) = student.stride(), df.stride()
            _relation_row_cls_kernel[(B, chunks)](
                grad, acc, b_0, student, df, blocks, splits, *grad.stride(), f_b, f_c, df_b, df_c,
                C=C, BLOCKS=launch.padded(blocks), BC=BC, num_warps=_warps(student), **launch.OPTIONS,
            )  # fmt: skip
    return df


def _split(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """(splits, tiles a split): enough programs for four a processor, never less than two tiles each."""
    splits = max(1, min(triton.cdiv(4 * processors, programs), tiles // 2))
    per_split = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, per_split), per_split
