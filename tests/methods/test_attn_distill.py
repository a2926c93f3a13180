"""AttnDistill: its losses are the paper's, its teacher stays out of the way, and it is a timm training task."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import nn
from torch.nn import functional as F

from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tap import AttentionTap
from attnkd.methods.attn_distill import AttnDistill, make_projector

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}


def make(name: str = "vit_tiny_patch16_224", seed: int = 0, spread: float = 0.1, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def student(**changes: object) -> nn.Module:
    return make(seed=1, **changes)


def teacher(**changes: object) -> nn.Module:
    return make(seed=2, **changes)


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def cls_probs(model: nn.Module, x: torch.Tensor, block: int = -1, prefix: int = 1) -> torch.Tensor:
    """[B, H, 1 + patches], from the map the model computes without fused attention; no other prefix tokens."""
    model = copy.deepcopy(model).eval().double()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    seen = []
    model.blocks[block].attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_features(x.double())
    row = seen[0][:, :, 0]
    row = torch.cat([row[..., :1], row[..., prefix:]], -1)
    return row / row.sum(-1, keepdim=True)


def kl(target: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    return (target * (target.log() - probs.log())).sum() / target.shape[0]


def merged(probs: torch.Tensor, temperature: float = 10.0) -> torch.Tensor:
    return (probs.log().sum(1, keepdim=True) / temperature).softmax(-1)


def resized(probs: torch.Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    cls, patches = probs[..., :1], probs[..., 1:]
    grid = F.interpolate(patches.unflatten(-1, old), new, mode=mode, align_corners=False).flatten(-2).clamp_min(1e-5)
    return torch.cat([cls, grid / grid.sum(-1, keepdim=True) * (1 - cls)], -1)


def attn_loss(task: AttnDistill, x: torch.Tensor) -> torch.Tensor:
    return task(x)["attn_loss"].double()


CASES = {  # teacher's changes: what the paper does with its class-token row
    "same heads and patches": ({}, lambda s, t: kl(t, s)),
    "other patches": ({"patch_size": 4}, lambda s, t: kl(resized(t, (8, 8), (4, 4)), s)),
    "other heads": ({"num_heads": 6}, lambda s, t: kl(merged(t), merged(s))),
    "both": ({"num_heads": 6, "patch_size": 4}, lambda s, t: kl(merged(resized(t, (8, 8), (4, 4))), merged(s))),
}


class TestAttentionGuidance:
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    @pytest.mark.parametrize("case", CASES)
    def test_the_four_cases(self, case: str, impl: str) -> None:
        changes, expected = CASES[case]
        s, t, x = student(), teacher(embed_dim=96, **changes), images()
        want = expected(cls_probs(s, x), cls_probs(t, x))
        got = attn_loss(AttnDistill(s, t, impl=impl), x)
        assert want > 1e-4
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("case", CASES)
    def test_gradients(self, case: str) -> None:
        changes, expected = CASES[case]
        s, t, x = student(), teacher(**changes), images()
        target = cls_probs(t, x).detach()
        other = copy.deepcopy(s)
        AttnDistill(s, t, pa_weight=0, attn_weight=2.0)(x)["loss"].backward()
        (2.0 * expected(_student_probs_with_grad(other, x), target)).backward()
        compared = 0
        for (name, one), two in zip(s.named_parameters(), other.parameters(), strict=True):
            if two.grad is not None and two.grad.any():
                scale = two.grad.abs().max().item()
                torch.testing.assert_close(
                    one.grad, two.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: n + m
                )
                compared += 1
        assert compared > 20

    @pytest.mark.parametrize(
        ("name", "prefix"),
        [
            ("vit_small_patch14_reg4_dinov2", 5),
            ("vit_small_patch16_dinov3", 5),
            ("deit_tiny_distilled_patch16_224", 2),
            ("beit_base_patch16_224", 1),
        ],
    )
    def test_only_class_token_and_patches_are_compared(self, name: str, prefix: int) -> None:
        other, plain, x = make(name, seed=2), student(), images()
        if hasattr(other, "rope") and hasattr(other.rope, "rescale_coords"):
            other.rope.rescale_coords = None
        rows, plain_rows = cls_probs(other, x, prefix=prefix), cls_probs(plain, x)
        task = AttnDistill(copy.deepcopy(plain), copy.deepcopy(other))
        torch.testing.assert_close(attn_loss(task, x), kl(rows, plain_rows), rtol=2e-5, atol=1e-7)
        fine = make(name, seed=2, patch_size=4)
        if hasattr(fine, "rope") and hasattr(fine.rope, "rescale_coords"):
            fine.rope.rescale_coords = None
        rows_fine = resized(cls_probs(fine, x, prefix=prefix), (8, 8), (4, 4))
        task = AttnDistill(copy.deepcopy(plain), fine)
        torch.testing.assert_close(attn_loss(task, x), kl(rows_fine, plain_rows), rtol=2e-5, atol=1e-7)
        task = AttnDistill(copy.deepcopy(other).eval(), copy.deepcopy(plain)).eval()
        torch.testing.assert_close(attn_loss(task, x), kl(plain_rows, rows), rtol=2e-5, atol=1e-7)

    def test_a_learned_bias_gets_its_gradient(self) -> None:
        s = make("beit_base_patch16_224", seed=1)
        AttnDistill(s, teacher(), pa_weight=0)(images())["loss"].backward()
        assert s.blocks[-1].attn.relative_position_bias_table.grad.any()

    @pytest.mark.parametrize("name", ["mean", "max", "min"])
    def test_other_merges(self, name: str) -> None:
        s, t, x = student(), teacher(num_heads=6), images()

        def merge(probs: torch.Tensor) -> torch.Tensor:
            row = {"mean": probs.mean(1), "max": probs.amax(1), "min": probs.amin(1)}[name]
            return row / row.sum(-1, keepdim=True)

        want = kl(merge(cls_probs(t, x)), merge(cls_probs(s, x)))
        torch.testing.assert_close(attn_loss(AttnDistill(s, t, merge=name), x), want, rtol=2e-5, atol=1e-7)

    def test_merge_and_temperature_given(self) -> None:
        s, t, x = student(), teacher(), images()
        want = kl(merged(cls_probs(t, x), 2.0), merged(cls_probs(s, x), 2.0))
        got = attn_loss(AttnDistill(s, t, merge="logsum", temperature=2.0), x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("changes", [{}, {"patch_size": 4}])
    def test_temperature_without_merging(self, changes: dict) -> None:
        s, t, x = student(), teacher(**changes), images()

        def soft(probs: torch.Tensor) -> torch.Tensor:
            return (probs.log() / 4.0).softmax(-1)

        target = soft(cls_probs(t, x))
        if changes:
            target = resized(target, (8, 8), (4, 4))
        got = attn_loss(AttnDistill(s, t, temperature=4.0), x)
        torch.testing.assert_close(got, kl(target, soft(cls_probs(s, x))), rtol=2e-5, atol=1e-7)

    def test_resample_mode(self) -> None:
        s, t, x = student(), teacher(patch_size=4), images()
        want = kl(resized(cls_probs(t, x), (8, 8), (4, 4), "bilinear"), cls_probs(s, x))
        got = attn_loss(AttnDistill(s, t, resample_mode="bilinear"), x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)

    def test_oblong_images(self) -> None:
        """As many patches in another arrangement are another grid: 2·8 is not 4·4."""
        s = student(dynamic_img_size=True)
        t = teacher(dynamic_img_size=True, patch_size=4)
        x = torch.randn(2, 3, 16, 64)
        want = kl(resized(cls_probs(t, x), (4, 16), (2, 8)), cls_probs(s, x))
        torch.testing.assert_close(attn_loss(AttnDistill(s, t), x), want, rtol=2e-5, atol=1e-7)
        t = teacher(dynamic_img_size=True, patch_size=(4, 16))
        want = kl(resized(cls_probs(t, x), (4, 4), (2, 8)), cls_probs(s, x))
        torch.testing.assert_close(attn_loss(AttnDistill(s, t), x), want, rtol=2e-5, atol=1e-7)

    def test_several_blocks_are_averaged(self) -> None:
        s, t, x = student(), teacher(depth=6), images()
        pairs = [(0, 1), (1, 3), (2, 5)]
        want = sum(kl(cls_probs(t, x, b), cls_probs(s, x, a)) for a, b in pairs) / 3
        torch.testing.assert_close(attn_loss(AttnDistill(s, t, blocks="all"), x), want, rtol=2e-5, atol=1e-7)
        want = (kl(cls_probs(t, x, 0), cls_probs(s, x, 2)) + kl(cls_probs(t, x, 4), cls_probs(s, x, 0))) / 2
        task = AttnDistill(student(), teacher(depth=6), blocks=[-1, 0], teacher_blocks=[0, 4])
        torch.testing.assert_close(attn_loss(task, x), want, rtol=2e-5, atol=1e-7)

    def test_autocast(self) -> None:
        s, t, x = student(), teacher(num_heads=6), images()
        want = kl(merged(cls_probs(t, x)), merged(cls_probs(s, x)))
        with torch.autocast("cpu", torch.bfloat16):
            result = AttnDistill(s, t)(x)
        assert result["loss"].dtype == torch.float32
        torch.testing.assert_close(result["attn_loss"].double(), want, rtol=0.1, atol=0)
        result["loss"].backward()


def _student_probs_with_grad(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.blocks[-1].attn.fused_attn = False
    seen = []
    model.blocks[-1].attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_features(x)
    return seen[0][:, :, 0]


def test_pair_blocks() -> None:
    def indices(depth: int, teacher_depth: int, blocks: object, teacher_blocks: object = None) -> list:
        one, two, pairs = pair_blocks(student(depth=depth), teacher(depth=teacher_depth), blocks, teacher_blocks)
        return [(int(one[i].split(".")[1]), int(two[j].split(".")[1])) for i, j in pairs]

    assert indices(3, 3, "all") == [(0, 0), (1, 1), (2, 2)]
    assert indices(3, 6, [-1, 0]) == [(2, 5), (0, 1)]
    assert indices(6, 2, "all") == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert indices(3, 4, "all") == [(0, 1), (1, 2), (2, 3)]
    assert indices(3, 3, [0, 1], [2, 2]) == [(0, 2), (1, 2)]
    assert indices(3, 3, "blocks.0.attn", -1) == [(0, 2)]
    with pytest.raises(ValueError, match="teacher_blocks: expected 2, one for each of blocks, got 1"):
        indices(3, 3, [0, 1], 2)
    with pytest.raises(ValueError, match="teacher_blocks: needed when blocks are module paths"):
        indices(3, 3, "blocks.0.attn")
    with pytest.raises(ValueError, match=r"\[-3, 2\] for 3 blocks, got 3"):
        indices(3, 3, 3)


class TestPublishedCode:
    """The loss steps of the authors' training code, restated: both rows clamped to [1e-5, 0.996] and renormalised."""

    @staticmethod
    def published(s: torch.Tensor, t: torch.Tensor, grids: tuple | None, aggregate: bool) -> torch.Tensor:
        if grids is not None:
            cls, patches = t[..., :1], t[..., 1:].unflatten(-1, grids[0])
            patches = F.interpolate(patches, size=grids[1], mode="bicubic").flatten(-2)
            t = torch.cat([cls, patches * ((1 - cls) / patches.sum(-1, keepdim=True))], -1)
        if aggregate:
            s, t = ((rows.log().sum(1) / 10.0).softmax(-1) for rows in (s, t))
        s, t = (F.normalize(rows.clamp(1e-5, 0.996), p=1, dim=-1) for rows in (s, t))
        return F.kl_div(s.log(), t, reduction="batchmean")

    @pytest.mark.parametrize("case", CASES)
    def test_equal_where_its_clamps_do_not_bind(self, case: str) -> None:
        changes, _ = CASES[case]
        s, t, x = student(spread=0.05), teacher(spread=0.05, **changes), images()
        rows, target = cls_probs(s, x), cls_probs(t, x)
        for probs in (rows, target):
            assert 1e-5 < probs.min() and probs.max() < 0.996, "the clamps must not bind here"
        grids = ((8, 8), (4, 4)) if "patch_size" in changes else None
        if grids is not None:
            raw = F.interpolate(target[..., 1:].unflatten(-1, grids[0]), size=grids[1], mode="bicubic")
            assert raw.min() > 1e-5, "nor may bicubic undershoot"
        want = self.published(rows, target, grids, "num_heads" in changes)
        torch.testing.assert_close(attn_loss(AttnDistill(s, t), x), want, rtol=5e-5, atol=1e-7)

    def test_different_where_they_bind(self) -> None:
        s, t, x = student(spread=0.4), teacher(spread=0.4), images()
        rows, target = cls_probs(s, x), cls_probs(t, x)
        assert rows.min() < 1e-5
        published = self.published(rows, target, None, False)
        ours = attn_loss(AttnDistill(s, t), x)
        torch.testing.assert_close(ours, kl(target, rows), rtol=2e-5, atol=1e-7)
        assert (ours - published).abs() > 0.01 * ours

    def test_published_interpolation_is_nan_where_bicubic_undershoots(self) -> None:
        s, t, x = student(), teacher(spread=0.3, patch_size=4, num_heads=6), images()
        assert self.published(cls_probs(s, x), cls_probs(t, x), ((8, 8), (4, 4)), True).isnan()
        assert attn_loss(AttnDistill(s, t), x).isfinite()


