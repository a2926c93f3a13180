"""Models of other libraries by name, from folders that are made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnkd.capture.adapters import adapter_for
from attnkd.capture.libraries import library_of
from attnkd.capture.loading import image_config, load_model, load_saved, new_model
from attnkd.capture.models import input_stats, num_classes

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZE = {"image_size": 32, "patch_size": 8}
PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True, "resample": 2}


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def saved_vit(folder: Path, classes: int = 5, processor: dict[str, Any] | None = None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**TINY, **SIZE, num_labels=classes)
    model = (transformers.ViTForImageClassification if classes else transformers.ViTModel)(config).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("classes", [0, 5])
def test_a_folder_of_transformers(tmp_path: Path, classes: int) -> None:
    model = saved_vit(tmp_path, classes, {**PROCESSOR, "size": {"height": 32, "width": 32}})
    loaded = load_model("teacher", f"hf:{tmp_path}")
    forward = adapter_for(model).forward
    assert torch.equal(forward(loaded, images()), forward(model, images())) and not loaded.training
    assert input_stats(loaded) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and num_classes(loaded) == classes
    config = image_config(loaded)
    assert (config["input_size"], config["interpolation"], config["crop_mode"]) == ((3, 32, 32), "bilinear", "squash")
    if classes:
        assert num_classes(load_model("teacher", f"hf:{tmp_path}", num_classes=0)) == 0


def test_a_clip_gives_its_image_tower(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**TINY, **SIZE})
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    crop = {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **crop}))
    tower = load_model("teacher", f"hf:{tmp_path}")
    expected = clip.vision_model(images()).last_hidden_state
    assert torch.equal(adapter_for(tower).tokens(tower, images()), expected)
    assert image_config(tower)["crop_pct"] == 0.8


def test_new_models_and_saved_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student's model.json builds it again, where the folder that it was named after is gone."""
    models = pytest.importorskip("torchvision.models")
    small = {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}  # not a ViT-B
    monkeypatch.setattr(models, "get_model", lambda name, weights, **more: models.VisionTransformer(**small, **more))
    from safetensors.torch import save_model

    from attnkd.capture.libraries import description

    pytest.importorskip("transformers")
    for name, arguments in (
        ("hf:dinov2", {**TINY, "patch_size": 8, "img_size": 32, "num_classes": 3, "in_chans": 1}),
        ("hf:vit", {**TINY, "patch_size": 8, "img_size": 32, "num_classes": 0}),
        ("torchvision:vit_b_16", {"img_size": 32, "num_classes": 3}),
        ("torchvision:vit_b_16", {"img_size": 32, "num_classes": 0}),
    ):
        arguments = {
            key: value for key, value in arguments.items() if (name, key) != ("hf:dinov2", "intermediate_size")
        }
        torch.manual_seed(0)
        model = new_model("student", name, **arguments)
        assert num_classes(model) == arguments["num_classes"]
        save_model(model, str(tmp_path / "model.safetensors"))
        described = description(name, model, arguments) | {"pretrained_cfg_overlay": {"mean": [0.3], "std": [0.4]}}
        (tmp_path / "model.json").write_text(json.dumps(described))
        again = load_saved(tmp_path / "model.safetensors")
        pixels = images()[:, : arguments.get("in_chans", 3)]
        forward = adapter_for(model).forward
        assert torch.equal(forward(again, pixels), forward(model.eval(), pixels))
        assert again.pretrained_cfg["mean"] == [0.3]


HUB = """
import torch
from torch import nn
from torch.nn import functional as F
dependencies = ["torch"]

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv = 4, nn.Linear(32, 96)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
    def forward(self, x):
        return x + self.attn(x)

class DinoVisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_dim, self.patch_size, self.num_register_tokens = 32, 8, 0
        self.patch_embed, self.head = nn.Conv2d(3, 32, 8, 8), nn.Identity()
        self.cls, self.blocks = nn.Parameter(torch.randn(1, 1, 32)), nn.ModuleList([Block(), Block()])
    def forward_features(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.patch_embed(x).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_clstoken": x[:, 0], "x_norm_regtokens": x[:, 1:1], "x_norm_patchtokens": x[:, 1:]}
    def forward(self, x):
        return self.forward_features(x)["x_norm_clstoken"]

def tiny(pretrained=True):
    model = DinoVisionTransformer()
    if pretrained:
        model.load_state_dict(torch.load(FILE, weights_only=False))
    return model

def other(pretrained=True):
    return nn.Linear(2, 2)
"""


