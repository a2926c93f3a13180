"""The calls that the gate compiles: a selection with every kernel and form, and the full sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from benchmarks.calls import DIVERGENCES, SIZES, Attention, Call, ClassRow, OnePass, Relation
from benchmarks.yardstick import PlainAttention

HEAD_DIMS = (16, 32, 64, 80, 128, 256)
WIDE_HEADS = ((3, 64), (6, 64), (12, 64), (16, 64))  # merged widths 192, 384, 768, 1024
CHANNELS = ((192, 384), (384, 768), (768, 768), (1024, 1280))


def representative() -> list[Call]:
    """One call per kernel and form: what the tests compile."""
    return [
        Attention(1, 197, 6, 64, "bfloat16"),
        Attention(1, 197, 3, 80, "float32"),
        Attention(1, 1370, 12, 64, "bfloat16", teacher_dim=128),  # does not fit one tile: split form
        Attention(1, 197, 6, 64, "bfloat16", merge="logsum", teacher_heads=12),
        Attention(1, 197, 6, 64, "float16", merge="mean"),
        Attention(0, 197, 6, 64, "bfloat16", batch=4),
        Attention(0, 197, 6, 64, "bfloat16", batch=4, known=True),
        Attention(0, 197, 6, 64, "bfloat16", batch=4, known=True, mask="bool"),
        Attention(0, 197, 6, 80, "bfloat16", batch=4, known=True),  # two tiles of channels
        Attention(0, 197, 6, 32, "bfloat16", batch=4, divergence="js", mask="additive"),  # the most registers
        Attention(0, 197, 6, 64, "bfloat16", batch=4, merge="mean", mask="bool"),
        OnePass(0, 197, 6, 64, "bfloat16", batch=4),
        OnePass(0, 197, 6, 64, "bfloat16", batch=4, known=True),
        OnePass(0, 197, 6, 64, "bfloat16", batch=4, divergence="none"),
        OnePass(0, 197, 6, 80, "bfloat16", batch=4, known=True),  # two tiles of channels
        ClassRow(1, 197, 6, 64, "bfloat16", batch=4),  # gradients added in place
        Relation(197, 384, 768, "bfloat16"),
        PlainAttention(),
    ]


def everything() -> Iterator[Call]:
    """The full sweep: every divergence with every dtype and head dim, every merged width, and each other option once."""
    yield from representative()
    for dtype, dim in itertools.product(SIZES, HEAD_DIMS):
        for divergence in DIVERGENCES:
            yield Attention(1, 197, 6, dim, dtype, divergence=divergence)
            yield Attention(0, 197, 6, dim, dtype, divergence=divergence, batch=4)
        yield Attention(1, 1370, 6, dim, dtype)
        yield Attention(1, 197, 6, dim, dtype, merge="mean")
    for dtype in SIZES:
        for heads, dim in WIDE_HEADS:
            yield Attention(1, 197, heads, dim, dtype, merge="logsum")
            yield Attention(0, 197, heads, dim, dtype, merge="logsum", batch=4)
        for channels, teacher_channels in CHANNELS:
            yield Relation(197, channels, teacher_channels, dtype)
    row = Attention(1, 197, 6, 64, "bfloat16")
    whole = dataclasses.replace(row, rows=0, batch=4)
    for call in (row, whole):
        for mask in ("bool", "additive"):
            yield dataclasses.replace(call, mask=mask)
        yield dataclasses.replace(call, backward=False)
        yield dataclasses.replace(call, teacher_dim=128)
        yield dataclasses.replace(call, merge="logsum", teacher_heads=12)
    yield dataclasses.replace(whole, merge="mean", teacher_heads=12)
    yield from _crowded_maps()
    yield from _one_passes()
    for call in (
        row,
        dataclasses.replace(row, merge="mean"),
        dataclasses.replace(row, keys=1370),
        dataclasses.replace(row, merge="logsum"),
    ):
        yield dataclasses.replace(call, rows=4)
    yield dataclasses.replace(row, probs=True)
    yield dataclasses.replace(row, merge="logsum", probs=True)
    for merge in ("max", "min"):
        yield dataclasses.replace(row, merge=merge, teacher_heads=12)
    yield dataclasses.replace(row, divergence="js", keys=1370)  # not one sweep: finished rows
    yield dataclasses.replace(row, one_model=True)
    yield dataclasses.replace(row, one_model=True, merge="logsum")
    yield Relation(197, 384, 768, "bfloat16", batch=1)  # few programs: the patches are split


def _crowded_maps() -> Iterator[Call]:
    """Whole maps with several options at once: the calls that need the most registers."""
    whole = Attention(0, 197, 6, 64, "bfloat16", batch=4)
    for dim in (32, 64, 128):
        yield dataclasses.replace(whole, dim=dim, divergence="js", mask="bool")
        for divergence, mask in itertools.product(("js", "mse"), ("full", "additive", "biases")):
            yield dataclasses.replace(whole, dim=dim, divergence=divergence, mask=mask)
    yield dataclasses.replace(whole, mask="biases")
    yield dataclasses.replace(whole, merge="mean", divergence="js")
    for dim, mask in itertools.product((32, 64), ("bool", "full", "biases")):
        yield dataclasses.replace(whole, dim=dim, merge="mean", divergence="js", mask=mask)
    single = dataclasses.replace(whole, dtype="float32")
    for mask in ("bool", "full", "additive", "biases"):
        yield dataclasses.replace(single, divergence="js", mask=mask)
    yield dataclasses.replace(single, divergence="mse", mask="additive")
    for mask in ("bool", "biases"):
        yield dataclasses.replace(single, merge="mean", divergence="js", mask=mask)
    for call, mask in itertools.product((whole, single), ("full", "additive", "biases")):
        yield dataclasses.replace(call, merge="logsum", divergence="js", mask=mask)


def _one_passes() -> Iterator[Call]:
    """Attention with its divergence: every divergence, head dim and mask; and the same kernels without one, the yardstick."""
    one = OnePass(0, 197, 6, 64, "bfloat16", batch=4)
    for dim, divergence in itertools.product((64, 96), ("none", *DIVERGENCES)):
        yield dataclasses.replace(one, dim=dim, divergence=divergence)
    for dim in (16, 32, 48, 80):
        yield dataclasses.replace(one, dim=dim)
    for dim, divergence in itertools.product((64, 96), ("none", "forward_kl", "js")):
        yield dataclasses.replace(one, dim=dim, divergence=divergence, mask="bool")
    yield dataclasses.replace(one, dim=80, teacher_dim=64)
    yield dataclasses.replace(one, dtype="float16")
    row = ClassRow(1, 197, 6, 64, "bfloat16", batch=4)
    yield dataclasses.replace(row, merge="logsum")
    yield dataclasses.replace(row, dtype="float32", dim=80)
    yield dataclasses.replace(row, keys=1370)