class TestProjectorAlignment:
    def test_is_the_mse_of_normalised_class_tokens(self) -> None:
        s, t, x = student(), teacher(embed_dim=96), images()
        task = AttnDistill(s, t)
        result = task(x)
        projector = task.trainable_module.projector
        with torch.no_grad():
            target = t.forward_features(x)[:, 0]
            features = projector(s.forward_features(x)[:, 0])
        torch.testing.assert_close(result["features"], features)
        torch.testing.assert_close(result["pa_loss"], ((features - target) ** 2).mean())
        torch.testing.assert_close(result["loss"], result["pa_loss"] + 0.1 * result["attn_loss"])

    def test_projector(self) -> None:
        layers = list(make_projector(48, 96))
        kinds = [type(layer).__name__ for layer in layers]
        assert kinds == ["LayerNorm", "Linear", "GELU", "Linear", "GELU", "Linear", "GELU", "Linear", "LayerNorm"]
        sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
        assert sizes == [(48, 96), (96, 48), (48, 96), (96, 96)]

    def test_teacher_that_normalises_after_pooling(self) -> None:
        t, x = teacher(global_pool="avg"), images()
        task = AttnDistill(student(), t)
        result = task(x)
        with torch.no_grad():
            target = t.fc_norm(t.forward_features(x)[:, 0])
        torch.testing.assert_close(result["pa_loss"], F.mse_loss(result["features"], target))

    def test_weights(self) -> None:
        x = images()
        both = AttnDistill(student(), teacher(), pa_weight=0.5, attn_weight=3.0)(x)
        torch.testing.assert_close(both["loss"], 0.5 * both["pa_loss"] + 3.0 * both["attn_loss"])
        only = AttnDistill(student(), teacher(), attn_weight=0)(x)
        assert torch.equal(only["loss"], only["pa_loss"]) and "attn_loss" not in only
        attn = AttnDistill(student(), teacher(), pa_weight=0, attn_weight=1.0)
        result = attn(x)
        assert result.keys() == {"loss", "attn_loss"} and torch.equal(result["loss"], result["attn_loss"])
        assert attn.trainable_module.projector is None

    def test_attention_only_stops_both_models(self) -> None:
        s, t = student(), teacher()
        for model in (s, t):
            model.blocks[-1].mlp.register_forward_hook(lambda *_: pytest.fail("ran past the tapped attention"))
        AttnDistill(s, t, pa_weight=0)(images())
        with pytest.raises(pytest.fail.Exception):
            AttnDistill(student(), t)(images())


