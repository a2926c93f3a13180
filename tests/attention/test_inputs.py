"""One answer on every implementation: weights, dead rows, NaN, impossible probabilities, inference tensors, no forward mode."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parameter import Parameter

from attnkd import attention_divergence, attention_rows, merge_attention, resample_attention
from attnkd.attention.problem import DIVERGENCES, MERGES

IMPLS = ("reference", "chunked", "triton")
ROWS = (3, 17)  # the kernels and the chunked implementation differ for a few rows and for many
B, H, N, D = 2, 2, 19, 8


def call(device, M, **extra):
    shapes = {"student_query": M, "student_key": N, "teacher_query": M, "teacher_key": N}
    return {name: torch.randn(B, H, rows, D, device=device) for name, rows in shapes.items()} | extra


def given(device, M, merge=None):
    """A student and a teacher's finished rows."""
    arguments = {name: x for name, x in call(device, M, merge=merge).items() if not name.startswith("teacher")}
    return arguments | {"teacher_probs": torch.rand(B, 1 if merge else H, M, N, device=device)}


def has_kernel(arguments):
    few = arguments["student_query"].shape[2] <= 16
    return few or "teacher_probs" not in arguments and arguments.get("merge") not in ("max", "min")


def losses(arguments, **options):
    """The loss of every implementation; all the same."""
    found = [
        attention_divergence(**arguments, **options, impl=impl)
        for impl in IMPLS
        if impl != "triton" or has_kernel(arguments)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], equal_nan=True, rtol=1e-4, atol=1e-6)
        assert other.dtype == found[0].dtype == torch.float32
    return found[0]


def probabilities(arguments):
    """The student's attention rows, on every implementation; all the same."""
    given = {name.removeprefix("student_"): x for name, x in arguments.items() if not name.startswith("teacher")}
    found = [attention_rows(**given, impl=impl) for impl in IMPLS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], equal_nan=True)
    return found[0]


@pytest.mark.parametrize("M", ROWS)
def test_rows_of_weight_0_leave_the_loss_whatever_they_are(device, M):
    visible = torch.ones(B, 1, M, N, dtype=torch.bool, device=device)
    visible[:, :, 0, 4:] = False
    arguments = call(
        device, M, student_mask=visible
    )  # the teacher weighs what the student cannot see: row 0 is infinite
    arguments["teacher_query"][:, :, 1] = torch.nan
    student = [arguments[name].requires_grad_() for name in ("student_query", "student_key")]
    weight = torch.ones(M, dtype=torch.float64, device=device)
    weight[:2], weight[2] = 0.0, -0.5
    rows = losses(arguments, reduction="none")
    assert rows[:, :, 0].isposinf().all() and rows[:, :, 1].isnan().all() and rows[:, :, 2:].isfinite().all()
    kept = rows[:, :, 2:] * weight[2:].float()
    torch.testing.assert_close(losses(arguments, row_weight=weight, reduction="none")[:, :, 2:], kept)
    assert not losses(arguments, row_weight=weight, reduction="none")[:, :, :2].any()
    torch.testing.assert_close(losses(arguments, row_weight=weight, reduction="sum"), kept.sum())
    torch.testing.assert_close(losses(arguments, row_weight=weight), kept.sum() / (B * H * weight.sum()).float())
    arguments["teacher_query"][:, :, 1] = 0.0
    for impl in IMPLS:  # an infinite row of weight 0 sends no gradient either
        loss = attention_divergence(**arguments, row_weight=weight, impl=impl)
        q, k = torch.autograd.grad(loss, student)
        assert not q[:, :, :2].any() and q[:, :, 2:].isfinite().all() and k.isfinite().all()
    assert losses(arguments, row_weight=torch.full((), torch.nan, device=device)).isnan()
    assert losses(arguments, row_weight=torch.zeros(M, device=device)).isnan()  # a mean of nothing


