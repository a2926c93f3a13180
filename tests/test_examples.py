"""The files of examples/ as they stand, with small random models in place of published ones."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def example(name: str) -> ModuleType:
    """The module of examples/NAME.py. What it imports must be installed."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timm_vit(classes: int = 5, **more: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **{**SMALL, **more})


def hugging_face_vit(classes: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=classes)
    return transformers.ViTForImageClassification(config) if classes else transformers.ViTModel(config)


def hugging_face(model: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    named = f"{model.removesuffix('Model').removesuffix('ForImageClassification')}Config"
    return getattr(transformers, model)(getattr(transformers, named)(**small, image_size=32, patch_size=8, **config))


def open_clip_tower() -> nn.Module:
    return pytest.importorskip("open_clip").transformer.VisionTransformer(32, 8, 32, 3, 4, 2.0, output_dim=16)


def swin(depth: int) -> nn.Module:
    small = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, depth),
        "num_heads": (2, 4),
    }
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **small)


def text(kind: str, **sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=50, num_labels=5)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


class Words(dict):
    """What a tokenizer gives."""

    def to(self, device: torch.device) -> Words:
        return self


def words() -> Words:
    visible = torch.arange(7) < torch.tensor([[7], [4], [2], [7]])
    return Words(input_ids=torch.randint(2, 50, (4, 7)) * visible, attention_mask=visible.long())


def twins() -> tuple[nn.Module, nn.Module]:
    student = timm_vit()
    return student, copy.deepcopy(student)


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    # example: small models of its kinds, student and teacher
    "dinov2_to_registers": lambda: (
        timm.create_model("vit_small_patch14_reg4_dinov2", **{**SMALL, "patch_size": 8}, num_classes=0),
        hugging_face("Dinov2WithRegistersModel", num_register_tokens=4),  # torch.hub's: tests/capture/test_adapters.py
    ),
    "dinov3_to_vit": lambda: (timm_vit(0, depth=4), hugging_face("DINOv3ViTModel", num_register_tokens=4)),
    "siglip_to_deit": lambda: (timm_vit(0, num_heads=2), hugging_face("SiglipVisionModel")),
    "mae_to_vit": lambda: (timm_vit(num_heads=2), timm_vit(0)),
    "clip_to_vit": lambda: (timm_vit(0), open_clip_tower()),
    "dino_s8_to_s16": lambda: (timm_vit(0), timm_vit(0, patch_size=4)),
    "beit_to_vit": lambda: (
        timm_vit(),
        hugging_face("BeitForImageClassification", num_labels=5, use_relative_position_bias=True),
    ),
    "ema_self_distillation": twins,
    "swin_to_swin": lambda: (swin(2), swin(6)),
    "bert_to_minilm": lambda: (
        text("DistilBert", dim=48, n_layers=2, n_heads=4, hidden_dim=64),
        text("Bert", hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64),
    ),
    "bert_to_distilbert": lambda: (
        text("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        text("Bert", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_the_gallery(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = PAIRS[name]()
    monkeypatch.syspath_prepend(ROOT / "examples")
    before, taught = copied(student), copied(teacher)
    module = example(name)
    labels = () if name == "bert_to_minilm" else (torch.arange(4),)
    batches: list = [(words() if "bert_" in name else images(4), *labels) for _ in range(2)]
    losses = module.train(module.method(student, teacher), batches)
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    attention = [key for key in changed(before, student) if "qkv.weight" in key or "attention.q_lin" in key]
    assert attention
    assert bool(changed(taught, teacher)) == (name == "ema_self_distillation")


def test_the_images_of_a_small_folder_are_a_batch(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("dog", 1)):
        for index in range(count):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (40, 30)).save(tmp_path / name / f"{index}.png")
    loader = example("loop").images(str(tmp_path), size=32)
    loader = DataLoader(loader.dataset, loader.batch_size, drop_last=loader.drop_last)  # without its processes
    ((batch, classes),) = loader
    assert batch.shape == (3, 3, 32, 32) and sorted(classes.tolist()) == [0, 0, 1]


def test_every_file_is_tested_and_listed_and_its_models_exist() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"loop"}
    assert found == set(PAIRS) | {"transformers_trainer", "accelerate_loop", "lightning_module"}
    page = (ROOT / "docs" / "models.md").read_text()
    for name in found:
        assert f"examples/{name}.py" in page, name
        text = (ROOT / "examples" / f"{name}.py").read_text()
        for model, more in re.findall(r'timm\.create_model\("([^"]+)"([^)]*)\)', text):
            assert timm.is_model(model) and ("." not in model or model in timm.list_pretrained()), model
            assert "pretrained=True" not in more or timm.list_pretrained(model.partition(".")[0] + "*"), model
        for model, tag in re.findall(r'open_clip\.create_model\("([^"]+)", "([^"]+)"\)', text):
            assert (model, tag) in pytest.importorskip("open_clip").list_pretrained()


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32)


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("fresh_accelerator")
def test_trainer_of_transformers(tmp_path: Path) -> None:
    module = example("transformers_trainer")
    student, teacher = hugging_face_vit(), timm_vit(0)
    before, taught = copied(student), copied(teacher)
    twin = module.AttnDistill(hugging_face_vit(), timm_vit(0), verbose=False)  # as with activation_checkpointing=True
    twin.activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=1, offload=False)
    assert all(layer.gradient_checkpointing for layer in twin.student.layers)
    data = [{"images": image} for image in images()]
    given = module.distil(student, teacher, data, str(tmp_path), max_steps=3, per_device_train_batch_size=4, **CPU)
    assert any("attention" in name for name in changed(before, student)) and not changed(taught, teacher)
    assert given is student and all(layer.gradient_checkpointing for layer in student.layers)
    loaded, report = type(student).from_pretrained(tmp_path / "student", use_safetensors=True, output_loading_info=True)
    assert not changed(copied(student), loaded) and not any(report.values())


