"""Models of other libraries than timm by name: 'hf:', 'hub:', 'open_clip:', 'torchvision:' and what the library calls it.

The one module of the package that imports these libraries, when one is asked for. Weights are read as tensors: no code in a
file can run. Code of a repository ('hub:') runs, as torch.hub means it to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnkd.capture.adapters import adapter_for
from attnkd.capture.adapters.base import pair
from attnkd.capture.weights import first_line

FORMS = (
    "hf:FOLDER, hf:OWNER/NAME or, for a new student, hf:TYPE (transformers); hub:FOLDER:ENTRY or hub:OWNER/REPOSITORY:ENTRY "
    "(torch.hub); open_clip:NAME or open_clip:NAME:TAG; torchvision:NAME or torchvision:NAME:WEIGHTS"
)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def library_of(name: str) -> str | None:
    """The library that a name begins with: 'hf', 'hub', 'open_clip' or 'torchvision'; None for a name of timm's or a file."""
    prefix, _, rest = name.partition(":")
    return prefix if rest and prefix in _BUILDERS else None


def build(role: str, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A model by name, see :data:`FORMS`. Its ``pretrained_cfg`` says how its images come, as that of a timm model.

    Args:
        role: the argument that messages begin with.
        pretrained: with the library's weights; else with random ones.
        kwargs: num_classes (0 is no classifier), img_size and in_chans as for ``timm.create_model``, pretrained_cfg_overlay; the
            others are the library's own: of the configuration (hf), of the entry (hub), of the builder.

    Raises:
        ImportError: the library is not installed.
        TypeError: not a model that can be distilled.
        ValueError: nothing of that name, arguments that the model does not take, weights that do not fit.
        RuntimeError: the weights cannot be had.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", {})
    prefix, _, rest = name.partition(":")
    try:
        with _tensors_only():
            model, images = _BUILDERS[prefix](rest, pretrained, kwargs)
    except ImportError as error:
        raise ImportError(f"{role}: {name} needs a library that is not installed ({first_line(error)})") from error
    except (TypeError, AssertionError, KeyError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{role}: {name} cannot be built ({first_line(error)}); expected {FORMS}") from error
    except Exception as error:  # of the many libraries that a download goes through
        raise RuntimeError(f"{role}: {name} could not be loaded ({first_line(error)})") from error
    adapter_for(model, role)
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **images, **overlay}  # type: ignore[assignment]
    return model.eval()


def description(name: str, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The model's ``model.json``: its name, and the arguments that :func:`build` needs to build it again with random weights."""
    if library_of(name) != "hf":
        return {"model_name": name, **arguments}
    config: Any = model.config  # the folder that the name says need not be there
    labels = {"id2label", "label2id", "architectures"}  # num_classes says it
    own = {key: value for key, value in _arguments(config).items() if key not in labels}
    return {"model_name": f"hf:{config.model_type}", **own, "num_classes": adapter_for(model).num_classes(model)}


def _hugging_face(rest: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    names = {"img_size": "image_size", "in_chans": "num_channels"}
    given = {names.get(key, key): value for key, value in kwargs.items()}
    classes = given.pop("num_classes", None)
    new = rest in transformers.CONFIG_MAPPING and not Path(rest).is_dir()
    if new and pretrained:
        raise ValueError(f"{rest!r} is a type of model, which has no weights; name a folder or a published model")
    auto: Any = transformers.AutoConfig
    config = auto.for_model(rest) if new else auto.from_pretrained(rest, trust_remote_code=False)
    config = getattr(config, "vision_config", config)  # CLIP and SigLIP: their image tower
    size = given.pop("image_size", None) if pretrained else None  # its position embeddings are resized in the forward
    unknown = sorted(key for key in given if not hasattr(config, key))
    if unknown:
        raise ValueError(f"the configuration of {config.model_type} has no {', '.join(unknown)}")
    if given:
        config = type(config)(**{**_arguments(config), **given})
    classifies = classes is None and any("ForImageClassification" in made for made in config.architectures or ())
    if classes:
        config.num_labels, classifies = classes, True
    made: Any = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    height, width = pair(size or getattr(config, "image_size", None)) or (224, 224)
    images: dict[str, Any] = {"input_size": (getattr(config, "num_channels", 3), height, width)}
    if new or not pretrained:
        return made.from_config(config, attn_implementation="sdpa"), images
    model, found = made.from_pretrained(
        rest,
        config=config,
        attn_implementation="sdpa",
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(key for key in found["missing_keys"] if "pooler.dense." not in key)  # nothing here runs that layer
    if missing:
        raise ValueError(f"{rest} has no weights for {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")
    return model, {**images, **_processor(rest)}


def _arguments(config: Any) -> dict[str, Any]:
    """What a configuration was made with, as far as it differs from its defaults and does not follow from the rest."""
    follows = {"model_type", "dtype", "transformers_version", "stage_names"}
    follows |= {"out_features", "out_indices", "_out_features", "_out_indices"}
    return {key: value for key, value in config.to_diff_dict().items() if key not in follows}


def _processor(rest: str) -> dict[str, Any]:
    """Mean, standard deviation and crop of the images, as the model's image processor has them; nothing where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(rest)[0]
    except OSError:
        return {}
    images: dict[str, Any] = {"interpolation": _PILLOW.get(found.get("resample", 3), "bicubic")}
    if found.get("do_normalize", True) and found.get("image_mean") is not None:
        images |= {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}
    size, crop = found.get("size"), found.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    if found.get("do_center_crop") and isinstance(crop, dict) and edge:
        return {**images, "crop_pct": min(crop["height"] / edge, 1.0)}
    return {**images, "crop_pct": 1.0, "crop_mode": "center" if edge else "squash"}


def _hub(rest: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    repository, _, entry = rest.rpartition(":")
    if not repository:
        raise ValueError(
            f"expected hub:REPOSITORY:ENTRY, such as hub:facebookresearch/dinov2:dinov2_vits14, got hub:{rest}"
        )
    classes = kwargs.pop("num_classes", None)
    source = "local" if Path(repository).is_dir() else "github"
    try:
        model = torch.hub.load(repository, entry, source=source, trust_repo="check", pretrained=pretrained, **kwargs)
    except EOFError:  # torch.hub asks whether it is trusted, and nobody answers
        raise RuntimeError(
            f"{repository} is not trusted yet; torch.hub.load({repository!r}, {entry!r}, trust_repo=True) in Python does that, "
            "if you do"
        ) from None
    if classes and adapter_for(model).num_classes(model) != classes:
        raise ValueError(f"{entry} has no classifier for {classes} classes; leave num_classes out or give 0")
    dino = any(base.__name__ == "DinoVisionTransformer" for base in type(model).__mro__)
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    images = {} if pair(size) is None else {"input_size": (3, *(pair(size) or ()))}
    return model, {**images, **(IMAGENET | {"interpolation": "bicubic", "crop_pct": 1.0} if dino else {})}


def _open_clip(rest: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    import open_clip

    own_weights = rest.startswith(("local-dir:", "hf-hub:"))
    name, _, tag = (rest, "", "") if own_weights else rest.partition(":")
    if pretrained and not tag and not own_weights:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"weights need a tag, open_clip:{name}:TAG, one of {', '.join(tags) or 'none: no such model'}")
    classes = kwargs.pop("num_classes", None)
    if classes:
        raise ValueError(f"a tower of open_clip has no classifier, got num_classes={classes}; leave it out or give 0")
    if "img_size" in kwargs:
        kwargs["force_image_size"] = kwargs.pop("img_size")
    clip = open_clip.create_model(name, tag or None, load_weights=pretrained, require_pretrained=pretrained, **kwargs)
    visual: Any = clip.visual
    found = visual.preprocess_cfg
    images = {"input_size": (3, *pair(found["size"])), "mean": found["mean"], "std": found["std"]}  # type: ignore[misc]
    return getattr(visual, "trunk", visual), {**images, "interpolation": found["interpolation"], "crop_pct": 1.0}


def _torchvision(rest: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from torchvision import models

    name, _, tag = rest.partition(":")
    vits = models.list_models(include="vit_*")
    if name not in vits:
        raise ValueError(f"expected one of torchvision's {', '.join(vits)}, got {name!r}")
    classes = kwargs.pop("num_classes", None)
    if "img_size" in kwargs:
        kwargs["image_size"] = kwargs.pop("img_size")
    weights = models.get_model_weights(name)[tag or "DEFAULT"] if pretrained else None
    model = models.get_model(name, weights=weights, **kwargs, **({"num_classes": classes} if classes else {}))
    if classes == 0:
        model.heads = nn.Sequential()
    images: dict[str, Any] = {"input_size": (3, model.image_size, model.image_size), **IMAGENET}
    if weights is not None:
        made = weights.transforms()
        crop = {"interpolation": made.interpolation.value, "crop_pct": made.crop_size[0] / made.resize_size[0]}
        images |= {"mean": tuple(made.mean), "std": tuple(made.std), **crop}
    return model, images


_Builder = Callable[[str, bool, dict[str, Any]], tuple[nn.Module, dict[str, Any]]]
_BUILDERS: dict[str, _Builder] = {
    "hf": _hugging_face,
    "hub": _hub,
    "open_clip": _open_clip,
    "torchvision": _torchvision,
}


@contextmanager
def _tensors_only() -> Iterator[None]:
    """``torch.load`` reads tensors alone, also where a library asks for more: torch.hub's own download does."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
