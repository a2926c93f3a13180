"""Models that PEFT, torchao, bitsandbytes and accelerate have changed: exact as teachers, and as students what their library trains, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attnkd.capture.tap import AttentionTap
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.testing.census import attention_map
from tests.stirred import stirred


def hugging_face(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 5,
    }
    torch.manual_seed(seed)
    return stirred(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)))


def student() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    return stirred(timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=5))


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


CLASSES = torch.tensor([0, 3])


def losses(teacher: nn.Module, **options: Any) -> list[Tensor]:
    """Of a method that stops at the last attention, of one that needs the features, and of one that needs the scores; twice each."""
    tasks = [
        HeadKD(student(), teacher, verbose=False, **options),
        AttnDistill(student(), teacher, verbose=False, **options),
        AttentionProbe(student(), teacher, 0.9, verbose=False, **options),
    ]
    found = [task(images(), CLASSES)["loss"] for task in tasks for _ in range(2)]
    for task in tasks:
        task.untap()
    return found


@pytest.mark.parametrize("kind", ["cpu", "disk", "some of it"])
@pytest.mark.parametrize("normalised", [False, True])
def test_offloaded_teachers(kind: str, normalised: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    teacher, device = hugging_face(), {"execution_device": "cpu"}
    options: dict[str, Any] = {"input_norm": ((0.4,) * 3, (0.2,) * 3)} if normalised else {}
    plain = hugging_face()
    plain.pretrained_cfg = teacher.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # type: ignore[assignment]
    if kind == "cpu":
        accelerate.cpu_offload(teacher, **device)
    elif kind == "disk":
        accelerate.disk_offload(teacher, str(tmp_path), **device)
    else:
        places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
        accelerate.dispatch_model(teacher, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in teacher.parameters())
    torch.testing.assert_close(losses(teacher, **options), losses(plain, **options))
    torch.testing.assert_close(teacher(images()).logits, plain(images()).logits)  # given back as it was
    with pytest.raises(ValueError, match="student: weights of ViTForImageClassification are on the meta device"):
        HeadKD(teacher, student(), verbose=False)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_teachers_quantised_by_torchao(kind: str) -> None:
    """What is captured is the attention of the quantised weights."""
    quantization = pytest.importorskip("torchao.quantization")
    teacher = hugging_face()
    quantization.quantize_(teacher, getattr(quantization, kind)())
    exact = copy.deepcopy(teacher)
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    maps = [attention_map(AttentionTap(model, -1)(images())[1][0]) for model in (teacher, exact, hugging_face())]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(maps[0], maps[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses(teacher), losses(exact), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_models_quantised_by_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """On a CPU: what is captured is the attention that the quantised model computes in the open. A student trains what is not quantised."""
    for name in ("bitsandbytes", "accelerate"):
        pytest.importorskip(name)
    transformers = pytest.importorskip("transformers")
    plain: Any = hugging_face()
    plain.save_pretrained(tmp_path)

    def quantised(attention: str) -> Any:
        config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
        return type(plain).from_pretrained(tmp_path, quantization_config=config, attn_implementation=attention).eval()

    teacher = quantised("sdpa")
    assert {type(m).__name__ for m in teacher.modules()} & {"Linear4bit", "Linear8bitLt"}
    target = quantised("eager")(images(), output_attentions=True).attentions[-1].double()
    _, (call,) = AttentionTap(teacher, -1)(images())
    torch.testing.assert_close(attention_map(call), target, rtol=1e-4, atol=1e-6)
    _, (other,) = AttentionTap(plain, -1)(images())
    assert not torch.allclose(attention_map(other), target, rtol=1e-4, atol=1e-6)

    learner = student()
    result = HeadKD(learner, teacher, mode="block_to_block", verbose=False)(images(), CLASSES)
    _, (call,) = AttentionTap(learner, -1)(images())
    expected = (target * (target.log() - attention_map(call).log())).sum(-1).mean()
    torch.testing.assert_close(result["attn_loss"].double(), expected, rtol=1e-4, atol=1e-6)
    assert all(bool(loss.isfinite()) for loss in losses(teacher))

    trained = quantised("sdpa")
    HeadKD(trained, student(), verbose=False)(images(), CLASSES)["loss"].backward()
    names = {name for name, p in trained.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert "vit.layers.0.attention.q_proj.bias" in names
    assert not any(name.endswith("proj.weight") and "layers" in name for name in names)


def adapted(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    targets = ["q_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_a_student_with_peft_adapters_trains_them_alone() -> None:
    wrapped = adapted(hugging_face())
    with pytest.raises(TypeError, match=r"student: .*got PeftModel around one; give student.get_base_model\(\)"):
        HeadKD(wrapped, student(), verbose=False)
    merged = adapted(hugging_face()).merge_and_unload()
    base = wrapped.get_base_model()
    result = HeadKD(base, student(), criterion=None, alpha=0.0, verbose=False)(images())
    result["loss"].backward()
    trained = {name for name, p in base.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == {
        name for name, p in base.named_parameters() if p.requires_grad and "layers.2.attention.v_proj" not in name
    }
    assert all("lora_" in name for name in trained)
    expected = HeadKD(merged.requires_grad_(), student(), criterion=None, alpha=0.0, verbose=False)(images())
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-4, atol=1e-6)


def test_a_teacher_with_peft_adapters() -> None:
    with pytest.raises(TypeError, match=r"teacher: .*give teacher.get_base_model\(\)"):
        HeadKD(student(), adapted(hugging_face()), verbose=False)
    merged = adapted(hugging_face()).merge_and_unload()
    torch.testing.assert_close(losses(adapted(hugging_face()).get_base_model()), losses(merged), rtol=1e-4, atol=1e-6)