@pytest.mark.parametrize("M", ROWS)
def test_probabilities_that_are_none(device, M):
    """Negative and NaN entries make their row NaN, on every implementation and for every divergence; zero rows leave the mean."""
    for merge in (None, "logsum", "mean"):
        arguments = given(device, M, merge)
        probs = arguments["teacher_probs"]
        probs[0, :, 0, 3], probs[0, :, 1, 3], probs[0, :, 2] = -1e-3, torch.nan, 0.0
        probs[1, :, 0, 5] = 0.0  # one key hidden, as in a peaked row
        for divergence in DIVERGENCES[:-1]:
            rows = losses(arguments, divergence=divergence, reduction="none")
            assert rows[0, :, :2].isnan().all() and not rows[0, :, 2].any()
            finite = rows[1:, :, 1:] if divergence == "reverse_kl" else rows[1:]
            assert finite.isfinite().all()
        probs[0, :, :2] = 1.0
        rows = losses(arguments, reduction="none")
        torch.testing.assert_close(losses(arguments), rows.sum() / (rows.numel() - rows.shape[1]))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("merge", MERGES)
def test_nan_is_never_a_hidden_key(device, M, merge):
    """In queries, keys and additive masks, beside keys that are hidden. Each in an image of its own; the last has none."""
    names = ("student_query", "teacher_key", "student_mask", "teacher_mask", None)
    shapes = {"student_query": M, "student_key": N, "teacher_query": M, "teacher_key": N}
    arguments = {name: torch.randn(len(names), H, rows, D, device=device) for name, rows in shapes.items()}
    for name in ("student_mask", "teacher_mask"):
        arguments[name] = torch.zeros(len(names), 1, M, N, device=device)
        arguments[name][..., 2] = -torch.inf
    for image, name in enumerate(names[:-1]):
        arguments[name][image, 0, 1, 5] = torch.nan
    for divergence in DIVERGENCES if M < 16 else ("forward_kl", "mse", "logit_mse"):
        if divergence == "logit_mse" and merge not in (None, "logsum"):
            continue
        rows = losses(arguments | {"merge": merge}, divergence=divergence, reduction="none")
        for image, name in enumerate(names):
            hit = rows[image, 0] if name == "teacher_key" else rows[image, 0, 1]
            assert (hit.isfinite() if name is None else hit.isnan()).all(), (name, divergence)
        assert rows[-1].isfinite().all()


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("merge", (None, "logsum", "mean"))
def test_a_hidden_key_is_never_seen(device, M, merge):
    """Whatever it is: the loss and the rows are those of any other key there. Boolean and additive masks."""
    visible = torch.rand(B, 1, 1, N, device=device) > 0.3
    visible[..., 0], visible[..., 5] = True, False
    for mask in (visible, torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)):
        arguments = call(device, M, student_mask=mask, teacher_mask=mask, merge=merge)
        hit = {name: x.clone() for name, x in arguments.items() if name.endswith("key")}
        for x in hit.values():
            x[0, :, 5], x[1, :, 5] = torch.nan, torch.inf
        torch.testing.assert_close(losses(arguments | hit), losses(arguments))
        if M < 16:
            rows = probabilities(arguments | hit)
            torch.testing.assert_close(rows, probabilities(arguments))
            assert not rows.masked_select(~visible).any()


@pytest.mark.parametrize(("M", "D"), [(1, 1), (1, 600), (17, 1)])  # a row whole, in pieces, and whole maps
def test_a_weight_on_a_hidden_key_is_infinite_however_small(device, M, D):
    """Up to float32's smallest number: e^−60 times a stand-in for −∞ would be a number that looks like a loss."""
    keys = 130
    query, key = torch.zeros(1, 1, M, D, device=device), torch.zeros(1, 1, keys, D, device=device)
    query[..., 0], mask = 1.0, torch.ones(keys, dtype=torch.bool, device=device)
    mask[129] = False
    teacher = key.clone()
    for gap, infinite in ((45.0, True), (60.0, True), (84.0, True), (95.0, False)):
        teacher[0, 0, 0, 0] = gap
        for divergence in ("forward_kl", "cross_entropy"):
            rows = losses(
                {"student_query": query, "student_key": key, "teacher_query": query, "teacher_key": teacher},
                student_mask=mask, student_scale=1.0, teacher_scale=1.0, divergence=divergence, reduction="none",
            )  # fmt: skip
            expected = math.inf if infinite else math.log(129)
            torch.testing.assert_close(rows, torch.full_like(rows, expected))


