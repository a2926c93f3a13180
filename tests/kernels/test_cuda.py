"""What CUDA (and ROCm) users may do: graphs, streams, several GPUs, no hidden synchronisation, training under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnkd
from attnkd.relation.api import relation_row_loss
from attnkd.testing.proof import assert_proved
from tests.methods.test_distributed import batch, gradients, tasks

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

Operation = Callable[[list[Tensor]], Tensor]
OPERATIONS: dict[str, Operation] = {
    "cls_row": lambda x: attnkd.attention_divergence(x[0][:, :, :1], x[1], x[2][:, :, :1], x[3], impl="triton"),
    "cls_row_long": lambda x: attnkd.attention_divergence(
        x[0][:, :, :1], x[1].repeat(1, 1, 20, 1), x[2][:, :, :1], x[3].repeat(1, 1, 20, 1), impl="triton"
    ),
    "cls_row_logsum": lambda x: attnkd.attention_divergence(
        x[0][:, :, :1], x[1], x[2][:, :, :1], x[3], merge="logsum", temperature=10, impl="triton"
    ),
    "cls_row_mean": lambda x: attnkd.attention_divergence(
        x[0][:, :, :1], x[1], x[2][:, :, :1], x[3], merge="mean", reduction="batchmean", impl="triton"
    ),
    "whole_map": lambda x: attnkd.attention_divergence(*x, impl="triton"),
    "whole_map_js": lambda x: attnkd.attention_divergence(*x, divergence="js", impl="triton"),
    "attention_rows": lambda x: attnkd.attention_rows(x[0][:, :, :1], x[1], impl="triton").square().sum(),
    "relation_row": lambda x: relation_row_loss(x[0].flatten(0, 1), x[2].flatten(0, 1), impl="triton"),
}


def _inputs(device: str = "cuda", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    packed = [torch.randn(2, 197, 3, 3, 64, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)]
    return [x for p in packed for x in p.permute(2, 0, 3, 1, 4)[:2]]


def _leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs[:2]] + inputs[2:]


def _loss_and_gradients(operation: Operation, leaves: list[Tensor]) -> list[Tensor]:
    loss = operation(leaves)
    return [loss, *(g for g in torch.autograd.grad(loss, leaves[:2], allow_unused=True) if g is not None)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cuda_graph_of_forward_and_backward_replays_on_new_inputs(name):
    operation = OPERATIONS[name]
    static = _leaves(_inputs())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the capture
        for _ in range(3):
            _loss_and_gradients(operation, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_gradients(operation, static)
    fresh = _inputs(seed=1)
    with torch.no_grad():
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
    for tensor in captured:
        tensor.detach().fill_(torch.nan)  # so that what is read below was written by the replay
    graph.replay()
    for got, expected in zip(captured, _loss_and_gradients(operation, _leaves(fresh)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_current_stream_is_used(name):
    operation = OPERATIONS[name]
    inputs = _inputs()
    expected = _loss_and_gradients(operation, _leaves(inputs))
    late = [torch.full_like(x, torch.nan) for x in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late on this stream: only a kernel queued on it sees them
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        got = _loss_and_gradients(operation, _leaves(late))
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_waits_for_the_device(name):
    operation = OPERATIONS[name]
    leaves = _leaves(_inputs())
    _loss_and_gradients(operation, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _loss_and_gradients(operation, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_on_another_gpu_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    operation = OPERATIONS[name]
    inputs = _inputs()
    expected = _loss_and_gradients(operation, _leaves(inputs))
    with torch.cuda.device(0):
        got = _loss_and_gradients(operation, _leaves([x.to("cuda:1") for x in inputs]))
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.to("cuda:0"), b, rtol=0, atol=0)


def test_results_repeat_bit_for_bit():
    for operation in OPERATIONS.values():
        leaves = _leaves(_inputs())
        first, second = _loss_and_gradients(operation, leaves), _loss_and_gradients(operation, leaves)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in tasks() if "," not in name])
def test_a_training_step_is_the_same_on_the_gpu_and_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding's convolution
    images, targets = batch()
    steps = []
    for device in ("cpu", DEVICE):
        task = tasks()[name]().to(device).train()
        torch.manual_seed(0)
        loss = task(images.to(device), targets.to(device))["loss"]
        loss.backward()
        steps.append([loss.detach().cpu(), *(g.cpu() for g in gradients(task).values())])
    for want, got in zip(*steps, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in tasks() if "," not in name])
def test_autocast_training_steps_stay_close_to_float32(name, dtype):
    images, targets = (x.to(DEVICE) for x in batch())
    task = tasks()[name]().to(DEVICE).train()
    want = task(images, targets)["loss"]
    with torch.autocast(DEVICE, dtype):
        loss = task(images, targets)["loss"]
    torch.testing.assert_close(loss.float(), want, rtol=0.05, atol=0.05)
    torch.amp.GradScaler(DEVICE, 2.0**10).scale(loss).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(task).values())


def test_compiled_training_steps_are_the_eager_ones():
    images, targets = (x.to(DEVICE) for x in batch())
    losses = []
    for compiled in (False, True):
        task = tasks()["AttnDistill"]().to(DEVICE).train()
        if compiled:
            task.compile()
        losses.append(task(images, targets)["loss"])
        losses[-1].backward()
        assert gradients(task)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("merge", [None, "logsum", "mean", "max", "min"])
def test_the_plain_implementation(merge):
    """In blocks, whose sizes differ between a GPU and a CPU."""
    for rows in (1, 40):
        for mask in (None, torch.rand(2, 1, 1, 50, device=DEVICE) > 0.2):
            given = {
                name: torch.randn(2, 3, n, 16, device=DEVICE)
                for name, n in (
                    ("student_query", rows),
                    ("student_key", 50),
                    ("teacher_query", rows),
                    ("teacher_key", 50),
                )
            }
            assert_proved("chunked", **given, merge=merge, student_mask=mask, teacher_mask=mask)