@pytest.fixture
def fresh_accelerator() -> None:
    """accelerate keeps its settings in the process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_loop_of_accelerate() -> None:
    module = example("accelerate_loop")
    student, teacher = hugging_face_vit(classes=5), timm_vit()
    before = copied(student)
    loader = DataLoader(TensorDataset(images(), torch.arange(8) % 5), batch_size=2)
    options = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    losses = module.distil(student, teacher, loader, epochs=2, cpu=True, **options)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert any("attention" in name for name in changed(before, student))
    assert not hasattr(student.vit.layers[0].attention, "_armed")


WORKER = """
import sys, torch
sys.path[:0] = [{root!r}, {kernels!r}]
from torch.utils.data import DataLoader, TensorDataset
from tests import test_examples as tests

torch.manual_seed(0)
student, teacher = tests.timm_vit(), tests.timm_vit()
before = tests.copied(student)
loader = DataLoader(TensorDataset(tests.images(16), torch.arange(16) % 5), batch_size=4)
losses = tests.example("accelerate_loop").distil(student, teacher, loader, epochs=2)
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.save((size, losses, tests.changed(before, student), tests.copied(student)), f"{out}/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def test_loop_of_accelerate_in_two_processes(tmp_path: Path) -> None:
    """As ``accelerate launch`` starts it: other images in each, the same student in both afterwards."""
    pytest.importorskip("accelerate")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), kernels=str(ROOT / "kernels"), out=str(tmp_path)))
    # --cpu --num_processes 2 would start one process: accelerate leaves processes on CPUs to mpirun.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    ran = subprocess.run(
        [*launch, *options, str(script)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "did not find any unused parameters" not in ran.stderr
    (size, losses, trained, first), (_, others, _, second) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert size == 2 and len(losses) == 2 and losses != others
    assert any("attn" in name for name in trained)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    student, teacher = timm_vit(), timm_vit(0)
    before, taught = copied(student), copied(teacher)
    module = example("lightning_module").Distillation(student, teacher)
    loader = DataLoader(TensorDataset(images(), torch.arange(8) % 5), batch_size=4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    lightning.Trainer(max_epochs=2, **options).fit(module, loader)
    assert any("attn" in name for name in changed(before, student)) and not changed(taught, teacher)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert len(saved) == len(student.state_dict()) and all(name.startswith("task.") for name in saved)