@pytest.mark.parametrize("merge", MERGES)
def test_the_keys_that_a_row_of_nan_does_not_see_have_probability_0(device, merge):
    """One head hides a key, the other is NaN: after logsum and min nothing sees it, after mean and max the other one does."""
    mask = torch.zeros(H, 1, N, device=device)
    mask[:, :, 3], mask[0, :, 7] = -torch.inf, -torch.inf
    arguments = call(device, 3, student_mask=mask, merge=merge)
    arguments["student_query"][:, 1, 1] = torch.nan
    rows = probabilities(arguments)
    assert rows[:, :, [0, 2]].isfinite().all() and rows[:, -1, 1].isnan().sum() == B * (
        N - 1 - (merge in ("logsum", "min"))
    )
    assert not rows[..., 3].any()


def test_a_scale_of_0_looks_at_queries_and_keys(device):
    """0 · NaN is NaN."""
    for M in ROWS:
        arguments = call(device, M, student_scale=0.0, teacher_scale=0.0)
        arguments["student_query"][0, 0, 1] = arguments["teacher_key"][0, 1, 1] = torch.nan
        rows = losses(arguments, divergence="cross_entropy", reduction="none")
        assert rows[0, 0, 1].isnan() and rows[0, 1].isnan().all() and rows[0].isnan().sum() == M + 1
        torch.testing.assert_close(rows[1], torch.full_like(rows[1], math.log(N)))


@pytest.mark.parametrize("M", ROWS)
def test_a_teacher_made_under_inference_mode(device, M):
    """Its tensors cannot be kept by autograd the usual way. Masks, weights and probabilities made there too."""
    bias = torch.randn(H, 1, N, device=device)
    with torch.inference_mode():
        made = call(device, M, teacher_mask=bias.clone(), row_weight=torch.rand(M, device=device))
        made["student_mask"] = torch.rand(1, 1, M, N, device=device) > 0.1
        probs = torch.rand(B, H, M, N, device=device)
    for form in ("queries", "probs"):
        for reduction in ("mean", "none"):
            for impl in IMPLS if form == "queries" or M <= 16 else IMPLS[:2]:
                results = []
                for arguments in (made, {name: x.clone() for name, x in made.items()}):
                    student = [arguments[f"student_{x}"].clone().requires_grad_() for x in ("query", "key")]
                    named = arguments | dict(zip(("student_query", "student_key"), student, strict=True))
                    if form == "probs":
                        named = {n: x for n, x in named.items() if not n.startswith("teacher")}
                        named["teacher_probs"] = probs if arguments is made else probs.clone()
                    # mse: a KL is infinite where the student's mask hides what the teacher weighs
                    loss = attention_divergence(**named, divergence="mse", reduction=reduction, impl=impl).sum()
                    results.append((loss.detach(), *torch.autograd.grad(loss, student)))
                torch.testing.assert_close(*results)
    for impl in IMPLS:
        q = torch.randn(B, H, 2, D, device=device, requires_grad=True)
        attention_rows(q, made["teacher_key"], mask=made["student_mask"][:, :, :2], impl=impl).square().sum().backward()
        assert q.grad is not None and q.grad.any()


@pytest.mark.parametrize("impl", ["chunked", "triton", "auto"])
def test_forward_mode_is_refused_never_0(device, impl):
    arguments = call(device, 2)
    q = arguments.pop("student_query")

    def loss(q):
        return attention_divergence(q, **arguments, impl=impl)

    def rows(q):
        return attention_rows(q, arguments["student_key"], impl=impl)

    for function in (loss, rows):
        for transform in (lambda f: torch.func.jvp(f, (q,), (q,)), lambda f: torch.func.jacfwd(f)(q)):
            with pytest.raises(NotImplementedError, match="forward-mode automatic differentiation"):
                transform(function)
    exact = torch.func.jvp(lambda q: attention_divergence(q, **arguments, impl="reference"), (q,), (q,))[1]
    leaf = q.clone().requires_grad_()
    attention_divergence(leaf, **arguments, impl="reference").backward()
    torch.testing.assert_close(exact.float(), (leaf.grad * q).sum())


