"""Attention transfer beside attention: Zagoruyko and Komodakis' equation 2 restated on the models' own blocks."""

import pytest
import timm
import torch

from attnkd import SSTA, HeadKD
from attnkd.capture.outputs import BlockTokens
from attnkd.capture.tokens import TokenLayout
from attnkd.methods.attention_transfer import attention_transfer_loss


def vit(heads, seed, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}, num_heads=heads)


def tokens_after(model, images):
    """[B, N, D] after each block."""
    found, x = [], model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


def textbook(pairs, prefixes):
    """Image by image and patch by patch."""
    total = 0.0
    for ours, theirs in pairs:
        for image in range(len(ours)):
            places = []
            for tokens, prefix in zip((ours, theirs), prefixes, strict=True):
                q = torch.stack([(token**2).sum() for token in tokens[image, prefix:]])
                places.append(q / (q**2).sum().sqrt())
            total += ((places[0] - places[1]) ** 2).sum().sqrt() / 2 / len(ours)
    return total


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("method", [HeadKD, SSTA])
def test_it_is_added_to_the_loss(method, one_pass):
    student, teacher = vit(2, 0, reg_tokens=2), vit(4, 1, depth=4, embed_dim=32)
    images, targets = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    ours, theirs = tokens_after(student, images), tokens_after(teacher, images)
    expected = textbook([(ours[0], theirs[1]), (ours[1], theirs[3])], (3, 1))
    options = {"at_weight": 2.0, "one_pass": one_pass, "verbose": False}
    alone = {"alpha": 1.0} if method is HeadKD else {"beta": 0.0}
    if method is SSTA:
        options |= {"teacher_heads": [3, 0], "blocks": "all", "stop_epoch": None}
    task = method(student, teacher, **options)
    result = task(images, targets)
    torch.testing.assert_close(result["at_loss"], expected)
    (attn_loss,) = (value for name, value in result.items() if name.endswith("attn_loss"))
    share = 0.5 if method is HeadKD else 1.0
    torch.testing.assert_close(result["loss"], share * result["task_loss"] + share * attn_loss + 2 * expected)
    task.untap()

    task = method(student, teacher, **options, **alone)  # the teacher's attention has no part in it
    result = task(images, targets)
    torch.testing.assert_close(result["loss"], result["task_loss"] + 2 * expected)
    student.zero_grad()
    (result["loss"] - result["task_loss"]).backward()
    grad = student.blocks[0].mlp.fc1.weight.grad
    torch.testing.assert_close(grad, *torch.autograd.grad(2 * expected, student.blocks[0].mlp.fc1.weight))
    assert grad.abs().sum() > 0 and all(parameter.grad is None for parameter in teacher.parameters())
    task.untap()
    assert not student.blocks[0]._forward_hooks and not teacher.blocks[0]._forward_hooks

    if method is HeadKD:
        other = vit(4, 1, patch_size=8)
        resized = HeadKD(student, other, **options)(images, targets)["at_loss"]
        maps = [(t[:, 1:] ** 2).sum(-1).view(3, 1, 2, 2) for t in tokens_after(other, images)]
        wanted = [torch.nn.functional.interpolate(q, size=(4, 4), mode="bicubic").flatten(1) for q in maps]
        ours = tokens_after(student, images)
        gaps = [
            (q / q.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).norm(dim=1).mean() / 2
            for q, t in zip([(s[:, 3:] ** 2).sum(-1) for s in ours], wanted, strict=True)
        ]
        torch.testing.assert_close(resized, sum(gaps))


def test_equal_blocks_have_no_loss_and_no_gradient():
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    block = BlockTokens(tokens, 1, True, (2, 2))
    loss = attention_transfer_loss([(block, block._replace(tokens=tokens.detach()))], (TokenLayout(1, True, 8),) * 2)
    loss.backward()
    assert loss == 0 and (tokens.grad == 0).all()


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="at_weight: above 0, but teacher is None"):
        SSTA(vit(2, 0), assistant=vit(4, 1), assistant_heads=[0], blocks=(-1,), at_weight=1.0, verbose=False)
    with pytest.raises(ValueError, match="at_weight: expected a number >= 0"):
        HeadKD(vit(2, 0), vit(4, 1), at_weight=-1.0, verbose=False)
    task = HeadKD(vit(2, 0), vit(4, 1, patch_size=8), alpha=1.0, at_weight=1.0, resample_mode=None, verbose=False)
    with pytest.raises(ValueError, match="the student's grid is 4x4 .* the teacher's 2x2"):
        task(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))
