"""AttnDistill: a self-supervised ViT teaches a student its class token and where that class token looks.

Wang, Yang, van de Weijer: Attention Distillation: self-supervised vision transformer students need more guidance,
BMVC 2022 (arXiv:2210.00944). The formulas, and where the authors' published code differs: docs/methods/attn_distill.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.capture.attention_paths import Blocks, pair_blocks
from attnkd.capture.tap import AttentionCall, AttentionTap
from attnkd.capture.tokens import (
    TrainingTask,
    cls_row,
    input_stats,
    patch_grid,
    resolve_model,
    token_layout,
    unwrap_model,
)
from attnkd.functional import attention_kl, attention_rows
from attnkd.merging import merge_attention
from attnkd.methods.student_teacher import FrozenTeacher, TappedStudent, check_models
from attnkd.problem import MERGES
from attnkd.resample import MODES, resample_attention

_logger = logging.getLogger(__name__)


class AttnDistill(TrainingTask):
    """The AttnDistill training task: loss = pa_weight · PA + attn_weight · AG (+ task_loss_weight · criterion).

    PA (projector alignment) is the mean squared error between the teacher's normalised class token and the student's
    after a projector. AG (attention guidance) is KL(teacher ‖ student) of the class token's attention over class token
    and patches, summed over heads and divided by the batch size; see :meth:`attention_loss`.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's own distillation tasks. The
    teacher is frozen, stays in evaluation mode, and is not a submodule: no optimizer, state_dict or checkpoint has it.

    Args:
        student: a timm Vision Transformer with a class token, or a timm name (built without classifier, from scratch).
        teacher: the same, pretrained; by name it is built with its pretrained weights. It is frozen in place.
        blocks: student blocks whose attention is guided: index, sequence of indices, 'all', or module paths. The paper
            guides the last block. With several, AG is their mean.
        teacher_blocks: the teacher block for each student block, in the same order. None: student block i of Ls learns
            from teacher block ⌈(i + 1)·Lt/Ls⌉ − 1, the last from the last.
        pa_weight: weight of PA; 0 leaves it out, and then neither model runs past its last tapped attention.
        attn_weight: weight of AG, the paper's λ; 0 leaves it out.
        merge: how heads are compared: None head by head, or merged by 'logsum', 'mean', 'max' or 'min'. 'auto' merges
            by 'logsum' where the numbers of heads differ.
        temperature: T of the comparison; None is the paper's 10 for 'logsum', otherwise 1.
        resample_mode: 'bicubic', 'bilinear' or 'area', for teachers with another patch grid.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: the teacher gets them as they are.
        criterion: loss of (student output, targets); None trains without labels.
        task_loss_weight: weight of ``criterion``.
        impl: implementation of the attention loss, see :func:`attnkd.attention_kl`.
        check_finite: read the loss back every step, and if it is not finite and the teacher is the cause, say so. A
            student's overflow is passed on for a gradient scaler to handle. False saves that one synchronisation.
        device: moves student and teacher there; None is where the student is. dtype: of the projector, None the
            student's.
        verbose: log the settings.

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
        pa_weight: float = 1.0,
        attn_weight: float = 0.1,
        merge: str | None = "auto",
        temperature: float | None = None,
        resample_mode: str = "bicubic",
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        criterion: nn.Module | None = None,
        task_loss_weight: float = 1.0,
        impl: str = "auto",
        check_finite: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        student, teacher = resolve_model(student, pretrained=False), resolve_model(teacher, pretrained=True)
        _check_options(pa_weight, attn_weight, merge, temperature, resample_mode)
        check_models(student, teacher)
        parameter = next(student.parameters())
        super().__init__(device=device or parameter.device, dtype=dtype or parameter.dtype, verbose=verbose)

        self.pa_weight, self.attn_weight, self.task_loss_weight = pa_weight, attn_weight, task_loss_weight
        self.merge, self.temperature = merge, temperature
        self.resample_mode, self.impl, self.check_finite = resample_mode, impl, check_finite
        self.criterion = criterion
        self.student_layout, self.teacher_layout = token_layout(student), token_layout(teacher)

        student_paths, teacher_paths, self.pairs = pair_blocks(student, teacher, blocks, teacher_blocks)
        student_tap = AttentionTap(student.to(self.device), student_paths, stop=pa_weight == 0 and criterion is None)
        teacher_tap = AttentionTap(teacher.to(self.device), teacher_paths, stop=pa_weight == 0)
        projector = None
        if pa_weight:
            projector = make_projector(self.student_layout.feature_dim, self.teacher_layout.feature_dim)
            projector.to(device=self.device, dtype=self.dtype)
        self.trainable_module: Any = TappedStudent(student_tap, projector, train_head=criterion is not None)
        # In __dict__, not in _modules: parameters(), state_dict(), train() and requires_grad_() must not reach it.
        self.__dict__["teacher"] = FrozenTeacher(teacher_tap, input_norm)
        if input_norm is None and input_stats(student) != input_stats(teacher):
            _logger.warning(
                f"image mean and std differ between student {input_stats(student)} and teacher {input_stats(teacher)}: "
                "images must come normalised for the teacher, or say with input_norm how they come"
            )
        if verbose:
            _logger.info(
                f"AttnDistill: student {student_paths} <- teacher {teacher_paths} (pairs {self.pairs}), "
                f"pa_weight={pa_weight}, attn_weight={attn_weight}, merge={merge}, temperature={temperature}"
            )

    teacher: FrozenTeacher

    @property
    def student(self) -> nn.Module:
        """The student model itself, without wrappers."""
        return self.student_tap.model

    @property
    def student_tap(self) -> AttentionTap:
        return unwrap_model(self.trainable_module).tap

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student.
            targets: what ``criterion`` takes; unused without one.

        Returns:
            loss: what to call backward on. pa_loss, attn_loss, task_loss: its unweighted parts, those that are on.
            output: the student's head output [B, ...], without gradient if there is no ``criterion``. features: the
            projected class token [B, Dt]. Both are absent when the student stops at its last tapped attention.

        Raises:
            ValueError: images of another rank, tokens that are not class token + prefix + patch grid.
            RuntimeError: the teacher made the loss NaN or infinite (with ``check_finite``).
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected [B, C, H, W], got {got}; NaFlex batches of patches are not supported")
        if self.criterion is not None and targets is None:
            raise ValueError("targets: needed by criterion, got None")
        output, features, student_calls = self.trainable_module(images)
        target_features, teacher_calls = self.teacher(images)

        result, parts = {}, []
        if self.pa_weight:
            result["pa_loss"] = F.mse_loss(features.float(), target_features.float())
            parts.append(self.pa_weight * result["pa_loss"])
        if self.attn_weight:
            losses = [self.attention_loss(student_calls[s], teacher_calls[t], images.shape[-2:]) for s, t in self.pairs]
            result["attn_loss"] = torch.stack(losses).mean()
            parts.append(self.attn_weight * result["attn_loss"])
        if self.criterion is not None:
            result["task_loss"] = self.criterion(output, targets)
            parts.append(self.task_loss_weight * result["task_loss"])
        loss = sum(parts[1:], parts[0])
        if self.check_finite and not bool(torch.isfinite(loss)):
            _blame_teacher(self.teacher.tap.model, target_features, teacher_calls)
        extra = {"output": output, "features": features}
        return {"loss": loss, **result, **{name: value for name, value in extra.items() if value is not None}}

    def attention_loss(self, student: AttentionCall, teacher: AttentionCall, size: Sequence[int]) -> Tensor:
        """AG of one pair of attentions: Σ_heads KL(teacher ‖ student) of the class-token row ÷ B.

        Same patch grid: both rows straight from queries and keys. Another grid: the teacher's rows are resized to the
        student's grid head by head, and merged after that.

        Args:
            student, teacher: as an :class:`attnkd.AttentionTap` returns them, tokens on dimension 2.
            size: (height, width) of the images in pixels.
        """
        prefix, teacher_prefix = self.student_layout.num_prefix_tokens, self.teacher_layout.num_prefix_tokens
        student_grid = patch_grid(self.student, size, student.key.shape[2] - prefix)
        teacher_grid = patch_grid(self.teacher.tap.model, size, teacher.key.shape[2] - teacher_prefix)
        s, t = cls_row(student, prefix), cls_row(teacher, teacher_prefix)
        merge = self.merge
        if merge == "auto":
            merge = None if s.query.shape[1] == t.query.shape[1] else "logsum"
        temperature = self.temperature or (10.0 if merge == "logsum" else 1.0)
        options: dict[str, Any] = {
            "student_scale": s.scale,
            "student_mask": s.mask,
            "merge": merge,
            "temperature": temperature,
            "reduction": "batchmean",
            "impl": self.impl,
        }
        if student_grid == teacher_grid:
            return attention_kl(s.query, s.key, t.query, t.key, teacher_scale=t.scale, teacher_mask=t.mask, **options)
        with torch.no_grad():
            rows_temperature = temperature if merge is None else 1.0  # merging applies it to the finished rows
            rows = attention_rows(
                t.query, t.key, scale=t.scale, mask=t.mask, temperature=rows_temperature, impl=self.impl
            )
            rows = resample_attention(rows, teacher_grid, student_grid, self.resample_mode)
            if merge is not None:
                rows = merge_attention(rows, merge, temperature)
        return attention_kl(s.query, s.key, teacher_probs=rows, **options)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> AttnDistill:
        """Wrap student and projector in DistributedDataParallel; the teacher stays as it is on every rank."""
        if self.criterion is None:  # the head, and without PA all that follows the tapped attention, gets no gradient
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile student, projector and teacher, before :meth:`prepare_distributed`; returns the model to evaluate."""
        options: dict[str, Any] = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        resolved = super().get_eval_model(module=module, ema=ema)
        plain = None if resolved is None else unwrap_model(resolved)
        return plain.tap.model if isinstance(plain, TappedStudent) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        projector = None if trainable is None else unwrap_model(trainable).projector
        return {} if projector is None else {"projector": projector.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        if trainable is None:
            raise RuntimeError("AttnDistill: setup_ema() comes before loading an EMA checkpoint")
        projector = unwrap_model(trainable).projector
        if projector is None:
            return
        if state and "projector" in state:
            projector.load_state_dict(state["projector"], strict=strict)
        elif strict:
            raise RuntimeError("AttnDistill: the checkpoint has no task state 'projector' (strict=False ignores that)")

    def untap(self) -> tuple[nn.Module, nn.Module]:
        """Give student and teacher back as plain models; the task cannot run after that."""
        return self.student_tap.untap(), self.teacher.tap.untap()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> AttnDistill:
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


def make_projector(dim: int, teacher_dim: int) -> nn.Sequential:
    """[B, D] → [B, Dt]: LayerNorm, linear layers D → 2D → D → 2D → Dt with GELU between them, LayerNorm."""
    widths = [dim, 2 * dim, dim, 2 * dim, teacher_dim]
    layers: list[nn.Module] = [nn.LayerNorm(dim, eps=1e-6)]
    for index in range(4):
        linear = nn.Linear(widths[index], widths[index + 1])
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1], nn.LayerNorm(teacher_dim, eps=1e-6))


def _check_options(
    pa_weight: float, attn_weight: float, merge: str | None, temperature: float | None, resample_mode: str
) -> None:
    for name, weight in (("pa_weight", pa_weight), ("attn_weight", attn_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {weight}")
    if pa_weight == attn_weight == 0:
        raise ValueError("pa_weight, attn_weight: both are 0, nothing would be distilled")
    if merge not in ("auto", *MERGES):
        raise ValueError(f"merge: expected 'auto' or one of {MERGES}, got {merge!r}")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number > 0 or None, got {temperature}")
    if resample_mode not in MODES:
        raise ValueError(f"resample_mode: expected one of {MODES}, got {resample_mode!r}")


def _blame_teacher(teacher: nn.Module, features: Tensor | None, calls: list[AttentionCall]) -> None:
    """The loss is not finite: raise if the teacher is the cause."""
    tensors = [("class token", features)]
    for index, call in enumerate(calls):
        tensors += [(f"query of tapped attention {index}", call.query), (f"key of tapped attention {index}", call.key)]
    for name, tensor in tensors:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(
                f"teacher ({type(teacher).__name__}): its {name} is NaN or infinite, and so is the loss; check its "
                "weights, its input and its precision. Nothing was updated"
            )
