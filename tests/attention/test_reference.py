"""The reference against textbook formulas on materialised maps, and its gradients by finite differences."""

import pytest
import torch
from torch.nn import functional as F

from attnkd import attention_divergence, attention_rows, merge_attention

B, H, M, N, D = 2, 3, 4, 7, 5


@pytest.fixture
def sides():
    qs, ks = torch.randn(B, H, M, D).double(), torch.randn(B, H, N, D).double()
    qt, kt = torch.randn(B, H, M, D + 2).double(), torch.randn(B, H, N, D + 2).double()
    return qs, ks, qt, kt


def maps(q, k, scale=None, temperature=1.0):
    return ((q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale) / temperature).softmax(-1)


def reference(*args, **kwargs):
    return attention_divergence(*args, reduction="none", impl="reference", **kwargs)


TEXTBOOK = {
    "forward_kl": lambda s, t: F.kl_div(s.log(), t, reduction="none").sum(-1),
    "reverse_kl": lambda s, t: F.kl_div(t.log(), s, reduction="none").sum(-1),
    "js": lambda s, t: 0.5 * sum(F.kl_div((0.5 * (s + t)).log(), x, reduction="none").sum(-1) for x in (s, t)),
    "cross_entropy": lambda s, t: -(t * s.log()).sum(-1),
    "mse": lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1),
}


@pytest.mark.parametrize("divergence", TEXTBOOK)
def test_divergences_are_the_textbook_ones(sides, divergence):
    qs, ks, qt, kt = sides
    got = reference(qs, ks, qt, kt, divergence=divergence, temperature=1.7, student_scale=0.3)
    want = TEXTBOOK[divergence](maps(qs, ks, 0.3, 1.7), maps(qt, kt, None, 1.7))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_logit_mse_compares_scores_before_the_softmax(sides):
    qs, ks, qt, kt = sides
    got = reference(qs, ks, qt, kt, divergence="logit_mse", temperature=2.0)
    want = ((qs @ ks.mT) * D**-0.5 / 2 - (qt @ kt.mT) * (D + 2) ** -0.5 / 2).square().mean(-1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("merge", ["logsum", "mean", "max", "min"])
def test_merges_are_the_papers(sides, merge):
    """AttnDistill, Sec. 3.3 and 4.3, on each head's materialised map; teacher and student differ in heads."""
    qs, ks, qt, kt = sides
    qt, kt = torch.cat([qt, qt[:, :1] + 1], 1), torch.cat([kt, kt[:, :1] * 2], 1)

    def merged(p, temperature):
        if merge == "logsum":  # softmax((1/T) Σ_h log p^h)
            return (p.log().sum(1, keepdim=True) / temperature).softmax(-1)
        a = {"mean": p.mean(1, keepdim=True), "max": p.amax(1, keepdim=True), "min": p.amin(1, keepdim=True)}[merge]
        return a / a.sum(-1, keepdim=True)

    temperature = 10.0 if merge == "logsum" else 1.0
    s, t = merged(maps(qs, ks), temperature), merged(maps(qt, kt), temperature)
    got = reference(qs, ks, qt, kt, merge=merge, temperature=temperature)
    torch.testing.assert_close(got, TEXTBOOK["forward_kl"](s, t))
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(attention_rows(qs, ks, merge=merge, temperature=temperature, impl=impl), s)
    torch.testing.assert_close(merge_attention(maps(qs, ks), merge, temperature), s)


@pytest.mark.parametrize("merge", ["logsum", "mean", "max", "min"])
def test_merging_heads_that_see_different_keys(sides, device, merge):
    """A key that one head's additive mask hides has probability 0 in that head, and the merge goes on from there."""
    qs, ks, _, _ = sides
    mask = torch.randn(H, M, N, dtype=qs.dtype)
    mask[0, :, 1], mask[1:, :, 2], mask[:, :, 3] = -torch.inf, -torch.inf, -torch.inf
    p = (qs @ ks.mT * D**-0.5 + mask).softmax(-1)
    a = {"logsum": torch.Tensor.prod, "mean": torch.Tensor.mean, "max": torch.Tensor.amax, "min": torch.Tensor.amin}
    want = a[merge](p, 1, keepdim=True)
    want = want / want.sum(-1, keepdim=True)
    want[:, :, 1], mask[0, 1] = 0.0, -torch.inf  # a row that one head cannot see at all
    merged = {"merge": merge, "mask": mask}
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(attention_rows(qs, ks, **merged, impl=impl), want)
    on_device = attention_rows(
        qs.float().to(device), ks.float().to(device), merge=merge, mask=mask.to(device), impl="triton"
    )
    torch.testing.assert_close(on_device.cpu().double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merge_attention(attention_rows(qs, ks, mask=mask), merge), want)


def test_logsum_merging_is_one_wide_head(sides):
    """Every head's normaliser is constant in j, so the merged row is the softmax of the concatenated heads' scores."""
    qs, ks, _, _ = sides
    wide_q, wide_k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (qs, ks))
    wide = maps(wide_q, wide_k, D**-0.5, 10.0)
    torch.testing.assert_close(attention_rows(qs, ks, merge="logsum", temperature=10.0, impl="reference"), wide)


