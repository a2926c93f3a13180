"""What methods that compare whole maps share: a student that trains, frozen teachers beside it, scheduled weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.attention_paths import plain_class
from attnkd.capture.tap import AttentionCall, AttentionTap
from attnkd.capture.tokens import TokenLayout, TrainingTask, image_size, input_stats, resolve_model, unwrap_model
from attnkd.functional import attention_kl
from attnkd.methods.schedule import Schedules
from attnkd.methods.student_teacher import FrozenTeacher, TappedStudent

_logger = logging.getLogger(__name__)

Heads = tuple[int, ...]


class FrozenClassifier(FrozenTeacher):
    """A frozen teacher that gives its classifier's output instead of its class token."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor | None, list[AttentionCall]]:
        """images [B, C, H, W] → output [B, classes] (None if the tap stops before it), attention calls."""
        if self.scale is not None and self.shift is not None:
            images = (images * self.scale + self.shift).to(images.dtype)
        return self.tap(images)


class DistillTask(TrainingTask):
    """Base of training tasks with a class loss, whole-map attention losses and weights that follow schedules.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's distillation tasks. Teachers
    are frozen, stay in evaluation mode, and are not submodules: they are in no optimizer, state_dict or checkpoint.

    Args:
        student: the model that trains.
        student_paths: its attentions to tap.
        teachers: frozen teachers by name.
        criterion: loss of (student output, targets), or None to train without labels.
        schedules: weights and temperatures by name.
        impl: implementation of the attention losses, see :func:`attnkd.attention_kl`.
    """

    teachers: dict[str, FrozenTeacher]

    def __init__(
        self,
        student: nn.Module,
        student_paths: Sequence[str],
        teachers: Mapping[str, FrozenTeacher],
        *,
        criterion: nn.Module | None,
        schedules: Schedules,
        impl: str,
        device: torch.device | None,
        dtype: torch.dtype | None,
        verbose: bool,
    ) -> None:
        parameter = next(student.parameters())
        super().__init__(device=device or parameter.device, dtype=dtype or parameter.dtype, verbose=verbose)
        self.criterion, self.schedules, self.impl = criterion, schedules, impl
        self.trainable_module: Any = TappedStudent(
            AttentionTap(student, list(student_paths), stop=criterion is None), None, criterion is not None
        )
        for name, teacher in teachers.items():
            teacher.to(self.device)
            if teacher.scale is None and input_stats(student) != input_stats(teacher.tap.model):
                _logger.warning(
                    f"{name}: pretrained with image mean and std {input_stats(teacher.tap.model)}, the student's are "
                    f"{input_stats(student)}; images must arrive as the teacher expects them, or say with input_norm "
                    "how they arrive"
                )
        # In __dict__, not in _modules: parameters(), state_dict(), train() and requires_grad_() must not reach them.
        self.__dict__["teachers"] = dict(teachers)

    @property
    def student(self) -> nn.Module:
        """The student model itself, without wrappers."""
        return self.student_tap.model

    @property
    def student_tap(self) -> AttentionTap:
        return unwrap_model(self.trainable_module).tap

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch (0 at the start) to the scheduled numbers; call it as you would a sampler's ``set_epoch``."""
        self.schedules.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Tell the number of optimizer steps done to numbers scheduled by step."""
        self.schedules.set_step(step)

    def run_student(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor | None, list[AttentionCall]]:
        """The student's output (None without a criterion) and its attention calls, after a look at the arguments."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected [B, C, H, W], got {got}; NaFlex batches of patches are not supported")
        if self.criterion is not None and targets is None:
            raise ValueError("targets: needed by criterion, got None (criterion=None trains without labels)")
        output, _, calls = self.trainable_module(images)
        return output, calls

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> DistillTask:
        """Wrap the student in DistributedDataParallel; the teachers stay as they are on every rank."""
        if self.criterion is None:  # what follows the last tapped attention gets no gradient
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile student and teachers; call it before :meth:`prepare_distributed`. Returns the eval model."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        for teacher in self.teachers.values():
            teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        resolved = super().get_eval_model(module=module, ema=ema)
        plain = None if resolved is None else unwrap_model(resolved)
        return plain.tap.model if isinstance(plain, TappedStudent) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {"schedules": self.schedules.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if state and "schedules" in state:
            self.schedules.load_state_dict(state["schedules"])
        elif strict:
            raise RuntimeError(
                f"{type(self).__name__}: the checkpoint has no task state 'schedules' (strict=False ignores that)"
            )

    def untap(self) -> tuple[nn.Module, list[nn.Module]]:
        """Give student and teachers back as plain models; the task cannot run after that."""
        return self.student_tap.untap(), [teacher.tap.untap() for teacher in self.teachers.values()]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> DistillTask:
        for teacher in self.teachers.values():
            teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


def build_student(student: str | nn.Module, criterion: nn.Module | None, num_classes: int | None) -> nn.Module:
    """The student; by name it is new, with a classifier for ``num_classes`` if there is a class loss."""
    if not isinstance(student, str):
        if num_classes is not None:
            raise ValueError("num_classes: only for a student given by name, got it together with a model")
        return student
    model = resolve_model(student, pretrained=False)
    if criterion is not None:
        if num_classes is None:
            raise ValueError(f"num_classes: needed to build student {student!r} with a classifier, got None")
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def check_pair(student: nn.Module, name: str, teacher: nn.Module) -> None:
    """Refuse models whose maps cannot be compared on the same images.

    Raises:
        TypeError: not a timm model.
        ValueError: shared parameters, or fixed image sizes that differ.
    """
    for label, model in (("student", student), (name, teacher)):
        if not isinstance(model, nn.Module) or not hasattr(model, "forward_features"):
            raise TypeError(f"{label}: expected a timm model or its name, got {type(model).__name__}")
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError(f"{name}: shares parameters with student; freezing the teacher would freeze the student")
    sizes = image_size(student), image_size(teacher)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"student and {name} see the same images, but student takes {sizes[0]} and {name} {sizes[1]} pixels only; "
            "build one of them with another img_size, or with dynamic_img_size=True"
        )


