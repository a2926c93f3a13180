"""The row kernels against the float64 oracle: outputs and every gradient.

One head of 64 dims and 197 keys is handled whole, one row of 300 keys or of wide heads in splits, several as finished rows; see
kernels/attnkd_kernels/row/kl.py.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnkd import attention_divergence, attention_rows
from attnkd.testing.proof import assert_proved, prove
from attnkd_kernels.row.kl import row_kl_fwd

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(device, B=2, H=3, M=1, N=33, D=16, dtype=torch.float32, H_t=None, D_t=None, std=1.0, **extra):
    H_t, D_t = H_t or H, D_t or D
    shapes = {
        "student_query": (B, H, M, D), "student_key": (B, H, N, D),
        "teacher_query": (B, H_t, M, D_t), "teacher_key": (B, H_t, N, D_t),
    }  # fmt: skip
    return {n: (torch.randn(s) * std).to(device, dtype) for n, s in shapes.items()} | extra


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_head(device, divergence, dtype):
    for N in (33, 1100):  # whole, and split (or, where no single sweep exists, finished rows)
        assert_proved("triton", **call(device, N=N, H=2, D_t=24, dtype=dtype, divergence=divergence, temperature=1.7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", ["logsum", "mean", "max", "min"])
def test_merged_heads(device, merge, dtype):
    """Teacher and student differ in heads and head dims; 48·3 = 144 dims make a wide head that needs splits at 170 keys."""
    for divergence, N in (("forward_kl", 33), ("forward_kl", 170), ("js", 170), ("mse", 33)):
        arguments = call(device, N=N, D=48, H_t=4, D_t=16, dtype=dtype)
        assert_proved("triton", **arguments, merge=merge, divergence=divergence, temperature=1.7)


@pytest.mark.parametrize("merge", [None, "logsum", "mean", "max", "min"])
def test_masks_biases_and_dead_rows(device, merge):
    for N, M in ((21, 2), (1100, 1), *([(1100, 2)] if merge in (None, "logsum") else [])):
        arguments = call(device, N=N, M=M, H=2)
        visible = torch.rand(2, 1, M, N, device=device) > 0.3
        visible[0, :, -1] = False
        assert_proved("triton", **arguments, merge=merge, student_mask=visible, teacher_mask=visible)
        learned = torch.randn(2, 1, N, device=device)  # [H, 1, N], a relative position bias
        hiding = torch.where(visible, 0.0, -torch.inf)
        assert_proved("triton", **arguments, merge=merge, student_mask=learned, temperature=3.0)
        assert_proved("triton", **arguments, merge=merge, student_mask=learned + hiding, teacher_mask=hiding)
        hiding = hiding.repeat(1, 2, 1, 1)  # heads that see different keys; one of them nothing at all
        hiding[:, 0, :, 2], hiding[1, 1, :, 4], hiding[1, 0, -1] = -torch.inf, -torch.inf, -torch.inf
        assert_proved("triton", **arguments, merge=merge, student_mask=learned + hiding, teacher_mask=hiding)


@pytest.mark.parametrize("merge", ["logsum", "mean", "max", "min"])
def test_biases_of_models_with_different_heads(device, merge):
    for H, H_t, N in ((1, 4, 33), (3, 2, 170)):
        biases = {"student_mask": torch.randn(H, 1, N), "teacher_mask": torch.randn(2, H_t, 1, N)}
        biases = {name: bias.to(device) for name, bias in biases.items()}
        assert_proved("triton", **call(device, N=N, H=H, H_t=H_t), **biases, merge=merge, temperature=1.7)


@pytest.mark.parametrize("merge", [None, "logsum", "max"])
def test_given_target_rows(device, merge):
    for N in (33, 1100):
        arguments = call(device, N=N, H=2)
        del arguments["teacher_query"], arguments["teacher_key"]
        probs = (3 * torch.randn(N, 2, 2 if merge is None else 1, 1, device=device)).softmax(0).permute(1, 2, 3, 0)
        probs[..., 5] = 0.0
        assert_proved("triton", **arguments, teacher_probs=probs, merge=merge)
        assert_proved("triton", **arguments, teacher_probs=probs.bfloat16(), merge=merge, divergence="js")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_subnormal_target_rows(device, divergence):
    """Probabilities below 1.2e-38, which a softmax does return: they are no zeros, which would be hidden keys."""
    for N in (33, 1100):
        arguments = call(device, N=N, divergence=divergence)
        del arguments["teacher_query"], arguments["teacher_key"]
        probs = torch.rand(2, arguments["student_query"].shape[1], 1, N, device=device)
        probs[..., 3:9] = torch.tensor([1.5e-45, 1e-44, 1e-42, 3e-40, 1.1e-38, 1.2e-38], device=device)
        for merge in (None, "mean"):
            rows = probs if merge is None else probs[:, :1]
            assert_proved("triton", **arguments, teacher_probs=rows, merge=merge)


def test_strides(device):
    """Views of a packed qkv projection, a transposed layout, expanded batches, a sliced head dim: no copy, same values."""
    B, H, N, D = 2, 3, 40, 16
    qkv = torch.randn(B, N, 3, H, D, device=device)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    layouts = {
        "packed qkv": (q[:, :, :1], k),
        "head dim first": (torch.randn(B, H, D, 1, device=device).mT, torch.randn(B, H, D, N, device=device).mT),
        "expanded batch": (q[:1, :, :1].expand(B, -1, -1, -1), k[:1].expand(B, -1, -1, -1)),
        "every second dim": (torch.randn(B, H, 1, 2 * D, device=device)[..., ::2], torch.randn(B, H, N, 2 * D, device=device)[..., ::2]),
    }  # fmt: skip
    for merge in (None, "logsum", "mean"):
        for student, teacher in (
            ("packed qkv", "head dim first"),
            ("expanded batch", "every second dim"),
            ("head dim first", "packed qkv"),
        ):
            (qs, ks), (qt, kt) = layouts[student], layouts[teacher]
            assert_proved("triton", student_query=qs, student_key=ks, teacher_query=qt, teacher_key=kt, merge=merge)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "mse"])
def test_extremes(device, divergence):
    """Logits of ±1e4, a teacher next to its student, one key, and a student that gives its whole weight elsewhere."""
    for N in (33, 1100):
        arguments = call(device, N=N, H=1, divergence=divergence)
        arguments["student_query"] *= 1e4
        arguments["teacher_query"] *= 1e4
        loss = prove("triton", **arguments)[0]
        assert loss.ok, loss
        near = call(device, N=N, H=1, divergence=divergence)
        near["teacher_query"] = near["student_query"] + 1e-2 * torch.randn_like(near["student_query"])
        near["teacher_key"] = near["student_key"].clone()
        assert_proved("triton", **near)
    one = call(device, N=1)
    assert attention_divergence(**one, impl="triton") == 0


def test_impossible_and_nan_are_never_hidden(device):
    for N in (33, 1100):
        for merge in (None, "logsum", "mean"):
            arguments = call(device, N=N, H=2, merge=merge, reduction="none", impl="triton")
            student = torch.zeros(N, device=device)
            student[3] = -torch.inf
            assert attention_divergence(**arguments, student_mask=student).isinf().all()
            for name in ("teacher_query", "teacher_key", "student_query", "student_key"):
                broken = arguments | {name: arguments[name].clone()}
                broken[name][0, 0, 0] = torch.nan
                loss = attention_divergence(**broken)
                assert loss[0, 0].isnan().all() and loss[1].isfinite().all(), (name, N, merge)
    for divergence in DIVERGENCES:
        arguments = call(device, H=1, divergence=divergence, reduction="none", impl="triton")
        arguments["student_query"][0] = torch.nan
        loss = attention_divergence(**arguments)
        assert loss[0].isnan().all() and loss[1].isfinite().all(), divergence


def test_several_rows_in_splits(device):
    """Of more keys than finished rows take in registers, several rows are split too: each as if it were alone."""
    given = call(device, H=2, M=3, N=1100)
    names = "student_query", "student_key", "teacher_query", "teacher_key"

    def split(rows):
        q_s, k_s, q_t, k_t = (given[n][:, :, rows] if "query" in n else given[n] for n in names)
        return row_kl_fwd(q_s, k_s, None, q_t, k_t, None, None, 0.3, 0.2, 1.5, False, "forward_kl", True)

    for whole, *alone in zip(split(slice(3)), *(split(slice(m, m + 1)) for m in range(3)), strict=True):
        torch.testing.assert_close(whole, torch.cat(alone, 2), rtol=1e-5, atol=1e-7)


def test_infinite_upstream_and_unused_gradients(device):
    """A stride-0 upstream gradient (loss.sum()), and gradients asked for one input only."""
    arguments = call(device, N=40, M=2)
    for names in (("student_query",), ("student_key",), ("student_query", "student_key")):
        leaves = {n: arguments[n].clone().requires_grad_() for n in names}
        grads = []
        for impl in ("triton", "reference"):
            loss = attention_divergence(**(arguments | leaves), reduction="none", impl=impl).sum()
            grads.append(torch.autograd.grad(loss, list(leaves.values())))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not attention_divergence(**arguments, impl="triton").requires_grad


def test_deterministic(device):
    """Bitwise equal twice: no atomics anywhere."""
    for merge, N in ((None, 33), (None, 1100), ("logsum", 170), ("mean", 33)):
        arguments = call(device, N=N, dtype=torch.bfloat16)
        runs = []
        for _ in range(2):
            q, k = (arguments[n].clone().requires_grad_() for n in ("student_query", "student_key"))
            loss = attention_divergence(
                **(arguments | {"student_query": q, "student_key": k}), merge=merge, impl="triton"
            )
            runs.append((loss.detach(), *torch.autograd.grad(loss, (q, k))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("merge", [None, "logsum", "mean", "max", "min"])
def test_attention_rows(device, merge):
    """The rows and their gradients, against the chunked implementation's autograd in float64."""
    q, k = torch.randn(2, 3, 2, 48, device=device), torch.randn(2, 3, 50, 48, device=device)
    mask = torch.randn(3, 1, 50, device=device)
    mask[..., 7] = -torch.inf
    got_leaves = [x.clone().requires_grad_() for x in (q, k, mask)]
    want_leaves = [x.double().requires_grad_() for x in (q, k, mask)]
    got = attention_rows(*got_leaves[:2], mask=got_leaves[2], merge=merge, temperature=1.7, impl="triton")
    want = attention_rows(*want_leaves[:2], mask=want_leaves[2], merge=merge, temperature=1.7, impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(got, got_leaves, upstream.float()), torch.autograd.grad(want, want_leaves, upstream)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    B=st.integers(1, 2), H=st.integers(1, 3), M=st.integers(1, 3), N=st.integers(1, 90), D=st.sampled_from([1, 7, 16, 40, 72, 88]),
    H_t=st.integers(1, 3), D_t=st.sampled_from([5, 16, 64]), merge=st.sampled_from([None, "logsum", "mean", "max", "min"]),
    divergence=st.sampled_from(DIVERGENCES[:-1]), temperature=st.floats(0.3, 10), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(device, B, H, M, N, D, H_t, D_t, merge, divergence, temperature, seed):
    torch.manual_seed(seed)
    arguments = call(device, B, H, M, N, D, H_t=H if merge is None else H_t, D_t=D_t)
    arguments |= {"merge": merge, "divergence": divergence, "temperature": temperature}
    # Tiny gradients at a max/min switch or of near-equal rows may lose digits that eager keeps by luck: judge them in float32.
    assert_proved("triton", **arguments, seed=seed)