class Shout:
    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


def test_torch_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pth"
    (tmp_path / "hubconf.py").write_text(HUB.replace("FILE", repr(str(weights))))
    torch.save({}, weights)
    with pytest.raises(RuntimeError, match=r"teacher: hub:.*:tiny could not be loaded \(RuntimeError: Error"):
        load_model("teacher", f"hub:{tmp_path}:tiny")
    model = load_model("teacher", f"hub:{tmp_path}:tiny", make_weights(tmp_path, weights))
    assert input_stats(model) is not None and torch.equal(model.cls, torch.load(weights)["cls"])
    assert torch.equal(load_model("teacher", f"hub:{tmp_path}:tiny").cls, model.cls)
    torch.save({"cls": Shout()}, weights)
    with pytest.raises(RuntimeError, match="could not be loaded .UnpicklingError"):
        load_model("teacher", f"hub:{tmp_path}:tiny")
    assert "ran" not in capsys.readouterr().out and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    for name, message in (
        (f"hub:{tmp_path}", "expected hub:REPOSITORY:ENTRY"),
        (f"hub:{tmp_path}:none", "could not be loaded .RuntimeError: Cannot find callable none"),
        (f"hub:{tmp_path}:other", "expected a Vision Transformer or text encoder of a known family"),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            load_model("teacher", name)
    with pytest.raises(ValueError, match="student: .* runs the code of a repository"):
        new_model("student", f"hub:{tmp_path}:tiny")


def make_weights(folder: Path, weights: Path) -> Path:
    names: dict[str, Any] = {}
    exec((folder / "hubconf.py").read_text(), names)
    torch.save(names["tiny"](pretrained=False).state_dict(), weights)
    return weights


def test_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    described = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    described["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    clip = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    tower = load_model("teacher", f"open_clip:local-dir:{tmp_path}")
    assert torch.equal(tower(images()), clip.eval().visual(images()))
    assert input_stats(tower) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ValueError, match="weights need a tag, open_clip:ViT-B-32:TAG, one of openai"):
        load_model("teacher", "open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="has no classifier, got num_classes=3"):
        new_model("student", f"open_clip:local-dir:{tmp_path}", num_classes=3)


def test_mistakes_are_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved_vit(tmp_path / "vit", 0)
    transformers.ResNetConfig().save_pretrained(tmp_path / "resnet")
    (tmp_path / "bin").mkdir()
    transformers.ViTConfig(**TINY, **SIZE).save_pretrained(tmp_path / "bin")
    torch.save({"x": Shout()}, tmp_path / "bin" / "pytorch_model.bin")
    for name, kwargs, message in (
        ("hf:vit", {}, "'vit' is a type of model, which has no weights"),
        (f"hf:{tmp_path}/vit", {"flavour": 3}, "the configuration of vit has no flavour"),
        (f"hf:{tmp_path}/vit", {"num_classes": 3}, "has no weights for classifier.bias, classifier.weight"),
        (f"hf:{tmp_path}/bin", {}, "could not be loaded .OSError: .*no file named model.safetensors"),
        (f"hf:{tmp_path}/none", {}, "hf:.*none c"),
        ("torchvision:resnet50", {}, "expected one of torchvision's vit_b_16"),
        ("else:vit", {}, "'else:vit' is neither a timm model nor .*hf:FOLDER"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"(?s)^teacher: .*{message}"):
            load_model("teacher", name, **kwargs)
    with pytest.raises(ValueError, match="student: hf:.*resnet cannot be built .*scaled_dot_product_attention"):
        new_model("student", f"hf:{tmp_path}/resnet")
    with pytest.raises(ValueError, match="mean: ViTModel does not say its images' mean and std"):
        image_config(load_model("teacher", f"hf:{tmp_path}/vit"))
    assert library_of("vit_tiny_patch16_224.augreg") is library_of("hf:") is library_of("hf-hub:timm/x") is None
    described = {"model_name": f"hub:{tmp_path}:tiny"}
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="model.json: hub:.* runs the code of a repository"):
        load_saved(tmp_path / "model.safetensors")