def test_boolean_mask_equals_leaving_keys_out(sides):
    qs, ks, qt, kt = sides
    mask = torch.ones(N, dtype=torch.bool)
    mask[2] = mask[5] = False
    want = reference(qs, ks[:, :, mask], qt, kt[:, :, mask])
    for hidden in (mask, torch.where(mask, 0.0, -torch.inf), torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        torch.testing.assert_close(reference(qs, ks, qt, kt, student_mask=hidden, teacher_mask=hidden), want)


def test_additive_mask_is_a_bias_that_temperature_divides(sides):
    qs, ks, qt, kt = sides
    bias = torch.randn(H, 1, N).double()
    got = reference(qs, ks, qt, kt, student_mask=bias, temperature=3.0)
    s = ((qs @ ks.mT * D**-0.5 + bias) / 3.0).softmax(-1)
    torch.testing.assert_close(got, TEXTBOOK["forward_kl"](s, maps(qt, kt, None, 3.0)))


def test_rows_that_see_no_key_leave_the_loss_and_the_mean(sides):
    qs, ks, qt, kt = sides
    mask = torch.ones(B, 1, M, N, dtype=torch.bool)
    mask[0, :, 1] = False
    kwargs = {"student_mask": mask, "teacher_mask": mask, "impl": "reference"}
    rows = attention_divergence(qs, ks, qt, kt, reduction="none", **kwargs)
    assert (rows[0, :, 1] == 0).all() and (rows[1] > 0).all()
    torch.testing.assert_close(attention_divergence(qs, ks, qt, kt, **kwargs), rows.sum() / (rows.numel() - H))


def test_a_key_hidden_from_the_student_alone_is_infinite(sides):
    qs, ks, qt, kt = sides
    mask = torch.ones(N, dtype=torch.bool)
    mask[3] = False
    assert reference(qs, ks, qt, kt, student_mask=mask).isinf().all()
    assert reference(qs, ks, qt, kt, teacher_mask=mask).isfinite().all()


def test_teacher_probs_replace_teacher_query_and_key(sides):
    qs, ks, qt, kt = sides
    want = reference(qs, ks, qt, kt)
    torch.testing.assert_close(reference(qs, ks, teacher_probs=maps(qt, kt)), want)
    torch.testing.assert_close(reference(qs, ks, teacher_probs=3 * maps(qt, kt)), want)  # normalised inside


def test_reductions_and_row_weight(sides):
    rows = reference(*sides)
    for impl in ("reference", "chunked"):
        loss = {r: attention_divergence(*sides, reduction=r, impl=impl) for r in ("sum", "mean", "batchmean")}
        torch.testing.assert_close(loss["sum"], rows.sum())
        torch.testing.assert_close(loss["mean"], rows.mean())
        torch.testing.assert_close(loss["batchmean"], rows.sum() / B)
        weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
        got = attention_divergence(*sides, row_weight=weight, impl=impl)
        torch.testing.assert_close(got, (rows * weight).sum() / (weight.sum() * B * H))


PAIRS = [(m, d) for m in (None, "logsum", "mean", "max", "min") for d in TEXTBOOK] + [
    (None, "logit_mse"),
    ("logsum", "logit_mse"),
]


@pytest.mark.parametrize(("merge", "divergence"), PAIRS)
def test_gradients_by_finite_differences(merge, divergence):
    qs, ks = torch.randn(1, 2, 2, 3).double().requires_grad_(), torch.randn(1, 2, 4, 3).double().requires_grad_()
    qt, kt = torch.randn(1, 2, 2, 3).double(), torch.randn(1, 2, 4, 3).double()
    bias = torch.randn(2, 1, 4).double().requires_grad_()

    def loss(qs, ks, bias):
        return reference(qs, ks, qt, kt, student_mask=bias, merge=merge, divergence=divergence, temperature=1.3)

    assert torch.autograd.gradcheck(loss, (qs, ks, bias))


def test_the_teacher_gets_no_gradient(sides):
    qs, ks, qt, kt = (x.requires_grad_() for x in sides)
    attention_divergence(qs, ks, qt, kt, impl="reference").backward()
    assert qs.grad is not None and ks.grad is not None
    assert qt.grad is None and kt.grad is None
