"""one_pass=True: the four methods have the same losses, gradients and trained weights as without, whatever is around the student."""

import copy
import io

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from attnkd import SSTA, AttentionProbe, AttnDistill, HeadKD
from attnkd.capture import tap
from attnkd.methods import attention_probe, head_kd, ssta
from attnkd.methods.schedule import Schedule


def vit(seed=0, heads=2, **options):
    torch.manual_seed(seed)
    given = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": heads}
    model = timm.models.VisionTransformer(**{**given, "num_classes": 5, "weight_init": "jax", **options})
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # attention that is not uniform
        model.head.weight.normal_(std=0.1)
    return model


def teacher(seed=1, heads=4, **options):
    return vit(seed, heads, embed_dim=32, **options)


def batch():
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return images, torch.tensor([0, 4, 2])


HEADS = {"teacher_heads": [1, 3], "assistant_heads": [2, 0], "blocks": "all", "stop_epoch": None}
TASKS = {
    "AttnDistill": lambda **o: AttnDistill(vit(reg_tokens=2), teacher(heads=2), blocks="all", patch_weight=0.5, **o),
    "AttnDistill, merged": lambda **o: AttnDistill(vit(), teacher(), pa_weight=0, criterion=nn.CrossEntropyLoss(), **o),
    "AttnDistill, another grid": lambda **o: AttnDistill(
        vit(dynamic_img_size=True), teacher(patch_size=2), merge="mean", temperature=2.0, **o
    ),
    "HeadKD": lambda **o: HeadKD(vit(), teacher(), wrong_student_weight=0.5, temperature=2.0, at_weight=0.3, **o),
    "HeadKD, registers": lambda **o: HeadKD(vit(reg_tokens=2), teacher(), divergence="logit_mse", **o),
    "HeadKD, one head": lambda **o: HeadKD(
        vit(), teacher(), mode="head_to_head", blocks="all", heads=[1, 0], teacher_heads=[3, 1], **o
    ),
    "HeadKD, another grid": lambda **o: HeadKD(vit(dynamic_img_size=True), teacher(patch_size=2), **o),
    "SSTA": lambda **o: SSTA(
        vit(), teacher(), teacher(2), temperature=1.5, lam=0.5, label_teacher=teacher(3), label_weight=0.3, **HEADS, **o
    ),
    "SSTA, average": lambda **o: SSTA(
        vit(), assistant=teacher(2), assistant_heads="average", blocks="all", stop_epoch=None, **o
    ),
    "AttentionProbe": lambda **o: AttentionProbe(vit(), teacher(), 0.9, **o),
}  # fmt: skip
COMPARING = (
    (tap, "distilled"), (head_kd, "map_rows"), (ssta, "whole_map_divergence"), (attention_probe, "relation_row_loss"),
)  # fmt: skip
FOUR = ("AttnDistill", "HeadKD", "SSTA", "AttentionProbe")


def make(name, **options):
    """In float64, where rounding is far smaller than any mistake."""
    return TASKS[name](verbose=False, **options).double()


def step(task, *given):
    result = task(*(given or batch()))
    task.student.zero_grad()
    result["loss"].backward()
    grads = {name: p.grad for name, p in task.student.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in result.items()}, grads


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TASKS)
def test_same_losses_and_gradients(name, monkeypatch):
    """And every comparison happens while the student runs: before its head."""
    expected = step(make(name))
    task, order = make(name, one_pass=True), []
    for module, name in COMPARING:
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _whole=whole, **k: order.append("compared") or _whole(*a, **k))
    task.student.norm.register_forward_hook(lambda *a: order.append("student's last norm"))
    assert_same(step(task), expected)
    assert "compared" in order and "compared" not in order[order.index("student's last norm") :]


@pytest.mark.parametrize("name", FOUR)
def test_around_the_student(name):
    """Non-reentrant checkpointing, autocast, a compiled forward without graph breaks, EMA, copies and checkpoints."""
    expected = step(make(name).train())
    for_ema = make(name, one_pass=True)
    for_ema.setup_ema(decay=0.5)
    assert for_ema.student.state_dict().keys() == make(name).student.state_dict().keys()
    ema = for_ema.get_eval_model(ema=True)
    assert type(ema) is timm.models.VisionTransformer
    images, targets = batch()
    torch.testing.assert_close(ema(images), for_ema.student(images))
    assert_same(step(copy.deepcopy(for_ema).train()), expected)
    buffer = io.BytesIO()
    torch.save(for_ema.student.state_dict(), buffer)
    buffer.seek(0)
    make(name).student.load_state_dict(torch.load(buffer))

    checkpointed = make(name, one_pass=True).train()
    checkpointed.student.set_grad_checkpointing(True)
    assert_same(step(checkpointed), expected)

    torch._dynamo.reset()
    compiled = make(name, one_pass=True).train()
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(compiled), expected)

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            make(name, one_pass=True)(images, targets)["loss"],
            make(name)(images, targets)["loss"],
            rtol=1e-2,
            atol=1e-3,
        )


def test_teachers_rest_while_their_weights_are_zero():
    images, targets = batch()
    probe = make("AttentionProbe", one_pass=True, relation_weight=Schedule(1.0, stop=1))
    supervised = SSTA(vit(), teacher(), teacher_heads=[0, 1], blocks="all", stop_epoch=1, one_pass=True, verbose=False)
    for task, part in ((probe, "relation_loss"), (supervised, "teacher_attn_loss")):
        task.set_epoch(0)
        assert part in task(images, targets)
        task.set_epoch(1)
        assert part not in task(images, targets)
    ran = []
    supervised.teachers["teacher"].register_forward_hook(lambda *a: ran.append(a))
    supervised(images, targets)
    assert not ran


@pytest.mark.parametrize("name", FOUR)
def test_wrong_images_are_named_before_a_teacher_runs(name):
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\]"):
        make(name, one_pass=True)(torch.randn(1, 16, 16), torch.tensor([0]))


@pytest.mark.parametrize("name", FOUR)
def test_trains_digits_to_the_same_weights(name):
    """15 steps of SGD on real images."""
    digits = load_digits()
    images = torch.tensor(digits.images[:480]).div(8).sub(1)[:, None]
    images = nn.functional.interpolate(images, scale_factor=2)
    targets = torch.tensor(digits.target[:480] % 5)
    weights = []
    for one_pass in (False, True):
        task = make(name, one_pass=one_pass).train()
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)
        for at in range(0, 480, 32):
            loss = task(images[at : at + 32], targets[at : at + 32])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append({name: p.detach().clone() for name, p in task.student.named_parameters()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-7)
    start = dict(make(name).student.named_parameters())["blocks.0.attn.qkv.weight"]
    assert (weights[0]["blocks.0.attn.qkv.weight"] - start).abs().max() > 0.01