def test_boolean_masks_of_single_heads_in_merged_rows(device):
    """A key that one head hides has probability 0 in that head: with every merge as with the same mask in numbers."""
    q, k = torch.randn(B, H, 2, D, device=device), torch.randn(B, H, N, D, device=device)
    visible = torch.rand(B, H, 1, N, device=device) > 0.3
    additive = torch.where(visible, 0.0, -torch.inf)
    for merge in MERGES:
        want = attention_rows(q, k, mask=additive, merge=merge, impl="reference")
        for impl in IMPLS:
            torch.testing.assert_close(attention_rows(q, k, mask=visible, merge=merge, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_in_nothing_out(device, impl):
    """No images, no rows: empty results of the right shape."""
    for batch, rows in ((0, 2), (2, 0)):
        q, k = torch.randn(batch, H, rows, D, device=device), torch.randn(batch, H, N, D, device=device)
        got = attention_rows(q, k, impl=impl)
        assert got.shape == (batch, H, rows, N) and attention_rows(q, k, merge="mean", impl=impl).shape[1] == 1
        assert merge_attention(got, "logsum").shape == (batch, 1, rows, N)
        for mode in ("bicubic", "bilinear", "area"):
            assert resample_attention(got, (3, 6), (2, 2), mode).shape == (batch, H, rows, 5)


def test_a_class_entry_above_1_leaves_nothing_to_the_patches():
    for cls in (1.0, 1 + 1e-6):
        row = torch.cat([torch.full((1, 1, 1, 1), cls), torch.zeros(1, 1, 1, 9)], -1)
        assert not resample_attention(row, (3, 3), (2, 2))[..., 1:].any()


def test_numbers_are_numbers(device):
    learnable = Parameter(torch.tensor(0.3, device=device))
    arguments = call(device, 2)
    q, k, row = arguments["student_query"], arguments["student_key"], torch.rand(1, 1, 1, 10)
    uses = {
        "student_scale": lambda x: attention_divergence(**arguments, student_scale=x),
        "teacher_scale": lambda x: attention_divergence(**arguments, teacher_scale=x),
        "temperature": lambda x: attention_divergence(**arguments, temperature=x),
        "scale": lambda x: attention_rows(q, k, scale=x),
        "temperature ": lambda x: attention_rows(q, k, temperature=x),
        "temperature  ": lambda x: merge_attention(row, "mean", x),
        "floor": lambda x: resample_attention(row, (3, 3), (2, 2), floor=x),
    }
    for name, use in uses.items():
        with pytest.raises(TypeError, match=f"^{name.strip()}: expected a number, got a tensor that requires grad"):
            use(learnable)
        with pytest.raises(TypeError, match=f"^{name.strip()}: expected a number, got a tensor; take its value"):
            use(learnable.detach())
        with pytest.raises(TypeError, match=f"^{name.strip()}: expected a number, got str 'a'"):
            use("a")
        with pytest.raises(ValueError, match=f"^{name.strip()}: expected a"):
            use(math.nan)
    import numpy

    want = attention_divergence(**arguments, temperature=2.0)
    torch.testing.assert_close(attention_divergence(**arguments, temperature=numpy.float32(2.0)), want)


@pytest.mark.parametrize("name", ["student_query", "student_key", "teacher_query", "teacher_key", "teacher_probs"])
def test_what_is_no_tensor_is_named(name):
    arguments = given("cpu", 2) if name == "teacher_probs" else call("cpu", 2)
    for value in ([1], 1.0, "x"):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor .* got {type(value).__name__}"):
            attention_divergence(**(arguments | {name: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")
def test_bfloat16_in_tritons_own_interpreter_is_refused():
    """It computes garbage in bfloat16, where attnkd.testing.interpreter is not installed. Float32 and float16 are right."""
    code = """
import torch, attnkd
for M in (2, 17):
    t = [torch.randn(1, 2, n, 16) for n in (M, 20, M, 20)]
    for dtype in (torch.float32, torch.float16):
        x = [a.to(dtype) for a in t]
        want = attnkd.attention_divergence(*x, impl="reference")
        torch.testing.assert_close(attnkd.attention_divergence(*x, impl="triton"), want, rtol=1e-3, atol=1e-5)
    half = [a.bfloat16() for a in t]
    for arguments in ({}, {"student_mask": torch.zeros(20).bfloat16()}):
        q = t if arguments else half
        for call in (lambda: attnkd.attention_divergence(*q, **arguments, impl="triton"),
                     lambda: attnkd.relation_row_loss(half[0][0], half[2][0], impl="triton"),
                     lambda: attnkd.attention_rows(*half[:2], impl="triton")):
            try:
                print("NOT REFUSED", call())
            except NotImplementedError as error:
                assert "attnkd.testing.interpreter.install()" in str(error), error
print("done")
"""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stdout + done.stderr
