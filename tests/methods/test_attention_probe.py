"""Attention Probe's distillation: its equations against textbook restatements, its task, its refusals."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from attnkd.capture.blocks import default_blocks
from attnkd.capture.outputs import BlockOutputs
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.logits import kd_loss
from attnkd.methods.noise_adaptation import NoiseAdaptation, noisy_cross_entropy
from attnkd.methods.schedule import Schedule
from attnkd.relation.api import relation_row_loss

KIND = {"img_size": 16, "patch_size": 4, "in_chans": 1}


def vit(seed, embed_dim, depth, num_heads, num_classes=10, name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(seed)
    options = {**KIND, **kwargs}
    return timm.create_model(
        name, embed_dim=embed_dim, depth=depth, num_heads=num_heads, num_classes=num_classes, **options
    )


def make(device="cpu", **options):
    student, teacher = vit(1, 16, 3, 2), vit(2, 32, 6, 4)
    return AttentionProbe(
        student.to(device), teacher.to(device), options.pop("teacher_accuracy", 0.9), verbose=False, **options
    )


# --- equations --------------------------------------------------------------------------------------------------------


def test_kd_is_the_textbook_divergence():
    output, target = torch.randn(5, 7), torch.randn(5, 7)
    p, t = (output / 4).softmax(1), (target / 4).softmax(1)
    torch.testing.assert_close(kd_loss(output, target, 4.0), 16 * (t * (t / p).log()).sum() / 5)


def test_q_has_the_accuracy_on_its_diagonal_and_a_softmax_beside_it():
    for classes, accuracy in ((2, 0.7), (5, 0.9), (4, 1.0)):
        noise = NoiseAdaptation(classes, accuracy)
        q = noise().exp()
        want = torch.full((classes, classes), (1 - accuracy) / (classes - 1)).fill_diagonal_(accuracy)
        torch.testing.assert_close(q, want)
        nn.init.normal_(noise.weight)
        q, softmax = noise().exp(), noise.weight.softmax(1)
        for i in range(classes):  # row i: the softmax over the other classes, in order, around the diagonal
            row = torch.cat(
                [(1 - accuracy) * softmax[i, :i], torch.tensor([accuracy]), (1 - accuracy) * softmax[i, i:]]
            )
            torch.testing.assert_close(q[i], row)
        torch.testing.assert_close(q.sum(1), torch.ones(classes))


def test_noisy_cross_entropy_is_the_cross_entropy_behind_q():
    noise = NoiseAdaptation(6, 0.8)
    nn.init.normal_(noise.weight)
    output, labels = torch.randn(9, 6, requires_grad=True), torch.randint(6, (9,))
    want = F.nll_loss((output.softmax(1) @ noise().exp()).log(), labels)
    got = noisy_cross_entropy(output, labels, noise())
    torch.testing.assert_close(got, want)
    leaves = [output, noise.weight]
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_noisy_cross_entropy_survives_certainty():
    """Q of a perfect teacher is the identity: the plain cross-entropy, also where the student rules the label out."""
    output, labels = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    noise = NoiseAdaptation(5, 1.0)
    torch.testing.assert_close(noisy_cross_entropy(output, labels, noise()), F.cross_entropy(output, labels))
    sure = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    loss = noisy_cross_entropy(sure, torch.tensor([1]), NoiseAdaptation(3, 0.9)())
    torch.testing.assert_close(loss, torch.tensor(-math.log(0.05)))  # (1 − 0.9) / 2: the teacher's fault
    loss.backward()
    assert sure.grad.isfinite().all()


def test_total_loss_is_eq_10():
    task = make(relation_weight=0.8)
    images = torch.randn(3, 1, 16, 16)
    result = task(images, targets=None)
    tokens = {}

    def keep(name):
        return lambda module, args, output: tokens.__setitem__(name, output)

    pairs = {0: 1, 1: 3, 2: 5}  # thirds of 3 and of 6 blocks
    handles = [task.student.blocks[s].register_forward_hook(keep(("s", s))) for s in pairs]
    handles += [task.teacher.tap.model.blocks[t].register_forward_hook(keep(("t", t))) for t in pairs.values()]
    output, target = task.student(images), task.teacher.tap.model(images)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(result["output"], output)
    torch.testing.assert_close(result["kd_loss"], kd_loss(output, target, 4.0))
    q = torch.full((10, 10), 0.1 / 9).fill_diagonal_(0.9)
    torch.testing.assert_close(result["noisy_loss"], F.nll_loss((output.softmax(1) @ q).log(), target.argmax(1)))
    rows = [relation_row_loss(tokens["s", s], tokens["t", t], impl="reference") for s, t in pairs.items()]
    torch.testing.assert_close(result["relation_loss"], torch.stack(rows).mean())
    torch.testing.assert_close(result["loss"], result["kd_loss"] + result["noisy_loss"] + 0.8 * result["relation_loss"])


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_implementations_agree_in_the_student(device, impl):
    images = torch.randn(2, 1, 16, 16, device=device)
    grads = {}
    for which in (impl, "reference"):
        task = make(device, impl=which, kd_weight=0.0, noisy_weight=0.0)
        task(images)["loss"].backward()
        grads[which] = [p.grad for p in task.student.parameters() if p.grad is not None]
    torch.testing.assert_close(grads[impl], grads["reference"], rtol=1e-4, atol=1e-6)


# --- the task ---------------------------------------------------------------------------------------------------------


def test_default_blocks_are_the_authors():
    twelve = vit(1, 8, 12, 2)
    assert default_blocks(twelve, 3) == [3, 7, 11] and default_blocks(twelve, 2) == [3, 7]
    assert default_blocks(vit(1, 8, 24, 2), 3) == [7, 15, 23] and default_blocks(vit(1, 8, 2, 2), 3) == [0, 1]


def test_trains_student_and_q_and_nothing_else():
    task = make()
    before = {n: p.clone() for n, p in task.teacher.named_parameters()}
    assert {n for n, _ in task.named_parameters() if "noise" in n} == {"trainable_module.noise.weight"}
    optimizers = task.optimizers()
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, torch.optim.Adam]
    assert (optimizers[0].defaults["lr"], optimizers[0].defaults["weight_decay"], optimizers[1].defaults["lr"]) == (
        7.5e-4,
        0.025,
        1e-3,
    )
    images = torch.randn(8, 1, 16, 16)
    task.train()
    assert not task.teacher.training
    losses = []
    for _ in range(12):
        result = task(images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        result["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(result["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert task.noise.weight.abs().max() > 0
    for name, parameter in task.teacher.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_registers_of_either_model_are_left_out():
    student, teacher = vit(1, 16, 3, 2, reg_tokens=2), vit(2, 32, 3, 4, name="deit_tiny_distilled_patch16_224")
    task = AttentionProbe(student, teacher, 0.9, kd_weight=0.0, noisy_weight=0.0, blocks=[0, 2], verbose=False)
    images = torch.randn(2, 1, 16, 16)
    _, s = BlockOutputs(student, ["blocks.0", "blocks.2"])(images)
    _, t = BlockOutputs(teacher.eval(), ["blocks.0", "blocks.2"])(images)
    assert [(b.num_prefix_tokens, b.has_cls, b.grid) for b in (s[0], t[1])] == [(3, True, (4, 4)), (2, True, (4, 4))]
    want = [
        relation_row_loss(
            torch.cat([a.tokens[:, :1], a.tokens[:, 3:]], 1), torch.cat([b.tokens[:, :1], b.tokens[:, 2:]], 1)
        )
        for a, b in zip(s, t, strict=True)
    ]
    torch.testing.assert_close(task(images)["loss"], 0.8 * torch.stack(want).mean())


def test_checkpoint_round_trip():
    """Q, the schedules' time and the student; the student's keys are those of the plain model."""
    weight = Schedule(0.8, stop=10)
    task = make(relation_weight=weight)
    task.set_epoch(3)
    nn.init.normal_(task.noise.weight)
    state = copy.deepcopy(task.get_checkpoint_state())
    assert set(state["state_dict"]) == set(vit(1, 16, 3, 2).state_dict())
    other = make(relation_weight=weight)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert torch.equal(other.noise.weight, task.noise.weight) and other.schedules.time["epoch"] == 3
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(other(images)["loss"], task(images)["loss"])
    with pytest.raises(RuntimeError, match="no task state"):
        other.load_checkpoint_state(state["state_dict"], {})
    other.load_checkpoint_state(state["state_dict"], {}, strict=False)


def test_schedules():
    task = make(relation_weight=Schedule(0.8, stop=5), temperature=Schedule(4.0, start=1.0, warmup=2))
    images = torch.randn(2, 1, 16, 16)
    with pytest.raises(RuntimeError, match="set_epoch"):
        task(images)
    task.set_epoch(4)
    assert "relation_loss" in task(images)
    task.set_epoch(5)
    assert "relation_loss" not in task(images)


def test_ema_copies_hooks_and_holders_together():
    task = make()
    task.setup_ema(decay=0.5)
    images = torch.randn(2, 1, 16, 16)
    task(images)["loss"].backward()
    for parameter in task.student.parameters():
        parameter.data.add_(1e-2)
    task.update_ema()
    copied = task.get_trainable_module(ema=True)
    model = task.get_eval_model(ema=True)
    assert isinstance(model, timm.models.VisionTransformer) and model is not task.student
    output, tokens, *_ = copied(images)
    # The copy's own blocks were listened to: its last tokens give its output.
    torch.testing.assert_close(model.head(model.norm(tokens[-1].tokens)[:, 0]), output)


def test_compile_fullgraph():
    torch._dynamo.reset()
    task, plain = make(), make()
    task.compile(backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(task(images)["loss"], plain(images)["loss"])


def test_close_gives_the_models_back():
    task = make()
    student, teacher = task.close()
    assert not any(block._forward_hooks for model in (student, teacher) for block in model.blocks)


def test_activation_checkpointing():
    images = torch.randn(2, 1, 16, 16)
    grads = []
    for checkpointing in (False, True):
        task = make()
        task.student.set_grad_checkpointing(checkpointing)
        task.train()
        task(images)["loss"].backward()
        grads.append([p.grad for p in task.student.parameters()])
    torch.testing.assert_close(*grads)
    before = timm.layers.use_reentrant_ckpt()
    try:
        timm.layers.set_reentrant_ckpt(True)
        with pytest.raises(RuntimeError, match="[Rr]eentrant"):
            task(images.requires_grad_())
    finally:
        timm.layers.set_reentrant_ckpt(before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", [0.0, -0.1, 1.01, 97, math.nan, True, None])
def test_refuses_an_accuracy_outside_its_range(accuracy):
    with pytest.raises(ValueError, match=r"teacher_accuracy: expected a number in \(0, 1\]"):
        make(teacher_accuracy=accuracy)


def no_cls(**kwargs):
    return vit(1, 16, 3, 2, class_token=False, global_pool="avg", **kwargs)


REFUSED = {
    "no class token": (ValueError, "class token", lambda: (no_cls(), vit(2, 16, 3, 2), {})),
    "other classes": (ValueError, "student: expected a classifier of the teacher's classes", lambda: (vit(1, 16, 3, 2, 9), vit(2, 16, 3, 2), {})),
    "no classifier": (ValueError, "classifier", lambda: (vit(1, 16, 3, 2, 0), vit(2, 16, 3, 2, 0), {})),
    "one model": (ValueError, "shares parameters", lambda: (*[vit(1, 16, 3, 2)] * 2, {})),
    "block out of range": (ValueError, r"blocks: expected indices in \[-3, 2\]", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"blocks": 3})),
    "block twice": (ValueError, "every block once", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"blocks": [2, -1]})),
    "no block": (ValueError, "at least one", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"blocks": []})),
    "path without its teacher": (ValueError, "teacher_blocks: needed when blocks are module paths", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"blocks": "blocks.0"})),
    "unpaired": (ValueError, "teacher_blocks: expected 1", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"blocks": 0, "teacher_blocks": [0, 1]})),
    "negative weight": (ValueError, "kd_weight: expected a number >= 0", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"kd_weight": -1.0})),
    "cold": (ValueError, "temperature: expected a number > 0", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"temperature": 0.0})),
    "nothing on": (ValueError, "all are 0", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"kd_weight": 0.0, "noisy_weight": 0.0, "relation_weight": 0.0})),
    "axis": (ValueError, "normalize_dim: expected -1 or -2", lambda: (vit(1, 16, 3, 2), vit(2, 16, 3, 2), {"normalize_dim": 0})),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument(case):
    error, message, build = REFUSED[case]
    student, teacher, options = build()
    with pytest.raises(error, match=message):
        AttentionProbe(student, teacher, 0.9, verbose=False, **options)


def test_refuses_other_patch_grids_and_other_images():
    student, teacher = vit(1, 16, 3, 2), vit(2, 16, 3, 2, patch_size=2)
    task = AttentionProbe(student, teacher, 0.9, verbose=False)
    with pytest.raises(ValueError, match="the student's grid is 4x4 .* the teacher's 8x8"):
        task(torch.randn(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\]"):
        task(torch.randn(1, 16, 16))
