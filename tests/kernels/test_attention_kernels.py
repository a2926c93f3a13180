"""Attention with its divergence against the float64 oracle: both results and every gradient, and what the kernels promise besides.

In the interpreter a tile is 64 queries × 32 keys (16 where keys may be hidden): the shapes here cross every boundary in few steps.
"""

import pytest
import torch

from attnkd import AttentionCall, attention_with_divergence
from attnkd.attention import fused_attention
from attnkd.attention.problem import DIVERGENCES, make_problem
from attnkd.testing.guard import canaries, guarded, lay_out
from attnkd.testing.one_pass import assert_one_pass


@pytest.fixture(autouse=True)
def _float32_and_nothing_beside(monkeypatch):
    """float32, whose errors show more, and all masks; no case may reach PyTorch's attention by mistake."""
    monkeypatch.setattr(fused_attention, "MASKS", ("none", "bool", "bool row", "float", "float row"))
    monkeypatch.setattr(fused_attention, "DTYPES", (*fused_attention.DTYPES, torch.float32))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: pytest.fail("beside")
    )


def call(device, B=1, H=2, M=66, N=35, D=16, dtype=torch.float32, Dt=24, V=16, **extra):
    shapes = {
        "student_query": (B, H, M, D), "student_key": (B, H, N, D), "value": (B, H, N, V),
        "teacher_query": (B, H, M, Dt), "teacher_key": (B, H, N, Dt),
    }  # fmt: skip
    return {n: torch.randn(s).to(device, dtype) for n, s in shapes.items()} | extra


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_mask(device, divergence):
    assert_one_pass("triton", **call(device, divergence=divergence, student_scale=0.3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_and_dead_rows(device, divergence):
    """Different boolean masks on both sides, rows dead on one side or both, keys that only the teacher or only the student sees."""
    student = torch.rand(1, 1, 66, 35, device=device) > 0.3
    teacher = student & (torch.rand(1, 1, 66, 35, device=device) > 0.2)
    student[:, :, 3], teacher[:, :, 3] = False, False
    student[:, :, 5], teacher[:, :, 5] = False, True
    student[:, :, 7], teacher[:, :, 7] = True, False
    student[:, :, 9, :20], teacher[:, :, 9] = False, True  # no key in the first tile
    assert_one_pass("triton", **call(device, H=1, divergence=divergence, student_mask=student, teacher_mask=teacher))


def test_masks_of_keys_and_additive_masks(device):
    keys = ((torch.arange(35) > 3) & (torch.arange(35) < 22)).to(device)
    assert_one_pass("triton", **call(device, H=1, student_mask=keys, teacher_mask=keys))
    padded = torch.arange(35, device=device) < torch.tensor([35, 20], device=device).view(2, 1, 1, 1)
    small = call(device, B=2, H=1, M=20, V=24, student_mask=padded, divergence="reverse_kl")
    assert_one_pass("triton", **small, teacher_mask=padded)
    bias = torch.randn(1, 2, 66, 35, device=device)
    hiding = torch.where(torch.rand(1, 1, 1, 35, device=device) > 0.2, 0.0, -torch.inf)
    for student, teacher in ((bias, hiding), (hiding, hiding + bias[:, :1])):
        given = call(device, student_mask=student, teacher_mask=teacher)
        query, key, value, *other = (
            given[n] for n in ("student_query", "student_key", "value", "teacher_query", "teacher_key")
        )
        problem = make_problem(query, key, *other, None, None, None, student, teacher, None, "forward_kl", 1.0)
        assert fused_attention.why_not(problem, value) is None
        student.requires_grad_()
        learned = make_problem(query, key, *other, None, None, None, student, teacher, None, "forward_kl", 1.0)
        assert fused_attention.why_not(learned, value) == "the mask requires grad"
        student = student.detach()
        assert_fixed_mask(device, given)


def assert_fixed_mask(device, given):
    """An additive mask that is not learned; its gradient is not asked for."""
    leaves = [given[n].requires_grad_() for n in ("student_query", "student_key", "value")]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = given["student_mask"].detach()
    teacher = AttentionCall(given["teacher_query"], given["teacher_key"], given["teacher_mask"], 24**-0.5)
    upstream = torch.randn(leaves[0].shape[:3] + (16,), device=device), torch.randn(leaves[0].shape[:3], device=device)
    found = attention_with_divergence(*leaves, teacher, mask=mask, reduction="none", impl="triton")
    wide = teacher._replace(query=teacher.query.double(), key=teacher.key.double())
    truth = attention_with_divergence(*exact, wide, mask=mask, reduction="none", impl="reference")
    finite = truth[1].isfinite()
    assert torch.equal(finite, found[1].isfinite())
    upstream = upstream[0], torch.where(finite, upstream[1], 0.0)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][finite].double(), truth[1][finite], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, leaves, upstream)
    for grad, right in zip(grads, torch.autograd.grad(truth, exact, [u.double() for u in upstream]), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-4)


