"""Normalisers that are given: the same answers as without, and an error by name where they are not those of the logits."""

import pytest
import torch
from torch.nn import functional as F

from attnkd import AttentionCall, AttentionTap, attention_divergence, attention_with_divergence
from attnkd.attention import checks, reference
from attnkd.attention.call import class_row, shared_tokens, take_heads
from attnkd.attention.problem import DIVERGENCES, make_problem
from attnkd.capture.sdpa import attention_and_lse

IMPLS = ("triton", "chunked", "reference")


def example(device, M=37, N=41, std=1.0, offset=0.0):
    """A student and a teacher of two heads, a boolean mask that hides all keys from one row, and both LSEs."""
    given = {}
    mask = torch.rand(2, 1, M, N, device=device) > 0.2
    mask[0, 0, 3] = False
    for side, dim in (("student", 16), ("teacher", 24)):
        query, key = torch.randn(2, 2, M, dim, device=device) * std, torch.randn(2, 2, N, dim, device=device)
        query[..., 0], key[..., 0] = 1.0, offset * dim**0.5  # added to every logit
        z = (query.double() @ key.double().mT * dim**-0.5).masked_fill(~mask, -torch.inf)
        names = ("query", "key", "mask", "lse")
        given |= {f"{side}_{n}": x for n, x in zip(names, (query, key, mask, z.logsumexp(-1).float()), strict=True)}
    return given