def num_heads(model: nn.Module, path: str) -> int:
    """The number of heads of an attention, as its module says."""
    heads = getattr(model.get_submodule(path), "num_heads", None)
    if not isinstance(heads, int):
        raise TypeError(f"{path} ({plain_class(model.get_submodule(path)).__name__}): does not say its num_heads")
    return heads


def check_heads(name: str, heads: Sequence[int], count: int, path: str) -> Heads:
    """Head indices of an attention with ``count`` heads, each at most once; negative indices are refused."""
    for head in heads:
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"{name}: expected head indices (int), got {head!r}")
        if not 0 <= head < count:
            raise ValueError(f"{name}: expected indices from 0 to {count - 1} ({path} has {count} heads), got {head}")
    if len(set(heads)) != len(heads):
        raise ValueError(f"{name}: expected every head once, got {list(heads)} for {path}")
    return tuple(heads)


def take_heads(call: AttentionCall, heads: Heads) -> AttentionCall:
    """The call of some heads: views where the heads follow each other, else copies of these heads."""
    if heads == tuple(range(call.query.shape[1])):
        return call
    index: slice | list[int] = list(heads)
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        index = slice(heads[0], heads[0] + len(heads))
    mask = call.mask
    if mask is not None and mask.ndim >= 3 and mask.shape[-3] != 1:
        mask = mask[..., index, :, :]
    return AttentionCall(call.query[:, index], call.key[:, index], mask, call.scale)


def shared_map(call: AttentionCall, layout: TokenLayout, keep_cls: bool) -> AttentionCall:
    """Rows and keys that two models share: patches, and the class token where both have one.

    Registers, distillation tokens and a class token of one model alone are left out before the softmax: what remains is
    the distribution conditional on the shared keys.
    """
    prefix, kept = layout.num_prefix_tokens, int(keep_cls)
    if prefix == kept:
        return call

    def cut(tensor: Tensor, dim: int) -> Tensor:
        patches = tensor.narrow(dim, prefix, tensor.shape[dim] - prefix)
        return torch.cat([tensor.narrow(dim, 0, 1), patches], dim) if kept else patches

    mask = call.mask
    for dim in (-1, -2):
        if mask is not None and mask.ndim >= -dim and mask.shape[dim] != 1:
            mask = cut(mask, dim)
    return AttentionCall(cut(call.query, 2), cut(call.key, 2), mask, call.scale)


def whole_map_divergence(
    student: AttentionCall,
    student_layout: TokenLayout,
    teacher: AttentionCall,
    teacher_layout: TokenLayout,
    *,
    student_heads: Heads,
    teacher_heads: Heads,
    merge: str | None = None,
    sample_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The divergence of whole maps, averaged over images, heads and query rows; a scalar.

    Args:
        student, teacher: as an :class:`attnkd.AttentionTap` returns them.
        student_layout, teacher_layout: which of their tokens are class token, other prefix tokens and patches.
        student_heads, teacher_heads: student head i learns from teacher head i; with ``merge`` any numbers of heads.
        merge: None, or how the heads of each side become one map first.
        sample_weight: [B], multiplies every image's rows; the divisor stays the number of rows, so that a batch of
            small weights has a small loss.
        options: divergence, temperature, impl; see :func:`attnkd.attention_kl`.

    Raises:
        ValueError: maps of different sizes.
    """
    keep_cls = student_layout.has_cls and teacher_layout.has_cls
    s = take_heads(shared_map(student, student_layout, keep_cls), student_heads)
    t = take_heads(shared_map(teacher, teacher_layout, keep_cls), teacher_heads)
    if s.query.shape[2] != t.query.shape[2]:
        raise ValueError(
            f"whole maps need the same tokens: the student's map is {s.query.shape[2]} x {s.key.shape[2]}, the "
            f"teacher's {t.query.shape[2]} x {t.key.shape[2]} (class token and patches); use models with the same patch "
            "grid, or a method that compares class-token rows (AttnDistill), which can be resized"
        )
    reduction, row_weight = "mean", None
    if sample_weight is not None:
        rows = (s.query.shape[1] if merge is None else 1) * s.query.shape[2]
        reduction, row_weight = "batchmean", (sample_weight / rows)[:, None, None]
    return attention_kl(
        s.query,
        s.key,
        t.query,
        t.key,
        student_scale=s.scale,
        teacher_scale=t.scale,
        student_mask=s.mask,
        teacher_mask=t.mask,
        merge=merge,
        row_weight=row_weight,
        reduction=reduction,
        **options,
    )
