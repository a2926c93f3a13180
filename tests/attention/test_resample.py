"""Resizing a teacher's rows to another patch grid."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attnkd import resample_attention


def rows(grid, peak=6.0, batch=3, heads=2, queries=1):
    return (peak * torch.randn(batch, heads, queries, 1 + grid[0] * grid[1])).softmax(-1)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area"])
def test_keeps_the_class_entry_and_sums_to_one(mode):
    source = rows((8, 8), queries=2)
    out = resample_attention(source, (8, 8), (5, 3), mode=mode)
    assert out.shape == (3, 2, 2, 16)
    torch.testing.assert_close(out[..., 0], source[..., 0])
    torch.testing.assert_close(out.sum(-1), torch.ones(3, 2, 2))
    assert (out > 0).all()


def test_is_pytorchs_bicubic_clamped_then_rescaled():
    source = rows((6, 6)).double()
    image = F.interpolate(source[:, :, 0, 1:].reshape(3, 2, 6, 6), size=(4, 4), mode="bicubic", align_corners=False)
    assert (image < 0).any(), "the case should undershoot, or the clamp is not tested"
    image = image.clamp_min(1e-5).flatten(2)
    want = image / image.sum(-1, keepdim=True) * (1 - source[:, :, 0, :1])
    torch.testing.assert_close(resample_attention(source, (6, 6), (4, 4))[:, :, 0, 1:], want)


def test_same_grid_is_the_identity_and_half_precision_becomes_float32():
    source = rows((4, 4))
    assert resample_attention(source, (4, 4), (4, 4)) is source
    assert resample_attention(source.bfloat16(), (4, 4), (2, 2)).dtype == torch.float32
    grid = np.array([2, 4])
    torch.testing.assert_close(
        resample_attention(source, np.array([4, 4]), grid), resample_attention(source, (4, 4), (2, 4))
    )


def test_a_constant_map_stays_constant():
    source = torch.full((1, 1, 1, 65), 1 / 65)
    torch.testing.assert_close(resample_attention(source, (8, 8), (4, 4))[0, 0, 0, 1:], torch.full((16,), 64 / 65 / 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.rand(2, 3, 17)}, "rows: expected 4 dimensions"),
        ({"rows": torch.ones(1, 1, 1, 17, dtype=torch.int64)}, "rows: expected a floating point dtype"),
        ({"teacher_grid": (4, 5)}, "rows: expected 1 \\+ 4·5 = 21 keys"),
        ({"student_grid": (0, 4)}, "student_grid: expected two positive integers"),
        ({"student_grid": (2.0, 4)}, "student_grid: expected two positive integers"),
        ({"student_grid": 4}, "student_grid: expected \\(height, width\\)"),
        ({"mode": "nearest"}, "mode: expected one of 'bicubic', 'bilinear', 'area', got 'nearest'"),
        ({"floor": 0.0}, "floor: expected a number between 0 and 1"),
    ],
)
def test_refusals(change, message):
    arguments = {"rows": rows((4, 4)), "teacher_grid": (4, 4), "student_grid": (2, 2)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        resample_attention(**arguments)
