"""What the training tasks share: a student that trains, frozen teachers beside it, scheduled weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.checks import check_choice, check_device
from attnkd.attention.dispatch import IMPLS
from attnkd.capture.adapters import adapter_for, adapter_or_plain
from attnkd.capture.adapters.text import is_text
from attnkd.capture.blocks import attentions_in_words
from attnkd.capture.checkpointing import recompute_blocks
from attnkd.capture.models import (
    TrainingTask,
    check_images,
    image_size,
    input_channels,
    input_stats,
    num_classes,
    parameter_dtype,
    resolve_model,
    unwrap_model,
)
from attnkd.capture.outputs import NO_DATA_PARALLEL
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import token_layout
from attnkd.methods.logits import check_targets
from attnkd.methods.schedule import Schedule, Schedules
from attnkd.methods.student_teacher import FrozenTeacher, TrainedStudent

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_logger = logging.getLogger(__name__)


class DistillTask(TrainingTask):
    """Base of the training tasks.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's distillation tasks. Teachers
    are frozen, stay in evaluation mode, and are not submodules: they are in no optimizer, state_dict or checkpoint.
    What trains beside the student and the time of the schedules are the checkpoint's task state.

    Args:
        trainable: the student and what trains beside it.
        teachers: frozen teachers by name.
        criterion: loss of (student output, targets), or None to train without labels.
        schedules: weights and temperatures by name.
        impl: implementation of the attention losses, see :func:`attnkd.attention_divergence`.
        device: moves all models there; None is where the student is. dtype: of what trains beside the student; None is
            the student's.
    """

    teachers: dict[str, FrozenTeacher]

    def __init__(
        self,
        trainable: TrainedStudent,
        teachers: Mapping[str, FrozenTeacher],
        *,
        criterion: nn.Module | None,
        schedules: Schedules,
        impl: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        verbose: bool,
    ) -> None:
        student = trainable.model
        parameter = next(student.parameters())
        super().__init__(
            device=parameter.device if device is None else torch.device(device),
            dtype=dtype or parameter.dtype,
            verbose=verbose,
        )
        self.criterion, self.schedules, self.impl = criterion, schedules, impl
        for module in trainable.task_modules().values():
            module.to(self.dtype)
        self.trainable_module: Any = trainable.to(self.device)
        for name, teacher in teachers.items():
            teacher.to(self.device)
            stats, theirs = input_stats(student), input_stats(teacher.tap.model)
            if teacher.input_norm is None and None not in (stats, theirs) and stats != theirs:
                _logger.warning(
                    f"image mean and std differ between student {stats} and {name} {theirs}: images must come normalised "
                    f"for the {name}, or say with input_norm how they come"
                )
        # In __dict__, not in _modules: parameters(), state_dict(), train() and requires_grad_() must not reach them.
        self.__dict__["teachers"] = dict(teachers)

    @property
    def student(self) -> nn.Module:
        """The student model itself, without wrappers."""
        return unwrap_model(self.trainable_module).model

    @property
    def student_tap(self) -> AttentionTap:
        return unwrap_model(self.trainable_module).tap

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch (0 at the start) to the scheduled numbers; call it as you would a sampler's ``set_epoch``."""
        self.schedules.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Tell the number of optimizer steps done to numbers scheduled by step."""
        self.schedules.set_step(step)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Let the student recompute its blocks in the backward: the Trainer of transformers asks its model, here the task, for it.

        Args:
            options: of the same method of a Hugging Face student; others have none.

        Raises:
            ValueError: options for another student, or one that cannot recompute.
        """
        own: Any = getattr(self.student, "activation_checkpointing_enable", None)
        if own is not None:
            own(**options)
            return
        plain = {"activation_checkpointing_kwargs": None, "every_n_layers": 1, "offload": False}
        unknown = {name: value for name, value in options.items() if name not in plain or value != plain[name]}
        if unknown:
            raise ValueError(
                f"student: {type(self.student).__name__} recomputes its blocks without options, got {unknown}"
            )
        recompute_blocks(self.student, "student")

    def check_inputs(self, images: Tensor, targets: Tensor | None) -> None:
        """Looks at the arguments of a training step before any model runs.

        Raises:
            ValueError: images of another rank, size or type than a model takes, targets that are missing or not what the criterion takes.
        """
        words = adapter_for(self.student).vocabulary(self.student) is not None
        if words and not (is_text(images) and "input_ids" in images):
            raise ValueError(
                "images: a text encoder takes what its tokenizer gives, a dictionary with input_ids [B, L] and attention_mask, got "
                f"{type(images).__name__}"
            )
        if not words and (not isinstance(images, Tensor) or images.ndim != 4):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected [B, C, H, W], got {got}; NaFlex batches of patches are not supported")
        if self.criterion is not None and targets is None:
            raise ValueError("targets: needed by criterion, got None (criterion=None trains without labels)")
        if words:
            _check_text(images)
        elif len(images) == 0:
            raise ValueError(f"images: expected at least one, got shape {tuple(images.shape)}")
        else:
            check_images("student", self.student, images)
            for name, teacher in self.teachers.items():
                check_images(name, teacher.tap.model, images)
        if self.criterion is not None:
            first: Any = images
            batch = len(first["input_ids"] if words else first)
            check_targets(self.criterion, targets, batch, num_classes(self.student))

    def run_student(self, images: Tensor, **options: Any) -> Any:
        """What the trainable module returns for the images."""
        if not torch.compiler.is_compiling():
            self._check_wrapper()
        images = images if is_text(images) else images.to(parameter_dtype(self.student))
        return self.trainable_module(images, **options)

    def total(self, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
        """Σ weight · loss over the parts that are on.

        Raises:
            RuntimeError: there are none, or the loss depends on no parameter that trains.
        """
        if not parts:
            raise RuntimeError(
                f"{type(self).__name__}: nothing to train on: all weights of the teachers are 0 now and criterion is None"
            )
        weighted = [weight * loss for weight, loss in parts]
        loss = sum(weighted[1:], weighted[0])
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: nothing would train: the loss depends on no parameter of the student "
                "that requires grad. Unfreeze some below its last compared block, or run the task under torch.no_grad()"
            )
        return loss

    def _check_wrapper(self) -> None:
        """DistributedDataParallel around the whole task does not know which parameters get no gradient; the task does."""
        active: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if active is None or unwrap_model(active) is not self or not self.leaves_parameters_unused():
            return
        if not active.find_unused_parameters and not active.static_graph:
            raise RuntimeError(
                f"{type(self).__name__}: DistributedDataParallel around the task would wait for parameters that get no "
                "gradient; call task.prepare_distributed() instead, or give it find_unused_parameters=True"
            )

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__}: {NO_DATA_PARALLEL} and task.prepare_distributed()")

    def leaves_parameters_unused(self) -> bool:
        """Whether a step may give some parameter no gradient; DistributedDataParallel must know."""
        return self.criterion is None  # the head, and all that follows the last attention if nothing else is compared

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> DistillTask:
        """Wrap what trains in DistributedDataParallel; the teachers stay as they are on every rank."""
        if self.leaves_parameters_unused():
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile what trains and the teachers, before :meth:`prepare_distributed`. Returns the model to evaluate."""
        options: dict[str, Any] = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        for teacher in self.teachers.values():
            teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        resolved = super().get_eval_model(module=module, ema=ema)
        plain = None if resolved is None else unwrap_model(resolved)
        return plain.model if isinstance(plain, TrainedStudent) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        if trainable is None:
            return {}
        beside = unwrap_model(trainable).task_modules()
        return {name: m.state_dict() for name, m in beside.items()} | {"schedules": self.schedules.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore :meth:`get_task_state`. The schedules' time may be missing where no number changes."""
        state, task = state or {}, type(self).__name__
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        if trainable is None:
            raise RuntimeError(f"{task}: setup_ema() comes before loading an EMA checkpoint")
        beside = unwrap_model(trainable).task_modules()
        needed = [*beside, *(["schedules"] if not self.schedules.constant else [])]
        missing = [name for name in needed if name not in state]
        if strict and missing:
            listed = ", ".join(map(repr, missing))
            raise RuntimeError(f"{task}: the checkpoint has no task state {listed} (strict=False ignores that)")
        for name in beside.keys() & state.keys():
            beside[name].load_state_dict(state[name], strict=strict)
        if "schedules" in state:
            self.schedules.load_state_dict(state["schedules"])

    def untap(self) -> tuple[nn.Module, Any]:
        """Give student and teachers back as plain models, teachers with their modes and ``requires_grad`` as found.

        The task cannot run after that.
        """
        student = unwrap_model(self.trainable_module).release()
        # Backwards: of a model that is teacher and assistant, the first one found it as it was.
        given = [teacher.release() for teacher in reversed(self.teachers.values())][::-1]
        return student, given[0] if len(given) == 1 else given

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


