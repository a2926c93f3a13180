"""The gradients of a captured query are the ones that slicing it gives; the attention's own tensor is written only where it is ours."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from attnkd.attention.owned import alone
from attnkd.capture.hand_out import hand_out

LOSSES = {
    "row": lambda out, captured, row: out.square().sum() + row.sin().sum(),
    "rows": lambda out, captured, row: out.square().sum() + captured.cos().sum(),
    "both": lambda out, captured, row: out.square().sum() + captured.cos().sum() + row.sin().sum() + row.exp().sum(),
    "row alone": lambda out, captured, row: row.sin().sum(),
    "no loss": lambda out, captured, row: out.square().sum(),
    "rows alone": lambda out, captured, row: captured.cos().sum(),
}


def _inputs(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def _gradients(loss, handed, create_graph=False):
    query, key, value = _inputs()
    inner = query * 1.0
    if handed:
        attention, captured, row = hand_out(inner)
    else:
        attention, captured, row = inner, inner, inner[:, :, :1]
    total = loss(F.scaled_dot_product_attention(attention, key, value), captured, row)
    return query, torch.autograd.grad(total, query, create_graph=create_graph)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_a_slice(name):
    _, want = _gradients(LOSSES[name], handed=False)
    torch.testing.assert_close(_gradients(LOSSES[name], handed=True)[1], want, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_those_of_a_slice():
    second = []
    for handed in (False, True):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            query, grad = _gradients(LOSSES["both"], handed, create_graph=True)
            second.append(torch.autograd.grad(grad.square().sum(), query)[0])
    torch.testing.assert_close(*second, rtol=1e-12, atol=1e-12)


class _Sends(torch.autograd.Function):
    """Sends the gradient that it was given, whatever flows in."""

    @staticmethod
    def forward(ctx, x, sent):
        ctx.sent = sent
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.sent(), None


@pytest.mark.parametrize("held", ["by a list", "part of a larger tensor", "expanded"])
def test_a_gradient_that_someone_else_holds_is_not_written(held):
    larger = torch.zeros(2, 2, 3, 7, 8)
    other = {"by a list": torch.zeros(2, 3, 7, 8), "part of a larger tensor": larger, "expanded": torch.zeros(())}[held]
    sent = {
        "by a list": lambda: other,
        "part of a larger tensor": lambda: larger[0],
        "expanded": lambda: other.expand(2, 3, 7, 8),
    }
    query = torch.randn(2, 3, 7, 8, requires_grad=True)
    attention, _, row = hand_out(query * 1.0)
    (grad,) = torch.autograd.grad(_Sends.apply(attention, sent[held]) + row.sum(), query)
    assert not other.any()
    assert torch.equal(grad[:, :, :1], torch.ones(2, 3, 1, 8)) and not grad[:, :, 1:].any()


def test_the_attentions_gradient_is_written_in_place_where_it_is_ours():
    """No operation of the backward allocates a query of zeros, adds two queries or copies one."""
    query, key, value = (torch.randn(2, 3, 700, 8, requires_grad=True) for _ in range(3))
    attention, captured, row = hand_out(query)
    out = F.scaled_dot_product_attention(attention, key, value)
    total = out.sum() + row.square().sum()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.autograd.grad(total, query)
    whole = [2, 3, 700, 8]
    counted = [e.name for e in recorded.events() if e.input_shapes and whole in e.input_shapes]
    assert not {"aten::add", "aten::cat", "aten::zero_", "aten::fill_", "aten::clone"} & set(counted), counted


def test_nothing_is_handed_out_without_a_gradient():
    query = torch.randn(2, 3, 7, 8)
    assert hand_out(query) == (query, query, None)
    with torch.no_grad():
        assert hand_out(query.requires_grad_())[2] is None
    assert hand_out(torch.randn(2, 3, 1, 8, requires_grad=True))[2] is None  # class attention: there is no other row


def test_this_pytorch_can_tell_who_holds_a_gradient():
    assert len(alone()) == 3


def test_the_first_look_may_come_from_a_compiled_frame():
    """After a graph break a frame holds more than it shows; that count would be kept for the whole process."""
    alone.cache_clear()
    right = alone()
    seen = []

    def function(x):
        torch._dynamo.graph_break()
        seen.append(alone())
        return x.sin()

    torch._dynamo.reset()
    alone.cache_clear()
    torch.compile(function, backend="eager")(torch.ones(2))
    assert seen == [right] and alone() == right
