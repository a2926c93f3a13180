"""impl="chunked": right against the float64 oracle, O(N) memory, and at home in PyTorch.

Up to 16 query rows keep coefficient rows, more rows walk over blocks; both are tested throughout (M = 2 and M = 20).
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from attnkd import attention_divergence
from attnkd.attention.chunked import divergence as chunked_divergence
from attnkd.attention.chunked import operation as chunked
from attnkd.attention.chunked import sweep as chunked_sweep
from attnkd.attention.problem import DIVERGENCES, MERGES, make_problem
from attnkd.testing.proof import assert_proved
from benchmarks import cpu
from benchmarks.calls import Attention

ROWS = (2, 20)


def call(B=2, H=3, M=2, N=33, D=16, dtype=torch.float32, H_t=None, D_t=None, std=1.0, **extra):
    H_t, D_t = H_t or H, D_t or D
    shapes = {
        "student_query": (B, H, M, D), "student_key": (B, H, N, D),
        "teacher_query": (B, H_t, M, D_t), "teacher_key": (B, H_t, N, D_t),
    }  # fmt: skip
    return {n: (torch.randn(s) * std).to(dtype) for n, s in shapes.items()} | extra


def problem(arguments, divergence="forward_kl", merge=None, temperature=1.0, **extra):
    names = ("student_query", "student_key", "teacher_query", "teacher_key", "teacher_probs", "student_scale",
             "teacher_scale", "student_mask", "teacher_mask")  # fmt: skip
    return make_problem(*[(arguments | extra).get(n) for n in names], merge, divergence, temperature)


def leaves(arguments):
    return [arguments[n].requires_grad_() for n in ("student_query", "student_key")]


def small_blocks(monkeypatch, logits):
    monkeypatch.setattr(chunked_sweep, "CPU_BLOCK", max(logits // torch.get_num_threads(), 1))


# -- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_head(divergence, dtype, M):
    assert_proved("chunked", **call(M=M, D_t=24, dtype=dtype, divergence=divergence, temperature=1.7))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_is_computed_in_float64(divergence, M):
    arguments = call(M=M, dtype=torch.float64)
    student = leaves(arguments)
    rows = [
        attention_divergence(**arguments, divergence=divergence, reduction="none", impl=i)
        for i in ("chunked", "reference")
    ]
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(rows[0])
    a, b = (torch.autograd.grad(r, student, upstream) for r in rows)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("merge", MERGES[1:])
def test_merged_heads(merge, M):
    """Teacher and student differ in heads and head dims."""
    for divergence in DIVERGENCES if merge == "logsum" else DIVERGENCES[:-1]:
        for dtype in (torch.float32, torch.bfloat16):
            arguments = call(M=M, H_t=4, D_t=8, dtype=dtype)
            assert_proved("chunked", **arguments, merge=merge, divergence=divergence, temperature=1.7)


def test_heads_that_tie_share_the_gradient():
    arguments = call(H=1, M=2)
    twins = {n: x.expand(-1, 2, -1, -1).clone() for n, x in arguments.items()}
    for merge in ("max", "min"):
        assert_proved("chunked", **twins, merge=merge)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_and_dead_rows(divergence, M):
    arguments = call(M=M, N=21)
    visible = torch.rand(2, 1, M, 21) > 0.3
    visible[0, :, 1] = False
    other = torch.rand(2, 3, 1, 21) > 0.3
    hiding = torch.where(visible, 0.0, -torch.inf)
    learned = torch.randn(3, 1, 21)
    very_low = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    by_head = hiding.repeat(1, 3, 1, 1)  # heads that see different keys; one of them nothing at all
    by_head[:, 0, :, 2], by_head[1, 1:, :, 4], by_head[1, 0, 1] = -torch.inf, -torch.inf, -torch.inf
    for merge in (None, "logsum", "mean", "max", "min"):
        if merge not in (None, "logsum") and divergence == "logit_mse":
            continue
        options = arguments | {"merge": merge, "divergence": divergence, "temperature": 1.7}
        assert_proved("chunked", **options, student_mask=visible, teacher_mask=visible)
        assert_proved("chunked", **options, student_mask=learned)
        assert_proved("chunked", **options, student_mask=learned + hiding, teacher_mask=very_low)
        assert_proved("chunked", **options, student_mask=learned + by_head, teacher_mask=by_head)
        if merge is None:
            assert_proved("chunked", **options, student_mask=visible, teacher_mask=other)  # +inf rows for some kinds
            assert_proved("chunked", **options, teacher_mask=other)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("merge", MERGES[1:])
def test_biases_of_models_with_different_heads(merge, M):
    for H, H_t in ((1, 4), (3, 2)):
        biases = {"student_mask": torch.randn(H, M, 33), "teacher_mask": torch.randn(2, H_t, 1, 33)}
        assert_proved("chunked", **call(M=M, H=H, H_t=H_t), **biases, merge=merge, temperature=1.7)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("divergence", DIVERGENCES[:-1])
def test_given_target_rows(divergence, M):
    for merge in MERGES:
        arguments = call(M=M, divergence=divergence, merge=merge)
        del arguments["teacher_query"], arguments["teacher_key"]
        probs = (3 * torch.randn(33, M, 2, 3 if merge is None else 1)).softmax(0).permute(2, 3, 1, 0)
        assert_proved("chunked", **arguments, teacher_probs=7.0 * probs)
        probs[..., 5] = 0.0
        assert_proved("chunked", **arguments, teacher_probs=probs.bfloat16())


def test_strides():
    """Views of a packed qkv projection, a transposed layout, expanded batches, a sliced head dim: same values."""
    B, H, N, D = 2, 3, 40, 16
    packed = torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    layouts = [
        packed[:2],
        (torch.randn(B, H, D, N).mT, torch.randn(B, H, D, N).mT),
        (torch.randn(1, H, N, D).expand(B, -1, -1, -1), torch.randn(1, H, N, D).expand(B, -1, -1, -1)),
        (torch.randn(B, H, N, 2 * D)[..., ::2], torch.randn(B, H, N, 2 * D)[..., ::2]),
    ]
    for merge in (None, "logsum", "mean"):
        for M in ROWS:
            for (qs, ks), (qt, kt) in zip(layouts, layouts[1:] + layouts[:1], strict=True):
                sides = {
                    "student_query": qs[:, :, :M],
                    "student_key": ks,
                    "teacher_query": qt[:, :, :M],
                    "teacher_key": kt,
                }
                assert_proved("chunked", **sides, merge=merge)
                assert_proved("chunked", **{n: x.half() if x.stride(0) else x[:1].half().expand_as(x) for n, x in sides.items()},
                              merge=merge)  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes(divergence):
    for M in ROWS:
        for merge in (None, "mean"):
            if merge and divergence == "logit_mse":
                continue
            hard = call(M=M, divergence=divergence, merge=merge)  # logits of ±1e4
            hard["student_query"] *= 1e4
            hard["teacher_query"] *= 1e4
            loss = attention_divergence(**hard, reduction="none", impl="chunked")
            oracle = attention_divergence(**{n: x.double() if torch.is_tensor(x) else x for n, x in hard.items()}, reduction="none",
                                  impl="reference")  # fmt: skip
            torch.testing.assert_close(loss, oracle.float(), rtol=1e-3, atol=1e-3)
            shifted = call(M=M, divergence=divergence, merge=merge)  # a common offset of 1e4 is nobody's business
            rows = attention_divergence(**shifted, reduction="none", impl="chunked")
            offset = torch.full((1, 1, 1, 33), 1e4)
            if divergence != "logit_mse":
                moved = attention_divergence(**shifted, student_mask=offset, reduction="none", impl="chunked")
                torch.testing.assert_close(moved, rows, rtol=0.0, atol=2e-3)
            one = call(M=M, N=1, divergence=divergence, merge=merge)
            value = attention_divergence(**one, reduction="none", impl="chunked")
            assert divergence == "logit_mse" or (value == 0).all()
            near = call(M=M, divergence=divergence, merge=merge)
            near["teacher_query"] = near["student_query"] + 1e-2 * torch.randn_like(near["student_query"])
            near["teacher_key"] = near["student_key"].clone()
            assert_proved("chunked", **near)


def test_nothing_to_do():
    for B, M in ((0, 2), (0, 20), (2, 0)):
        arguments = call(B=B, M=M)
        student = leaves(arguments)
        loss = attention_divergence(**arguments, reduction="sum", impl="chunked")
        assert loss == 0
        for grad, x in zip(torch.autograd.grad(loss, student), student, strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


def test_infinite_rows_and_nan():
    """A student that hides what its teacher sees is worth +inf, spoils no other row, and leaves the sum at weight 0."""
    for M in ROWS:
        for divergence, side in (("forward_kl", "student_mask"), ("reverse_kl", "teacher_mask")):
            arguments = call(M=M, divergence=divergence)
            student = leaves(arguments)
            visible = torch.ones(M, 33, dtype=torch.bool)
            visible[0, 3] = False
            rows = attention_divergence(**arguments, **{side: visible}, reduction="none", impl="chunked")
            assert rows[:, :, 0].isinf().all() and rows[:, :, 1:].isfinite().all()
            kept = torch.ones(M).index_fill(0, torch.tensor(0), 0.0)
            total = attention_divergence(
                **arguments, **{side: visible}, row_weight=kept, reduction="sum", impl="chunked"
            )
            torch.testing.assert_close(total, rows[:, :, 1:].sum())
            assert all(g.isfinite().all() for g in torch.autograd.grad(total, student))
        for name in ("student_query", "teacher_query"):
            broken = call(M=M)
            broken[name][0, 0, 0] = torch.nan
            for extra in ({}, {"student_mask": visible, "teacher_mask": visible}):
                rows = attention_divergence(**broken, **extra, reduction="none", impl="chunked")
                assert rows[0, 0, 0].isnan() and rows.isnan().sum() == 1


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("logits", [1, 50, 100, 500])
def test_every_way_to_cut_into_blocks(monkeypatch, merge, logits):
    small_blocks(monkeypatch, logits)
    visible = torch.rand(3, 1, 1, 13) > 0.2
    for M in (3, 20):
        arguments = call(B=3, H=2, H_t=3 if merge else 2, M=M, N=13, D=4, merge=merge)
        assert_proved("chunked", **arguments, student_mask=torch.randn(2, M, 13))
        assert_proved("chunked", **arguments, student_mask=visible, teacher_mask=visible)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("M", ROWS)
def test_reductions_keep_the_gradients_of_the_forward(reduction, M):
    """Every reduction but 'none' finishes its gradients in the forward; they equal the recomputed ones."""
    bias = torch.randn(3, 1, 33, requires_grad=True)
    arguments = call(M=M, student_mask=bias)
    inputs = [*leaves(arguments), bias]
    weight = torch.rand(2, 1, M)
    loss = attention_divergence(**arguments, row_weight=weight, reduction=reduction, impl="chunked")
    rows = attention_divergence(**arguments, reduction="none", impl="chunked")
    divisor = {"sum": 1.0, "mean": 3.0 * weight.sum(), "batchmean": 2.0}[reduction]
    again = (rows * weight).sum() / divisor
    torch.testing.assert_close(loss, again)
    for a, b in zip(torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * again, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("M", ROWS)
def test_half_precision_gradients_survive_a_small_weight(M):
    """Gradients are kept in float32 and leave it after the loss scale: in float16 they would be 0 before it."""
    arguments = call(M=M, dtype=torch.float16)
    student = leaves(arguments)
    weight = torch.full((2, 3, M), 1e-8)
    grads = torch.autograd.grad(chunked.weighted_sum(problem(arguments), weight) * 1e8, student)
    oracle = torch.autograd.grad(attention_divergence(**arguments, reduction="sum", impl="reference"), student)
    for a, b in zip(grads, oracle, strict=True):
        assert a.dtype == torch.float16 and b.abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("M", ROWS)
def test_gradcheck(divergence, M):
    arguments = call(B=1, H=2, M=M, N=5, D=3, dtype=torch.float64)
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 2, M, dtype=torch.float64)

    def rows(q, k, bias):
        return chunked.per_row(
            problem(arguments | {"student_query": q, "student_key": k, "student_mask": bias}, divergence)
        )

    def total(q, k, bias):
        changed = arguments | {"student_query": q, "student_key": k, "student_mask": bias}
        return chunked.weighted_sum(problem(changed, divergence), weight)

    assert gradcheck(rows, (*leaves(arguments), bias)) and gradcheck(total, (*leaves(arguments), bias))


# -- a learnable mask -------------------------------------------------------------------------------------------------

SHAPES = [(33,), (3, 1, 33), (20, 33), (2, 1, 1, 33), (1, 3, 20, 33), (2, 3, 20, 33)]


@pytest.mark.parametrize("merge", [None, "logsum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_gradient(shape, merge):
    arguments = call(M=20, merge=merge)
    bias = torch.randn(shape)
    assert_proved("chunked", **arguments, student_mask=bias)
    half = bias.bfloat16().requires_grad_()
    grads = [
        torch.autograd.grad(attention_divergence(**arguments, student_mask=half, reduction="sum", impl=impl), half)[0]
        for impl in ("chunked", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


def test_gradient_of_a_mask_that_the_user_expanded():
    """Such a view has a gradient for every copy, which must not be shared out among them."""
    bias = torch.randn(3, 20, 33, requires_grad=True)
    view = bias.expand(2, -1, -1, -1)
    grads = [
        torch.autograd.grad(attention_divergence(**arguments, student_mask=view, reduction="sum", impl=impl), view)[0]
        for arguments in [call(M=20)]
        for impl in ("chunked", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(grads[0][0], grads[0][1], rtol=0.1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_row_logits(temperature):
    q, k = torch.randn(2, 3, 2, 16, requires_grad=True), torch.randn(2, 3, 33, 16, requires_grad=True)
    mask = torch.randn(1, 3, 1, 33)
    mask[..., 4] = -torch.inf
    mask.requires_grad_()
    z = chunked.row_logits(q, k, mask, 0.3, temperature)
    eager = (0.3 * q @ k.mT + mask) / temperature
    assert z.isneginf().equal(eager.isneginf())
    upstream = torch.randn_like(z)
    finite = ~eager.isneginf()
    torch.testing.assert_close(z[finite], eager[finite])
    grads = torch.autograd.grad(z, (q, k, mask), upstream)
    upstream = upstream.masked_fill(~finite, 0.0)  # a hidden key sends no gradient
    for a, b in zip(grads, torch.autograd.grad(eager, (q, k, mask), upstream), strict=True):
        torch.testing.assert_close(a, b)


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(function):
    """The most that tensors allocated inside ``function`` took at one time, as the allocator saw it."""
    with profile(profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_memory_is_linear_in_n(monkeypatch, impl, reduction):
    """Forward and backward of 1 x 2 maps of 700 x 700, learned [N] bias: no buffer of the size of one float32 map."""
    small_blocks(monkeypatch, 16 * 1024)
    N, D = 700, 16
    arguments = call(B=1, H=2, M=N, N=N, D=D)
    bias = torch.zeros(N, requires_grad=True)
    inputs = [*leaves(arguments), bias]

    def step():
        loss = attention_divergence(**arguments, student_mask=bias, reduction=reduction, impl=impl)
        torch.autograd.grad(loss.sum(), inputs)

    maps = 2 * 4 * N * N
    peak = peak_bytes(step)
    assert peak < maps / 2 if impl == "chunked" else peak > 2 * maps, peak  # the meter sees the reference's maps


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_memory_of_a_broadcast_mask(monkeypatch, reduction):
    small_blocks(monkeypatch, 16 * 1024)
    arguments = call(B=16, H=2, M=200, N=200, D=4)
    bias = torch.zeros(1, 2, 200, 200, requires_grad=True)
    inputs = [*leaves(arguments), bias]

    def step():
        loss = attention_divergence(**arguments, student_mask=bias, reduction=reduction, impl="chunked")
        return torch.autograd.grad(loss, inputs)[2]

    assert peak_bytes(step) < 16 * 2 * 200 * 200  # one byte an entry, were it not broadcast
    assert step().shape == bias.shape


def test_only_what_is_needed_is_computed():
    arguments = call(M=20)
    rows = attention_divergence(**arguments, reduction="none", impl="chunked")
    assert not rows.requires_grad
    key = arguments["student_key"].requires_grad_()
    with torch.no_grad():
        assert not attention_divergence(**arguments, impl="chunked").requires_grad
    _, dq, dk, dmask = torch.ops.attnkd.chunked_gradients(
        *chunked._flatten(problem(arguments)), torch.ones(2, 3, 20), False, True, False
    )
    assert dq.numel() == 0 and dmask.numel() == 0 and dk.shape == key.shape


# -- at home in PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", ROWS)
def test_deterministic(M):
    arguments = call(B=4, M=M, N=200, merge="mean")
    student = leaves(arguments)

    def run():
        loss = attention_divergence(**arguments, impl="chunked")
        return loss, *torch.autograd.grad(loss, student)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(reduction, dynamic):
    def step(q, k, bias, rest):
        return attention_divergence(q, k, **rest, student_mask=bias, reduction=reduction, impl="chunked").sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (2, 20):
        arguments = call(M=M)
        bias = torch.randn(3, 1, 33, requires_grad=True)
        inputs = [*leaves(arguments), bias]
        rest = {n: arguments[n] for n in ("teacher_query", "teacher_key")}
        a, b = compiled(*inputs, rest), step(*inputs, rest)
        torch.testing.assert_close(a, b)
        for x, y in zip(torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs), strict=True):
            torch.testing.assert_close(x, y)


def test_operators_keep_their_contract():
    """torch.library.opcheck: schema, fake tensors, autograd registration, dynamic shapes."""
    mask = torch.randn(1, 3, 1, 33)
    flat = chunked._flatten(problem(call(M=3), student_mask=mask))
    ds, weight = torch.randn(2, 3, 3, 33), torch.rand(2, 3, 3)
    for name, arguments in {
        "chunked_rows": flat,
        "chunked_coefficients": flat,
        "chunked_gradients": (*flat, weight, True, True, True),
        "chunked_contract": (ds, weight, *flat[:3], 0.25, 1.0, True, False, True),
        "chunked_logits": (*flat[:3], 0.25, 1.0),
    }.items():
        torch.library.opcheck(getattr(torch.ops.attnkd, name).default, arguments)


def test_autocast_does_not_reach_the_blocks():
    arguments = call(M=20)
    rows = chunked.per_row(problem(arguments))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked.per_row(problem(arguments)), rows)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(use_reentrant, reduction):
    arguments = call(M=20)
    student = leaves(arguments)

    def step(q, k):
        return attention_divergence(
            **(arguments | {"student_query": q, "student_key": k}), reduction=reduction, impl="chunked"
        ).sum()

    grads = []
    for loss in (step(*student), checkpoint(step, *student, use_reentrant=use_reentrant)):
        loss.backward()
        grads.append([x.grad.clone() for x in student])
        for x in student:
            x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(M, reduction):
    arguments = call(M=M)
    student = leaves(arguments)
    loss = attention_divergence(**arguments, reduction=reduction, impl="chunked").sum()
    grad, _ = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_a_mask_without_broadcast_views():
    """Problems may hold masks with sizes of 1 instead of expanded views."""
    bias = torch.randn(1, 3, 1, 33)
    expanded = problem(call(M=20), student_mask=bias)
    compact = expanded._replace(student=expanded.student._replace(mask=bias))
    assert torch.equal(chunked.per_row(expanded), chunked.per_row(compact))


# -- its benchmark ----------------------------------------------------------------------------------------------------


JS = Attention(rows=0, keys=65, dtype="float32", divergence="js", batch=1)


def test_benchmark_measures_a_case():
    settings = {"threads": torch.get_num_threads(), "clock": "wall", "seconds": 0.01}
    for name in cpu.IMPLEMENTATIONS:
        record = cpu._measure({"call": dataclasses.asdict(JS), "implementation": name, **settings})
        assert record["status"] == "ok" and 0 < record["ms"]["fastest"] <= record["ms"]["median"]


def test_benchmark_stops_where_chunked_is_wrong(monkeypatch):
    monkeypatch.setitem(chunked_divergence._KINDS, "js", chunked_divergence._forward_kl)
    assert "WRONG" in cpu._wrong(JS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resets the peak of /proc/self")
def test_benchmark_sees_memory_that_is_given_back():
    """In a fresh process, as the benchmark measures: an old one may hold freed memory that a step takes without growing."""
    code = """
import torch
from benchmarks import cpu
print(cpu._extra_bytes(lambda: None), cpu._extra_bytes(lambda: torch.ones(16 << 20).sum()))
"""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    nothing, some = map(int, output.split())
    assert nothing < 8 << 20
    assert 60 << 20 < some < 80 << 20
