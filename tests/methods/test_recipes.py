"""AttnDistill's training recipe has the published numbers, and its position embeddings are what they say."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from attnkd import AttnDistill, AttnDistillRecipe, sincos_pos_embed_
from attnkd.methods.recipes import Recipe

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


def make(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **changes})


def task(**changes: object) -> AttnDistill:
    return AttnDistill(sincos_pos_embed_(make()), make(embed_dim=96, **changes), verbose=False)


class TestRecipe:
    def test_published_numbers(self) -> None:
        recipe = AttnDistillRecipe(epochs=800, batch_size=4096)
        assert recipe.lr == pytest.approx(2.4e-3) and AttnDistillRecipe(100, 64).lr == pytest.approx(3.75e-5)
        optimizer = recipe.optimizer(task())
        assert type(optimizer) is torch.optim.AdamW
        for group in optimizer.param_groups:
            assert group["lr"] == recipe.lr and group["betas"] == (0.9, 0.95)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]

    def test_the_loss_has_them_as_its_defaults(self) -> None:
        made = task(num_heads=6)
        assert made.schedules.values() == {
            "pa_weight": 1.0,
            "patch_weight": 0.0,
            "attn_weight": 0.1,
            "task_loss_weight": 1.0,
        }
        x = torch.randn(2, 3, 32, 32)
        ten = AttnDistill(
            copy.deepcopy(made.student), make(embed_dim=96, num_heads=6), temperature=10.0, merge="logsum"
        )
        torch.testing.assert_close(made(x)["attn_loss"], ten(x)["attn_loss"])

    def test_weight_decay_is_for_matrices_of_student_and_projector(self) -> None:
        made = task()
        optimizer = AttnDistillRecipe(50, 256).optimizer(made)
        decayed, undecayed = (
            {id(p) for group in optimizer.param_groups if bool(group["weight_decay"]) == on for p in group["params"]}
            for on in (True, False)
        )
        names = dict(made.trainable_module.named_parameters())
        for name, parameter in names.items():
            if name == "tap.model.pos_embed":
                assert id(parameter) not in decayed | undecayed, "fixed position embeddings do not train"
            elif name == "tap.model.cls_token" or parameter.ndim == 1:
                assert id(parameter) in undecayed, name
            else:
                assert id(parameter) in decayed, name
        assert any(name.startswith("projector.") and id(p) in decayed for name, p in names.items())
        teacher = {id(p) for p in made.teacher.parameters()}
        assert not teacher & (decayed | undecayed)

    def test_learnable_position_embeddings_train_without_weight_decay(self) -> None:
        made = AttnDistill(sincos_pos_embed_(make(), learnable=True), make(embed_dim=96), verbose=False)
        optimizer = AttnDistillRecipe(50, 256).optimizer(made)
        (group,) = [g for g in optimizer.param_groups if any(p is made.student.pos_embed for p in g["params"])]
        assert group["weight_decay"] == 0

    def test_optimizer_under_wrappers(self, tmp_path: object) -> None:
        """DDP and torch.compile must not hide which parameters have no weight decay."""
        plain = [len(group["params"]) for group in AttnDistillRecipe(50, 256).optimizer(task()).param_groups]
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            made = task()
            made.compile(backend="eager")
            made.prepare_distributed()
            groups = AttnDistillRecipe(50, 256).optimizer(made).param_groups
            assert [len(group["params"]) for group in groups] == plain
        finally:
            torch.distributed.destroy_process_group()

    def test_options_reach_the_optimizer(self) -> None:
        optimizer = AttnDistillRecipe(50, 256).optimizer(make(), foreach=False, betas=(0.9, 0.99))
        assert optimizer.param_groups[0]["foreach"] is False and optimizer.param_groups[0]["betas"] == (0.9, 0.99)

    def test_learning_rate(self) -> None:
        """Linear from 0 over 40 epochs, then half a cosine to 0, step by step; the published code's formula."""
        recipe, steps = AttnDistillRecipe(epochs=100, batch_size=512), 5
        optimizer = recipe.optimizer(make())
        scheduler = recipe.scheduler(optimizer, steps_per_epoch=steps)
        seen = [optimizer.param_groups[0]["lr"]]
        for step in range(1, 100 * steps + 1):
            scheduler.step_update(step)
            seen.append(optimizer.param_groups[0]["lr"])
        for step, lr in enumerate(seen):
            epoch = step / steps
            fall = 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 60))
            assert lr == pytest.approx(3e-4 * (epoch / 40 if epoch < 40 else fall), rel=1e-9, abs=1e-15)
        assert seen[0] == 0 and max(seen) == seen[40 * steps] == pytest.approx(3e-4) and seen[-1] == 0
        assert all(group["lr"] == 0 for group in optimizer.param_groups)

    def test_without_warm_up(self) -> None:
        recipe = AttnDistillRecipe(epochs=2, batch_size=256, warmup_epochs=0)
        optimizer = recipe.optimizer(make())
        recipe.scheduler(optimizer, steps_per_epoch=3)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1.5e-4)

    def test_images(self) -> None:
        model = make("vit_small_patch16_224.dino", pretrained=False)
        crop, flip, tensor, norm = AttnDistillRecipe(50, 256).transform(model).transforms
        assert crop.size == (32, 32) and crop.scale == (0.2, 1.0) and crop.interpolation.name == "BICUBIC"
        assert type(flip).__name__ == "RandomHorizontalFlip" and flip.p == 0.5
        assert norm.mean.tolist() == pytest.approx(model.pretrained_cfg["mean"])
        assert norm.std.tolist() == pytest.approx(model.pretrained_cfg["std"])
        picture = Image.fromarray(np.full((50, 70, 3), 128, np.uint8))
        out = AttnDistillRecipe(50, 256).transform(model)(picture)
        want = (128 / 255 - torch.tensor(model.pretrained_cfg["mean"])) / torch.tensor(model.pretrained_cfg["std"])
        torch.testing.assert_close(out, want[:, None, None].expand(3, 32, 32))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs: expected at least 1, got 0"),
            ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
            ({"epochs": 40}, "warmup_epochs: expected 0 to 39 for 40 epochs, got 40"),
            ({"warmup_epochs": -1}, "warmup_epochs: expected 0 to 99"),
            ({"crop_scale": (1.0, 0.2)}, "crop_scale: expected 0 < smallest <= largest <= 1"),
        ],
    )
    def test_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AttnDistillRecipe(**{"epochs": 100, "batch_size": 64, **options})

    @pytest.mark.parametrize(
        "policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "original-mstd0.5", "v0r", "augmix-m5-w4-d2"]
    )
    def test_no_policy_asks_for_images_without_a_bit(self, policy: str) -> None:
        """Pillow refuses them since version 13."""
        made = Recipe(10, 4, auto_augment=policy).transform_for((16, 16), (0.5,) * 3, (0.5,) * 3)
        ops = [op for step in made.transforms for op in getattr(step, "ops", ())]
        ops += [op for step in made.transforms for several in getattr(step, "policy", ()) for op in several]
        found = [op for op in ops if op.name.startswith("Posterize")]
        assert found
        image = Image.effect_noise((16, 16), 60).convert("RGB")
        for op in found:
            op.prob, op.magnitude_std = 1.0, 0
            for op.magnitude in range(11):
                assert op(image).size == (16, 16)
        pickle.loads(pickle.dumps(made))  # workers that are not forked get it so

    def test_whole_images_are_the_same_every_time(self) -> None:
        made = Recipe(10, 4, crop_scale=(1.0, 1.0), hflip=0.0).transform_for((16, 16), (0.0,) * 3, (1.0,) * 3)
        image = Image.effect_noise((125, 94), 60).convert(
            "RGB"
        )  # 4:3 up to rounding: timm's crop would move by a pixel
        first = made(image)
        assert all(torch.equal(made(image), first) for _ in range(200))
        want = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(first.numpy(), want, atol=1e-6)

    def test_trains(self) -> None:
        """Recipe, task and fixed position embeddings together: the loss falls and the embeddings stay."""
        made = task(num_heads=6, patch_size=4).train()
        recipe = AttnDistillRecipe(epochs=3, batch_size=1024, warmup_epochs=1)
        optimizer = recipe.optimizer(made)
        scheduler = recipe.scheduler(optimizer, steps_per_epoch=10)
        before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
        x, losses = torch.randn(8, 3, 32, 32), []
        for step in range(30):
            scheduler.step_update(step)
            loss = made(x)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        unchanged = {name for name, p in made.student.named_parameters() if torch.equal(p, before[name])}
        assert unchanged == {"pos_embed"}