def check_numbers(
    weights: Mapping[str, float | Schedule],
    *,
    fractions: Mapping[str, float | Schedule] | None = None,
    one_of: Sequence[str] = (),
    **temperatures: float | Schedule | None,
) -> Schedules:
    """All numbers of a method, checked at construction: what a schedule will ever reach counts.

    Args:
        weights: by argument name; at least 0.
        fractions: from 0 to 1.
        one_of: weights of which one must be above 0 at some time.
        temperatures: above 0; None leaves one out.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    fractions = fractions or {}
    given = {name: number for name, number in temperatures.items() if number is not None}
    schedules = Schedules(**weights, **fractions, **given)
    for name, number in schedules.numbers.items():
        low, high = min(number.reached), max(number.reached)
        if name in weights and low < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number}")
        if name in fractions and not 0 <= low <= high <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {number}")
        if name in temperatures and low <= 0:
            raise ValueError(f"{name}: expected a number > 0, got {number}")
    if one_of and all(schedules.numbers[name].off for name in one_of):
        raise ValueError(f"{', '.join(one_of)}: all are 0, nothing would be distilled")
    return schedules


def check_student(
    student: nn.Module, criterion: nn.Module | None, impl: str, device: torch.device | str | None, dtype: object
) -> None:
    """Refuse a student that would not train: frozen, without a classifier under a class loss, or where PyTorch cannot compute.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_choice("impl", impl, IMPLS)
    if device is not None:
        check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating point torch.dtype, such as torch.float32, got {dtype!r}")
    parameters = list(student.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"student: weights of {type(student).__name__} are on the meta device (offloaded by accelerate, or not loaded), so they cannot "
            "train; offload the teacher alone"
        )
    if not parameters or not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"student: no parameter of {type(student).__name__} requires grad, so nothing would train; unfreeze it with "
            "student.requires_grad_()"
        )
    if criterion is not None and num_classes(student) == 0:
        raise ValueError(
            f"student: {type(student).__name__} has no classifier (num_classes = 0), but criterion compares its output with "
            "targets; build it with num_classes, or give criterion=None"
        )