class TestTeacher:
    def test_is_frozen_and_in_evaluation_mode(self) -> None:
        t = teacher(drop_path_rate=0.9, proj_drop_rate=0.9).train()
        task = AttnDistill(student(), t).train()
        task.requires_grad_(True)
        assert not t.training and not t.blocks[0].training and task.training and task.student.training
        assert not any(parameter.requires_grad for parameter in t.parameters())
        x = images()
        assert torch.equal(task.teacher(x)[0], task.teacher(x)[0])
        task(x)["loss"].backward()
        assert all(parameter.grad is None for parameter in t.parameters())

    def test_is_in_no_state_dict_and_no_optimizer(self) -> None:
        s, t = student(), teacher()
        task = AttnDistill(s, t)
        ours = {id(p) for p in s.parameters()} | {id(p) for p in task.trainable_module.projector.parameters()}
        assert {id(p) for p in task.parameters()} == ours
        assert not [key for key in task.state_dict() if "teacher" in key]
        task.load_state_dict(task.state_dict())

    def test_moves_with_the_task(self) -> None:
        task = AttnDistill(student(), teacher(), input_norm=((0.1,) * 3, (0.2,) * 3)).to(torch.float64)
        assert task.teacher.scale.dtype == torch.float64
        result = task(images().double())
        assert result["loss"].dtype == torch.float64

    def test_copies_have_their_own_teacher(self) -> None:
        task, x = AttnDistill(student(), teacher()), images()
        other = copy.deepcopy(task)
        assert other.teacher.tap.model is not task.teacher.tap.model
        assert torch.equal(other(x)["loss"], task(x)["loss"])

    def test_input_norm(self) -> None:
        s, x = student(), images()
        t = make("vit_small_patch16_224.dino", seed=2)
        mean, std = ((torch.tensor(t.pretrained_cfg[key]).view(1, 3, 1, 1)) for key in ("mean", "std"))
        task = AttnDistill(s, t, input_norm=((0.5, 0.4, 0.3), (0.2, 0.3, 0.5)))
        pixels = x * torch.tensor((0.2, 0.3, 0.5)).view(1, 3, 1, 1) + torch.tensor((0.5, 0.4, 0.3)).view(1, 3, 1, 1)
        features, _ = task.teacher(x)
        with torch.no_grad():
            torch.testing.assert_close(features[:, 0], t.forward_features((pixels - mean) / std)[:, 0])
        same = AttnDistill(student(), t, input_norm=(t.pretrained_cfg["mean"], t.pretrained_cfg["std"]))
        assert same.teacher.scale is None

    def test_different_pretraining_is_mentioned(self, caplog: pytest.LogCaptureFixture) -> None:
        t = make("vit_small_patch16_224.dino", seed=2)
        with caplog.at_level(logging.WARNING):
            AttnDistill(student(), t)
        assert "image mean and std differ between student" in caplog.text
        caplog.clear()
        AttnDistill(student(), t, input_norm=((0.5,) * 3, (0.5,) * 3))
        AttnDistill(student(), teacher())
        assert "mean and std" not in caplog.text

    def test_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The student from scratch, the teacher with its published weights, both without classifier."""
        build, asked = timm.create_model, []

        def without_download(name: str, **kwargs: object) -> nn.Module:
            asked.append((name, dict(kwargs)))
            return build(name, **{**kwargs, "pretrained": False})

        monkeypatch.setattr(timm, "create_model", without_download)
        task = AttnDistill("test_vit", "test_vit")
        assert asked == [
            ("test_vit", {"pretrained": False, "num_classes": 0}),
            ("test_vit", {"pretrained": True, "num_classes": 0}),
        ]
        assert task(images(size=160))["loss"].isfinite()

    @pytest.mark.parametrize("where", ["weights", "attention"])
    def test_a_teacher_that_is_not_finite_is_named(self, where: str) -> None:
        """Broken from the beginning, and one whose numbers break on the way."""

        def poisoned(**options: object) -> AttnDistill:
            t = teacher()
            task = AttnDistill(student(), t, **options)
            with torch.no_grad():
                (t.norm.bias if where == "weights" else t.blocks[-1].attn.qkv.bias)[0] = torch.nan
            return task

        with pytest.raises(RuntimeError, match=r"teacher \(VisionTransformer\): its class token is NaN or infinite"):
            poisoned()(images())
        if where == "attention":
            with pytest.raises(RuntimeError, match=r"teacher .*: its query of tapped attention 0"):
                poisoned(pa_weight=0)(images())
        assert poisoned(check_finite=False)(images())["loss"].isnan()
        broken = teacher()
        with torch.no_grad():
            broken.norm.bias[0] = torch.nan
        with pytest.raises(ValueError, match="teacher: expected finite weights, got NaN or infinity in norm.bias"):
            AttnDistill(student(), broken)

    def test_a_student_that_is_not_finite_is_passed_on(self) -> None:
        """A gradient scaler skips such a step on its own. One that is broken from the beginning is refused."""
        s = student()
        task = AttnDistill(s, teacher())
        with torch.no_grad():
            s.norm.bias[0] = torch.inf
        assert not task(images())["loss"].isfinite()
        task.untap()
        with pytest.raises(ValueError, match="student: expected finite weights, got NaN or infinity in norm.bias"):
            AttnDistill(s, teacher())


class TestTrainingTask:
    def test_is_one(self) -> None:
        assert issubclass(AttnDistill, TrainingTask)

    def test_training_brings_the_loss_down(self) -> None:
        s, x = student(num_classes=10), images(8)
        task = AttnDistill(s, teacher(embed_dim=96, num_heads=6, patch_size=4, depth=4)).train()
        optimizer = create_optimizer_v2(task.trainable_module, "adamw", lr=1e-3, weight_decay=0.05)
        undecayed = [id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
        assert id(s.pos_embed) in undecayed and id(s.cls_token) in undecayed
        losses = []
        for _ in range(30):
            result = task(x)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.append({name: result[name].item() for name in ("loss", "pa_loss", "attn_loss")})
        assert all(losses[-1][name] < 0.7 * losses[0][name] for name in losses[0]), (losses[0], losses[-1])
        assert result["output"].shape == (8, 10) and not result["output"].requires_grad
        assert s.head.weight.grad is None

    def test_with_a_criterion(self) -> None:
        s, x, targets = student(num_classes=10), images(), torch.tensor([1, 7])
        task = AttnDistill(s, teacher(), criterion=nn.CrossEntropyLoss(), task_loss_weight=0.5)
        result = task(x, targets)
        torch.testing.assert_close(result["task_loss"], F.cross_entropy(s(x), targets))
        total = result["pa_loss"] + 0.1 * result["attn_loss"] + 0.5 * result["task_loss"]
        torch.testing.assert_close(result["loss"], total)
        result["loss"].backward()
        assert s.head.weight.grad.any()
        with pytest.raises(ValueError, match="targets: needed by criterion"):
            task(x)
        only = AttnDistill(student(num_classes=10), teacher(), pa_weight=0, criterion=nn.CrossEntropyLoss())
        assert only(x, targets)["output"].requires_grad

    def test_checkpoints(self) -> None:
        task, x = AttnDistill(student(), teacher()), images()
        state = task.get_checkpoint_state()
        assert list(state["state_dict"]) == list(student().state_dict()), "a plain student, loadable by timm"
        assert set(state["task_state"]) == {"projector", "schedules"}
        other = AttnDistill(make(seed=9), teacher())
        assert not torch.equal(other(x)["pa_loss"], task(x)["pa_loss"])
        other.load_checkpoint_state(state["state_dict"], state["task_state"])
        assert torch.equal(other(x)["loss"], task(x)["loss"])
        with pytest.raises(RuntimeError, match="no task state 'projector'"):
            other.load_checkpoint_state(state["state_dict"])

    def test_ema(self) -> None:
        task, x = AttnDistill(student(), teacher()), images()
        task.setup_ema(decay=0.5)
        with torch.no_grad():
            task.student.norm.bias.add_(1.0)
        task.update_ema()
        ema = task.get_eval_model(ema=True)
        assert isinstance(ema, type(task.student)) and ema is not task.student
        torch.testing.assert_close(ema.norm.bias, task.student.norm.bias - 0.5)
        assert task.get_eval_model() is task.student
        assert set(task.get_checkpoint_state(ema=True)) == {"state_dict_ema", "task_state_ema"}
        assert ema(x).shape == (2, 48)

    def test_untap(self) -> None:
        s, t = student(), teacher()
        task = AttnDistill(s, t)
        assert task.untap() == (s, t)
        assert type(s.blocks[-1].attn) is type(t.blocks[-1].attn) is timm.layers.Attention

    def test_gradient_checkpointing(self) -> None:
        s, t, x = student(), teacher(), images()
        task = AttnDistill(s, t).train()
        grads = []
        for enable in (False, True):
            s.zero_grad()
            s.set_grad_checkpointing(enable)
            t.set_grad_checkpointing(enable)
            task(x)["loss"].backward()
            grads.append([p.grad.clone() for p in s.parameters() if p.grad is not None])
        for one, two in zip(*grads, strict=True):
            assert torch.equal(one, two)

    def test_compile(self) -> None:
        torch._dynamo.reset()
        s, x = student(num_classes=10, depth=2), images()
        plain = AttnDistill(copy.deepcopy(s), teacher(num_heads=6, depth=1))
        task = AttnDistill(s, teacher(num_heads=6, depth=1))
        task.trainable_module.projector.load_state_dict(plain.trainable_module.projector.state_dict())
        eval_model = task.compile(backend="aot_eager", fullgraph=True)
        result, want = task(x), plain(x)
        torch.testing.assert_close(result["loss"], want["loss"])
        result["loss"].backward()
        want["loss"].backward()
        torch.testing.assert_close(s.patch_embed.proj.weight.grad, plain.student.patch_embed.proj.weight.grad)
        torch.testing.assert_close(eval_model(x), s(x))
        assert task.student is s
        assert list(task.get_checkpoint_state()["state_dict"]) == list(s.state_dict())

    def test_the_whole_task_compiles(self) -> None:
        torch._dynamo.reset()
        x = images()
        task = AttnDistill(student(depth=1), teacher(depth=1, patch_size=4, num_heads=6), check_finite=False)
        want = task(x)["loss"]
        torch.testing.assert_close(torch.compile(task, backend="aot_eager", fullgraph=True)(x)["loss"], want)

    @pytest.mark.parametrize("pa_weight", [0.0, 1.0])
    def test_distributed(self, pa_weight: float, tmp_path: object) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            s, x = student(num_classes=10), images()
            plain = AttnDistill(copy.deepcopy(s), teacher(), pa_weight=pa_weight)
            task = AttnDistill(s, teacher(), pa_weight=pa_weight)
            if pa_weight:
                task.trainable_module.projector.load_state_dict(plain.trainable_module.projector.state_dict())
            assert task.prepare_distributed() is task
            for _ in range(2):  # DDP complains about the first step's unused parameters at the second
                s.zero_grad()
                task(x)["loss"].backward()
            plain(x)["loss"].backward()
            for one, two in zip(s.parameters(), plain.student.parameters(), strict=True):
                if two.grad is not None:
                    torch.testing.assert_close(one.grad, two.grad)
            assert task.student is s and task.get_eval_model() is s
            assert list(task.get_checkpoint_state()["state_dict"]) == list(s.state_dict())
        finally:
            torch.distributed.destroy_process_group()


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"pa_weight": 0, "attn_weight": 0}, "pa_weight, patch_weight, attn_weight: all are 0, nothing"),
            ({"attn_weight": -1.0}, "attn_weight: expected a number >= 0, got -1"),
            ({"pa_weight": float("nan")}, "pa_weight: expected a finite number"),
            ({"merge": "sum"}, "merge: expected one of 'auto', None, .*got 'sum'"),
            ({"temperature": 0.0}, "temperature: expected a number > 0, got 0"),
            ({"resample_mode": "nearest"}, "resample_mode: expected one of .*got 'nearest'"),
            ({"input_norm": (0.5, 0.5)}, r"input_norm: expected \(\(mean, ...\), \(std, ...\)\), got \(0.5, 0.5\)"),
            ({"input_norm": ((0.5,), (0.5,))}, "input_norm: expected 3 channels, got 1 means"),
        ],
    )
    def test_options(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AttnDistill(student(), teacher(), **arguments)

    def test_no_class_token(self) -> None:
        registers = timm.create_model("vit_medium_patch16_reg4_gap_256", **TINY)
        with pytest.raises(
            ValueError, match=r"student: class tokens .*VisionTransformer has none \(num_prefix_tokens = 4"
        ):
            AttnDistill(registers, teacher())
        with pytest.raises(ValueError, match=r"teacher: class tokens .*has none"):
            AttnDistill(student(), registers)
        with pytest.raises(TypeError, match="student: expected a Vision Transformer .* or a timm name, got Linear"):
            AttnDistill(nn.Linear(2, 2), teacher())

    def test_one_model_in_both_roles(self) -> None:
        model = student()
        with pytest.raises(ValueError, match="teacher: shares parameters with student"):
            AttnDistill(model, model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        other = teacher()
        other.norm = model.norm
        with pytest.raises(ValueError, match="teacher: shares parameters with student"):
            AttnDistill(model, other)

    def test_image_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"student takes \(32, 32\) and teacher \(64, 64\) pixels only"):
            AttnDistill(student(), teacher(img_size=64))
        AttnDistill(student(), teacher(img_size=64, dynamic_img_size=True))(images())

    def test_images(self) -> None:
        task = AttnDistill(student(), teacher())
        with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got \(3, 32, 32\)"):
            task(images()[0])
        with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got dict; NaFlex"):
            task({"patches": images()})

    def test_heads_that_differ_without_merging(self) -> None:
        with pytest.raises(ValueError, match="merge"):
            AttnDistill(student(), teacher(num_heads=6), merge=None)(images())

    def test_patch_dropout(self) -> None:
        task = AttnDistill(student(patch_drop_rate=0.5), teacher()).train()
        with pytest.raises(ValueError, match="VisionTransformer: expected 4·4 = 16 patch tokens .*patch dropout"):
            task(images())

    def test_attention_that_cannot_be_captured(self) -> None:
        xcit = timm.create_model("xcit_nano_12_p8_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
        with pytest.raises(NotImplementedError, match="XCA"):
            AttnDistill(student(), xcit, teacher_blocks=1)

    def test_without_gradients_it_still_gives_a_loss(self) -> None:
        with torch.no_grad():
            assert AttnDistill(student(), teacher())(images())["loss"].isfinite()

    def test_a_tap_of_ones_own_on_the_same_student(self) -> None:
        s, x = student(), images()
        tap = AttentionTap(s, "all")
        result = AttnDistill(s, teacher())(x)
        assert result["loss"].isfinite() and len(tap(x)[1]) == 3
