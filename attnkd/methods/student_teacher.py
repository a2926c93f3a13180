"""Student and teacher as a training task holds them: tapped, the one with its projector, the other frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.tap import AttentionCall, AttentionTap
from attnkd.capture.tokens import cls_features, image_size, input_stats, token_layout


class TappedStudent(nn.Module):
    """What trains: the tapped student and its projector. The module that DDP, EMA and torch.compile wrap.

    Args:
        tap: the student's tap.
        projector: from student to teacher features, or None to leave features out.
        train_head: whether the head's output takes part in a loss.
    """

    def __init__(self, tap: AttentionTap, projector: nn.Module | None, train_head: bool) -> None:
        super().__init__()
        self.tap, self.projector, self.train_head = tap, projector, train_head

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None, list[AttentionCall]]:
        """images [B, C, H, W] → head output, projected features [B, Dt] (None where not computed), attention calls."""
        model: Any = self.tap.model
        tokens, calls = self.tap.capture(model.forward_features, images)
        if tokens is None:
            return None, None, calls
        with torch.set_grad_enabled(self.train_head and torch.is_grad_enabled()):
            output = model.forward_head(tokens)
        features = None if self.projector is None else self.projector(cls_features(model, tokens))
        return output, features, calls

    def no_weight_decay(self) -> set[str]:
        """The student's own list under the names its parameters have here; timm's optimizer factory asks for it."""
        listed = getattr(self.tap.model, "no_weight_decay", None)
        names: set[str] = set() if listed is None else set(listed())
        return {f"tap.model.{name}" for name in names}


class FrozenTeacher(nn.Module):
    """The tapped teacher: never trained, always in evaluation mode, run without gradients.

    Args:
        tap: the teacher's tap. The model's parameters are frozen in place.
        input_norm: ((mean, ...), (std, ...)) per channel that images come normalised with; None when they come as the
            teacher wants them.
    """

    def __init__(self, tap: AttentionTap, input_norm: tuple[Sequence[float], Sequence[float]] | None = None) -> None:
        super().__init__()
        self.tap = tap
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale, shift = (None, None) if input_norm is None else _renormalise(tap.model, input_norm)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        super().train(False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor | None, list[AttentionCall]]:
        """images [B, C, H, W] → class token [B, Dt] (None if stopped before it), attention calls."""
        model: Any = self.tap.model
        if self.scale is not None and self.shift is not None:
            images = (images * self.scale + self.shift).to(images.dtype)
        tokens, calls = self.tap.capture(model.forward_features, images)
        return (None if tokens is None else cls_features(model, tokens)), calls

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Does nothing: a teacher stays in evaluation mode."""
        return self


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse models whose class tokens cannot be compared on the same images.

    Raises:
        TypeError: not a timm model.
        ValueError: no class token, shared parameters, or fixed image sizes that differ.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) or not hasattr(model, "forward_features"):
            raise TypeError(f"{name}: expected a timm model or its name, got {type(model).__name__}")
        layout = token_layout(model)
        if not layout.has_cls:
            raise ValueError(
                f"{name}: class tokens are compared, but {type(model).__name__} has none "
                f"(num_prefix_tokens = {layout.num_prefix_tokens}, cls_token is None)"
            )
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError("teacher: shares parameters with student; freezing the teacher would freeze the student")
    sizes = image_size(student), image_size(teacher)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"student and teacher see the same images, but student takes {sizes[0]} and teacher {sizes[1]} pixels "
            "only; build one of them with another img_size, or with dynamic_img_size=True"
        )


def _renormalise(
    teacher: nn.Module, input_norm: tuple[Sequence[float], Sequence[float]]
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift [1, C, 1, 1] from the images' normalisation to the teacher's; None where they agree."""
    try:
        mean, std = (tuple(float(value) for value in values) for values in input_norm)
    except (TypeError, ValueError):
        raise ValueError(f"input_norm: expected ((mean, ...), (std, ...)), got {input_norm!r}") from None
    stats = input_stats(teacher)
    if stats is None:
        raise ValueError(f"input_norm: given, but teacher {type(teacher).__name__} names no mean and std of its own")
    if not len(mean) == len(std) == len(stats[0]):
        raise ValueError(f"input_norm: expected {len(stats[0])} channels, got {len(mean)} means and {len(std)} stds")
    if stats == (mean, std):
        return None, None
    device = next(teacher.parameters()).device
    ours, theirs = torch.tensor((mean, std), device=device), torch.tensor(stats, device=device)
    scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
