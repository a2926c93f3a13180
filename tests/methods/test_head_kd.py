"""Head-specific knowledge distillation: textbook restatements, choice of heads and blocks, refusals, and a run on digits."""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from attnkd.methods.head_kd import ALPHAS, HeadKD
from attnkd.methods.schedule import Schedule
from tests.digits import fit, load_digits


def vit(heads, depth=2, dim=48, classes=10, seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"img_size": 16, "patch_size": 4, "in_chans": 1}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{**defaults, **options},
        num_classes=classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        weight_init="jax",
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # attention that is not uniform
    return model


def batch(count=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def scores(model, images):
    """Every block's scaled scores [B, H, N, N], from the packed projection of timm's Attention."""
    found = []

    def hook(attention, inputs, output):
        count, tokens, width = output.shape
        query, key, _ = output.view(count, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
        found.append(query @ key.transpose(-2, -1) / (width // 3 // heads) ** 0.5)

    heads = model.blocks[0].attn.num_heads
    handles = [block.attn.qkv.register_forward_hook(hook) for block in model.blocks]
    output = model(images)
    for handle in handles:
        handle.remove()
    return found, output


def textbook(kind, student, teacher):
    """Mean over images, heads and rows; student, teacher: scores [B, h, N, N]."""
    if kind == "logit_mse":
        return F.mse_loss(student, teacher)
    log_s, p_t = student.log_softmax(-1), teacher.softmax(-1)
    if kind == "cross_entropy":
        return -(p_t * log_s).sum(-1).mean()
    return F.kl_div(log_s, p_t, reduction="none").sum(-1).mean()


@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy", "logit_mse"])
def test_block_to_block_is_the_textbook_loss(kind):
    student, teacher, (images, targets) = vit(2), vit(4, dim=64, seed=1), batch()
    task = HeadKD(student, teacher, mode="block_to_block", teacher_heads=[3, 1], divergence=kind, verbose=False)
    result = task(images, targets)
    s, output = scores(student, images)
    t, _ = scores(teacher, images)
    attention = textbook(kind, s[-1], t[-1][:, [3, 1]])
    alpha = ALPHAS[kind][0]
    torch.testing.assert_close(result["attn_loss"], attention)
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(output, targets))
    torch.testing.assert_close(result["loss"], alpha * F.cross_entropy(output, targets) + (1 - alpha) * attention)

    gradients = torch.autograd.grad(result["loss"], [student.blocks[-1].attn.qkv.weight, student.head.weight])
    expected = torch.autograd.grad(
        alpha * F.cross_entropy(output, targets) + (1 - alpha) * attention,
        [student.blocks[-1].attn.qkv.weight, student.head.weight],
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_head_to_head_takes_any_pair_of_blocks():
    student, teacher, (images, targets) = vit(2), vit(4, depth=3, dim=64, seed=1), batch()
    task = HeadKD(
        student,
        teacher,
        mode="head_to_head",
        blocks=[0, 1],
        teacher_blocks=[2, 0],
        heads=[1, 0],
        teacher_heads=3,
        verbose=False,
    )
    s, _ = scores(student, images)
    t, _ = scores(teacher, images)
    pairs = [(s[0][:, 1:2], t[2][:, 3:4]), (s[1][:, :1], t[0][:, 3:4])]
    expected = sum(textbook("forward_kl", *pair) for pair in pairs) / 2
    torch.testing.assert_close(task(images, targets)["attn_loss"], expected)


@pytest.mark.parametrize(("depth", "teacher_depth", "mapping"), [(2, 2, [0, 1]), (2, 5, [2, 4]), (3, 2, [0, 1, 1])])
def test_encoder_to_encoder_and_its_mapping(depth, teacher_depth, mapping):
    student, teacher, (images, targets) = vit(2, depth), vit(4, teacher_depth, dim=64, seed=1), batch()
    task = HeadKD(student, teacher, verbose=False)
    s, _ = scores(student, images)
    t, _ = scores(teacher, images)
    expected = sum(textbook("forward_kl", s[i], t[j][:, :2]) for i, j in enumerate(mapping)) / depth
    torch.testing.assert_close(task(images, targets)["attn_loss"], expected)


def test_heads_chosen_for_every_block():
    student, teacher, (images, targets) = vit(2), vit(4, dim=64, seed=1), batch()
    task = HeadKD(student, teacher, teacher_heads=[[0, 2], [3, 1]], verbose=False)
    s, _ = scores(student, images)
    t, _ = scores(teacher, images)
    expected = sum(textbook("forward_kl", s[i], t[i][:, heads]) for i, heads in enumerate([[0, 2], [3, 1]])) / 2
    torch.testing.assert_close(task(images, targets)["attn_loss"], expected)


def test_registers_are_left_out_before_the_softmax():
    student, teacher, (images, targets) = vit(2, reg_tokens=3), vit(2, seed=1), batch()
    task = HeadKD(student, teacher, mode="block_to_block", verbose=False)
    s, _ = scores(student, images)
    t, _ = scores(teacher, images)
    shared = [0, *range(4, 20)]
    torch.testing.assert_close(
        task(images, targets)["attn_loss"], textbook("forward_kl", s[-1][:, :, shared][..., shared], t[-1])
    )


def test_images_that_teacher_or_student_get_wrong_weigh_less():
    student, teacher, (images, targets) = vit(2), vit(2, seed=1), batch(8)
    s, output = scores(student, images)
    t, target_output = scores(teacher, images)
    targets[:4], targets[4] = target_output.argmax(-1)[:4], output.argmax(-1)[4]
    task = HeadKD(
        student, teacher, mode="block_to_block", wrong_teacher_weight=0.25, wrong_student_weight=0.5, verbose=False
    )
    teacher_wrong, student_wrong = target_output.argmax(-1) != targets, output.argmax(-1) != targets
    assert 0 < teacher_wrong.sum() < 8 and 0 < student_wrong.sum() < 8, "the case must have both kinds"
    weight = 0.25 ** teacher_wrong.float() * 0.5 ** student_wrong.float()
    rows = F.kl_div(s[-1].log_softmax(-1), t[-1].softmax(-1), reduction="none").sum(-1)
    result = task(images, targets)
    torch.testing.assert_close(result["attn_sample_weight"], weight)
    torch.testing.assert_close(result["attn_loss"], (rows.mean((1, 2)) * weight).mean())
    soft = task(images, F.one_hot(targets, 10).float())
    torch.testing.assert_close(soft["attn_loss"], result["attn_loss"])


def test_a_batch_that_the_teacher_gets_all_wrong_has_no_attention_loss():
    student, teacher, (images, _) = vit(2), vit(2, seed=1), batch()
    targets = (teacher(images).argmax(-1) + 1) % 10
    result = HeadKD(student, teacher, wrong_teacher_weight=0.0, verbose=False)(images, targets)
    assert result["attn_loss"] == 0
    torch.testing.assert_close(result["loss"], 0.5 * result["task_loss"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "block_to_block", "teacher_heads": [3, 1], "divergence": "logit_mse"},
        {"wrong_teacher_weight": 0.25, "wrong_student_weight": 0.5, "temperature": 2.0},
        {"criterion": None},
        {"alpha": 1.0},
    ],
)
def test_one_pass_has_the_same_losses_and_gradients(options):
    """The student's attentions compute the divergences on the way; registers of the student stay left out."""
    images, targets = batch()
    results = []
    for one_pass in (False, True):
        student = vit(2, reg_tokens=2)
        task = HeadKD(student, vit(4, dim=64, seed=1), one_pass=one_pass, verbose=False, **options)
        result = task(images, targets)
        result["loss"].backward()
        results.append((result, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-5)


def test_teacher_rests_while_alpha_is_one():
    task = HeadKD(vit(2), vit(2, seed=1), alpha=Schedule(0.5, stop=1, end=1.0), verbose=False)
    images, targets = batch()
    task.set_epoch(0)
    assert "attn_loss" in task(images, targets)

    def forbidden(images):
        raise AssertionError("the teacher ran")

    task.teachers["teacher"].forward = forbidden
    with pytest.raises(AssertionError, match="the teacher ran"):
        task(images, targets)
    task.set_epoch(1)
    result = task(images, targets)
    assert "attn_loss" not in result and torch.equal(result["loss"], result["task_loss"])


def test_teacher_is_frozen_and_in_no_state():
    student, teacher = vit(2), vit(2, seed=1)
    task = HeadKD(student, teacher, verbose=False)
    task.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    ours = {id(p) for p in student.parameters()}
    assert {id(p) for p in task.parameters()} == ours
    checkpoint = task.get_checkpoint_state()
    assert checkpoint["state_dict"].keys() == vit(2).state_dict().keys()
    other = HeadKD(vit(2, seed=5), teacher, verbose=False)
    task.set_epoch(3)
    other.load_checkpoint_state(checkpoint["state_dict"], task.get_task_state())
    images, targets = batch()
    assert torch.equal(other(images, targets)["loss"], task(images, targets)["loss"])
    assert other.schedules.state_dict() == {"epoch": 3, "step": None}


def test_ema_and_compilation():
    task = HeadKD(vit(2), vit(2, seed=1), verbose=False)
    images, targets = batch()
    expected = task(images, targets)["loss"]
    task.setup_ema()
    assert torch.equal(task.get_eval_model(ema=True)(images), task.student.eval()(images))
    task.compile(backend="eager")
    assert torch.equal(task(images, targets)["loss"], expected)


def test_without_labels_only_the_attention_trains():
    task = HeadKD(vit(2), vit(2, seed=1), criterion=None, verbose=False)
    images, _ = batch()
    result = task(images)
    assert set(result) == {"loss", "attn_loss"}
    result["loss"].backward()
    assert task.student.blocks[-1].attn.qkv.weight.grad is not None and task.student.head.weight.grad is None


def test_the_papers_alphas():
    assert ALPHAS == {"logit_mse": (1.5e-4, 0.015), "cross_entropy": (0.5,), "forward_kl": (0.5,)}


REFUSALS = [
    ({"mode": "block_to_block"}, "block_to_block: the student block has m = 4 heads .* n = 2; .* m <= n"),
    ({}, "encoder_to_encoder: the student block has m = 4 heads"),
    ({"mode": "head_to_head", "heads": 4}, r"heads: expected indices from 0 to 3 \(blocks.1.attn has 4 heads\), got 4"),
    ({"mode": "head_to_head", "teacher_heads": -1}, "teacher_heads: expected indices from 0 to 1 .*, got -1"),
    (
        {"mode": "head_to_head", "teacher_heads": [0, 1]},
        "teacher_heads: 'head_to_head' expects one head, or one for each",
    ),
    ({"mode": "block_to_block", "heads": [0]}, "heads: 'block_to_block' distils all heads"),
    ({"mode": "head_to_block"}, "mode: expected one of"),
    ({"mode": "head_to_head", "alpha": 1.5}, "alpha: expected a number from 0 to 1, got 1.5"),
    ({"mode": "head_to_head", "divergence": "js"}, "alpha: needed for divergence='js'"),
    ({"mode": "head_to_head", "alpha": 1, "criterion": None}, "alpha: 1 leaves the class loss alone"),
    ({"mode": "head_to_head", "wrong_teacher_weight": 2}, "wrong_teacher_weight: expected a number from 0 to 1"),
    ({"mode": "head_to_head", "wrong_student_weight": 0, "criterion": None}, "wrong_student_weight: needs targets"),
    ({"blocks": 0}, "blocks: 'encoder_to_encoder' takes every block"),
    ({"num_classes": 3}, "num_classes: only for a student given by name"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        HeadKD(vit(4), vit(2, seed=1), verbose=False, **options)


@pytest.mark.parametrize(
    ("teacher_heads", "message"),
    [
        ([0], "teacher_heads: expected m = 2 heads like the student block, got"),
        ([1, 1], r"teacher_heads: expected every head once, got \[1, 1\]"),
        ([0, 4], "teacher_heads: expected indices from 0 to 3"),
        ([[0, 1]], "teacher_heads: expected one sequence for each of 2 blocks, got 1"),
    ],
)
def test_wrong_teacher_heads(teacher_heads, message):
    with pytest.raises(ValueError, match=message):
        HeadKD(vit(2), vit(4, dim=64), teacher_heads=teacher_heads, verbose=False)


def test_more_refusals():
    images, targets = batch()
    with pytest.raises(ValueError, match="wrong_teacher_weight: expected a teacher that classifies the student's 10"):
        HeadKD(vit(2), vit(2, classes=7), wrong_teacher_weight=0.5, verbose=False)
    with pytest.raises(ValueError, match="the student's grid is 4x4 .* the teacher's 8x8; whole maps"):
        HeadKD(vit(2), vit(2, patch_size=2), resample_mode=None, verbose=False)(images, targets)
    with pytest.raises(ValueError, match="divergence: 'logit_mse' compares scores"):
        HeadKD(vit(2), vit(2, patch_size=2), divergence="logit_mse", verbose=False)(images, targets)
    with pytest.raises(ValueError, match=r"student takes \(16, 16\) and teacher \(32, 32\) pixels only"):
        HeadKD(vit(2), vit(2, img_size=32), verbose=False)
    with pytest.raises(ValueError, match="targets: needed by criterion"):
        HeadKD(vit(2), vit(2, seed=1), verbose=False)(images)
    with pytest.raises(ValueError, match=re.escape("images: expected [B, C, H, W], got (1, 16, 16)")):
        HeadKD(vit(2), vit(2, seed=1), verbose=False)(images[0], targets)
    shared = vit(2)
    with pytest.raises(ValueError, match="teacher: shares parameters with student"):
        HeadKD(shared, shared, verbose=False)
    with pytest.raises(ValueError, match="num_classes: needed to build student 'test_vit'"):
        HeadKD("test_vit", vit(2), verbose=False)


def test_student_by_name_has_a_classifier():
    student = HeadKD("test_vit", timm.create_model("test_vit", num_classes=5), num_classes=5, verbose=False).student
    assert student(torch.randn(1, 3, 160, 160)).shape == (1, 5)


def test_digits_end_to_end():
    """A short run on real digits brings the student's attention nearer to the teacher's than class labels alone do."""
    train, test = load_digits(320, 100)
    teacher, options = vit(4, dim=64, seed=1), {"teacher_heads": [1, 3], "verbose": False}

    def run(alpha):
        student = vit(2)
        probe = HeadKD(student, teacher, **options)

        def distance():
            with torch.no_grad():
                return probe(*test)["attn_loss"].item()

        before = distance()
        history = fit(HeadKD(student, teacher, alpha=alpha, **options), *train)
        return before, distance(), history

    (before, with_attention, _), (same, without, history) = run(0.05), run(1.0)
    assert before == same
    assert with_attention < 0.8 * min(without, before)
    assert history[-1]["task_loss"] < history[0]["task_loss"]