def test_heads_of_two_tiles(device):
    """Of more than 64 channels: queries and keys, the teacher's, the values, each or all of them; up to the last that fit."""
    for divergence, widths in (
        ("forward_kl", {"D": 72, "Dt": 96, "V": 80}),
        ("reverse_kl", {"D": 16, "Dt": 80, "V": 16}),
        ("mse", {"D": 96, "Dt": 64, "V": 24}),
        ("logit_mse", {"D": 40, "Dt": 40, "V": 96}),
    ):
        assert_one_pass("triton", **call(device, H=1, M=33, divergence=divergence, **widths))
    visible = torch.rand(1, 1, 33, 35, device=device) > 0.3
    visible[:, :, 3] = False
    masks = {"student_mask": visible, "teacher_mask": visible | (torch.rand_like(visible, dtype=torch.float32) > 0.9)}
    assert_one_pass("triton", **call(device, H=1, M=33, D=80, Dt=88, V=80, dtype=torch.bfloat16), **masks)
    assert_one_pass("triton", **call(device, H=1, M=33, D=80, Dt=88, V=80, divergence="js"), **masks)
    given = call(device, D=97)
    names = "student_query", "student_key", "teacher_query", "teacher_key"
    problem = make_problem(*(given[n] for n in names), None, None, None, None, None, None, "forward_kl", 1.0)
    assert fused_attention.why_not(problem, given["value"]) == "a head has more than 96 channels"


def test_half_precision_and_large_logits(device):
    assert_one_pass("triton", **call(device, H=1, dtype=torch.bfloat16, D=64, Dt=48, V=64))
    assert_one_pass("triton", **call(device, H=1, M=20, dtype=torch.float16, divergence="js"))
    assert_one_pass("triton", **call(device, H=1, M=20, N=4100, dtype=torch.bfloat16))  # many keys
    assert_one_pass("triton", **call(device, H=1, M=4100, N=20, dtype=torch.bfloat16, divergence="mse"))  # many queries
    loud = call(device, H=1, M=20)
    loud["student_query"] *= 100  # logits of ±1000: the largest so far rises by hundreds
    loud["teacher_query"] = loud["student_query"][..., :1].expand(-1, -1, -1, 24) * 0.1
    assert_one_pass("triton", **loud)


def test_each_result_alone_and_a_divergence_of_weight_0(device):
    """With no gradient from the divergence the gradients have the same bits as those of the same kernels without one."""
    given = call(device, M=35)
    for upstream in (("output",), ("divergence",)):
        assert_one_pass("triton", upstream=upstream, **given)
    names = ("student_query", "student_key", "value")
    leaves = [given[n].requires_grad_() for n in names]
    other = given["teacher_query"], given["teacher_key"]
    grad = torch.randn(1, 2, 35, 16, device=device)
    for divergence in ("forward_kl", "mse"):
        problem = make_problem(*leaves[:2], *other, None, None, None, None, None, None, divergence, 1.0)
        output, rows = fused_attention.attend(leaves, problem)
        with_zero = torch.autograd.grad([output, rows], leaves, [grad, torch.zeros_like(rows)], retain_graph=True)
        without = torch.autograd.grad(output, leaves, grad)
        alone, _ = fused_attention.attend(leaves, problem._replace(divergence="none"))
        plain = torch.autograd.grad(alone, leaves, grad)
        if divergence == "forward_kl":  # mse takes its normalisers from another sweep
            assert all(torch.equal(a, b) for a, b in zip([alone, *plain], [output, *with_zero], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(with_zero, without, strict=True))


def test_packed_gradients_land_in_place_and_results_are_reproducible(device):
    """One gradient [B, N, 3, H, D], of one launch each for dq and for dk and dv; nothing beside the results is written."""
    for channels in (16, 80):
        packed_in_place(device, channels)


def packed_in_place(device, channels):
    qkv = guarded(torch.randn(1, 35, 3, 2, channels, device=device)).requires_grad_()
    teacher = AttentionCall(
        *(lay_out(torch.randn(1, 2, 35, channels, device=device), "guarded") for _ in range(2)), None, 0.25
    )
    upstream = lay_out(torch.randn(1, 2, 35, channels, device=device), "transposed")
    runs = []
    for _ in range(2):
        with canaries() as allocated:
            output, loss = attention_with_divergence(qkv, teacher=teacher, impl="triton")
            (grad,) = torch.autograd.grad([output, loss], qkv, [upstream, torch.ones_like(loss)])
        assert any(x.data_ptr() == grad.data_ptr() for x in allocated)
        assert output.transpose(1, 2).is_contiguous()  # what the projection after it reads
        runs.append((output.detach(), loss.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    loose = [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    again = attention_with_divergence(*loose, teacher, impl="triton")
    grads = torch.autograd.grad(again, loose, [upstream, torch.ones_like(loss)])
    assert torch.equal(torch.stack([g.transpose(1, 2) for g in grads], 2), runs[0][2])


def test_empty_batches(device):
    qkv = torch.randn(0, 35, 3, 2, 16, device=device, requires_grad=True)
    teacher = AttentionCall(
        torch.randn(0, 2, 35, 16, device=device), torch.randn(0, 2, 35, 16, device=device), None, 0.25
    )
    output, loss = attention_with_divergence(qkv, teacher=teacher, reduction="none", impl="triton")
    assert output.shape == (0, 2, 35, 16) and loss.shape == (0, 2, 35)
    assert torch.autograd.grad(output.sum() + loss.sum(), qkv)[0].shape == qkv.shape


def test_opcheck(device):
    query, key, value = (torch.randn(1, 2, 35, 16, device=device) for _ in range(3))
    inputs = (query, key, value, None, 0.25, key, value, None, 0.25, "mse")
    torch.library.opcheck(fused_attention._fwd, (*inputs, None))
    out, _, *saved = fused_attention._fwd(*inputs, None)
    torch.library.opcheck(
        fused_attention._bwd, (torch.randn_like(out), torch.randn(1, 2, 35, device=device), *inputs, out, *saved)
    )
