"""Student and teacher as a training task holds them: the one trains, with what trains beside it, the other is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.call import AttentionCall
from attnkd.capture.adapters import adapter_for
from attnkd.capture.adapters.text import is_text
from attnkd.capture.models import final_tokens, input_stats, modes, parameter_dtype, restore_modes
from attnkd.capture.outputs import BlockHooks, BlockTokens
from attnkd.capture.tap import AttentionTap, Wanted
from attnkd.capture.tokens import padded_patches, token_layout


class TrainedStudent(nn.Module):
    """What trains: a student in a wrapper that observes it, and modules that train beside it.

    The module that DDP, EMA and torch.compile wrap. ``wrapper`` is the name of the submodule that has the student as its
    ``model``; every other submodule is task state.
    """

    wrapper = "tap"

    @property
    def model(self) -> nn.Module:
        """The student itself."""
        return getattr(self, self.wrapper).model

    def release(self) -> nn.Module:
        """Give the student back as a plain model."""
        return getattr(self, self.wrapper).untap()

    def task_modules(self) -> dict[str, nn.Module]:
        """What trains beside the student, by name."""
        return {name: module for name, module in self.named_children() if name != self.wrapper}

    def no_weight_decay(self) -> set[str]:
        """Positions and tokens of the student under the names its parameters have here; timm's optimizer factory asks for it."""
        return {f"{self.wrapper}.model.{name}" for name in adapter_for(self.model).no_weight_decay(self.model)}


class TappedStudent(TrainedStudent):
    """A tapped student and its projector.

    Args:
        tap: the student's tap.
        projector: from student to teacher features, or None to leave features out.
        train_head: whether a loss uses the head's output.
        blocks: of the same model, to keep what they put out too.
        label_token: a distillation token, where the student has one, has a head and labels of its own.
    """

    def __init__(
        self,
        tap: AttentionTap,
        projector: nn.Module | None = None,
        train_head: bool = True,
        blocks: BlockHooks | None = None,
        label_token: bool = False,
    ) -> None:
        super().__init__()
        self.tap, self.projector, self.train_head, self.blocks = tap, projector, train_head, blocks
        self._heads_found = adapter_for(tap.model).separate_heads(tap.model, True) if label_token else None

    def forward(
        self,
        images: Tensor,
        patches: bool = False,
        teacher: Sequence[Wanted] | None = None,
        options: Mapping[str, Any] | None = None,
        block_tokens: bool = False,
    ) -> tuple[Any, Tensor | None, list[AttentionCall], list[Any], list[BlockTokens]]:
        """images [B, C, H, W] → head output, projected tokens, attention calls, divergences, tokens of blocks; None for what is not
        computed. With ``label_token`` in training mode the head output is that of two heads, [B, K] each.

        The projected tokens are the class token [B, 1, Dt], or with ``patches`` class token and patches [B, 1 + N, Dt].
        With ``teacher`` (and ``options``) the attentions compute their divergences, see :meth:`attnkd.AttentionTap.distil`.
        With ``block_tokens`` the last is what ``blocks`` put out, without it empty.

        Raises:
            RuntimeError: a student that trains in evaluation mode, in which its two heads have one output.
        """
        model = self.tap.model
        losses: list[Any] = []
        tokens_of_blocks: list[BlockTokens] = []
        run: Any = adapter_for(model).run if self.projector is not None else _output_alone
        arguments: tuple[Any, ...] = (model, images, self.train_head)
        if block_tokens and self.blocks is not None:
            run, arguments = self.blocks.run, (run, *arguments)
        if teacher is None:
            ran, calls = self.tap.capture(run, *arguments)
        else:
            ran, calls, losses = self.tap.distil(teacher, *arguments, function=run, **(options or {}))
        if ran is None:
            return None, None, calls, losses, []
        if block_tokens and self.blocks is not None:
            ran, tokens_of_blocks, _ = ran
        tokens, output = ran
        if self._heads_found is not None and isinstance(output, Tensor) and torch.is_grad_enabled():
            raise RuntimeError(
                f"student: {type(model).__name__} returned the mean of its two heads, which learn different labels; training needs "
                "task.train() and the student's distilled_training on"
            )
        features = None
        if self.projector is not None and tokens is not None:
            features = self.projector(_features(model, tokens, patches, calls))
        return output, features, calls, losses, tokens_of_blocks

    def release(self) -> nn.Module:
        """Give the student back as a plain model, with hooks and heads as it was found."""
        model = super().release()
        if self.blocks is not None:
            self.blocks.close()
        if self._heads_found is not None:
            adapter_for(model).separate_heads(model, self._heads_found)
        return model


