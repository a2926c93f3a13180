"""Models that work in stages: maps of the same tokens are compared, rows of the last stage with any model's, the rest is refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attnkd.capture.adapters import adapter_for
from attnkd.capture.outputs import BlockOutputs
from attnkd.capture.tap import AttentionTap
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.minilm import MiniLM
from attnkd.methods.ssta import SSTA
from attnkd.testing.census import _maps, attention_map
from tests.methods.test_text_and_windows import swin
from tests.stirred import stirred


def hiera(seed: int = 0, stages: tuple[int, ...] = (1, 1, 2, 2), **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "embed_dim": 16, "stages": stages, "num_classes": 3}
    return stirred(timm.create_model("hiera_tiny_224", **{**sizes, **more}))


def pit(seed: int = 0, depth: tuple[int, ...] = (1, 2, 1), **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "base_dims": (8, 8, 8), "heads": (2, 4, 4), "depth": depth, "num_classes": 3}
    return stirred(timm.create_model("pit_ti_distilled_224", **{**sizes, **more}))


def maxvit(seed: int = 0, name: str = "maxvit_rmlp_tiny_rw_256", **more: Any) -> nn.Module:
    """16x16, 8x8, 4x4 and 2x2 tokens, in windows and grids of 2x2."""
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "num_classes": 3}
    return stirred(timm.create_model(name, **{**sizes, **more}))


def coatnet(seed: int = 0) -> nn.Module:
    """Attention over 4x4 and 2x2 tokens."""
    return maxvit(seed, "coatnet_rmlp_1_rw_224", depths=(1, 1, 2, 1))


def vit(patch: int = 16, **more: Any) -> nn.Module:
    torch.manual_seed(5)
    sizes = {"img_size": 64, "patch_size": patch, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return stirred(timm.create_model("vit_tiny_patch16_224", **{**sizes, **more}))


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def unfused(model: nn.Module, path: str) -> Tensor:
    """The one map [B, (windows,) H, M, N] of an attention, with the model's fused attention off; windows of Hiera before the heads."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    (found,) = _maps(model, path, images())
    return found.transpose(1, 2).flatten(0, 1) if found.ndim == 5 else found


ROWS = {
    # by model: the rows of every attention
    hiera: [64, 16, 4, 16, 4, 4],
    pit: [51, 18, 18, 6],
    maxvit: [4] * 8,
    coatnet: [16, 16, 4],
}


@pytest.mark.parametrize("make", ROWS)
def test_every_attention_is_captured(make: Any) -> None:
    model = make()
    tap = AttentionTap(model, "all")
    output, calls = tap(images())
    tap.untap()
    torch.testing.assert_close(output, model(images()))
    for path, call in zip(tap.paths, calls, strict=True):
        torch.testing.assert_close(attention_map(call).float(), unfused(model, path))
    assert [call.query.shape[2] for call in calls] == ROWS[make]


