"""Token facts: prefix tokens, class token, patch grid, and the keys that two models share."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from attnkd.capture.models import cls_features, image_size, input_stats, resolve_model
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import patch_grid, token_layout

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}


def make(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    options = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    ("name", "changes", "prefix", "has_cls"),
    [
        ("vit_tiny_patch16_224", {}, 1, True),
        ("deit_tiny_distilled_patch16_224", {}, 2, True),
        ("vit_small_patch14_reg4_dinov2", {}, 5, True),
        ("vit_small_patch16_dinov3", {}, 5, True),
        ("beit_base_patch16_224", {}, 1, True),
        ("cait_xxs24_224", {}, 1, True),
        ("vit_medium_patch16_reg4_gap_256", {}, 4, False),  # registers, but no class token
        ("vit_relpos_base_patch16_224", {}, 0, False),
        ("naflexvit_base_patch16_gap", {"img_size": None}, 4, False),
        ("naflexvit_base_patch16_gap", {"img_size": None, "class_token": True}, 5, True),
    ],
)
def test_token_layout(name: str, changes: dict, prefix: int, has_cls: bool) -> None:
    model = make(name, **changes)
    layout = token_layout(model)
    assert (layout.num_prefix_tokens, layout.has_cls, layout.feature_dim) == (prefix, has_cls, 48)
    tokens = model.forward_features(torch.randn(1, 3, 32, 32))
    assert tokens.shape == (1, prefix + 16, 48)


def test_token_layout_needs_a_vision_transformer() -> None:
    with pytest.raises(
        TypeError, match="model: expected a Vision Transformer or text encoder of a known family.*, got Linear"
    ):
        token_layout(nn.Linear(2, 2))


class TestPatchGrid:
    def test_follows_the_input_not_the_stale_grid_size(self) -> None:
        model = make(dynamic_img_size=True)
        tap = AttentionTap(model)
        for height, width in [(32, 32), (48, 16), (16, 24)]:
            _, (call,) = tap(torch.randn(1, 3, height, width))
            grid = patch_grid(model, (height, width), call.key.shape[2] - 1)
            assert grid == (height // 8, width // 8)
        assert model.patch_embed.grid_size == (4, 4), "timm keeps the first grid here; that is why it is not used"

    def test_padding(self) -> None:
        model = make(dynamic_img_size=True, dynamic_img_pad=True)
        _, (call,) = AttentionTap(model)(torch.randn(1, 3, 30, 17))
        assert patch_grid(model, (30, 17), call.key.shape[2] - 1) == (4, 3)

    def test_naflex(self) -> None:
        model = make("naflexvit_base_patch16_gap", img_size=None)
        _, (call,) = AttentionTap(model)(torch.randn(1, 3, 16, 40))
        assert patch_grid(model, (16, 40), call.key.shape[2] - 4) == (2, 5)

    def test_tokens_that_are_not_a_grid(self) -> None:
        model = make(patch_drop_rate=0.5).train()
        _, (call,) = AttentionTap(model)(torch.randn(1, 3, 32, 32))
        with pytest.raises(
            ValueError, match=r"expected 4·4 = 16 patch tokens for images of 32x32, its attention has 8"
        ):
            patch_grid(model, (32, 32), call.key.shape[2] - 1)
        with pytest.raises(TypeError, match="expected a Vision Transformer .*, got Linear"):
            patch_grid(nn.Linear(2, 2), (32, 32), 16)


class TestClsFeatures:
    def test_normalised_tokens_are_taken_as_they_are(self) -> None:
        model = make()
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        assert torch.equal(cls_features(model, tokens), tokens[:, 0])
        assert torch.equal(cls_features(model, tokens), model.forward_head(tokens, pre_logits=True))

    def test_models_that_normalise_after_pooling(self) -> None:
        model = make(global_pool="avg")
        assert isinstance(model.norm, nn.Identity)
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        features = cls_features(model, tokens)
        assert torch.equal(features, model.fc_norm(tokens[:, 0])) and not torch.equal(features, tokens[:, 0])

    def test_refusals(self) -> None:
        model = make(final_norm=False)
        with pytest.raises(ValueError, match="neither norm nor fc_norm"):
            cls_features(model, torch.randn(2, 17, 48))
        with pytest.raises(ValueError, match=r"expected \[B, N, D\] tokens, got \(2, 48\)"):
            cls_features(make(), torch.randn(2, 48))


def test_resolve_model() -> None:
    model = make()
    assert resolve_model(model, pretrained=True) is model
    built = resolve_model("test_vit", pretrained=False)
    assert isinstance(built, nn.Module) and built.num_classes == 0


def test_image_size() -> None:
    assert image_size(make()) == (32, 32)
    assert image_size(make(dynamic_img_size=True)) is None
    assert image_size(make("naflexvit_base_patch16_gap", img_size=None)) is None


def test_input_stats() -> None:
    assert input_stats(make()) == ((0.5,) * 3, (0.5,) * 3)
    assert input_stats(make("vit_small_patch16_224.dino"))[0] == pytest.approx((0.485, 0.456, 0.406))
