"""Models and image preprocessing by the names and files that a user gives; nothing is unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attnkd.capture import libraries
from attnkd.capture.weights import first_line, load_weights

TIMMS_OWN = ("hf-hub:", "local-dir:")
"""Beginnings of names of models in timm's form outside timm: on the Hugging Face hub, in a folder."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def load_model(role: str, name: str, checkpoint: Path | None = None, **kwargs: Any) -> nn.Module:
    """A model in evaluation mode, with its published weights or those of a checkpoint.

    Args:
        role: the argument that messages begin with, 'teacher' or 'student'.
        name: a timm model's name; a model of another library, see :data:`attnkd.capture.libraries.FORMS`; or a saved model: a
            checkpoint with a .json of the model's arguments beside it, as `attnkd train` leaves them (model.safetensors and
            model.json).
        checkpoint: weights for a model given by name, see :func:`attnkd.load_weights`. Where the checkpoint of a timm model has
            another classifier than the model, or none, the model gets that.
        kwargs: of ``timm.create_model``; for other libraries see :func:`attnkd.capture.libraries.build`.

    Raises:
        ValueError: no model of that name, and no saved one; arguments that the model does not take; a checkpoint that
            cannot be read or does not fit.
        RuntimeError: the published weights cannot be had.
    """
    saved = Path(name)
    if saved.is_file() and saved.with_suffix(".json").is_file():
        if checkpoint is not None:
            raise ValueError(
                f"{role}: {name} is a saved model and has its weights; leave the checkpoint {checkpoint} out"
            )
        return load_saved(saved, **kwargs)
    model = _create(role, name, {"pretrained": checkpoint is None, **kwargs})
    if checkpoint is not None:
        load_weights(model, checkpoint, keep_classifier=kwargs.get("num_classes") is not None)
    return model.eval()


def new_model(role: str, name: str, **kwargs: Any) -> nn.Module:
    """A model with random weights, by the same names, but for those of torch.hub.

    Raises:
        ValueError: no model of that name, or arguments that it does not take.
    """
    _refuse_code(role, name)
    return _create(role, name, {**kwargs, "pretrained": False})


def default_size(name: str) -> tuple[int, int] | None:
    """The image size (height, width) that a timm model is built for when none is asked for; None for no timm model."""
    import timm

    if not timm.is_model(name):
        return None
    cfg = timm.models.get_pretrained_cfg(name)
    return None if cfg is None else (cfg.input_size[-2], cfg.input_size[-1])


def load_saved(path: Path, **kwargs: Any) -> nn.Module:
    """The model of ``path`` and of its name and arguments beside it, in evaluation mode.

    Raises:
        ValueError: one of the two files is missing, cannot be read, or does not fit the other.
    """
    described = path.with_suffix(".json")
    try:
        args = json.loads(described.read_text(encoding="utf-8"))
        name = args.pop("model_name")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{described}: expected the arguments of timm.create_model as JSON ({first_line(error)})"
        ) from None
    for argument in ("pretrained", "checkpoint_path", "pretrained_cfg"):  # the weights are in the file beside it
        if argument in args:
            raise ValueError(
                f"{described}: expected a model's description, has {argument!r}, which loads other weights"
            )
    _refuse_code(str(described), name)
    model = _create("model", name, {**args, **kwargs, "pretrained": False})
    load_weights(model, path)
    return model.eval()


def image_config(
    model: nn.Module,
    *,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """How a model's images are resized, cropped and normalised: timm's description, with what is given put in its place.

    Raises:
        ValueError: a size that the model does not take, or a number out of range.
    """
    from timm.data import resolve_data_config

    from attnkd.capture.models import image_size, input_channels

    embed: Any = getattr(model, "patch_embed", None)
    channels = input_channels(model) or 3
    if channels not in (1, 3):
        raise ValueError(
            f"teacher: expected a model of images with 1 or 3 channels, {type(model).__name__} takes {channels}"
        )
    only = image_size(model)
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size: expected at least 1, got {img_size}")
    if img_size is not None and only is not None and only != (img_size, img_size):
        raise ValueError(
            f"img_size: this model takes {only[0]}x{only[1]} pixels only, got {img_size}; build it for another size "
            f"with --model-kwargs img_size={img_size}"
        )
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: expected a share above 0, at most 1, got {crop_pct}")
    given: dict[str, Any] = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    size = (img_size, img_size) if img_size is not None else getattr(embed, "img_size", None)
    given["input_size"] = None if size is None else (channels, *size)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    for name in ("mean", "std"):
        if cfg and not given[name] and not cfg.get(name):
            raise ValueError(
                f"{name}: {type(model).__name__} does not say its images' mean and std (no image processor); give both"
            )
        values = given[name] or cfg.get(name) or (0.0, 0.0, 0.0)
        if len(values) not in (1, channels) or (given[name] is None and len(values) != channels):
            raise ValueError(f"{name}: expected 1 or {channels} numbers for {channels} channels, got {tuple(values)}")
        if not all(math.isfinite(value) for value in values) or (name == "std" and given[name] and min(values) <= 0):
            raise ValueError(f"{name}: expected finite numbers{' above 0' * (name == 'std')}, got {tuple(values)}")
    return resolve_data_config(given, model=model)


def image_transform(config: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """Pillow image → [C, H, W] as :func:`image_config` says."""
    from timm.data import create_transform

    return create_transform(**config, is_training=False)


def _refuse_code(role: str, name: str) -> None:
    if libraries.library_of(name) == "hub":
        raise ValueError(
            f"{role}: {name} runs the code of a repository, so a saved model cannot be one; it can be a teacher by this name. DINOv2 and "
            "DINOv3 students: hf:dinov2, hf:dinov3_vit, or timm's"
        )


def _create(role: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    if libraries.library_of(name) is not None:
        return libraries.build(role, name, **kwargs)
    if not timm.is_model(name) and not name.startswith(TIMMS_OWN):
        raise ValueError(
            f"{role}: {name!r} is neither a timm model nor a model.safetensors with its .json beside it, and not "
            f"{libraries.FORMS}"
        )
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, AssertionError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{name}: timm cannot build it with these arguments ({first_line(error)})") from None
    except Exception as error:  # of the many libraries that a download goes through
        raise RuntimeError(f"{name}: its published weights could not be loaded ({first_line(error)})") from error
