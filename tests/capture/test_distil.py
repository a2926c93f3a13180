"""AttentionTap.distil: the model's output as it was, the divergences of its calls, the sum of both gradients, and no trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from attnkd import AttentionCall, AttentionTap, attention_divergence
from attnkd.attention import one_pass

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
OPTIONS = {"divergence": "reverse_kl", "temperature": 2.0, "reduction": "batchmean"}


def make(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def teacher_calls(name: str, blocks: object) -> list[AttentionCall]:
    with torch.no_grad():
        return AttentionTap(make(name, seed=9), blocks, stop=True)(images())[1]


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_calls(tap: AttentionTap, teacher: list[AttentionCall], **options: object) -> tuple:
    output, calls = tap(images())
    return output, [attention_divergence(s, t, **options) for s, t in zip(calls, teacher, strict=True)]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rows", ["all", "cls"])
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "beit_base_patch16_224"],
)
def test_output_divergences_and_gradients_are_those_of_two_calls(name: str, rows: str) -> None:
    model, blocks, options = make(name), [0, 2], OPTIONS | {"rows": rows}
    teacher, tap = teacher_calls(name, blocks), AttentionTap(model, blocks)
    plain = copy.deepcopy(model)(images())
    results = []
    for run in (lambda: two_calls(tap, teacher, **options), lambda: tap.distil(teacher, images(), **options)[::2]):
        output, losses = run()
        assert torch.equal(output, plain) and len(losses) == 2
        results.append((losses, gradients(model, output.square().sum() + losses[0] + 2 * losses[1])))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])
    state = model.state_dict().keys()
    assert tap.untap() is model and state == make(name).state_dict().keys()


def test_the_kernels_replace_the_models_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the last block's attention is one sweep; the packed projection gets one gradient, and nothing stacks three."""
    model = make(depth=1).bfloat16()
    teacher = [
        call._replace(query=call.query.bfloat16(), key=call.key.bfloat16())
        for call in teacher_calls("vit_tiny_patch16_224", 0)
    ]
    tap, x = AttentionTap(model, 0), images().bfloat16()
    output, calls = tap(x)
    loss = attention_divergence(*calls, *teacher, reduction="sum", impl="triton")
    expected = gradients(model, output.float().square().sum() + loss)
    sweeps, attend = [], one_pass.fused_attention.attend
    monkeypatch.setattr(
        one_pass.fused_attention, "attend", lambda inputs, problem: sweeps.append(inputs) or attend(inputs, problem)
    )
    found, _, losses = tap.distil(teacher, x, reduction="sum", impl="triton")
    assert [len(inputs) for inputs in sweeps] == [1], "packed"
    torch.testing.assert_close(found, output, rtol=0.02, atol=0.02)
    torch.testing.assert_close(losses[0], loss, rtol=1e-3, atol=1e-3)
    grads = gradients(model, found.float().square().sum() + losses[0])
    for name, grad in expected.items():
        error = (grads[name] - grad).float().norm() / grad.float().norm().clamp_min(1e-6)
        assert error < 0.03, f"{name}: {error}"


def test_packed_is_recognised_only_where_it_is_one() -> None:
    qkv = torch.randn(2, 5, 3 * 3 * 8, requires_grad=True) * 1.0
    query, key, value = qkv.view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    found = one_pass.packed(query, key, value)
    assert found is not None and found.shape == (2, 5, 3, 3, 8) and found.data_ptr() == qkv.data_ptr()
    assert one_pass.packed(key, query, value) is None and one_pass.packed(query, key.clone(), value) is None
    assert one_pass.packed(query.detach(), key, value) is None
    query.retain_grad()
    assert one_pass.packed(query, key, value) is None, "somebody wants this gradient"


@pytest.mark.parametrize("stop", [False, True])
def test_checkpointed_blocks(stop: bool) -> None:
    """The second run of a block has no teacher: the divergence stays outside it, and everything is the same."""
    model, teacher = make().train(), teacher_calls("vit_tiny_patch16_224", [0, 2])
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        output, _, losses = AttentionTap(model, [0, 2], stop=stop).distil(teacher, images(), **OPTIONS)
        loss = losses[0] + losses[1] + (0.0 if output is None else output.square().sum())
        results.append((losses, gradients(model, loss)))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_dropout_is_the_models_own() -> None:
    model, teacher = make(attn_drop_rate=0.5).train(), teacher_calls("vit_tiny_patch16_224", -1)
    torch.manual_seed(5)
    plain = model(images())
    torch.manual_seed(5)
    output, calls, (loss,) = AttentionTap(model).distil(teacher, images())
    assert torch.equal(output, plain)
    torch.testing.assert_close(loss, attention_divergence(*calls, *teacher))


def test_compile_fullgraph_and_autocast() -> None:
    model, teacher = make(), teacher_calls("vit_tiny_patch16_224", [0, 2])
    tap = AttentionTap(model, [0, 2])

    def step(x: torch.Tensor) -> tuple:
        output, _, losses = tap.distil(teacher, x, **OPTIONS)
        return output, losses

    expected = step(images())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(images()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        output, calls, losses = tap.distil(teacher, images(), **OPTIONS)
        found = attention_divergence(calls[0], teacher[0], **OPTIONS)
    assert calls[0].query.dtype == torch.bfloat16 and losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], found)


def test_the_number_of_teacher_calls_is_checked() -> None:
    teacher = teacher_calls("vit_tiny_patch16_224", [0, 2])
    with pytest.raises(
        ValueError, match=r"teacher: expected 1, one for each tapped attention \(blocks.2.attn\), got 2"
    ):
        AttentionTap(make()).distil(teacher, images())
    with pytest.raises(TypeError, match="teacher: expected an AttentionCall"):
        AttentionTap(make()).distil([None], images())
    with pytest.raises(TypeError, match="teacher: expected a sequence, one for each tapped attention, got NoneType"):
        AttentionTap(make()).distil(None, images())
    tap = AttentionTap(make())
    assert torch.equal(tap.distil(teacher[1], images())[2][0], tap.distil(teacher[1:], images())[2][0])
    with pytest.raises(ValueError, match="divergence"):
        tap.distil(teacher[:1], images(), divergence="distance")
    assert tap(images())[0].shape == (2, 10), "the tap is disarmed again"
