"""Attention and its divergence in one call: both results and all gradients against the oracle, and the calls it takes."""

import pytest
import torch
from torch.nn import functional as F

from attnkd import AttentionCall, attention_divergence, attention_with_divergence
from attnkd.attention import fused_rows
from attnkd.attention.problem import DIVERGENCES
from attnkd.testing.one_pass import assert_one_pass

IMPLS = ("triton", "chunked", "reference")


def call(device, B=2, H=2, M=18, N=18, D=16, dtype=torch.float32, Dt=24, **extra):
    shapes = {
        "student_query": (B, H, M, D), "student_key": (B, H, N, D), "value": (B, H, N, D),
        "teacher_query": (B, H, M, Dt), "teacher_key": (B, H, N, Dt),
    }  # fmt: skip
    return {n: torch.randn(s).to(device, dtype) for n, s in shapes.items()} | extra


@pytest.mark.parametrize("impl", IMPLS)
def test_output_divergence_and_gradients(device, impl):
    for divergence in DIVERGENCES:
        assert_one_pass(impl, **call(device, divergence=divergence))
    for upstream in (("output",), ("divergence",)):
        assert_one_pass(impl, upstream=upstream, **call(device))
    assert_one_pass(impl, **call(device, dtype=torch.bfloat16, temperature=2.0, student_scale=0.3))
    assert_one_pass(impl, **call(device, merge="logsum"))
    assert_one_pass(
        impl, **call(device, dtype=torch.float16)
    )  # with Triton in one sweep, all others beside the attention


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_and_dead_rows(device, impl):
    student = torch.rand(2, 1, 18, 18, device=device) > 0.3
    teacher = student & (torch.rand(2, 1, 18, 18, device=device) > 0.2)
    student[:, :, 3], student[:, :, 7], teacher[:, :, 5] = False, True, False
    assert_one_pass(impl, **call(device, student_mask=student, teacher_mask=teacher))
    keys = torch.arange(18, device=device) < 11
    assert_one_pass(impl, **call(device, student_mask=keys, teacher_mask=keys, divergence="js"))
    bias = torch.randn(1, 2, 18, 18, device=device)
    hiding = torch.where(torch.rand(2, 1, 1, 18, device=device) > 0.2, 0.0, -torch.inf)
    assert_one_pass(impl, **call(device, student_mask=bias, teacher_mask=hiding))
    assert_one_pass(impl, **call(device, student_mask=hiding.nan_to_num(neginf=0.5), divergence="reverse_kl"))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_in_another_precision(device, impl):
    """PyTorch takes a float32 mask beside float64 queries, and reads it wrong."""
    bias = torch.randn(2, 18, 18).bfloat16().to(device)
    for dtype in (torch.float32, torch.bfloat16, *((torch.float64,) if impl != "triton" else ())):
        given = call(device, dtype=dtype)
        query, key, value = (given[n] for n in ("student_query", "student_key", "value"))
        teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2)
        expected = (0.25 * query.double() @ key.double().mT + bias).softmax(-1) @ value.double()
        close = {"rtol": 0.0, "atol": 0.05 if dtype == torch.bfloat16 else 1e-5}
        for precision in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            mask = bias.to(precision, copy=True).requires_grad_()
            output, loss = attention_with_divergence(query, key, value, teacher, mask=mask, impl=impl)
            torch.testing.assert_close(output.double(), expected, **close)
            (output.sum() + loss).backward()
            assert mask.grad.isfinite().all() and mask.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_results_are_those_of_the_two_calls(device, impl):
    given = call(device)
    query, key, value = (given[n] for n in ("student_query", "student_key", "value"))
    mask = torch.randn(18, 18, device=device)
    tokens = {"num_prefix_tokens": 2, "has_cls": True, "grid": (4, 4)}
    student = AttentionCall(query, key, mask, 0.3, **tokens)
    teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2, **tokens)
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    close = {"rtol": 1e-5, "atol": 1e-6}
    weight = torch.rand(2, 2, 17, device=device)
    for options in (
        {"rows": "cls"},
        {"rows": "cls", "merge": "logsum", "temperature": 10.0, "reduction": "batchmean"},
        {"rows": "all", "reduction": "sum", "row_weight": weight},
        {"rows": "all", "reduction": "none", "divergence": "mse", "temperature": 2.0},
        {"rows": 3, "reduction": "none"},
    ):
        out, loss = attention_with_divergence(student, value=value, teacher=teacher, impl=impl, **options)
        torch.testing.assert_close(out, output, **close)
        torch.testing.assert_close(loss, attention_divergence(student, teacher, impl=impl, **options), **close)
    if impl != "triton":
        probs = torch.rand(2, 2, 18, 18, device=device)
        _, loss = attention_with_divergence(query, key, value, probs, impl=impl)
        torch.testing.assert_close(loss, attention_divergence(query, key, teacher_probs=probs, impl=impl), **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_projections(device, impl):
    """[B, N, 3, H, D], as a linear layer puts it out: the same numbers, and one gradient."""
    given = call(device)
    qkv = torch.stack([given[n].transpose(1, 2) for n in ("student_query", "student_key", "value")], 2)
    leaves = [qkv.clone().requires_grad_(), qkv.clone().requires_grad_()]
    teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2)
    packed = attention_with_divergence(leaves[0], teacher=teacher, impl=impl)
    loose = attention_with_divergence(*leaves[1].permute(2, 0, 3, 1, 4).unbind(0), teacher, impl=impl)
    for results, leaf in ((packed, leaves[0]), (loose, leaves[1])):
        (results[0].square().sum() + 3 * results[1]).backward()
        assert leaf.grad.shape == (2, 18, 3, 2, 16)
    torch.testing.assert_close([*packed, leaves[0].grad], [*loose, leaves[1].grad])


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_compile_fullgraph_and_a_second_derivative(device, impl):
    """Triton in float16 is one sweep; a packed projection stays one tensor."""
    teacher = AttentionCall(*torch.randn(2, 2, 2, 18, 24, device=device).half(), None, 0.2)

    def function(qkv):
        return attention_with_divergence(qkv * 1.0, teacher=teacher, reduction="sum", impl=impl)

    torch._dynamo.reset()
    qkv = torch.randn(2, 18, 3, 2, 16, device=device).half().requires_grad_()
    runs = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)):
        output, loss = run(qkv)
        (grad,) = torch.autograd.grad(output.float().square().sum() + loss, qkv, create_graph=run is function)
        runs.append((output, loss, grad))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="second derivative|derivative .* is not implemented"):
        torch.autograd.grad(runs[0][2].float().square().sum() + qkv.sum(), qkv)


