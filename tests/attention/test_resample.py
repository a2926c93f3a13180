"""Resizing a teacher's rows to another patch grid."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attnkd import attention_divergence, merge_attention, resample_attention
from attnkd.attention.call import AttentionCall
from attnkd.attention.resample import MODES
from attnkd.attention.resampled_maps import resampled_map_divergence


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


class TestWholeMaps:
    """A whole map over another patch grid, beside the whole map resized at once."""

    def calls(self, has_cls: bool, dtype: torch.dtype = torch.float64) -> tuple[AttentionCall, AttentionCall]:
        generator = torch.Generator().manual_seed(3)

        def call(heads: int, grid: tuple[int, int], dim: int, bias: bool) -> AttentionCall:
            count = has_cls + grid[0] * grid[1]
            query, key = (torch.randn(2, heads, count, dim, generator=generator, dtype=dtype) for _ in range(2))
            mask = torch.randn(heads, count, count, generator=generator, dtype=dtype) if bias else None
            return AttentionCall(query, key, mask, 0.7, int(has_cls), has_cls, grid)

        return call(3, (3, 5), 8, True), call(3, (6, 4), 4, False)

    def target(self, teacher: AttentionCall, grid: tuple[int, int], mode: str) -> torch.Tensor:
        first = int(bool(teacher.has_cls))
        maps = (teacher.scale * teacher.query @ teacher.key.mT).softmax(-1)
        images = maps[:, :, first:].unflatten(2, teacher.grid).permute(0, 1, 4, 2, 3)  # [B, H, keys, height, width]
        resized = F.interpolate(images.flatten(1, 2), size=grid, mode="bilinear").unflatten(1, images.shape[1:3])
        rows = torch.cat([maps[:, :, :first], resized.flatten(3).mT], 2)
        rows = rows if first else F.pad(rows, (1, 0))
        return resample_attention(rows, teacher.grid, grid, mode)[..., 1 - first :]

    @pytest.mark.parametrize("has_cls", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_is_the_divergence_from_the_resized_map(self, mode: str, has_cls: bool) -> None:
        student, teacher = self.calls(has_cls)
        student = student._replace(query=student.query.requires_grad_())
        target = self.target(teacher, (3, 5), mode)
        torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
        log_p = (student.scale * student.query @ student.key.mT + student.mask).log_softmax(-1)
        expected = (target * (target.log() - log_p)).sum(-1)
        for impl in ("reference", "chunked"):
            losses = resampled_map_divergence(student, teacher, mode=mode, impl=impl)
            torch.testing.assert_close(losses, expected)
            grads = [
                torch.autograd.grad(x.sin().sum(), student.query, retain_graph=True)[0] for x in (losses, expected)
            ]
            torch.testing.assert_close(*grads)

    def test_merged_and_warm(self) -> None:
        student, teacher = self.calls(True)
        options = {"merge": "mean", "temperature": 2.0, "divergence": "js", "impl": "reference"}
        losses = resampled_map_divergence(student, teacher, mode="area", **options)
        rows = merge_attention(self.target(teacher, (3, 5), "area"), "mean", 2.0)
        query, key, mask, scale = student[:4]
        expected = attention_divergence(
            query, key, teacher_probs=rows, student_mask=mask, student_scale=scale, reduction="none", **options
        )
        torch.testing.assert_close(losses, expected)

    def test_scores_cannot_be_resized(self) -> None:
        with pytest.raises(ValueError, match="divergence: 'logit_mse' compares scores"):
            resampled_map_divergence(*self.calls(True), divergence="logit_mse")
