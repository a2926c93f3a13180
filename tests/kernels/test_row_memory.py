"""What the row kernels touch: bytes against the floor, launches, guard bands, layouts."""

import pytest
import torch

from attnkd import attention_divergence, attention_rows
from attnkd.testing.guard import LAYOUTS, canaries, lay_out
from attnkd.testing.proof import assert_proved
from attnkd.testing.traffic import Meter

HAS_GPU = torch.cuda.is_available()
interpreter_only = pytest.mark.skipif(HAS_GPU, reason="bytes are counted in the interpreter")


def inputs(B, H, M, N, D, dtype=torch.bfloat16):
    shapes = (B, H, M, D), (B, H, N, D), (B, H, M, D), (B, H, N, D)
    names = "student_query", "student_key", "teacher_query", "teacher_key"
    return {name: torch.randn(shape).to(dtype) for name, shape in zip(names, shapes, strict=True)}


def size(tensor):
    return tensor.numel() * tensor.element_size()


@interpreter_only
@pytest.mark.parametrize(
    ("merge", "H", "N", "D", "launches"),
    [
        (None, 2, 197, 64, 1),
        (None, 2, 257, 64, 1),
        (None, 6, 257, 64, 2),  # a processor holds one such tile; more than four of them are split
        (None, 1, 785, 64, 2),
        ("logsum", 3, 197, 64, 2),
        ("logsum", 6, 101, 64, 2),
    ],
)
def test_forward_reads_each_key_once_and_backward_none(merge, H, N, D, launches):
    given = inputs(1, H, 1, N, D)
    leaves = {n: given[n].requires_grad_() for n in ("student_query", "student_key")}
    with Meter(**given) as forward:
        loss = attention_divergence(**given, merge=merge, reduction="none", impl="triton")
    for name in ("student_key", "teacher_key"):
        assert forward.loaded(name) == size(given[name]), name
    assert len(forward.launches) == launches
    with Meter(**given) as backward:
        dq, dk = torch.autograd.grad(loss.sum(), list(leaves.values()))
    assert backward.loaded("student_key") == backward.loaded("teacher_key") == 0
    assert backward.stored("DK.pointer") == size(dk) == backward.stored("DK.pointer").once
    assert backward.stored("DQ.pointer") == size(dq)
    assert len(backward.launches) == 1
    # Everything else is rows: 1/D of a K each. Coefficients (fp32) are read once per tile of keys.
    rows = loss.numel() * N * 4
    assert backward.loaded("COEF") == rows
    others = sum(forward.loaded(n) for n in forward.names if n not in ("student_key", "teacher_key"))
    assert others <= 2 * rows + 16 * H * D * 4 * max(1, N // 128) + 4096


@interpreter_only
@pytest.mark.parametrize(
    ("merge", "divergence", "N", "again"),
    [
        (None, "forward_kl", 60, 0),
        (
            None,
            "forward_kl",
            577,
            1,
        ),  # beyond one tile the rows' logits come first: K_s again for dq, once for all rows
        ("logsum", "cross_entropy", 197, 1),
        (None, "js", 577, 1),
        ("mean", "forward_kl", 60, 1),
    ],
)
def test_a_few_rows_read_each_key_once(merge, divergence, N, again):
    given = inputs(1, 6, 16, N, 64)
    leaves = [given[n].requires_grad_() for n in ("student_query", "student_key")]
    with Meter(**given) as forward:
        loss = attention_divergence(**given, merge=merge, divergence=divergence, impl="triton")
    for name in ("student_key", "teacher_key"):
        assert forward.loaded(name) == size(given[name]), name
    with Meter(**given) as backward:
        torch.autograd.grad(loss, leaves)
    assert backward.loaded("student_key") == again * size(given["student_key"])
    assert backward.loaded("teacher_key") == 0
    assert backward.stored("DK.pointer") == size(given["student_key"])


@interpreter_only
def test_floor_of_the_headline_case():
    """H 6, N 197, D 64, bf16, forward and backward: all bytes asked for ÷ (both keys once + dk once)."""
    given = inputs(2, 6, 1, 197, 64)
    leaves = [given[n].requires_grad_() for n in ("student_query", "student_key")]
    with Meter(**given) as meter:
        torch.autograd.grad(attention_divergence(**given, impl="triton"), leaves)
    ratio = (meter.loaded() + meter.stored()) / (3 * size(given["student_key"]))
    assert 1.0 <= ratio < 1.04, ratio  # the rest: coefficient rows 2.1%, queries, unit dq and dq 1.7%


@interpreter_only
def test_attention_rows_read_each_key_once():
    given = inputs(2, 3, 2, 50, 64)
    with Meter(**given) as meter:
        attention_rows(given["teacher_query"], given["teacher_key"], merge="logsum", impl="triton")
    assert meter.loaded("teacher_key") == size(given["teacher_key"]) and len(meter.launches) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_between_guard_bands(layout, device):
    """Unwritten outputs stay NaN, a stray write kills a canary, a stray read brings NaN."""
    for merge, N, D in ((None, 33, 24), (None, 400, 48), ("logsum", 70, 48), ("mean", 33, 16)):
        given = {n: lay_out(x.to(device), layout) for n, x in inputs(2, 3, 1, N, D).items()}
        with canaries() as allocated:
            assert_proved("triton", **given, merge=merge)
        assert allocated


def test_offsets_beyond_two_to_the_31(device):
    """A batch stride of 2³¹ elements: 32-bit offsets would wrap (the interpreter raises where they would)."""
    memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    shape, strides = (2, 1, 20, 16), (2**31, 1, 16, 1)
    key = memory.as_strided(shape, strides)
    key.copy_(torch.randn(shape))
    small = key.clone()
    query = torch.randn(2, 1, 1, 16, device=device).half()
    want = attention_divergence(query, small, query.flip(0), small, reduction="none", impl="triton")
    assert torch.equal(attention_divergence(query, key, query.flip(0), key, reduction="none", impl="triton"), want)


def test_no_gradient_no_coefficients(device):
    """Without a gradient to compute, neither coefficient rows nor the unit dq are allocated."""
    given = {n: x.to(device) for n, x in inputs(2, 3, 1, 197, 64).items()}
    with canaries() as allocated, torch.no_grad():
        attention_divergence(**given, impl="triton")
    assert sum(size(x) for x in allocated) < 1024
