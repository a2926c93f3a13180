"""The rows that guide a student without class token, beside whole maps in float64."""

import pytest
import torch
from torch.nn import functional as F

from attnkd.attention.call import AttentionCall
from attnkd.methods.guided_rows import guided_divergence

GENERATOR = torch.Generator().manual_seed(5)


def call(heads, grid, prefix, has_cls, rows=None, bias=False):
    count = prefix + grid[0] * grid[1]
    rows = count if rows is None else rows
    query, key = (torch.randn(2, heads, n, 6, generator=GENERATOR, dtype=torch.float64) for n in (rows, count))
    mask = torch.randn(heads, rows, count, generator=GENERATOR, dtype=torch.float64) if bias else None
    return AttentionCall(query, key, mask, 0.6, prefix, has_cls, grid)


def patch_map(one, first, temperature=1.0):
    """[B, H, M, N] over the tokens from ``first`` on."""
    logits = one.scale * one.query @ one.key.mT + (0 if one.mask is None else one.mask)
    return (logits[..., first:] / temperature).softmax(-1)


def kl(target, row):
    return (target * (target.log() - row.log())).sum() / len(row)


def resized(rows, old, new):
    images = F.interpolate(rows.flatten(1, 2).unflatten(2, old), size=new, mode="bilinear").flatten(2)
    images = images.clamp_min(1e-5)
    return (images / images.sum(-1, keepdim=True)).unflatten(1, rows.shape[1:3])


OPTIONS = {"merge": None, "temperature": 1.0, "mode": "bilinear", "impl": "reference"}


@pytest.mark.parametrize("teacher_grid", [(3, 4), (2, 5)])
def test_the_mean_patch_row(teacher_grid):
    student, teacher = call(3, (3, 4), 2, True, bias=True), call(3, teacher_grid, 0, False)
    student = student._replace(query=student.query.requires_grad_())
    row = patch_map(student, 2)[:, :, 2:].mean(2, keepdim=True)
    target = patch_map(teacher, 0).mean(2, keepdim=True)
    if teacher_grid != (3, 4):
        target = resized(target, teacher_grid, (3, 4))
    loss, expected = guided_divergence(student, teacher, "mean", **OPTIONS), kl(target, row)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, student.query, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("teacher_grid", [(3, 4), (2, 5)])
def test_the_pooling_row(teacher_grid):
    """A class token pools in the student (its own key is left out), an attention pooling in the teacher."""
    student, teacher = call(3, (3, 4), 1, True), call(3, teacher_grid, 0, False, rows=1, bias=True)
    row, target = patch_map(student, 1)[:, :, :1], patch_map(teacher, 0)
    if teacher_grid != (3, 4):
        target = resized(target, teacher_grid, (3, 4))
    torch.testing.assert_close(guided_divergence(student, teacher, "pool", **OPTIONS), kl(target, row))
    # Heads of another number are merged.
    teacher = call(5, (3, 4), 4, False, rows=1)
    options = OPTIONS | {"merge": "logsum", "temperature": 2.0}
    rows = [patch_map(one, first)[:, :, :1].log().sum(1) / 2 for one, first in ((student, 1), (teacher, 4))]
    expected = kl(rows[1].softmax(-1), rows[0].softmax(-1))
    torch.testing.assert_close(guided_divergence(student, teacher, "pool", **options), expected)


def test_all_rows():
    student, teacher = call(3, (3, 4), 2, True), call(3, (3, 4), 1, True)
    maps = []
    for one, prefix in ((student, 2), (teacher, 1)):
        kept = [0, *range(prefix, one.key.shape[2])]
        shared = one._replace(query=one.query[:, :, kept], key=one.key[:, :, kept])
        maps.append(patch_map(shared, 0))
    expected = kl(maps[1], maps[0]) / 13
    torch.testing.assert_close(guided_divergence(student, teacher, "all", **OPTIONS), expected)
    other = guided_divergence(student, call(3, (2, 5), 0, False), "all", **OPTIONS)
    assert other.isfinite() and other > 0


@pytest.mark.parametrize("teacher_grid", [(3, 4), (2, 5)])
@pytest.mark.parametrize("rows", ["all", "mean"])
def test_padding_has_no_part(rows, teacher_grid):
    """What is in the student's padding changes nothing; the rest of the teacher's map counts over what is left."""
    keep = torch.arange(13) < torch.tensor([[13], [9]])  # of class token and 12 patches
    student = call(3, (3, 4), 1, True)._replace(mask=keep[:, None, None])
    teacher = call(3, teacher_grid, 1, True)
    teacher = teacher._replace(mask=keep[:, None, None]) if teacher_grid == (3, 4) else teacher
    loss = guided_divergence(student, teacher, rows, **OPTIONS)
    filled = [torch.where(keep[:, None, :, None], x, x + 5.0) for x in student[:2]]
    other = guided_divergence(student._replace(query=filled[0], key=filled[1]), teacher, rows, **OPTIONS)
    torch.testing.assert_close(other, loss)
    assert loss.isfinite() and loss > 0


def test_the_mean_row_of_peaked_maps_in_float32():
    """Probabilities far below the smallest float32 are not 0."""
    sides = [one._replace(scale=one.scale * 600) for one in (call(2, (3, 4), 0, False), call(2, (3, 4), 0, False))]
    expected = guided_divergence(*sides, "mean", **OPTIONS)
    single = [one._replace(query=one.query.float(), key=one.key.float()) for one in sides]
    torch.testing.assert_close(guided_divergence(*single, "mean", **OPTIONS), expected.float(), rtol=1e-4, atol=0)
    assert expected > 100


def test_a_pooling_of_several_queries_is_refused():
    with pytest.raises(ValueError, match="rows: 'pool' needs a pooling of one query, this attention pools with 3"):
        guided_divergence(call(2, (3, 4), 1, True), call(2, (3, 4), 0, False, rows=3), "pool", **OPTIONS)