@pytest.mark.parametrize(
    ("make", "one_pass"),
    [(hiera, False), (hiera, True), (pit, False), (pit, True), (maxvit, True), (coatnet, False)],
)
def test_maps_of_all_stages(make: Any, one_pass: bool) -> None:
    student, teacher = make(), make(seed=1)
    task = HeadKD(student, teacher, one_pass=one_pass, verbose=False)
    paths = task.student_tap.paths
    result = task(images(), torch.tensor([0, 2]))
    result["loss"].backward()
    losses = []
    for path in paths:
        ours, theirs = unfused(student, path).double(), unfused(teacher, path).double()
        if make is pit:  # class token and patches; the distillation token is left out
            ours, theirs = (torch.cat([x[..., :1], x[..., 2:]], -1) for x in (ours, theirs))
            ours, theirs = (torch.cat([x[..., :1, :], x[..., 2:, :]], -2) for x in (ours, theirs))
            ours, theirs = (x / x.sum(-1, keepdim=True) for x in (ours, theirs))
        losses.append((theirs * (theirs.log() - ours.log())).sum(-1).mean())
    torch.testing.assert_close(result["attn_loss"].double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    assert all(bool(student.get_submodule(path).qkv.weight.grad.any()) for path in paths)
    student.train(make in (hiera, pit))  # the others have batch norms
    torch.testing.assert_close(result["output"], student(images()))


def test_blocks_learn_in_their_stage_from_a_deeper_teacher() -> None:
    task = HeadKD(hiera(), hiera(stages=(2, 3, 4, 3)), verbose=False)
    assert task.teachers["teacher"].tap.paths == [f"blocks.{i}.attn" for i in (1, 2, 5, 8, 9, 11)]


def test_hiera_puts_its_last_tokens_in_the_order_of_the_image() -> None:
    model: Any = hiera(img_size=128)
    tokens = adapter_for(model).tokens(model, torch.randn(1, 3, 128, 128))
    assert adapter_for(model).grid(model, (128, 128)) == (4, 4)
    torch.testing.assert_close(model.reroll(tokens, len(model.blocks) - 1).flatten(1, 2), tokens)


@pytest.mark.parametrize(
    ("student", "teacher", "rows"),
    [
        (lambda: pit(), lambda: vit(), "cls"),
        (lambda: vit(32), lambda: pit(seed=1), "cls"),
        (lambda: hiera(), lambda: vit(), "mean"),
        (lambda: vit(), lambda: hiera(), "all"),
        (lambda: swin(img_size=64, window_size=8), lambda: vit(), "mean"),
        (lambda: coatnet(), lambda: vit(), "mean"),
        (lambda: vit(), lambda: maxvit(), "all"),
    ],
)
def test_rows_of_the_last_stage_are_those_of_any_model(student: Any, teacher: Any, rows: str) -> None:
    ours = student()
    result = AttnDistill(ours, teacher(), rows=rows, verbose=False)(images())
    result["loss"].backward()
    assert result["attn_loss"] > 0 and result["pa_loss"] > 0
    last = [module for name, module in ours.named_modules() if name.endswith("attn.qkv")][-1]
    assert bool(last.weight.grad.any())


def test_maps_of_the_last_stage_are_those_of_any_model() -> None:
    """PiT has its class token and a grid in every stage."""
    student = pit().train()
    blocks = {"mode": "block_to_block", "blocks": 1, "teacher_blocks": 0}
    first = HeadKD(student, vit(patch=8), **blocks, at_weight=1.0, label_teacher=vit(), verbose=False)
    result = first(images(), torch.tensor([0, 1]))
    assert result["attn_loss"] > 0 and result["at_loss"] > 0
    result["label_loss"].backward()
    assert bool(student.head_dist.weight.grad.any()) and student.head.weight.grad is None  # type: ignore[union-attr, operator]
    early = AttnDistill(pit(), vit(), blocks=1, verbose=False)
    assert early(images())["attn_loss"] > 0
    for ours in (pit(), hiera(), swin(img_size=64, window_size=8), maxvit()):
        task = HeadKD(ours, vit(), mode="head_to_head", verbose=False)
        assert task(images(), torch.tensor([0, 1]))["attn_loss"] > 0
    task = SSTA(hiera(), vit(), blocks=-1, teacher_heads=[1], student_heads=(0, 1), stop_epoch=None, verbose=False)
    assert task(images(), torch.tensor([0, 1]))["teacher_attn_loss"] > 0
    assert MiniLM(pit(), vit(), relation_heads=4, verbose=False)(images())["loss"] > 0


def test_what_does_not_fit_together_is_refused() -> None:
    one = {"mode": "head_to_head", "blocks": 0, "teacher_blocks": 0, "verbose": False}
    task = HeadKD(pit(), pit(patch_size=8, stride=4), **one, resample_mode=None)
    with pytest.raises(ValueError, match="the student's grid is 7x7 .height x width., the teacher's 15x15"):
        task(images(), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match="attend over different tokens: grid 16x16 .* and all of them; pair blocks with the same"
    ):
        HeadKD(hiera(), vit(), **one)
    with pytest.raises(
        ValueError,
        match="grid 16x16 in units of 8x8, stage 1 .*, windows of 64 and .*stage 2 .*windows of 16, queries",
    ):
        HeadKD(hiera(), hiera(), **{**one, "teacher_blocks": 1})
    with pytest.raises(
        ValueError, match="grid 16x16, windows of 2x2 and grid 16x16, 2x2 tokens, spread over the whole"
    ):
        HeadKD(maxvit(), maxvit(1), **{**one, "teacher_blocks": 1})
    with pytest.raises(ValueError, match="grid 8x8, windows of 2x2 and all of a grid of 4x4"):
        HeadKD(maxvit(), coatnet(1), **{**one, "blocks": 2})
    with pytest.raises(
        ValueError, match="student: rows over the whole image .* blocks.0.attn attends over grid 16x16 in units"
    ):
        AttnDistill(hiera(), hiera(seed=1), rows="mean", blocks=0, verbose=False)
    with pytest.raises(ValueError, match="student: Hiera has no patch grid that is known"):
        AttnDistill(hiera(q_pool=2), hiera(1, q_pool=2), rows="mean", verbose=False)
    with pytest.raises(ValueError, match="student: call: relations are .*, but this one has 4 rows over 16 keys"):
        MiniLM(hiera(), hiera(1), relation_heads=4, blocks=4, teacher_blocks=4, verbose=False)(images())
    with pytest.raises(ValueError, match="class tokens are compared, but Hiera has none"):
        AttnDistill(hiera(), vit(), verbose=False)
    dropping = HeadKD(hiera(patch_drop_rate=0.5), hiera(seed=1), mode="block_to_block", verbose=False).train()
    with pytest.raises(ValueError, match="patch"):
        dropping(images(), torch.tensor([0, 1]))
    levit = timm.create_model("visformer_tiny")
    with pytest.raises(
        TypeError,
        match="student: Visformer does not say what its tokens are .* no adapter does: tokens of stages and windows .* Write an adapter "
        r".* Its attentions are stage2\.0\.attn, ",
    ):
        HeadKD(levit, vit(), blocks="stage2.0.attn", teacher_blocks=-1, mode="block_to_block", verbose=False)


@pytest.mark.parametrize(
    ("name", "path"),
    [("cait_xxs24_224", "blocks_token_only.1.attn"), ("xcit_nano_12_p8_224", "cls_attn_blocks.1.attn")],
)
def test_class_attention_has_one_row(name: str, path: str) -> None:
    """CaiT and XCiT add their class token late, in their last two blocks: the one row of its attention guides as any class token's does."""
    patch = {"patch_size": 16, "img_size": 64, "embed_dim": 32, "num_heads": 4, "depth": 1, "num_classes": 3}
    ours, theirs = (stirred(timm.create_model(name, **patch)) for _ in range(2))
    task = AttnDistill(ours, theirs, verbose=False)
    assert task.student_tap.paths == task.teachers["teacher"].tap.paths == [path]
    result = task(images())
    result["loss"].backward()
    s, t = unfused(ours, path), unfused(theirs, path)
    assert s.shape[2:] == (1, 17)
    torch.testing.assert_close(result["attn_loss"], (t * (t.log() - s.log())).sum() / 2, rtol=1e-4, atol=1e-6)
    by_path = {"teacher_blocks": path, "blocks": ["blocks.1.attn"]}
    for options in (by_path, {"rows": "pool"}):
        mixed = AttnDistill(vit(patch=8), ours, **options, verbose=False)(images())
        assert math.isfinite(mixed["loss"].item()) and mixed["attn_loss"] > 0
    learner = copy.deepcopy(theirs).requires_grad_()
    for rows in ("mean", "all"):
        with pytest.raises(
            ValueError, match=f"student: rows='{rows}' compares the rows of all patches, .* has 1 over 17"
        ):
            AttnDistill(learner, vit(), rows=rows, verbose=False)(images())
    other = stirred(timm.create_model(name, **{**patch, "patch_size": 8}))
    with pytest.raises(
        ValueError, match="whole maps need the same tokens: the student's map is 1 x 17, the teacher's 1 x 65"
    ):
        HeadKD(learner, other, mode="block_to_block", verbose=False)(images(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "last", "rows"),
    [
        (lambda: cait(), "blocks_token_only.1", "cls"),
        (lambda: swin(img_size=64, window_size=4), "layers.1.blocks.1", "mean"),
        (lambda: pit(), "transformers.2.blocks.0", "cls"),
        (lambda: maxvit(), "stages.3.blocks.0.attn_grid", "mean"),
        (lambda: coatnet(), "stages.3.blocks.0", "mean"),
        (lambda: hiera(), "blocks.5", "mean"),
    ],
)  # fmt: skip
def test_what_the_last_block_puts_out_is_compared(make: Any, last: str, rows: str) -> None:
    """A block of CaiT puts out the class token alone, one of Swin an image of tokens: what is compared are class token and patches."""
    model, relation = make(), {"kd_weight": 0.0, "noisy_weight": 0.0, "verbose": False}
    scores, (block,) = BlockOutputs(model, [last])(images())
    torch.testing.assert_close(scores, model(images()))
    expected = adapter_for(model).tokens(model, images())
    norm = model.norm if hasattr(model, "norm") else nn.Identity()
    normalised = norm(block.tokens.mT.unsqueeze(-1)).squeeze(-1).mT if hasattr(model, "stem") else norm(block.tokens)
    torch.testing.assert_close(normalised, expected)
    count = math.prod(block.grid)  # type: ignore[arg-type]
    assert block.tokens.shape[1] == block.num_prefix_tokens + count  # type: ignore[operator]
    patch = 64 // math.isqrt(count)
    probe = AttentionProbe(model, make(), 0.9, rows=rows, blocks=-1, **relation)
    assert probe(images())["loss"] < 1e-9 and probe(images() + 1)["loss"].requires_grad
    if 64 % math.isqrt(count) == 0:
        other = AttentionProbe(make(), vit(patch=patch), 0.9, rows=rows, blocks=-1, **relation)
        assert other(images())["relation_loss"] > 0


def test_blocks_of_other_orders_and_sizes_are_refused() -> None:
    mean = {"rows": "mean", "verbose": False}
    with pytest.raises(
        ValueError, match="blocks.1 of the student and blocks.1 of the teacher put out different tokens: grid 16x16"
    ):
        AttentionProbe(hiera(), vit(patch=8), 0.9, blocks=1, teacher_blocks=1, **mean)  # 64 tokens both
    with pytest.raises(ValueError, match="the student's grid is 16x16 .*, the teacher's 4x4"):
        AttentionProbe(swin(img_size=64), vit(), 0.9, blocks=0, teacher_blocks=1, **mean)(images())
    larger = swin(img_size=32, window_size=4, strict_img_size=False)  # its last stage attends in windows then
    with pytest.raises(ValueError, match="expected 8·8 = 64 patch tokens for images of 64x64, its attention has 16"):
        AttnDistill(larger, vit(), **mean)(images())


def cait(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"patch_size": 16, "img_size": 64, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 3}
    return stirred(timm.create_model("cait_xxs24_224", **sizes))