class FrozenTeacher(nn.Module):
    """A teacher in its wrapper: never trained, always in evaluation mode, run without gradients.

    Args:
        tap: what runs the teacher and observes it, with the teacher as its ``model``. The teacher's parameters are frozen
            in place.
        input_norm: ((mean, ...), (std, ...)) per channel that images come normalised with; None when they come as the
            teacher wants them.

    The images are given to the teacher in its own dtype: a bfloat16 teacher can teach a float32 student. A teacher whose weights
    accelerate keeps elsewhere (``cpu_offload``, ``disk_offload``, ``dispatch_model``) stays where accelerate runs it.
    """

    def __init__(
        self,
        tap: Any,
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        blocks: BlockHooks | None = None,
    ) -> None:
        super().__init__()
        self.tap, self.blocks = tap, blocks
        self.input_norm = input_norm
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale, shift = (None, None) if input_norm is None else _renormalise(self.tap.model, input_norm)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        model: nn.Module = tap.model
        self._found = modes(model), {name: p.requires_grad for name, p in model.named_parameters()}
        super().train(False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor | None, list[Any], list[BlockTokens]]:
        """images [B, C, H, W] → the teacher's output (None if it stops before), what its wrapper observed, and the tokens of
        ``blocks``, none without."""
        images, model = self.normalise(images), self.tap.model
        if not isinstance(self.tap, AttentionTap):
            return *self.tap(images), []
        run = adapter_for(model).forward
        if self.blocks is None:
            return *self.tap.capture(run, model, images), []
        (output, tokens, _), calls = self.tap.capture(self.blocks.run, run, model, images)
        return output, calls, tokens

    def normalise(self, images: Tensor) -> Tensor:
        """The images in the teacher's own normalisation and dtype; text as it is."""
        if is_text(images):
            return images
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        return images.to(parameter_dtype(self.tap.model))

    def release(self) -> nn.Module:
        """Give the teacher back as it was found: without tap, modes and ``requires_grad`` of its parameters as before."""
        model = self.tap.untap()
        if self.blocks is not None:
            self.blocks.close()
        found_modes, trained = self._found
        restore_modes(model, found_modes)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, False))
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenTeacher:
        offloaded = any(parameter.is_meta for parameter in self.tap.parameters())
        return super()._apply(
            fn, recurse and not offloaded
        )  # there is nothing to move: hooks bring the weights when they are needed

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Does nothing: a teacher stays in evaluation mode."""
        return self


class FeatureTeacher(FrozenTeacher):
    """A frozen, tapped teacher that gives its normalised tokens.

    Args:
        head: run the head too, because what is tapped is in it.
    """

    def __init__(self, tap: Any, input_norm: Any = None, head: bool = False) -> None:
        super().__init__(tap, input_norm)
        self.head = head

    @torch.no_grad()
    def forward(self, images: Tensor, patches: bool = False) -> tuple[Tensor | None, list[Any]]:  # type: ignore[override]
        """images [B, C, H, W] → class token [B, 1, Dt], or with ``patches`` class token and patches [B, 1 + N, Dt]
        (None if it stops before), and attention calls."""
        model = self.tap.model
        images, adapter = self.normalise(images), adapter_for(model)
        if self.head:
            ran, calls = self.tap.capture(adapter.run, model, images, False)
            tokens = None if ran is None else ran[0]
        else:
            tokens, calls = self.tap.capture(adapter.tokens, model, images)
        return (None if tokens is None else _features(model, tokens, patches, calls)), calls


def _output_alone(model: nn.Module, images: Tensor, train_head: bool) -> tuple[None, Tensor]:
    """In place of :meth:`attnkd.capture.adapters.Adapter.run`, where nobody asks for tokens."""
    return None, adapter_for(model).forward(model, images)


def _features(model: nn.Module, tokens: Tensor, patches: bool, calls: Sequence[AttentionCall]) -> Tensor:
    """The model's normalised tokens; patches that its attention takes for padding are in no mean."""
    layout = token_layout(model)
    padded = padded_patches(calls[0], layout) if calls else None
    if padded is not None and padded.shape[1] != tokens.shape[1] - layout.num_prefix_tokens:
        padded = None  # of a window's tokens
    return final_tokens(model, tokens, patches, padded)


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
    parameter = next(teacher.parameters())
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    ours, theirs = torch.tensor((mean, std), device=device), torch.tensor(stats, device=device)
    scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