def value_and_grads(impl, given, **options):
    leaves = [given["student_query"].clone().requires_grad_(), given["student_key"].clone().requires_grad_()]
    given = given | dict(zip(("student_query", "student_key"), leaves, strict=True))
    loss = attention_divergence(**given, **options, impl=impl, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def without(given, *names):
    return {name: x for name, x in given.items() if name not in names}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_answers(device, impl, divergence):
    given = example(device)
    oracle = value_and_grads("reference", without(given, "student_lse", "teacher_lse"), divergence=divergence)
    for unknown in ((), ("student_lse",), ("teacher_lse",)):
        known = without(given, *unknown)
        known["student_query"] = known["student_query"].mT.contiguous().mT  # other strides
        if "student_lse" in known:
            known["student_lse"] = known["student_lse"].mT.contiguous().mT
        found = value_and_grads(impl, known, divergence=divergence)
        for actual, expected in zip(found, oracle, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
        for actual, again in zip(found, value_and_grads(impl, known, divergence=divergence), strict=True):
            assert torch.equal(actual, again)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("std, offset", [(100.0, 0.0), (1.0, 1e4)])
def test_the_rounding_of_a_large_lse_does_not_reach_the_value(device, impl, std, offset):
    """At 1e4 a float32 LSE is off by up to 5e-4, and so would be the loss without the sums of its own probabilities."""
    given = without(example(device, std=std, offset=offset), "student_mask", "teacher_mask")
    for side in ("student", "teacher"):
        z = given[f"{side}_query"].double() @ given[f"{side}_key"].double().mT * given[f"{side}_query"].shape[3] ** -0.5
        given[f"{side}_lse"] = z.logsumexp(-1).float()
    plain = without(given, "student_lse", "teacher_lse")
    exact = attention_divergence(**plain, impl="reference", reduction="none")
    known, unknown = (attention_divergence(**g, impl=impl, reduction="none") for g in (given, plain))
    bound = (unknown - exact).abs().max().item() + 1e-4 * exact.abs().max().item() ** 0.5 + 2e-3 * (offset > 0)
    assert (known - exact).abs().max().item() <= bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_wrong_lse_is_an_error_by_name(device, impl, side, masked):
    given = example(device)
    if not masked:
        given = without(given, "student_mask", "teacher_mask", "student_lse", "teacher_lse")
        z = given[f"{side}_query"] @ given[f"{side}_key"].mT * given[f"{side}_query"].shape[3] ** -0.5
        given[f"{side}_lse"] = z.logsumexp(-1)
    right = given[f"{side}_lse"]
    attention_divergence(**given, impl=impl)
    off = right.clone()
    off[1, 1, -1] += 2.1 * checks.LSE_ERROR  # one row of all
    dead = right.clone()
    dead[1, 0, 0] = -torch.inf
    for wrong in (
        off,
        dead,
        right * 1.442695,
        torch.full_like(right, 1e6),
        torch.full_like(right, -1e6),
        right + torch.inf,
    ):
        with pytest.raises(Exception, match=f"{side}_lse: expected"):
            attention_divergence(**given | {f"{side}_lse": wrong}, impl=impl)


def test_tolerances_are_the_same_in_kernels():
    language = pytest.importorskip("attnkd_kernels.language")
    assert (
        language.LSE_ERROR.value == checks.LSE_ERROR and language.LSE_RELATIVE_ERROR.value == checks.LSE_RELATIVE_ERROR
    )


@pytest.mark.parametrize("options", [{"merge": "mean"}, {"temperature": 2.0}, {"divergence": "logit_mse"}])
def test_where_it_is_of_no_use_it_is_not_used(device, options):
    given = without(example(device), "student_mask", "teacher_mask")
    plain = without(given, "student_lse", "teacher_lse")
    for a, b in zip(
        value_and_grads("chunked", given, **options), value_and_grads("chunked", plain, **options), strict=True
    ):
        assert torch.equal(a, b)


def test_shapes_and_types_are_checked(device):
    given = example(device)
    lse = given["student_lse"]
    for wrong, error, message in (
        (
            lse[:, :1],
            ValueError,
            r"student_lse: expected \[B, H, M\] = \(2, 2, 37\) like student_query, got \(2, 1, 37\)",
        ),
        (lse[..., None], ValueError, "student_lse: expected 3 dimensions"),
        (lse.half(), TypeError, "student_lse: expected dtype float32 or float64, got torch.float16"),
        (1.0, TypeError, r"student_lse: expected a tensor \[B, H, M\], got float"),
    ):
        with pytest.raises(error, match=message):
            attention_divergence(**given | {"student_lse": wrong})
    rows = without(given, "teacher_query", "teacher_key", "teacher_mask")
    with pytest.raises(ValueError, match="teacher_probs: expected alone"):
        attention_divergence(**rows, teacher_probs=torch.rand(2, 2, 37, 41, device=device))


# -- where they come from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
def test_attention_returns_the_bits_of_pytorch_and_its_lse(dtype, kind):
    q, k, v = (torch.randn(2, 3, 17, 24, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = {"none": None, "bool": torch.rand(2, 1, 17, 17) > 0.3, "bias": torch.randn(1, 3, 17, 17, dtype=dtype)}[kind]
    if kind == "bool":
        mask[0, 0, 5] = False
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    output, lse = attention_and_lse(q, k, v, mask, 0.0, 0.3)
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
    upstream = torch.randn_like(output)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (output, expected)), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    z, visible = reference.side_logits(
        make_problem(q, k, q, k, None, 0.3, 0.3, mask, mask, None, "forward_kl", 1.0).student, None, 1.0, torch.float64
    )
    truth = torch.where(visible, z, -torch.inf).logsumexp(-1)
    assert lse is not None and not lse.requires_grad
    torch.testing.assert_close(lse.double(), truth.detach(), rtol=1e-5, atol=2e-4)


def test_a_learned_bias_has_no_kernel_that_tells():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    output, lse = attention_and_lse(q, k, v, bias, 0.0, None)
    assert lse is None and output.requires_grad


class Block(torch.nn.Module):
    """The attention of a model, in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def tap(stop=False):
    torch.manual_seed(1)
    return AttentionTap(torch.nn.ModuleDict({"attn": Block()}), blocks="attn", stop=stop)


def test_the_tap_hands_it_over_and_the_loss_is_the_same(device):
    student, teacher = tap().to(device), tap().to(device)
    x = torch.randn(2, 40, 32, device=device)
    _, (s,) = student.capture(student.model["attn"], x)
    with torch.no_grad():
        _, (t,) = teacher.capture(teacher.model["attn"], x + 0.3 * torch.randn_like(x))
    assert s.lse is not None and t.lse is not None
    weights = list(student.parameters())
    for impl in IMPLS:
        known, unknown = (
            torch.autograd.grad(attention_divergence(a, b, impl=impl), weights, retain_graph=True)
            for a, b in ((s, t), (s._replace(lse=None), t._replace(lse=None)))
        )
        for a, b in zip(known, unknown, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    with pytest.raises(Exception, match="teacher_lse: expected"):
        attention_divergence(s, t._replace(scale=0.9 * t.scale), impl="chunked")
    with torch.no_grad():
        stopping = tap(stop=True).to(device)
        assert stopping.capture(stopping.model["attn"], x)[1][0].lse is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_tap_under_compile_and_autocast(autocast):
    model, x = tap(), torch.randn(2, 20, 32)

    def step(x):
        output, (call,) = model.capture(model.model["attn"], x)
        return output, attention_divergence(call, call._replace(query=call.query * 0.9, lse=None), impl="chunked")

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, compiled = step(x), torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1], rtol=1e-4, atol=1e-6)


def test_views_keep_it_only_where_the_keys_are_the_same():
    whole = AttentionCall(
        torch.randn(1, 3, 21, 8), torch.randn(1, 3, 21, 8), None, 0.5, 5, True, (4, 4), torch.randn(1, 3, 21)
    )
    assert (
        class_row(whole).lse is None
        and shared_tokens(whole, True).lse is None
        and shared_tokens(whole, False).lse is None
    )
    assert torch.equal(take_heads(whole, (2, 0)).lse, whole.lse[:, [2, 0]])
    one = whole._replace(num_prefix_tokens=1)
    assert torch.equal(class_row(one).lse, whole.lse[:, :, :1]) and shared_tokens(one, True).lse is whole.lse


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_one_pass_takes_a_teachers_and_judges_it(device, divergence, monkeypatch):
    """The same results without the sweep for it, rows that see no key among them; a wrong one is an error."""
    launch = pytest.importorskip("attnkd_kernels.map.launch")
    query, key, value, theirs, their_key = torch.randn(5, 2, 2, 37, 16, device=device).half()
    mask = torch.arange(37, device=device) < torch.tensor([30, 0], device=device)[:, None, None, None]
    z = (theirs.double() @ their_key.double().mT * 0.25).masked_fill(~mask, -torch.inf)
    swept, sweep = [], launch.normaliser
    monkeypatch.setattr(launch, "normaliser", lambda maps, model, lse: swept.append(model) or sweep(maps, model, lse))

    def run(lse):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        teacher = AttentionCall(theirs, their_key, mask, 0.25, lse=lse)
        swept.clear()
        output, loss = attention_with_divergence(
            *leaves, teacher, divergence=divergence, reduction="none", impl="triton"
        )
        grads = torch.autograd.grad(output.sum() + loss.sum(), leaves)
        return output.detach(), loss.detach(), *grads

    expected, sweeps = run(None), len(swept)
    found = run(z.logsumexp(-1).float())
    assert sweeps - len(swept) == 1 and not any(model.query is theirs for model in swept)
    for actual, want in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-3)
    assert expected[1].isfinite().all() and not expected[1][1].any() and expected[1][0].any()
    with pytest.raises(Exception, match="teacher_lse: expected"):
        run(z.logsumexp(-1).float() + 0.1)
        if device == "cuda":
            torch.cuda.synchronize()
