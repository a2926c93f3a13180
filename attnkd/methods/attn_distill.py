"""AttnDistill: a self-supervised ViT teaches a student its class token and where that class token looks.

Wang, Yang, van de Weijer: Attention Distillation: self-supervised vision transformer students need more guidance,
BMVC 2022 (arXiv:2210.00944). The formulas, and where the authors' published code differs: docs/methods/attn_distill.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.attention.api import attention_divergence, attention_rows
from attnkd.attention.call import AttentionCall
from attnkd.attention.checks import check_choice
from attnkd.attention.merging import merge_attention
from attnkd.attention.problem import MERGES
from attnkd.attention.resample import MODES, resample_attention
from attnkd.capture.adapters import adapter_for
from attnkd.capture.blocks import Blocks, attention_paths
from attnkd.capture.models import check_final_norm, resolve_model
from attnkd.capture.pairs import pair_blocks
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import Grid, check_rows, filled_in, padded_patches, patch_grid, token_layout
from attnkd.methods.alignment import make_projector, resize_tokens
from attnkd.methods.guided_rows import guided_divergence
from attnkd.methods.schedule import Schedule
from attnkd.methods.student_teacher import FeatureTeacher, TappedStudent
from attnkd.methods.task import DistillTask, check_numbers, check_pair, check_student
from attnkd.methods.taught import compared
from attnkd.methods.whole_map import num_heads

_logger = logging.getLogger(__name__)

ROWS = ("cls", "pool", "mean", "all")
WEIGHTS = {
    "pa_loss": "pa_weight",
    "patch_loss": "patch_weight",
    "attn_loss": "attn_weight",
    "task_loss": "task_loss_weight",
}
"""The parts of the loss and their weights. The first three come from the teacher."""


class AttnDistill(DistillTask):
    """The AttnDistill training task: loss = pa_weight · PA + patch_weight · PT + attn_weight · AG.

    PA (projector alignment) is the mean squared error between the teacher's normalised class token and the student's
    after a projector. PT is the same of the patch tokens, off unless asked for. AG (attention guidance) is
    KL(teacher ‖ student) of the class token's attention over class token and patches, summed over heads and divided by
    the batch size; see :meth:`attention_loss`. With a ``criterion``, task_loss_weight · criterion is added.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's own distillation tasks. The
    teacher is frozen, stays in evaluation mode, and is not a submodule: no optimizer, state_dict or checkpoint has it.
    Projector and the schedules' time are task state.

    Args:
        student: a timm Vision Transformer with a class token, or a timm name (built without classifier, from scratch).
        teacher: the same, pretrained; by name it is built with its pretrained weights. It is frozen in place.
        blocks: student blocks whose attention is guided: index, sequence of indices, 'all', or module paths. The paper
            guides the last block. With several, AG is their mean.
        teacher_blocks: the teacher block for each student block, in the same order. None: student block i of Ls learns
            from teacher block ⌈(i + 1)·Lt/Ls⌉ − 1, the last from the last.
        rows: whose attention guides: 'cls', the class token's (the paper). For models without one: 'pool', the row of the attention
            pooling, or of the class token where that pools; 'mean', the mean of the patches' rows; 'all', every row. See
            :mod:`attnkd.methods.guided_rows`. In place of a class token, PA compares the mean patch token.
        pa_weight: weight of PA.
        patch_weight: weight of PT. With both at 0 for good neither model runs past its last tapped attention.
        attn_weight: weight of AG, the paper's λ.
        merge: how heads are compared: None head by head, or merged by 'logsum', 'mean', 'max' or 'min'. 'auto' merges
            by 'logsum' where the numbers of heads differ.
        temperature: T of the comparison; None is the paper's 10 for 'logsum', otherwise 1.
        resample_mode: 'bicubic', 'bilinear' or 'area', for teachers with another patch grid: how their attention rows and
            patch tokens are resized.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: the teacher gets them as they are.
        criterion: loss of (student output, targets); None trains without labels.
        task_loss_weight: weight of ``criterion``.
        one_pass: the student's attentions compute AG on the way (:meth:`attnkd.AttentionTap.distil`), with the same results. The teacher
            then runs before the student.
        impl: implementation of the attention loss, see :func:`attnkd.attention_divergence`.
        check_finite: read the loss back every step, and if it is not finite and the teacher is the cause, say so. A
            student's overflow is passed on for a gradient scaler to handle. False saves that one synchronisation.
        device: moves student and teacher there; None is where the student is. dtype: of the projector, None the
            student's.
        verbose: log the settings.

    Weights and temperature may be a :class:`attnkd.methods.schedule.Schedule`; ``set_epoch`` or ``set_step`` must then be
    called. A part whose weight is 0 now is not computed, and without any part from the teacher it does not run.

    Raises:
        TypeError, ValueError: models that cannot be compared (no class token, fixed input sizes that differ, shared
            parameters), options out of range.
        NotImplementedError: attention that cannot be captured, see :class:`attnkd.AttentionTap`.

    Example::

        task = AttnDistill("vit_small_patch16_224", "vit_small_patch8_224.dino", device=torch.device("cuda"))
        result = task(images)
        result["loss"].backward()
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        *,
        blocks: Blocks = -1,
        teacher_blocks: Blocks | None = None,
        rows: str = "cls",
        pa_weight: float | Schedule = 1.0,
        patch_weight: float | Schedule = 0.0,
        attn_weight: float | Schedule = 0.1,
        merge: str | None = "auto",
        temperature: float | Schedule | None = None,
        resample_mode: str = "bicubic",
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        criterion: nn.Module | None = None,
        task_loss_weight: float | Schedule = 1.0,
        one_pass: bool = False,
        impl: str = "auto",
        check_finite: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        student, teacher = resolve_model(student, pretrained=False), resolve_model(teacher, pretrained=True)
        check_choice("merge", merge, ("auto", *MERGES))
        check_choice("resample_mode", resample_mode, MODES)
        check_choice("rows", rows, ROWS)
        if one_pass and rows != "cls":
            raise ValueError(f"one_pass: compares the class token's row only, got rows={rows!r}")
        check_pair(student, "teacher", teacher, class_token=rows == "cls")
        check_student(student, criterion, impl, device, dtype)
        weights = {
            "pa_weight": pa_weight,
            "patch_weight": patch_weight,
            "attn_weight": attn_weight,
            "task_loss_weight": task_loss_weight,
        }
        schedules = check_numbers(weights, temperature=temperature, one_of=list(weights)[:3])
        student_layout, teacher_layout = token_layout(student), token_layout(teacher)
        if rows == "pool":
            student_paths, teacher_paths, pairs = _pooling_pair(student, teacher, blocks, teacher_blocks)
        else:
            student_paths, teacher_paths, pairs = pair_blocks(student, teacher, blocks, teacher_blocks)
        check_rows("student", student, student_paths)
        check_rows("teacher", teacher, teacher_paths)
        align = not (schedules.numbers["pa_weight"].off and schedules.numbers["patch_weight"].off)
        if align:
            check_final_norm("student", student)
            check_final_norm("teacher", teacher)
        student_tap = AttentionTap(student, student_paths, stop=not align and criterion is None)
        teacher_tap = AttentionTap(teacher, teacher_paths, stop=not align)
        projector = make_projector(student_layout.feature_dim, teacher_layout.feature_dim) if align else None
        super().__init__(
            TappedStudent(student_tap, projector, train_head=criterion is not None or rows == "pool"),
            {"teacher": FeatureTeacher(teacher_tap, input_norm, head=rows == "pool")},
            criterion=criterion,
            schedules=schedules,
            impl=impl,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.student_layout, self.teacher_layout, self.pairs = student_layout, teacher_layout, pairs
        self.merge, self.resample_mode, self.check_finite, self.one_pass = merge, resample_mode, check_finite, one_pass
        self.rows = rows
        if verbose:
            _logger.info(
                f"AttnDistill: student {student_paths} <- teacher {teacher_paths} (pairs {pairs}), {schedules}, merge={merge}"
            )

    @property
    def teacher(self) -> FeatureTeacher:
        teacher = self.teachers["teacher"]
        assert isinstance(teacher, FeatureTeacher)
        return teacher

    def forward(
        self, images: Tensor, targets: Tensor | None = None, taught: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student.
            targets: what ``criterion`` takes; unused without one.
            taught: what :func:`attnkd.methods.taught.teach` gave for these images; the teacher then does not run.

        Returns:
            loss: what to call backward on. pa_loss, patch_loss, attn_loss, task_loss: its unweighted parts, those that are
            on. output: the student's head output [B, ...], without gradient if there is no ``criterion``. features: the
            projected class token [B, Dt]. Both are absent when the student stops at its last tapped attention.

        Raises:
            ValueError: images of another rank, tokens that are not class token + prefix + patch grid.
            RuntimeError: the teacher made the loss NaN or infinite (with ``check_finite``); a weight that changes before
                ``set_epoch`` or ``set_step`` was called; nothing left to train on.
        """
        self.check_inputs(images, targets)
        weights = {part: self.schedules[name] for part, name in WEIGHTS.items()}
        patches = weights["patch_loss"] != 0
        size = images.shape[-2:]
        guided = any(weights[part] for part in ("pa_loss", "patch_loss", "attn_loss"))
        target_features: Any = None
        teacher_calls: list[AttentionCall] = []
        wanted: list[Any] | None = None
        if taught is not None:
            target_features = taught.get("features")
            wanted = compared(self, taught) if weights["attn_loss"] else None
        elif guided and self.one_pass:
            target_features, teacher_calls = self.teacher(images, patches)
            if weights["attn_loss"]:
                grid = patch_grid(self.student, size)
                heads = [num_heads(self.student, path) for path in self.student_tap.paths]
                wanted = [self.target(teacher_calls[t], size, grid, heads[s]) for s, t in self.pairs]
        output, features, student_calls, losses, _ = self.run_student(
            images, patches=patches, teacher=wanted if self.one_pass else None
        )
        if guided and not self.one_pass and taught is None:
            target_features, teacher_calls = self.teacher(images, patches)

        result: dict[str, Tensor] = {}
        if weights["pa_loss"]:
            result["pa_loss"] = F.mse_loss(features[:, 0].float(), target_features[:, 0].float())
        if patches:
            padded = padded_patches(student_calls[0], self.student_layout)
            result["patch_loss"] = self.patch_loss(features[:, 1:], target_features[:, 1:], size, padded)
        if weights["attn_loss"]:
            if wanted is not None and not self.one_pass:
                losses = [
                    self._compared(student_calls[s], *kept) for (s, _), kept in zip(self.pairs, wanted, strict=True)
                ]
            elif wanted is None:
                losses = [self.attention_loss(student_calls[s], teacher_calls[t], size) for s, t in self.pairs]
            result["attn_loss"] = torch.stack(losses).mean()
        if self.criterion is not None:
            result["task_loss"] = self.criterion(output, targets)
        loss = self.total([(weights[name], value) for name, value in result.items()])
        # A compiled forward cannot look at a number on its way: check_finite is for the eager one.
        if self.check_finite and not torch.compiler.is_compiling() and not bool(torch.isfinite(loss)):
            _blame_teacher(self.teacher.tap.model, target_features, teacher_calls)
        if output is not None:
            result["output"] = output if self.criterion is not None else output.detach()
        if features is not None:
            result["features"] = features[:, 0]
        return {"loss": loss, **result}

    def patch_loss(self, features: Tensor, target: Tensor, size: Sequence[int], padded: Tensor | None = None) -> Tensor:
        """PT: the mean squared error of patch tokens, over images, patches and features; in float32.

        A teacher with another patch grid has its tokens resized to the student's grid first, as an image of features.

        Args:
            features: [B, Ns, Dt], the student's, projected.
            target: [B, Nt, Dt], the teacher's.
            size: (height, width) of the images in pixels.
            padded: [B or 1, Ns] boolean, patches that do not count.
        """
        grid = patch_grid(self.student, size, features.shape[1])
        teacher_grid = patch_grid(self.teacher.tap.model, size, target.shape[1])
        target = resize_tokens(target.float(), teacher_grid, grid, self.resample_mode)
        if padded is None:
            return F.mse_loss(features.float(), target)
        patches = F.mse_loss(features.float(), target, reduction="none").mean(-1)
        counts = (~padded).expand(patches.shape)
        return torch.where(counts, patches, 0.0).sum() / counts.sum()

    def attention_loss(self, student: AttentionCall, teacher: AttentionCall, size: Sequence[int]) -> Tensor:
        """AG of one pair of attentions: Σ_heads KL(teacher ‖ student) of the guiding rows ÷ B.

        Same patch grid: both rows straight from queries and keys. Another grid: the teacher's rows are resized to the
        student's grid head by head, and merged after that.

        Args:
            student, teacher: as an :class:`attnkd.AttentionTap` returns them, tokens on dimension 2.
            size: (height, width) of the images in pixels.
        """
        if self.rows != "cls":
            return self._guided(student, teacher, size)
        grid = patch_grid(self.student, size, student.key.shape[2] - self.student_layout.num_prefix_tokens)
        if student.has_cls is False:
            raise ValueError(f"student: {_NO_CLASS_TOKEN}")
        target, options = self.target(teacher, size, grid, student.query.shape[1])
        return self._compared(student, target, options)

    def _compared(self, student: AttentionCall, target: AttentionCall | Tensor, options: dict[str, Any]) -> Tensor:
        """The divergence of a student's attention from what :meth:`target` gave."""
        student = filled_in(student, self.student_layout)
        if isinstance(target, AttentionCall):
            return attention_divergence(student, target, **options)
        padded = padded_patches(student, self.student_layout)
        if padded is not None:  # the resized row has something everywhere, also where the student has padding
            target = target.masked_fill(F.pad(padded, (1, 0))[:, None, None], 0.0)
        return attention_divergence(student, teacher_probs=target, **options)

    def _guided(self, student: AttentionCall, teacher: AttentionCall, size: Sequence[int]) -> Tensor:
        """The same of other rows than the class token's, see :mod:`attnkd.methods.guided_rows`."""
        calls = []
        for model, call, layout in (
            (self.student, student, self.student_layout),
            (self.teacher.tap.model, teacher, self.teacher_layout),
        ):
            call, expected = filled_in(call, layout), patch_grid(model, size)
            if call.key.shape[2] != expected[0] * expected[1]:  # an attention pooling may leave the prefix tokens out
                expected = patch_grid(model, size, call.key.shape[2] - call.num_prefix_tokens)
            calls.append(call._replace(grid=expected))
        merge, temperature = self.merging(student.query.shape[1], teacher.query.shape[1])
        return guided_divergence(
            calls[0], calls[1], self.rows, merge=merge, temperature=temperature, mode=self.resample_mode, impl=self.impl
        )

    def merging(self, heads: int, teacher_heads: int) -> tuple[str | None, float]:
        """How heads are merged, and the temperature."""
        merge = self.merge
        if merge == "auto":
            merge = None if heads == teacher_heads else "logsum"
        temperature = 10.0 if merge == "logsum" else 1.0
        if "temperature" in self.schedules.numbers:
            temperature = self.schedules["temperature"]
        return merge, temperature

    def target(
        self, teacher: AttentionCall, size: Sequence[int], grid: Grid, heads: int, as_rows: bool = False
    ) -> tuple[AttentionCall | Tensor, dict[str, Any]]:
        """What a student's attention is compared with: the teacher's call, or its row of probabilities, resized; and the options
        of :func:`attnkd.attention_divergence`.

        Args:
            teacher: as an :class:`attnkd.AttentionTap` returns it.
            size: (height, width) of the images in pixels.
            grid: (height, width) of the student in patches.
            heads: number of the student's heads.
            as_rows: give probabilities also where the grids are the same.
        """
        layout = self.teacher_layout
        teacher_grid = patch_grid(self.teacher.tap.model, size, teacher.key.shape[2] - layout.num_prefix_tokens)
        if teacher.has_cls is False:
            raise ValueError(f"teacher: {_NO_CLASS_TOKEN}")
        teacher = filled_in(teacher, layout)
        merge, temperature = self.merging(heads, teacher.query.shape[1])
        options = self.comparison(merge, temperature)
        if grid == teacher_grid and not as_rows:
            return teacher, options
        with torch.no_grad():
            if grid == teacher_grid:
                return attention_rows(
                    teacher, rows="cls", merge=merge, temperature=temperature, impl=self.impl
                ), options
            rows_temperature = temperature if merge is None else 1.0  # merging applies it to the finished rows
            rows = attention_rows(teacher, rows="cls", temperature=rows_temperature, impl=self.impl)
            rows = resample_attention(rows, teacher_grid, grid, self.resample_mode)
            if merge is not None:
                rows = merge_attention(rows, merge, temperature)
        return rows, options

    def comparison(self, merge: str | None, temperature: float) -> dict[str, Any]:
        """The options of :func:`attnkd.attention_divergence`."""
        options = {"rows": "cls", "merge": merge, "temperature": temperature}
        return {**options, "reduction": "batchmean", "impl": self.impl}

    def leaves_parameters_unused(self) -> bool:
        changing = any(not self.schedules.numbers[name].constant for name in ("pa_weight", "patch_weight"))
        return super().leaves_parameters_unused() or changing  # the projector


_NO_CLASS_TOKEN = "this attention runs before the model adds its class token; choose a later block"


def _pooling_pair(
    student: nn.Module, teacher: nn.Module, blocks: Blocks, teacher_blocks: Blocks | None
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """The attention that pools in each model: its attention pooling, or the last block's where the class token pools."""
    if blocks != -1 or teacher_blocks is not None:
        raise ValueError("blocks, teacher_blocks: rows='pool' compares the attentions that pool; leave them out")
    paths = []
    for name, model in (("student", student), ("teacher", teacher)):
        adapter = adapter_for(model, name)
        path = adapter.pooling(model)
        if path is None and not adapter.class_token_pools(model):
            raise ValueError(
                f"{name}: rows='pool', but {type(model).__name__} has neither an attention pooling of one query nor a class token that "
                "pools; rows='mean' or rows='all' compares its patches' rows"
            )
        paths.append([path] if path is not None else attention_paths(model, -1))
    return paths[0], paths[1], [(0, 0)]


def _blame_teacher(teacher: nn.Module, features: Tensor | None, calls: list[AttentionCall]) -> None:
    """The loss is not finite: raise if the teacher is the cause."""
    tensors = [] if features is None else [("class token", features[:, 0]), ("patch tokens", features[:, 1:])]
    for index, call in enumerate(calls):
        tensors += [(f"query of tapped attention {index}", call.query), (f"key of tapped attention {index}", call.key)]
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(
                f"teacher ({type(teacher).__name__}): its {name} is NaN or infinite, and so is the loss; check its "
                "weights, its input and its precision. Nothing was updated"
            )
