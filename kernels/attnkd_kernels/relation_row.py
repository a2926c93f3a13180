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

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnkd_kernels import launch
from attnkd_kernels.language import Operand

TILE = 4096  # elements of a feature tile


@dataclass(frozen=True, eq=False)  # one object a spec (_spec), so its identity tells it apart
class FeatureSpec:
    """What the code depends on: where a model's patches begin, how many channels it has, how many a tile takes."""

    FIRST: tl.constexpr
    CHANNELS: tl.constexpr
    BC: tl.constexpr


@triton.jit
def _relation_row_fwd_kernel(
    LOSS,  # [B, blocks]: partial sums
    B0,  # [B, blocks]: partial sums; None without a gradient
    COEF,  # [B, 2, P]: a, b; None without a gradient
    eps_squared,
    inverse_p,  # 1/P
    P,
    blocks,
    student,  # Operand [B, 1, Ns, Cs]
    teacher,  # Operand [B, 1, Nt, Ct]
    S: tl.constexpr,  # FeatureSpec of the student
    T: tl.constexpr,  # and of the teacher
    BN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # b·blocks + block
    b = program // blocks
    p = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    valid = p < P
    r_t, _, _ = _cosines(_image(teacher, b), p, P, eps_squared, T, BN)
    r_s, v, v_0 = _cosines(_image(student, b), p, P, eps_squared, S, BN)
    gap = r_s - r_t  # 0 where there is no patch: both rows are
    tl.store(LOSS + program, tl.sum(tl.where(valid, gap * gap, 0.0), 0) * inverse_p)
    if COEF is not None:
        e = 2.0 * inverse_p * gap
        coef = COEF + b * 2 * P + p
        tl.store(coef, e * v * v_0, mask=valid)
        tl.store(coef + P, -e * r_s * v * v, mask=valid)
        tl.store(B0 + program, -v_0 * v_0 * tl.sum(tl.where(valid, e * r_s, 0.0), 0))


@triton.jit
def _relation_row_bwd_kernel(
    COEF,  # [B, 2, P]: a, b
    B0,  # [B, blocks]
    ACC,  # [B, S, C]: Σ_j a_j F_j over a split's patches; None with one split
    P,
    blocks,
    splits,
    tiles_per_split,
    G,  # Operand [B, 1, 1, 1]: upstream gradient
    features,  # Operand [B, 1, N, C]
    DF,  # Operand [B, 1, N, C]
    SPEC: tl.constexpr,  # FeatureSpec
    BLOCKS: tl.constexpr,  # blocks, padded
    BN: tl.constexpr,
):
    chunks: tl.constexpr = (SPEC.CHANNELS + SPEC.BC - 1) // SPEC.BC
    program = tl.program_id(0).to(tl.int64)  # (b·splits + split)·chunks + chunk
    chunk = (program % chunks).to(tl.int32)
    image_split = program // chunks
    split = (image_split % splits).to(tl.int32)
    b = image_split // splits
    g = tl.load(G.pointer + b * G.batch).to(tl.float32)
    f_0, exists = _channels(_image(features, b), chunk * SPEC.BC, SPEC)
    df_0, _ = _channels(_image(DF, b), chunk * SPEC.BC, SPEC)
    dtype = DF.pointer.dtype.element_ty
    cls = tl.load(f_0, mask=exists, other=0.0).to(tl.float32)
    acc = tl.zeros([BN, SPEC.BC], tl.float32)
    first = split * tiles_per_split * BN
    last = tl.minimum(first + tiles_per_split * BN, P)
    for start in range(first, last, BN):
        p = start + tl.arange(0, BN)
        coef = COEF + b * 2 * P + p
        a = tl.load(coef, mask=p < P, other=0.0)
        diagonal = tl.load(coef + P, mask=p < P, other=0.0)
        n = (p + SPEC.FIRST).to(tl.int64)[:, None]
        mask = (p < P)[:, None]
        if SPEC.CHANNELS % SPEC.BC != 0:
            mask = mask & exists[None, :]
        f = tl.load(f_0[None, :] + n * features.row, mask=mask, other=0.0).to(tl.float32)
        df = g * (a[:, None] * cls[None, :] + diagonal[:, None] * f)
        tl.store(df_0[None, :] + n * DF.row, df.to(dtype), mask=mask)
        acc += a[:, None] * f
    total = tl.sum(acc, 0)
    if ACC is None:
        b_0 = _sum_of_blocks(B0 + b * blocks, blocks, BLOCKS)
        tl.store(df_0, (g * (b_0 * cls + total)).to(dtype), mask=exists)
    else:
        c = chunk * SPEC.BC + tl.arange(0, SPEC.BC)
        tl.store(ACC + image_split * SPEC.CHANNELS + c, total, mask=exists)
    if split == 0:
        for n in range(1, SPEC.FIRST):  # registers
            tl.store(df_0 + n * DF.row, tl.zeros([SPEC.BC], dtype), mask=exists)


@triton.jit
def _relation_row_cls_kernel(
    ACC,  # [B, S, C]
    B0,  # [B, blocks]
    blocks,
    splits,
    G,  # Operand [B, 1, 1, 1]
    features,  # Operand [B, 1, N, C]
    DF,  # Operand [B, 1, N, C]
    SPEC: tl.constexpr,  # FeatureSpec
    BLOCKS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    c = chunk * SPEC.BC + tl.arange(0, SPEC.BC)
    g = tl.load(G.pointer + b * G.batch).to(tl.float32)
    f_0, exists = _channels(_image(features, b), chunk * SPEC.BC, SPEC)
    df_0, _ = _channels(_image(DF, b), chunk * SPEC.BC, SPEC)
    total = tl.load(f_0, mask=exists, other=0.0).to(tl.float32) * _sum_of_blocks(B0 + b * blocks, blocks, BLOCKS)
    for split in range(splits):
        total += tl.load(ACC + (b * splits + split) * SPEC.CHANNELS + c, mask=exists, other=0.0)
    tl.store(df_0, (g * total).to(DF.pointer.dtype.element_ty), mask=exists)


@triton.jit
def _image(features, b):
    """The features of image b."""
    return Operand(features.pointer + b * features.batch, features.batch, features.head, features.row, features.column)


@triton.jit
def _channels(image, start, SPEC: tl.constexpr):
    """Pointers [BC] to token 0's channels from ``start`` on, and which of them exist."""
    c = start + tl.arange(0, SPEC.BC)
    return image.pointer + c.to(tl.int64) * image.column, c < SPEC.CHANNELS


@triton.jit
def _cosines(image, p, P, eps_squared, SPEC: tl.constexpr, BN: tl.constexpr):
    """r [BN] between token 0 and the patches p of one image, v [BN] of those patches, and v_0."""
    BC: tl.constexpr = SPEC.BC
    dot = tl.zeros([BN, BC], tl.float32)
    square = tl.zeros([BN, BC], tl.float32)
    square_0 = tl.zeros([BC], tl.float32)
    rows = (p + SPEC.FIRST).to(tl.int64)[:, None] * image.row
    valid = (p < P)[:, None]
    for start in range(0, SPEC.CHANNELS, BC):
        f_0, exists = _channels(image, start, SPEC)
        if SPEC.CHANNELS % BC == 0:
            cls = tl.load(f_0).to(tl.float32)
            f = tl.load(f_0[None, :] + rows, mask=valid, other=0.0).to(tl.float32)
        else:
            cls = tl.load(f_0, mask=exists, other=0.0).to(tl.float32)
            f = tl.load(f_0[None, :] + rows, mask=valid & exists[None, :], other=0.0).to(tl.float32)
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


@cache
def _spec(first: int, channels: int) -> FeatureSpec:
    return FeatureSpec(tl.constexpr(first), tl.constexpr(channels), tl.constexpr(_block_c(channels)))


def _operand(features: Tensor) -> Operand:
    """Features [B, N, C] as the one head of their model."""
    batch, row, column = features.stride()
    return Operand(features, batch, 0, row, column)


def relation_row_fwd(
    student: Tensor, teacher: Tensor, student_prefix: int, teacher_prefix: int, eps: float, need_grad: bool,
    factor: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [B], coefficients a and b [B, 2, P] and partial b_0 [B, blocks], fp32 (the last two empty without grad).

    With a ``factor`` the loss is [], the factor times the sum over images, and the coefficients are those of this number.

    Args:
        student: [B, Ns, Cs]; token 0 is the class token, tokens ``student_prefix``.. are the patches.
        teacher: [B, Nt, Ct], with as many patches.
    """
    B, N, C_S = student.shape
    C_T = teacher.shape[2]
    P = N - student_prefix
    BN, blocks = _block_n(C_S, C_T), num_blocks(P, C_S, C_T)
    new = student.new_empty
    loss = new((B, blocks), dtype=torch.float32)
    b_0 = new((B, blocks) if need_grad else (0,), dtype=torch.float32)
    coef = new((B, 2, P) if need_grad else (0,), dtype=torch.float32)
    if B:
        kept = (b_0, coef) if need_grad else (None, None)
        launch.run(
            _relation_row_fwd_kernel, (B * blocks,),
            loss, *kept, eps * eps, (1.0 if factor is None else factor) / P, P, blocks, _operand(student), _operand(teacher),
            S=_spec(student_prefix, C_S), T=_spec(teacher_prefix, C_T), BN=BN, num_warps=8,
        )  # fmt: skip
    if factor is not None:
        return loss.sum(), coef, b_0
    return loss.sum(1) if blocks > 1 else loss.view(B), coef, b_0


def relation_row_bwd(grad: Tensor, coef: Tensor, b_0: Tensor, student: Tensor, student_prefix: int) -> Tensor:
    """dF [B, N, C] in the student's dtype and (where dense) layout, from the upstream gradient, [B] or [], and what the forward kept."""
    B, N, C = student.shape
    P, blocks = N - student_prefix, b_0.shape[1]
    df = torch.empty_like(student)
    if B == 0:
        return df
    SPEC = _spec(student_prefix, C)
    BC = SPEC.BC.value
    BN = TILE // BC
    chunks = launch.cdiv(C, BC)
    splits, tiles = launch.split(launch.cdiv(P, BN), B * chunks, launch.num_processors(student.device))
    acc = coef.new_empty((B, splits, C)) if splits > 1 else None
    upstream = Operand(grad, grad.stride(0) if grad.ndim else 0, 0, 0, 0)
    constants = {"SPEC": SPEC, "BLOCKS": launch.padded(blocks), "num_warps": _warps(student)}
    operands = upstream, _operand(student), _operand(df)
    numbers = P, blocks, splits, tiles
    grid = (B * splits * chunks,)
    launch.run(_relation_row_bwd_kernel, grid, coef, b_0, acc, *numbers, *operands, BN=BN, **constants)
    if acc is not None:
        launch.run(_relation_row_cls_kernel, (B, chunks), acc, b_0, blocks, splits, *operands, **constants)
    return df
