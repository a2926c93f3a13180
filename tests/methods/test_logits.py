"""Logit distillation beside attention: Hinton's loss is added, the teacher runs to its end, and other classes are refused."""

import pytest
import timm
import torch
from torch.nn import functional as F

from attnkd import SSTA, HeadKD, Schedule
from attnkd.methods.head_kd import CROSS_ENTROPY


def vit(heads, seed, classes=7):
    torch.manual_seed(seed)
    options = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_classes": classes}
    model = timm.create_model("vit_tiny_patch16_224", **options, num_heads=heads)
    if classes:
        torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def hinton(output, target_output, temperature):
    """One image at a time, in float64."""
    total = 0.0
    for ours, theirs in zip(output.double(), target_output.double(), strict=True):
        p, t = (x / temperature for x in (ours, theirs))
        p, t = p.exp() / p.exp().sum(), t.exp() / t.exp().sum()
        total += temperature**2 * (t * (t / p).log()).sum()
    return (total / len(output)).float()


@pytest.mark.parametrize("method", ["head_kd", "ssta"])
def test_logit_distillation_is_added_to_the_loss(method):
    student, teacher = vit(2, seed=0), vit(4, seed=1)
    torch.manual_seed(3)
    images, targets = torch.randn(4, 1, 16, 16), torch.tensor([0, 3, 6, 2])
    output, target_output = student(images), teacher(images).detach()
    kd, task_loss = hinton(output, target_output, 2.0), F.cross_entropy(output, targets)

    def build(attention, criterion=CROSS_ENTROPY, **options):
        given = {"kd_weight": 0.6, "kd_temperature": 2.0, "criterion": criterion, "verbose": False, **options}
        if method == "head_kd":
            return HeadKD(student, teacher, alpha=0.25 if attention else 1.0, **given)
        given |= {"blocks": (-1,), "teacher_heads": [3], "stop_epoch": None, "beta": 0.5 if attention else 0.0}
        return SSTA(student, teacher, **given)

    result = build(attention=False)(images, targets)
    torch.testing.assert_close(result["loss"], task_loss + 0.6 * kd)
    torch.testing.assert_close(result["kd_loss"], kd)
    assert not {name for name in result if name.endswith("attn_loss")}

    result = build(attention=True)(images, targets)
    (attn,) = (value for name, value in result.items() if name.endswith("attn_loss"))
    wanted = 0.25 * task_loss + 0.75 * attn if method == "head_kd" else task_loss + 0.5 * attn
    torch.testing.assert_close(result["loss"], wanted + 0.6 * kd)
    task = build(attention=True, one_pass=True)
    torch.testing.assert_close(task(images, targets)["loss"], result["loss"])
    task.untap()

    task = build(attention=True, criterion=None)
    result = task(images)  # without labels the head learns from the teacher alone
    torch.testing.assert_close(result["kd_loss"], kd)
    student.zero_grad()
    result["loss"].backward()
    assert student.head.weight.grad.abs().sum() > 0

    task = build(attention=True, kd_weight=Schedule(0.6, stop=1))
    task.set_epoch(1)
    assert "kd_loss" not in task(images, targets)


def test_what_cannot_be_learnt_is_named():
    for build in (HeadKD, lambda *models, **options: SSTA(*models, teacher_heads=[0, 0], blocks=(-2, -1), **options)):
        with pytest.raises(ValueError, match=r"kd_weight: expected .* got num_classes 7 and 5"):
            build(vit(2, 0), vit(4, 1, classes=5), kd_weight=1.0, verbose=False)
        with pytest.raises(ValueError, match="kd_temperature: expected a number > 0"):
            build(vit(2, 0), vit(4, 1), kd_weight=1.0, kd_temperature=0.0, verbose=False)
    with pytest.raises(ValueError, match="kd_weight: above 0, but teacher is None"):
        SSTA(vit(2, 0), assistant=vit(4, 1), assistant_heads=[0], blocks=(-1,), kd_weight=1.0, verbose=False)