def check_pair(
    student: nn.Module, name: str, teacher: nn.Module, class_token: bool = False, text: bool = False
) -> None:
    """Refuse models that cannot be compared on the same images, or the same text.

    Args:
        name: of the teacher, for messages.
        class_token: both must have one.
        text: whether the method takes text encoders.

    Raises:
        TypeError: a model that no adapter speaks for.
        ValueError: no class token, shared parameters, or fixed image sizes that differ.
    """
    models = {"student": student, name: teacher}
    words = [adapter_for(model, label).vocabulary(model) for label, model in models.items()]
    if words != [None, None] and not text:
        raise ValueError(
            f"student and {name}: text encoders are compared by HeadKD and MiniLM only, got {_types(student, teacher)}"
        )
    for label, model in models.items():
        try:
            token_layout(model)
        except TypeError as error:
            said = str(error).replace("model:", f"{label}:", 1)
            raise TypeError(f"{said}. Its attentions are {attentions_in_words(model)}") from None
        if class_token and not token_layout(model).has_cls:
            raise ValueError(
                f"{label}: class tokens are compared, but {type(model).__name__} has none "
                f"(num_prefix_tokens = {token_layout(model).num_prefix_tokens}, cls_token is None); rows='mean' compares "
                "without one (AttnDistill also 'pool' and 'all')"
            )
    check_same_inputs(student, name, teacher)


def check_same_inputs(student: nn.Module, name: str, teacher: nn.Module) -> None:
    """Refuse a teacher of any kind that cannot see the student's images, or its text.

    Args:
        name: of the teacher, for messages.

    Raises:
        ValueError: shared parameters, another number of channels, fixed image sizes that differ, weights that are not finite.
    """
    words = [adapter_or_plain(model).vocabulary(model) for model in (student, teacher)]
    if words[0] != words[1]:
        raise ValueError(
            f"student and {name} see the same tokens, but {_types(student, teacher)} know {words[0]} and {words[1]} words (None: images); "
            "both need the same tokenizer"
        )
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise ValueError(f"{name}: shares parameters with student; freezing the teacher would freeze the student")
    channels = input_channels(student), input_channels(teacher)
    if None not in channels and channels[0] != channels[1]:
        raise ValueError(
            f"student and {name} see the same images, but student takes {channels[0]} channels and {name} {channels[1]}; "
            "build one of them with another in_chans"
        )
    sizes = image_size(student), image_size(teacher)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"student and {name} see the same images, but student takes {sizes[0]} and {name} {sizes[1]} pixels only; "
            "build one of them with another img_size, or with dynamic_img_size=True"
        )
    for label, model in (("student", student), (name, teacher)):
        _check_finite(label, model)


def _check_finite(name: str, model: nn.Module) -> None:
    """Refuse a broken checkpoint before anything is trained with it. Weights that are elsewhere (meta, quantised, shared out) are not read."""
    for path, weight in model.named_parameters():
        plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.device.type != "meta"
        if plain and weight.dtype in FLOATS and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name}: expected finite weights, got NaN or infinity in {path} of {type(model).__name__}; load another checkpoint"
            )


def _check_text(inputs: Any) -> None:
    """Refuse no text at all, and padding alone: the mean over no row is no number."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.numel() == 0:
        raise ValueError(f"images: expected at least one text and one token, got input_ids of shape {tuple(ids.shape)}")
    if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any()):
        raise ValueError("images: the attention_mask hides every token of every text, so there is nothing to compare")


def _types(student: nn.Module, teacher: nn.Module) -> str:
    return f"{type(student).__name__} and {type(teacher).__name__}"
