"""The operations inside PyTorch: opcheck, torch.compile, autocast, checkpointing, double backward, saved tensors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnkd import attention_divergence, attention_rows
from attnkd.attention import dispatch
from attnkd.attention.fused_rows import _row_kl_bwd, _row_kl_fwd, _row_logits_bwd, _row_logits_fwd, _row_merge

MERGES = [None, "logsum", "mean"]


def tensors(device, N=20, M=1, grad=True):
    shapes = [(2, 3, M, 16), (2, 3, N, 16)] * 2
    out = [torch.randn(s, device=device) for s in shapes]
    for x in out[:2]:
        x.requires_grad_(grad)
    return out


def value_and_grads(function, inputs):
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def equal(a, b):
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in zip(a, b, strict=True))


def test_opcheck(device):
    qs, ks, qt, kt = tensors(device, grad=False)
    mask = torch.randn(2, 3, 1, 20, device=device)
    rows, logits = torch.rand(2, 3, 1, device=device), torch.randn(2, 3, 1, 20, device=device)
    unit = torch.randn(2, 3, 1, 16, device=device)
    calls = [
        (_row_kl_fwd, (qs, ks, mask, qt, kt, None, None, 0.25, 0.25, 1.0, False, "js", True)),
        (_row_kl_fwd, (qs, ks, None, None, None, None, logits[:, :1].softmax(-1), 0.25, 1.0, 1.0, True, "forward_kl", False)),
        (_row_kl_bwd, (rows, logits, unit, qs, ks, 0.25, 1.0, False, True, True, True)),
        (_row_kl_bwd, (rows, logits, unit, qs, ks.transpose(1, 2).contiguous().transpose(1, 2), 0.25, 1.0, False, True, True, False)),
        (_row_logits_fwd, (qs, ks, mask, 0.25, 1.0, False)),
        (_row_logits_bwd, (logits, qs, ks, 0.25, 1.0, False, True, False, True)),
        (_row_merge, (logits, None, logits[:, :1].softmax(-1), "mean", "forward_kl", True)),
    ]  # fmt: skip
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference"])
@pytest.mark.parametrize("merge", MERGES)
def test_compile_fullgraph(device, impl, merge):
    def function(qs, ks, qt, kt):
        return attention_divergence(qs * 1.0, ks * 1.0, qt, kt, merge=merge, impl=impl)

    torch._dynamo.reset()
    inputs = tensors(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    assert equal(value_and_grads(compiled, inputs), value_and_grads(function, inputs))


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_compile_with_dynamic_shapes(device, impl):
    def function(qs, ks, qt, kt):
        return attention_divergence(qs, ks, qt, kt, merge="logsum", impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (20, 31, 50):
        inputs = tensors(device, N)
        assert equal(value_and_grads(compiled, inputs), value_and_grads(function, inputs))


def test_compile_attention_rows(device):
    def function(q, k):
        return attention_rows(q, k, merge="mean", impl="triton").square().sum()

    inputs = tensors(device)[:2]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert equal(value_and_grads(compiled, inputs), value_and_grads(function, inputs))


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference"])
def test_autocast_computes_in_its_dtype(device, impl):
    qs, ks, qt, kt = tensors(device)
    half = [x.bfloat16() for x in (qs, ks, qt, kt)]
    with torch.autocast(device.type, torch.bfloat16):
        inside = attention_divergence(qs, ks, qt, kt, impl=impl)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, attention_divergence(*half, impl=impl))
    grads = torch.autograd.grad(inside, (qs, ks))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_activation_checkpointing(device, impl, use_reentrant):
    def function(qs, ks, qt, kt):
        return attention_divergence(qs, ks, qt, kt, impl=impl)

    def checkpointed(*inputs):
        return checkpoint(function, *inputs, use_reentrant=use_reentrant)

    inputs = tensors(device)

    def run(f):
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
        loss = f(*leaves, *inputs[2:])
        loss.backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad

    assert equal(run(checkpointed), run(function))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_double_backward_raises(device, impl, merge):
    inputs = tensors(device)
    loss = attention_divergence(*inputs, merge=merge, impl=impl)
    (grad,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum() + inputs[0].sum(), inputs[:1], retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_saved_tensors_can_be_offloaded(device):
    inputs = tensors(device)
    want = value_and_grads(lambda *x: attention_divergence(*x, impl="triton"), inputs)
    with torch.autograd.graph.save_on_cpu():
        assert equal(value_and_grads(lambda *x: attention_divergence(*x, impl="triton"), inputs), want)


@pytest.mark.gpu
def test_cuda_graph_capture(device):
    inputs = tensors(device, N=197)

    def step():
        return value_and_grads(lambda *x: attention_divergence(*x, impl="triton"), inputs)

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    assert equal(captured, want)


@pytest.mark.gpu
def test_runs_on_the_tensors_gpu_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = tensors(torch.device("cuda:1"))
    with torch.cuda.device(0):
        loss = attention_divergence(*inputs, impl="triton")
    torch.testing.assert_close(loss, attention_divergence(*inputs, impl="reference"))


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "compute capability below 8.0"), ((8, 0), None)])
def test_gpus_that_triton_does_not_compile_for_get_plain_pytorch(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    why = dispatch.why_not_triton(torch.device("cuda", 0), torch.float16)
    assert why is None if reason is None else reason in why
    monkeypatch.undo()  # torch.compile itself asks for the GPU
    compiled = torch.compile(lambda x: x + dispatch.too_old(None), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == dispatch.too_old(None)
