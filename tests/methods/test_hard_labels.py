"""Hard labels of a third model: DeiT's equation restated, with a distillation token and without; what cannot be learnt is named."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from attnkd import SSTA, HeadKD, Schedule

NORM = ((0.5, 0.4, 0.3), (0.6, 0.5, 0.3))
DISTILLED = "deit_tiny_distilled_patch16_224"


def vit(heads, seed, name="vit_tiny_patch16_224", **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": heads, "num_classes": 7}
    model = timm.create_model(name, **{**sizes, **options})
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=0.3)
    return model


def cnn(**options):
    """Whose labels differ from image to image."""
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", **{"num_classes": 7, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of the one batch it sees
    if model.num_classes:
        nn.init.normal_(model.fc.weight, std=1.0)
    with torch.no_grad():
        model(torch.randn(16, options.get("in_chans", 3), 16, 16))
    return model


def build(method, student, **options):
    given = {"input_norm": NORM, "verbose": False, **options}
    if method is HeadKD:
        return HeadKD(student, vit(4, 1), **{"alpha": 0.25, **given})
    return SSTA(student, vit(4, 1), teacher_heads=[3], blocks=(-1,), **{"stop_epoch": None, "beta": 0.5, **given})


def labels_of(model, images):
    """What an image classifier of ImageNet's normalisation says to images that come with NORM."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    ours = [torch.tensor(values).view(3, 1, 1) for values in NORM]
    with torch.no_grad():
        return model.eval()((images * ours[1] + ours[0] - mean) / std).argmax(-1)


def cross_entropy(scores, labels):
    """Image by image: −Σ_k y_k log softmax_k."""
    total = 0.0
    for row, label in zip(scores, labels, strict=True):
        truth = label if label.ndim else F.one_hot(label, len(row))
        total -= (truth * (row.exp() / row.exp().sum()).log()).sum()
    return total / len(scores)


@pytest.mark.parametrize("name", [DISTILLED, "vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", [HeadKD, SSTA])
def test_the_class_loss_is_that_of_deit(method, name):
    student, labeller = vit(2, 0, name), cnn()
    torch.manual_seed(3)
    images, targets = torch.randn(6, 3, 16, 16), torch.rand(6, 7).softmax(1)  # mixed labels
    labels = labels_of(labeller, images)
    assert len(labels.unique()) > 2 and not torch.equal(labels, labeller(images).argmax(1)), (
        "they depend on the normalisation"
    )
    labeller.train()
    task = build(method, student, label_teacher=labeller, label_weight=0.3, kd_weight=0.5)
    result = task(images, targets)

    output = student(images)
    scores, label_scores = output if name == DISTILLED else (output, output)
    task_loss, label_loss = cross_entropy(scores, targets), cross_entropy(label_scores, labels)
    torch.testing.assert_close(result["task_loss"], task_loss)
    torch.testing.assert_close(result["label_loss"], label_loss)
    torch.testing.assert_close(result["output"], scores)
    (attn_loss,) = (value for part, value in result.items() if part.endswith("attn_loss"))
    alpha, beta = (0.25, 0.75) if method is HeadKD else (1.0, 0.5)
    expected = alpha * (0.7 * task_loss + 0.3 * label_loss) + beta * attn_loss + 0.5 * result["kd_loss"]
    torch.testing.assert_close(result["loss"], expected)

    result["loss"].backward()
    assert all(parameter.grad is None for parameter in labeller.parameters())
    if name == DISTILLED:
        (grad,) = torch.autograd.grad(alpha * 0.3 * label_loss, student.head_dist.weight)
        torch.testing.assert_close(student.head_dist.weight.grad, grad)
        with torch.no_grad():
            averaged = task.eval()(images, targets)["output"]
            torch.testing.assert_close(averaged, (scores + label_scores) / 2)
            torch.testing.assert_close(averaged, task.get_eval_model()(images))
        with pytest.raises(RuntimeError, match="returned the mean of its two heads.*task.train"):
            task(images, targets)
    assert not {key for key in [*task.state_dict(), *task.get_task_state()] if "label" in key}
    given, others = task.untap()
    assert given is student and others[-1] is labeller and labeller.training
    assert all(parameter.requires_grad for parameter in labeller.parameters())
    assert isinstance(student.train()(images), torch.Tensor), "its heads are averaged again"


class Plain(nn.Module):
    """A classifier of no family, which does not say how many classes it has."""

    def __init__(self, classes=7):
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, classes)

    def forward(self, images):
        return self.layer(images.flatten(1))


def test_any_classifier_gives_labels():
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 6, 2])
    student, labeller = vit(2, 0), Plain()
    task = build(HeadKD, student, label_teacher=labeller, input_norm=None, label_weight=Schedule(1.0, stop=1, end=0.5))
    task.set_epoch(0)
    result = task(images, targets)
    torch.testing.assert_close(result["label_loss"], cross_entropy(student(images), labeller(images).argmax(1)))
    torch.testing.assert_close(result["loss"], 0.25 * result["label_loss"] + 0.75 * result["attn_loss"])
    with pytest.raises(ValueError, match=r"label_teacher: expected scores \(4, 7\) .* as the student's, got \(4, 5\)"):
        build(HeadKD, vit(2, 0), label_teacher=Plain(5), input_norm=None)(images, targets)
    with pytest.raises(TypeError, match="Sequential: expected class scores"):
        build(HeadKD, vit(2, 0), label_teacher=nn.Sequential(nn.Conv2d(3, 3, 1)), input_norm=None)(images, targets)


@pytest.mark.parametrize("method", [HeadKD, SSTA])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_teacher": cnn(num_classes=5)},
            "label_teacher: expected a classifier of the student's 7 classes, .* ResNet is 5",
        ),
        ({"label_teacher": cnn(num_classes=0)}, "label_teacher: expected a classifier .* is 0"),
        ({"label_teacher": cnn(in_chans=1)}, "student takes 3 channels and label_teacher 1"),
        ({"label_teacher": vit(2, 0, img_size=32)}, r"student takes \(16, 16\) and label_teacher \(32, 32\) pixels"),
        (
            {"label_teacher": cnn(), "criterion": None},
            "label_teacher: .* share of the class loss, but criterion is None",
        ),
        ({"label_teacher": cnn(), "label_weight": 0.0}, "label_weight: expected a number above 0 at all times, got 0"),
        ({"label_teacher": cnn(), "label_weight": Schedule(0.5, stop=3)}, "label_weight: expected a number above 0"),
        ({"label_teacher": cnn(), "label_weight": 1.5}, "label_weight: expected a number from 0 to 1"),
        ({"label_weight": 0.7}, "label_weight: got 0.7, but label_teacher is None"),
    ],
)
def test_what_cannot_be_learnt_is_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        build(method, vit(2, 0), **options)


def test_two_heads_without_a_teacher_for_the_second():
    student = vit(2, 0, DISTILLED)
    student.set_distilled_training(True)
    with pytest.raises(ValueError, match="student: VisionTransformerDistilled returns the scores of two heads"):
        build(HeadKD, student)(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
