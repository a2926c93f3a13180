"""Student, teachers and training task of an experiment."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attnkd.capture.libraries import FORMS, description, library_of
from attnkd.capture.loading import default_size, load_model, new_model
from attnkd.capture.models import input_stats, num_classes
from attnkd.methods.pos_embed import sincos_pos_embed_
from attnkd.methods.recipes import Recipe
from attnkd.methods.task import DistillTask
from attnkd.training.config import TEACHERS, Experiment, method_class
from attnkd.training.sources import Source


class Inputs(NamedTuple):
    """What the models' images are."""

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_teachers(experiment: Experiment) -> dict[str, nn.Module]:
    """Teacher, assistant and label teacher, those that are asked for, by argument name.

    Raises:
        ValueError: one that the method needs is missing, or one that it does not know.
    """
    config, wanted = experiment.config, inspect.signature(method_class(experiment.method)).parameters
    made = {}
    for role in TEACHERS:
        name = getattr(config, role)
        if role not in wanted:
            if name is not None:
                raise ValueError(f"{role}: {experiment.method} has none")
            continue
        if name is None:
            if wanted[role].default is inspect.Parameter.empty:
                raise ValueError(
                    f"{role}: {experiment.method} needs one: a timm name, another library's ({FORMS}), or a saved model.safetensors"
                )
            continue
        kwargs = dict(getattr(config, f"{role}_kwargs"))
        if config.img_size is not None and role != "label_teacher":  # which may be a CNN, built for no size
            kwargs.setdefault("img_size", config.img_size)
        path = getattr(config, f"{role}_checkpoint")
        made[role] = load_model(role, name, None if path is None else Path(path), **kwargs)
    return made


def checksum(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers and their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def inputs_of(experiment: Experiment, teachers: dict[str, nn.Module], source: Source, channels: int) -> Inputs:
    """The images of the run: of the student's size if that is given, else of the teacher's, with the mean and standard
    deviation that are given, else the data set's, else the teacher's."""
    config, model = experiment.config, next(iter(teachers.values()))
    size = config.student_kwargs.get("img_size") or config.img_size
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    size = size or getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg.get("input_size", (3, 224))[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = config.mean or source.mean, config.std or source.std
    if mean is None or std is None:
        if cfg and not cfg.get("mean"):
            raise ValueError(
                f"mean, std: the teacher, {type(model).__name__}, does not say with which its images were normalised (no image "
                "processor); give both"
            )
        mean, std = input_stats(model) or ((0.5,), (0.5,))
    mean, std = (tuple(values) * channels if len(values) == 1 else tuple(values) for values in (mean, std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected 1 or {channels} numbers for {channels} channels, got {len(values)}")
    return Inputs(channels, size, mean, std)


def student_arguments(
    experiment: Experiment, teachers: dict[str, nn.Module], inputs: Inputs, classes: int | None
) -> dict[str, Any]:
    """Arguments of the student, its name apart: of ``timm.create_model``, or of :func:`attnkd.capture.libraries.build`.

    Args:
        classes: of the data set, if known. The student of a method that trains without labels (AttnDistill, MiniLM) has no classifier,
            Attention Probe's that of its teacher.
    """
    config = experiment.config
    wanted: int | None = config.num_classes
    if wanted is None:
        if has_class_loss(experiment.method) is False:
            wanted = 0
        elif experiment.method == "attention_probe":
            wanted = num_classes(teachers["teacher"])
            if not wanted:
                raise ValueError(
                    "teacher: attention_probe learns its classes; expected one with a classifier, got none"
                )
        else:
            wanted = classes
    if wanted is None:
        raise ValueError("num_classes: the data set does not say how many classes it has; give --num_classes")
    given = dict(config.student_kwargs)
    if inputs.channels != 3:
        given.setdefault("in_chans", inputs.channels)
    if inputs.size != default_size(config.student):
        given.setdefault("img_size", inputs.size[0] if inputs.size[0] == inputs.size[1] else list(inputs.size))
    given.setdefault("num_classes", wanted)
    return given


def build_student(experiment: Experiment, arguments: dict[str, Any], inputs: Inputs) -> nn.Module:
    """The student; the same weights for the same seed."""
    config = experiment.config
    torch.manual_seed(config.seed)
    if config.student_checkpoint is not None:
        student = load_model("student", config.student, Path(config.student_checkpoint), **arguments)
    else:
        student = new_model("student", config.student, **arguments)
        if config.pos_embed != "timm":
            sincos_pos_embed_(student, learnable=config.pos_embed == "sincos")
    cfg: Any = getattr(student, "pretrained_cfg", None) or {}  # what images it wants is what it is trained on
    student.pretrained_cfg = {**cfg, "mean": inputs.mean, "std": inputs.std}  # type: ignore[assignment]
    return student


def described(
    name: str, student: nn.Module, arguments: dict[str, Any], inputs: Inputs, recipe: Recipe
) -> dict[str, Any]:
    """What a student's ``model.json`` has: :func:`attnkd.capture.loading.load_saved` builds it again."""
    # Cut from images with borders, it was trained on whole images.
    overlay: dict[str, Any] = {} if recipe.crop_padding is None else {"crop_pct": 1.0}
    overlay |= {**arguments.get("pretrained_cfg_overlay", {}), "mean": list(inputs.mean), "std": list(inputs.std)}
    if library_of(name) is not None:
        overlay["input_size"] = [inputs.channels, *inputs.size]
    return {**description(name, student, arguments), "pretrained_cfg_overlay": overlay}


def build_task(
    experiment: Experiment,
    student: nn.Module,
    teachers: dict[str, nn.Module],
    inputs: Inputs,
    device: torch.device,
    *,
    verbose: bool = True,
) -> DistillTask:
    """The method's training task on ``device``."""
    made = method_class(experiment.method)
    options = dict(experiment.options)
    if has_class_loss(experiment.method):
        options["criterion"] = class_loss(experiment.config.train)
    if all(input_stats(model) is not None for model in teachers.values()):
        options["input_norm"] = (inputs.mean, inputs.std)
    return made(student.to(device), **teachers, **options, device=device, verbose=verbose)


def has_class_loss(method: str) -> bool | None:
    """Whether a method compares scores with labels unless told otherwise; None for one that has its labels from the teacher."""
    criterion = inspect.signature(method_class(method)).parameters.get("criterion")
    return None if criterion is None else criterion.default is not None


def class_loss(recipe: Recipe) -> nn.Module:
    """Of class indices, or of the probabilities that mixing makes, which are smoothed already."""
    if recipe.mixup or recipe.cutmix:
        return nn.CrossEntropyLoss()
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
