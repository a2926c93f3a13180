"""Attention Probe: a student learns from a classifier on unlabelled images, without the data the classifier was trained on.

Wang, Cao, Shi, Wu, Yang: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022. The formulas, and where
the authors' published code differs: docs/methods/attention_probe.md. Choosing the images: :mod:`attnkd.methods.selection`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.checks import check_choice
from attnkd.capture.adapters import adapter_for
from attnkd.capture.blocks import Blocks, block_paths, default_blocks
from attnkd.capture.models import resolve_model, unwrap_model
from attnkd.capture.outputs import BlockOutputs, BlockTokens
from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tokens import check_same_grid, filled_in, mean_token, token_layout
from attnkd.methods.logits import UNKNOWN_CLASSES, kd_loss
from attnkd.methods.noise_adaptation import NoiseAdaptation, noisy_cross_entropy
from attnkd.methods.schedule import Schedule
from attnkd.methods.student_teacher import FrozenTeacher, TrainedStudent
from attnkd.methods.task import DistillTask, check_numbers, check_pair, check_student
from attnkd.relation.api import relation_row_loss

_logger = logging.getLogger(__name__)


class AttentionProbe(DistillTask):
    """Probe knowledge distillation: loss = kd_weight · KD + noisy_weight · NCE + relation_weight · R.

    KD is T²·KL(teacher ‖ student) of the class probabilities at temperature T. NCE is the cross-entropy with the teacher's
    predicted classes after the student's probabilities went through a matrix Q of class confusions, whose diagonal is the
    teacher's accuracy and whose rest is learned. R compares, block by block, the similarity of class token and patch tokens,
    see :func:`attnkd.relation.api.relation_row_loss`.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's distillation tasks. Q and the
    schedules' time are task state. The teacher is frozen, stays in evaluation mode, and is not a submodule: it is in no
    optimizer, state_dict or checkpoint.

    Args:
        student: a timm Vision Transformer classifier with a class token, or a timm name (built from scratch for the teacher's
            classes).
        teacher: the same, trained; by name with its pretrained weights and classifier. Its parameters are frozen in place.
        teacher_accuracy: the teacher's top-1 accuracy in (0, 1] on the data it was trained for: the diagonal of Q.
        blocks: student blocks whose output is compared: index, sequence of indices, or 'all'. None: those at a third, two
            thirds and the whole of the depth, 4, 8 and 12 (counted from 1) of 12.
        teacher_blocks: the teacher block for each student block. None: block i of Ls learns from ⌈(i + 1)·Lt/Ls⌉ − 1.
        relation_weight: weight of R, the paper's α.
        kd_weight, noisy_weight: weights of KD and NCE; 1, as in the published code.
        temperature: T of KD.
        rows: whose similarity to the patches is compared: 'cls', the class token's (the paper), or 'mean', the mean patch's, for
            models without one.
        normalize_dim: of the features in R: -1 per token, -2 per channel as the published code does.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: the teacher gets them as they are.
        one_pass: R is computed while the student runs, as soon as a block's tokens are there, with the same results. The teacher then
            runs before the student.
        impl: implementation of R, see :mod:`attnkd.attention.dispatch`.
        device, dtype: of Q; the student's when None.
        verbose: log the settings.

    Weights and temperature may be :class:`attnkd.methods.schedule.Schedule`; a part whose weight is 0 now is not computed.

    Raises:
        TypeError, ValueError: models that cannot be compared (no class token, other classes, fixed input sizes that differ,
            shared parameters), options out of range.

    Example::

        task = AttentionProbe("vit_tiny_patch16_224", "deit_base_patch16_224", teacher_accuracy=0.818)
        optimizers = task.optimizers()
        result = task(images)
        result["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        teacher_accuracy: float,
        *,
        blocks: Blocks | None = None,
        teacher_blocks: Blocks | None = None,
        relation_weight: float | Schedule = 0.8,
        kd_weight: float | Schedule = 1.0,
        noisy_weight: float | Schedule = 1.0,
        temperature: float | Schedule = 4.0,
        normalize_dim: int = -1,
        rows: str = "cls",
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        one_pass: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        teacher = resolve_model(teacher, pretrained=True, num_classes=None)
        theirs = adapter_for(teacher, "teacher").num_classes(teacher)
        student = resolve_model(student, pretrained=False, num_classes=theirs)
        check_choice("rows", rows, ("cls", "mean"))
        check_pair(student, "teacher", teacher, class_token=rows == "cls")
        classes = adapter_for(student).num_classes(student)
        if theirs is None or theirs < 2 or classes != theirs:
            raise ValueError(
                f"student: expected a classifier of the teacher's classes, got num_classes {classes} and {theirs}"
                f"{UNKNOWN_CLASSES if None in (classes, theirs) else ''}"
            )
        if normalize_dim not in (-1, -2):
            raise ValueError(f"normalize_dim: expected -1 or -2, got {normalize_dim!r}")
        check_student(student, None, impl, device, dtype)
        weights = {"relation_weight": relation_weight, "kd_weight": kd_weight, "noisy_weight": noisy_weight}
        schedules = check_numbers(weights, temperature=temperature, one_of=list(weights))
        if blocks is None:
            blocks = default_blocks(student, 3)
        student_paths, teacher_paths, pairs = pair_blocks(student, teacher, blocks, teacher_blocks, block_paths)
        noise = NoiseAdaptation(theirs, teacher_accuracy)
        super().__init__(
            ProbeStudent(BlockOutputs(student, student_paths), noise),
            {"teacher": FrozenTeacher(BlockOutputs(teacher, teacher_paths), input_norm)},
            criterion=None,
            schedules=schedules,
            impl=impl,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.pairs, self.normalize_dim, self.rows, self.one_pass = pairs, normalize_dim, rows, one_pass
        self.layouts = token_layout(student), token_layout(teacher)
        if verbose:
            wanted = [teacher_paths[t] for _, t in pairs]
            _logger.info(f"AttentionProbe: {schedules}, student {student_paths} <- teacher {wanted}")

    @property
    def teacher(self) -> FrozenTeacher:
        return self.teachers["teacher"]

    @property
    def noise(self) -> NoiseAdaptation:
        return unwrap_model(self.trainable_module).noise

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student.
            targets: not used, so that loops which have some can pass them: the teacher's predictions take their place.

        Returns:
            loss: what to call backward on. kd_loss, noisy_loss, relation_loss: its unweighted parts, those whose weight is not
            0. output: [B, classes], the student's.

        Raises:
            ValueError: images of another rank, models that cut the same images into different numbers of patches.
        """
        self.check_inputs(images, targets)
        weights = {name: self.schedules[f"{name}_weight"] for name in ("kd", "noisy", "relation")}
        compare = None
        if self.one_pass:
            target_output, target_tokens, _ = self.teacher(images)
            if weights["relation"]:
                compare = [functools.partial(self.relation_loss, teacher=target_tokens[t]) for _, t in self.pairs]
        output, tokens, log_q, losses = self.run_student(images, compare=compare)
        if not self.one_pass:
            target_output, target_tokens, _ = self.teacher(images)
        assert target_output is not None
        result = {}
        if weights["kd"]:
            result["kd_loss"] = kd_loss(output, target_output, self.schedules["temperature"])
        if weights["noisy"]:
            result["noisy_loss"] = noisy_cross_entropy(output, target_output.argmax(1), log_q)
        if weights["relation"]:
            if compare is None:
                losses = [self.relation_loss(tokens[s], target_tokens[t]) for s, t in self.pairs]
            result["relation_loss"] = torch.stack(losses).mean()
        loss = self.total([(weights[name.removesuffix("_loss")], value) for name, value in result.items()])
        return {"loss": loss, **result, "output": output}

    def relation_loss(self, student: BlockTokens, teacher: BlockTokens) -> Tensor:
        """R of one pair of blocks, a scalar; see :func:`attnkd.relation.api.relation_row_loss`. Patches of padding do not count.

        Raises:
            ValueError: a block in which there is no class token yet, or other patches.
        """
        for name, block in (("student", student), ("teacher", teacher)):
            if self.rows == "cls" and block.has_cls is False:
                raise ValueError(
                    f"{name}: a compared block has no class token yet, the model adds it after that block; choose later blocks"
                )
        check_same_grid(student, teacher)
        student, teacher = (filled_in(b, layout) for b, layout in zip((student, teacher), self.layouts, strict=True))
        if self.rows == "mean":
            student, teacher = _with_mean(student), _with_mean(teacher)
        prefixes = [cast(int, block.num_prefix_tokens) for block in (student, teacher)]
        options: dict[str, Any] = {
            "student_prefix_tokens": prefixes[0],
            "teacher_prefix_tokens": prefixes[1],
            "normalize_dim": self.normalize_dim,
            "impl": self.impl,
        }
        if student.padded is None:
            return relation_row_loss(student.tokens, teacher.tokens, **options)
        # A token of zeros has similarity 0 in both models; it leaves the sum, and the rest is divided by its own number.
        padded = student.padded[:, prefixes[0] :]
        tokens = [_zeroed(b.tokens, padded) for b in (student, teacher)]
        losses = relation_row_loss(*tokens, reduction="none", **options)
        return (losses * (padded.shape[1] / (~padded).sum(1))).mean()

    def optimizers(
        self, lr: float = 7.5e-4, weight_decay: float = 0.025, noise_lr: float = 1e-3
    ) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The authors' two optimizers: AdamW for the student, Adam for Q."""
        return (
            torch.optim.AdamW(self.student.parameters(), lr=lr, weight_decay=weight_decay),
            torch.optim.Adam(self.noise.parameters(), lr=noise_lr),
        )

    def leaves_parameters_unused(self) -> bool:
        weights = [self.schedules.numbers[f"{name}_weight"] for name in ("kd", "noisy", "relation")]
        return any(not weight.constant or weight.off for weight in weights)

    close = DistillTask.untap


class ProbeStudent(TrainedStudent):
    """The student and Q."""

    wrapper = "outputs"

    def __init__(self, outputs: BlockOutputs, noise: NoiseAdaptation) -> None:
        super().__init__()
        self.outputs, self.noise = outputs, noise

    def forward(
        self, images: Tensor, compare: Sequence[Callable[[BlockTokens], Tensor]] | None = None
    ) -> tuple[Tensor, list[BlockTokens], Tensor, list[Tensor]]:
        """images [B, C, H, W] → class scores [B, K], tokens [B, N, D] of the blocks, log Q [K, K], what ``compare`` makes of the tokens."""
        output, tokens, losses = self.outputs.compare(images, compare)
        return output, tokens, self.noise(), losses

    def no_weight_decay(self) -> set[str]:
        """The student's own list, and Q."""
        return super().no_weight_decay() | {"noise.weight"}


def _with_mean(block: BlockTokens) -> BlockTokens:
    """The mean patch in place of all tokens before the patches. Patches of padding have no part in it."""
    prefix = cast(int, block.num_prefix_tokens)
    patches, padded = block.tokens[:, prefix:], None if block.padded is None else block.padded[:, prefix:]
    mean = mean_token(patches, padded)
    padded = None if padded is None else F.pad(padded, (1, 0))
    return block._replace(tokens=torch.cat([mean, patches], 1), num_prefix_tokens=1, has_cls=True, padded=padded)


def _zeroed(tokens: Tensor, padded: Tensor) -> Tensor:
    """Tokens [B, N, D] whose last P are patches, those of padding [B or 1, P] replaced by zeros."""
    prefix = tokens.shape[1] - padded.shape[1]
    return tokens.masked_fill(F.pad(padded, (prefix, 0)).unsqueeze(-1), 0.0)