def textbook(height: int, width: int, dim: int) -> torch.Tensor:
    """[H·W, D] number by number."""
    quarter = dim // 4
    frequencies = [10000.0 ** (-k / quarter) for k in range(quarter)]
    rows = [
        [f(place * w) for f in (math.sin, math.cos) for place in (y, x) for w in frequencies]
        for y in range(height)
        for x in range(width)
    ]
    return torch.tensor(rows)


class TestPositionEmbeddings:
    @pytest.mark.parametrize(
        ("name", "changes", "prefix"),
        [
            ("vit_tiny_patch16_224", {}, 1),
            ("vit_tiny_patch16_224", {"img_size": (32, 64)}, 1),
            ("vit_tiny_patch16_224", {"no_embed_class": True}, 0),
            ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
            ("vit_small_patch14_reg4_dinov2", {}, 0),
            ("deit_tiny_distilled_patch16_224", {}, 2),
            ("cait_xxs24_224", {}, 0),
        ],
    )
    @pytest.mark.parametrize("learnable", [False, True])
    def test_are_sines_and_cosines(self, name: str, changes: dict, prefix: int, learnable: bool) -> None:
        model = make(name, **changes)
        initial, keys = model.pos_embed.detach().clone(), list(model.state_dict())
        assert sincos_pos_embed_(model, learnable) is model
        width = 8 if changes.get("img_size") else 4
        torch.testing.assert_close(model.pos_embed[0, prefix:].detach(), textbook(4, width, 48))
        rest = model.pos_embed[0, :prefix]
        assert torch.equal(rest, initial[0, :prefix]) if learnable else not rest.any()
        assert model.pos_embed.requires_grad is learnable and list(model.state_dict()) == keys
        assert model(torch.randn(1, 3, 32, 8 * width)).isfinite().all()

    def test_fixed_ones_survive_training_and_checkpoints(self) -> None:
        model = sincos_pos_embed_(make())
        fixed = model.pos_embed.detach().clone()
        optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.5)
        ema = ModelEmaV3(model, decay=0.5)
        for _ in range(3):
            model(torch.randn(2, 3, 32, 32)).square().mean().backward()
            optimizer.step()
            ema.update(model)
        assert torch.equal(model.pos_embed, fixed) and torch.equal(ema.module.pos_embed, fixed)
        other = make()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.pos_embed, fixed)

    def test_half_precision(self) -> None:
        model = sincos_pos_embed_(make().to(torch.bfloat16))
        assert model.pos_embed.dtype == torch.bfloat16
        torch.testing.assert_close(model.pos_embed[0, 1:].float(), textbook(4, 4, 48), rtol=0, atol=2**-8)

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("vit_small_patch16_dinov3", {}, "expected position embeddings for a patch grid, Eva has none"),
            ("beit_base_patch16_224", {}, "Beit has none"),
            ("vit_tiny_patch16_224", {"pos_embed": "none"}, "VisionTransformer has none"),
            ("vit_tiny_patch16_224", {"embed_dim": 54}, "expected a width divisible by 4, got 54"),
        ],
    )
    def test_refused(self, name: str, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sincos_pos_embed_(make(name, **changes))

    def test_embeddings_of_another_grid_are_refused(self) -> None:
        model = make()
        model.pos_embed = nn.Parameter(torch.zeros(1, 20, 48))
        with pytest.raises(
            ValueError, match=r"\[1, 16 or 17, D\] for 1 prefix tokens and 4·4 patches, .* \(1, 20, 48\)"
        ):
            sincos_pos_embed_(model)
        with pytest.raises(ValueError, match="Linear has none"):
            sincos_pos_embed_(nn.Linear(2, 2))