def test_dropout_drops_attention_weights_and_leaves_the_divergence_alone(device):
    given = call(device, N=300)
    student = [given[n] for n in ("student_query", "student_key")]
    teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2)
    ones = torch.ones(2, 2, 300, 1, device=device)
    for impl in ("triton", "chunked", "reference"):
        kept, loss = attention_with_divergence(*student, ones, teacher, dropout_p=0.5, impl=impl)
        assert 0.05 < float((kept - 1).abs().mean()) < 0.5 and abs(float(kept.mean()) - 1) < 0.1
        torch.testing.assert_close(loss, attention_with_divergence(*student, ones, teacher, impl=impl)[1])


def test_messages_name_the_argument(device):
    given = call(device)
    query, key, value = (given[n] for n in ("student_query", "student_key", "value"))
    teacher = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2)
    student = AttentionCall(query, key, None, 0.2)
    wrong = [
        ((query, key, value), {}, TypeError, "teacher: expected an AttentionCall .* got None"),
        ((query, key, value[:, :, 1:], teacher), {}, ValueError, "value: expected .*18, 'Dv'.* got .*17"),
        ((query, key, value.double(), teacher), {}, TypeError, "value: expected torch.float32"),
        ((query, key, None, teacher), {}, TypeError, "value: expected a tensor"),
        ((query, None, None, teacher), {}, ValueError, r"query: expected 5 dimensions \[B, N, 3, H, D\]"),
        ((query[:, :, None, :, :],), {"teacher": teacher}, ValueError, r"query: expected \[B, N, 3, H, D\], packed"),
        ((query, key[..., 1:], value, teacher), {}, ValueError, "key: expected head dim D = 16 like query"),
        ((student, key), {"value": value, "teacher": teacher}, ValueError, "key: expected nothing beside a captured call"),
        ((student,), {"value": value, "teacher": teacher, "impl": "sdpa"}, ValueError, "impl: expected one of"),
        ((query, key, value, teacher), {"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number"),
        ((query, key, value, teacher), {"dropout_p": -0.1}, ValueError, "dropout_p: expected a number from 0 to 1, got -0.1"),
        ((query, key, value, teacher), {"dropout_p": float("nan")}, ValueError, "dropout_p: expected a number from 0 to 1"),
    ]  # fmt: skip
    for arguments, options, error, message in wrong:
        with pytest.raises(error, match=message):
            attention_with_divergence(*arguments, **options)


@pytest.mark.parametrize("alone", [None, "output", "divergence"])
def test_a_class_rows_gradient_is_added_into_the_attentions(device, alone, monkeypatch):
    """One launch in place where the attention's gradients are nobody else's, new tensors elsewhere; both to the reference's numbers."""
    given = call(device)
    tokens = {"num_prefix_tokens": 2, "has_cls": True, "grid": (4, 4)}
    plain = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2, 1, True)
    registers = AttentionCall(given["teacher_query"], given["teacher_key"], None, 0.2, **tokens)
    keys = torch.arange(18, device=device) < 15
    probs = torch.rand(2, 1, 1, 18, device=device)
    new_tensors = fused_rows._beside_gradients
    for target, options in (
        (plain, {}),
        (registers, {"merge": "logsum", "temperature": 10.0, "reduction": "batchmean"}),
        (probs, {"merge": "logsum", "row_weight": torch.rand(2, 1, 1, device=device)}),
        (plain, {"divergence": "js", "mask": keys}),
        (plain, {"shared": True}),
    ):
        shared, mask = options.pop("shared", False), options.pop("mask", None)
        calls = []
        monkeypatch.setattr(fused_rows, "_beside_gradients", lambda *a, to=calls: to.append(a) or new_tensors(*a))
        grads = []
        for impl in ("triton", "reference"):
            leaves = [given[n].clone().requires_grad_() for n in ("student_query", "student_key", "value")]
            query, key, value = (leaf * 1.0 for leaf in leaves)
            prefix = tokens if target is registers else {"num_prefix_tokens": 1, "has_cls": True}
            student = AttentionCall(query, key, mask, 0.3, **prefix)
            output, loss = attention_with_divergence(
                student, value=value, teacher=target, rows="cls", impl=impl, **options
            )
            kept = [output.sin().sum() if alone != "divergence" else 0, 3 * loss if alone != "output" else 0]
            held = []
            if shared:  # somebody keeps the gradients that the attention sends: they must not change afterwards
                output.grad_fn.register_hook(
                    lambda inputs, _, held=held: held.extend(x for x in inputs if x is not None)
                )
            found = torch.autograd.grad(sum(kept), leaves, allow_unused=True)
            grads.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        assert bool(calls) == (alone == "divergence" or (shared and alone is None)), options
