"""Published checkpoints, made here in each project's form, under timm's names."""

import argparse

import numpy
import pytest
import timm
import torch

from attnkd import load_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(num_classes=0, **changes):
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": num_classes, **changes})


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def made(form, state, classified):
    """What each project saves for a backbone's ``state``; ``classified`` has a classifier too."""
    mlp = {"head.mlp.0.weight": torch.ones(3, 24), "head.last_layer.weight_v": torch.ones(2, 3)}
    args = argparse.Namespace(arch="vit_small", lr=0.1)
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_blocks.0.x": torch.ones(2),
    }
    projector = {"head.0.weight": torch.ones(3, 24), "head.1.bias": torch.ones(3)}
    other = {name: value + 1 for name, value in state.items()}
    return {
        "timm": state,
        "timm, compiled and wrapped": {"state_dict": prefixed("module._orig_mod.", state), "epoch": 3},
        "timm with EMA": {"state_dict": other, "state_dict_ema": state},
        "DINO, backbone": state,
        "DINO, full": {
            "student": prefixed("module.backbone.", other) | prefixed("module.", mlp),
            "teacher": prefixed("backbone.", state) | mlp,
            "epoch": 9,
            "args": args,
        },
        "iBOT": {"state_dict": {**state, "masked_embed": torch.zeros(1, 24)}},
        "Mugs": {"state_dict": prefixed("module.backbone.", {**state, "relation_blocks.0.x": torch.ones(1)}) | mlp},
        "MoCo v3": {
            "arch": "vit_small",
            "state_dict": prefixed("module.base_encoder.", {**state, **projector})
            | prefixed("module.momentum_encoder.", {**other, **projector})
            | {"module.predictor.0.weight": torch.ones(2)},
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        },
        "MAE": {"model": {**state, **decoder}, "args": args, "epoch": 799},
        "DeiT": {"model": classified, "args": args},
    }[form]


FORMS = [
    "timm",
    "timm, compiled and wrapped",
    "timm with EMA",
    "DINO, backbone",
    "DINO, full",
    "iBOT",
    "Mugs",
    "MoCo v3",
    "MAE",
]


@pytest.mark.parametrize("form", [*FORMS, "DeiT"])
def test_every_published_form(form, tmp_path):
    source = vit(5)
    classified = source.state_dict()
    state = {name: value for name, value in classified.items() if not name.startswith("head.")}
    torch.save(made(form, state, classified), tmp_path / "x.pth")
    model = load_weights(vit(1000), tmp_path / "x.pth")
    assert model.num_classes == (5 if form == "DeiT" else 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, classified[name]), name


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True}, {"reg_tokens": 2}])
def test_position_embeddings_are_resized(options, tmp_path):
    source = vit(**options)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    model = load_weights(vit(**options, img_size=64), tmp_path / "x.pth")
    prefix = model.pos_embed.shape[1] - 64
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])
    # As timm does it when it builds a model for another size.
    want = source.pos_embed[:, prefix:].detach().transpose(1, 2).unflatten(2, (4, 4))
    want = torch.nn.functional.interpolate(want, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, prefix:].detach(), want)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_what_is_not_known_is_named(tmp_path):
    state = vit().state_dict()
    for content, message in (
        ({**state, "adapter.weight": torch.ones(1)}, r"1 not in the model \(adapter.weight\)"),
        (
            {name: value for name, value in state.items() if "qkv" not in name},
            r"4 missing \(blocks.0.attn.qkv.bias, blocks.0.attn.qkv.weight, blocks.1.attn.qkv.bias, blocks.1.attn.qkv.weight\)",
        ),
        (
            {**state, **{f"adapter.{index}": torch.ones(1) for index in range(7)}},
            r"7 not in the model \(adapter.0, adapter.1, adapter.2, adapter.3, adapter.4 and 2 more\)",
        ),
        ({**state, "pos_embed": torch.zeros(1, 12, 24)}, r"pos_embed \(1, 12, 24\), here \(1, 17, 24\)"),
        ({"weights": state}, "expected weights by name, or a checkpoint with one of"),
        (
            {"model": state, "best": numpy.float64(1)},
            r"x.pth: cannot be read .*: it holds numpy\S*\.scalar, whose .* torch.save\(model.state_dict\(\), path\)",
        ),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            load_weights(vit(), tmp_path / "x.pth")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got PosixPath; the model comes first"):
        load_weights(tmp_path / "x.pth", vit())


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_a_refused_checkpoint_leaves_the_model_as_it_was(name, tmp_path):
    options = {"depths": (1, 1), "embed_dim": 8, "num_heads": (2, 2)} if "swin" in name else SMALL
    model = timm.create_model(name, **options, num_classes=5).eval()
    images = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:]) if "swin" in name else torch.randn(1, 3, 32, 32)
    before, parameters = model(images), [id(parameter) for parameter in model.parameters()]
    torch.save({"adapter.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(model, tmp_path / "x.pth")
    assert model.num_classes == 5 and [id(parameter) for parameter in model.parameters()] == parameters
    assert torch.equal(model(images), before)
