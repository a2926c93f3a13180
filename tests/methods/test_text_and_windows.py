"""HeadKD between text encoders, and between models that attend in windows: the same as by hand from the models' own maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attnkd.capture.adapters import adapter_for
from attnkd.capture.tap import AttentionTap
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.ssta import SSTA
from tests.stirred import stirred

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}),
    "roberta": (
        "Roberta",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    ),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "modernbert": (
        "ModernBert",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
         "local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
}  # fmt: skip


def text(
    name: str, attention: str = "sdpa", kind: str = "ForSequenceClassification", seed: int = 0, **more: Any
) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    prefix, sizes = TEXT[name]
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, "vocab_size": 50, "num_labels": 3, **more})
    torch.manual_seed(seed)
    return stirred(getattr(transformers, prefix + kind)._from_config(config, attn_implementation=attention))


def words(length: int = 9, kept: int = 6) -> dict[str, Tensor]:
    """Two sequences; the second one has ``kept`` words and padding."""
    ids = torch.randint(2, 50, (2, length), generator=torch.Generator().manual_seed(3))
    visible = torch.arange(length) < torch.tensor([[length], [kept]])
    return {"input_ids": ids * visible, "attention_mask": visible.long(), "token_type_ids": torch.zeros_like(ids)}


def maps(name: str, model: nn.Module) -> list[Tensor]:
    """The maps of the model's unfused attention."""
    eager = text(name, "eager")
    eager.load_state_dict(model.state_dict())
    inputs = {key: value for key, value in words().items() if key != "token_type_ids"}
    return [one.double() for one in eager(**inputs, output_attentions=True).attentions]


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("names", [("distilbert", "bert"), ("roberta", "roberta"), ("modernbert", "modernbert")])
def test_text_encoders(names: tuple[str, str], one_pass: bool) -> None:
    student, teacher = text(names[0]), text(names[1], seed=1)
    task = HeadKD(student, teacher, kd_weight=1.0, one_pass=one_pass, verbose=False)
    result = task(words(), torch.tensor([0, 2]))
    result["loss"].backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
    ours, theirs = maps(names[0], student), maps(names[1], teacher)
    visible = words()["attention_mask"].bool()
    losses = []
    for index, map_ in enumerate(ours):
        target = theirs[(index + 1) * len(theirs) // len(ours) - 1]
        kl = torch.where(target > 0, target * (target.log() - map_.log()), 0.0).sum(-1)  # [B, H, N]
        losses.append(kl.transpose(1, 2)[visible].mean())  # rows of padding do not count
    torch.testing.assert_close(result["attn_loss"].double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing() -> None:
    losses = []
    for length in (6, 9):
        inputs = {key: value[1:] for key, value in words(length, kept=6).items()}
        if length == 6:
            inputs["input_ids"] = words(9)["input_ids"][1:, :6]
        losses.append(
            HeadKD(text("distilbert"), text("bert"), criterion=None, alpha=0.0, verbose=False)(inputs)["attn_loss"]
        )
    torch.testing.assert_close(*losses)


def test_what_does_not_fit_together_is_refused() -> None:
    bert, vit = text("bert"), timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    with pytest.raises(ValueError, match="know 50 and 60 words .* both need the same tokenizer"):
        HeadKD(text("distilbert"), text("bert", vocab_size=60), verbose=False)
    with pytest.raises(ValueError, match="know None and 50 words .None: images."):
        HeadKD(vit, bert, verbose=False)
    for rows in ("cls", "all"):
        with pytest.raises(ValueError, match="text encoders are compared by HeadKD and MiniLM only, got"):
            AttnDistill(text("distilbert"), bert, rows=rows, verbose=False)
    with pytest.raises(
        TypeError, match="teacher: .*it is a decoder .is_decoder=True., and causal attention is not compared"
    ):
        HeadKD(text("distilbert"), text("bert", is_decoder=True), verbose=False)
    with pytest.raises(ValueError, match="text encoders are compared by HeadKD and MiniLM only, got"):
        SSTA(text("distilbert"), bert, teacher_heads=[0, 0], verbose=False)
    with pytest.raises(
        ValueError, match="at_weight: compares the patches of images, but DistilBert.* is a text encoder"
    ):
        HeadKD(text("distilbert"), bert, at_weight=1.0, verbose=False)
    with pytest.raises(ValueError, match="images: a text encoder takes what its tokenizer gives.*got Tensor"):
        HeadKD(text("distilbert"), bert, verbose=False)(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    task = HeadKD(text("distilbert"), bert, verbose=False)
    with pytest.raises(ValueError, match="images: the attention_mask hides every token of every text"):
        task({**words(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"images: expected at least one text and one token, got .*\(0, 9\)"):
        task({key: value[:0] for key, value in words().items()}, torch.tensor([]))
    with pytest.raises(ValueError, match="attend over different tokens: all of them and those within 3"):
        HeadKD(text("modernbert"), text("modernbert"), mode="block_to_block", blocks=0, teacher_blocks=1, verbose=False)


def swin(depths: tuple[int, ...] = (2, 2), seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": depths, "num_heads": (2, 4)}
    return stirred(timm.create_model("swin_tiny_patch4_window7_224", **{**sizes, "num_classes": 3, **more}))


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_swin_blocks_learn_in_their_stage() -> None:
    """8x8 patches in four windows of 4x4, then 4x4 in one; every second block of the first stage shifts them."""
    task = HeadKD(swin((2, 2)), swin((6, 2)), mode="block_to_block", blocks=[1, 2, 3], verbose=False)
    paths = [f"layers.{stage}.blocks.{block}.attn" for stage, block in ((0, 5), (1, 0), (1, 1))]
    assert task.teachers["teacher"].tap.paths == paths


@pytest.mark.parametrize("one_pass", [False, True])
def test_swin_windows_are_compared_as_they_are(one_pass: bool) -> None:
    student, teacher = swin(), swin(seed=1)
    expected = student(images())
    classes = torch.tensor([0, 1, 2])
    task = HeadKD(student, teacher, one_pass=one_pass, wrong_teacher_weight=0.25, at_weight=1.0, verbose=False)
    result = task(images(), classes)
    assert result["at_loss"] > 0  # of what the blocks put out, [B, H, W, D]
    torch.testing.assert_close(result["output"], expected)
    result["loss"].backward()
    right = teacher(images()).argmax(1) == classes
    weight = torch.where(right, 1.0, 0.25)
    losses = []
    _, calls = AttentionTap(swin(), "all")(images())
    _, targets = AttentionTap(swin(seed=1), "all")(images())
    for call, target in zip(calls, targets, strict=True):
        log_p, log_t = ((one.query @ one.key.mT * one.scale + one.mask).log_softmax(-1) for one in (call, target))
        kl = (log_t.exp() * (log_t - log_p)).sum(-1).unflatten(0, (3, -1))  # [images, windows, H, N]
        losses.append((weight[:, None, None, None] * kl).mean())
    torch.testing.assert_close(result["attn_loss"], torch.stack(losses).mean())


def test_single_heads_of_windows() -> None:
    student = swin()
    loss = SSTA(student, swin(seed=1), blocks=[0, 1, 3], teacher_heads=[1, 0, 3], stop_epoch=None, verbose=False)
    result = loss(images(), torch.tensor([0, 1, 2]))
    result["loss"].backward()
    assert result["loss"].isfinite()
    assert all(bool(student.get_submodule(f"{path}.qkv").weight.grad.any()) for path in loss.student_tap.paths)


def test_other_windows_are_refused() -> None:
    with pytest.raises(
        ValueError, match="grid 8x8, windows of 4x4, shifted by 0x0 and grid 8x8, windows of 4x4, shifted by 2x2"
    ):
        HeadKD(swin(), swin(), mode="block_to_block", blocks=0, teacher_blocks=1, verbose=False)
    with pytest.raises(ValueError, match="windows of 4x4, shifted by 0x0 and grid 8x8, windows of 2x2"):
        HeadKD(swin(), swin(window_size=2), verbose=False)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    with pytest.raises(ValueError, match="attend over different tokens: grid .* and all of them"):
        HeadKD(swin(), vit, verbose=False)
    with pytest.raises(ValueError, match="class tokens are compared, but SwinTransformer has none"):
        AttnDistill(swin(), swin(seed=1), verbose=False)
    with pytest.raises(
        ValueError, match="student: SwinTransformer has no patch grid that is known.* HeadKD compares whole maps"
    ):
        AttnDistill(swin(window_size=2), swin(seed=1, window_size=2), rows="mean", verbose=False)
    with pytest.raises(
        ValueError, match="student: rows over the whole image .* layers.0.blocks.1.attn attends over grid 8x8"
    ):
        AttnDistill(swin(), swin(seed=1), rows="mean", blocks=1, teacher_blocks=1, verbose=False)


def test_a_swin_is_what_it_was() -> None:
    model = swin()
    adapter = adapter_for(model)
    tokens, output = adapter.run(model, images(), True)
    assert tokens.shape == (3, 16, 32)
    torch.testing.assert_close(output, model(images()))
