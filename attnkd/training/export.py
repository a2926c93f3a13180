"""A finished run as a folder that the student's own library loads: weights, configuration, and a card that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnkd
from attnkd import files
from attnkd.capture.adapters import adapter_for
from attnkd.capture.libraries import library_of
from attnkd.capture.loading import load_saved
from attnkd.capture.models import evaluating
from attnkd.training.config import METHODS, saved_settings
from attnkd.training.onnx_export import NAME as ONNX
from attnkd.training.onnx_export import require_onnx, write_onnx
from attnkd.training.rows import ROWS
from attnkd.training.run import CONFIG, DESCRIPTION, WEIGHTS

CARD = """---
library_name: {library}
tags: [image-feature-extraction, {library}, knowledge-distillation, attnkd]
---
# {title}

{student} ({parameters:.1f} million parameters), trained with {method} of attnkd {version}.

| | |
|---|---|
{facts}

## Use

```python
{use}
```

## Results

{results}
"""
PATH = "PATH OF THIS FOLDER"
USE = {
    "timm": f"""import timm

model = timm.create_model("local-dir:{PATH}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "transformers": f"""from transformers import AutoImageProcessor, {{kind}}

model = {{kind}}.from_pretrained("{PATH}").eval()
processor = AutoImageProcessor.from_pretrained("{PATH}")""",
    "torchvision": f"""import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.get_model({{name!r}}, **{{arguments}}){{headless}}
model.load_state_dict(load_file("{PATH}/model.safetensors"))
model.eval()""",
    "open_clip": f"""import open_clip
from safetensors.torch import load_file

model = open_clip.create_model({{name!r}}, load_weights=False, **{{arguments}}).visual{{trunk}}
model.load_state_dict(load_file("{PATH}/model.safetensors"))
model.eval()""",
}
"""How a folder is loaded, by library. The code runs as it stands once the path is put in, and gives the student bit by bit."""
KEPT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "classifier", "first_conv")
"""What timm's description of a pretrained model says of the student, whose weights are others."""


def export(run: Path, folder: Path, onnx: bool = False) -> str:
    """Write the student of a finished run so that its own library loads it.

    A timm student becomes a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, a Hugging Face one what
    ``save_pretrained`` writes with an image processor beside it; of other libraries the folder has the weights under the library's
    own names, and the card has the code.

    Args:
        run: the run's folder.
        folder: gets model.safetensors, config.json (model.json for other libraries) and README.md, the model card with the run's
            method, teacher, recipe and the results of `attnkd eval` in its folder.
        onnx: write model.onnx too, see :mod:`attnkd.training.onnx_export`.

    Returns:
        The Python code that loads it.

    Raises:
        ValueError: no finished run, or a folder that cannot be written.
        RuntimeError: what that code loads from the folder is not the student, bit by bit.
    """
    if not (run / WEIGHTS).is_file() or not (run / CONFIG).is_file():
        raise ValueError(f"run: expected the folder of a finished run, with {WEIGHTS} and {CONFIG}, got {run}")
    if onnx:
        require_onnx()
    files.make_folder("output", folder)
    model: Any = load_saved(run / WEIGHTS)
    arguments = json.loads((run / DESCRIPTION).read_text(encoding="utf-8"))
    settings = saved_settings("run", run / CONFIG)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    prefix = library_of(arguments["model_name"])
    if prefix == "hf":
        library, use = "transformers", _write_hugging_face(model, folder, size)
    elif prefix is None:
        library, use = "timm", _write_timm(model, folder, arguments, size)
        files.write_bytes(folder / WEIGHTS, (run / WEIGHTS).read_bytes())
    else:
        library, use = _code(prefix, model, arguments)
        files.write_json(folder / DESCRIPTION, arguments)
        files.write_bytes(folder / WEIGHTS, (run / WEIGHTS).read_bytes())
    files.write_text(folder / "README.md", card(settings, run, model, library, use))
    use = use.replace(PATH, json.dumps(str(folder))[1:-1])
    shape = (arguments.get("in_chans", arguments.get("num_channels", 3)), *size)
    _check(model, use, folder, (1, *shape))
    if onnx:
        write_onnx(model, folder / ONNX, shape)
    return use


def _write_timm(model: Any, folder: Path, arguments: dict[str, Any], size: Any) -> str:
    kept = {k: v for k, v in arguments.items() if k not in ("model_name", "num_classes", "pretrained_cfg_overlay")}
    described = {
        "architecture": arguments["model_name"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": kept,
        "pretrained_cfg": {
            **{name: model.pretrained_cfg[name] for name in KEPT if model.pretrained_cfg.get(name) is not None},
            "input_size": [kept.get("in_chans", 3), *size],
            "num_classes": model.num_classes,
        },
    }
    files.write_json(folder / "config.json", described)
    return USE["timm"]


def _write_hugging_face(model: Any, folder: Path, size: Any) -> str:
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(model.pretrained_cfg["mean"]),
        "image_std": list(model.pretrained_cfg["std"]),
    }
    files.write_json(folder / "preprocessor_config.json", processor)
    classifies = adapter_for(model).num_classes(model)
    return USE["transformers"].format(kind="AutoModelForImageClassification" if classifies else "AutoModel")


def _code(prefix: str, model: Any, described: dict[str, Any]) -> tuple[str, str]:
    """Library and code of a student that is weights and the call that builds it."""
    arguments = {k: v for k, v in described.items() if k not in ("model_name", "pretrained_cfg_overlay", "num_classes")}
    rest, classes = described["model_name"].partition(":")[2], described.get("num_classes")
    size = {"torchvision": "image_size", "open_clip": "force_image_size"}[prefix]
    arguments = {size if key == "img_size" else key: value for key, value in arguments.items()}
    if prefix == "open_clip":
        name = rest if rest.startswith(("local-dir:", "hf-hub:")) else rest.partition(":")[0]
        trunk = "" if type(model).__module__.startswith("open_clip.") else ".trunk"
        return "open_clip", USE["open_clip"].format(name=name, arguments=arguments, trunk=trunk)
    if classes:
        arguments["num_classes"] = classes
    headless = "" if classes else "\nmodel.heads = torch.nn.Sequential()"
    return "torchvision", USE["torchvision"].format(name=rest.partition(":")[0], arguments=arguments, headless=headless)


def card(settings: dict[str, Any], run: Path, model: nn.Module, library: str, use: str) -> str:
    """The model card of a run with these settings, as its config.yaml has them.

    Args:
        library: the student's. use: the code that loads it.
    """
    method, train, row = settings["task"], settings["train"], ROWS.get(settings["recipe"] or "")
    facts = {
        "method": f"attnkd.{METHODS[method]}, {_words(settings['method'])}",
        "teacher": _model(settings, "teacher"),
        "assistant": _model(settings, "assistant"),
        "label teacher": _model(settings, "label_teacher"),
        "student": _model(settings, "student"),
        "data": f"{settings['data']}, split {settings['train_split']}",
        "recipe": None if row is None else f"{settings['recipe']}: {row.source}",
        "training": f"{train['epochs']} epochs, {train['batch_size']} images a step, {_words(train)}",
        "seed": settings["seed"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in (None, ""))
    return CARD.format(
        title=f"{settings['student']}, {method}",
        student=settings["student"],
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        method=f"attnkd.{METHODS[method]}",
        version=attnkd.__version__,
        facts=rows,
        results=_results(run),
        library=library,
        use=use,
    )


def _results(run: Path) -> str:
    """Tables of what `attnkd eval` left in the run's folder."""
    lines = []
    for path in sorted(run.glob("eval_*.json")):
        try:
            lines += [*_result(json.loads(path.read_text(encoding="utf-8"))), ""]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"run: {path} is no result of attnkd eval; delete it") from None
    return "\n".join(lines).rstrip() or "None were measured: `attnkd eval knn RUN`, `attnkd eval linear RUN`."


def _result(found: dict[str, Any]) -> list[str]:
    where = f"{found['val_images']} images of {found['data']}"
    if found.get("subset") is not None:
        where += f", learnt from {found['train_images']} labelled ones"
    usual = {"last_blocks": 1, "temperature": 0.07, "train_split": None, "val_split": None}
    options = (*usual, "img_size", "mean", "std", "model_kwargs")
    changed = _words({name: found.get(name) for name in options if found.get(name) != usual.get(name)})
    where += f" ({changed})" if changed else ""
    if found["evaluation"] == "knn":
        scores = [f"| {k} | {score['top1']:.2f} |" for k, score in found["scores"].items()]
        return [f"k-NN on {where}, top-1:", "", "| k | % |", "|---:|---:|", *scores]
    if found["evaluation"] == "finetune":
        return [f"Fine-tuned, on {where}, top-1: {found['top1']:.2f} % ({found['epochs']} epochs)"]
    return [f"Linear probe on {where}, top-1: {found['top1']:.2f} % (learning rate {found['lr']:g})"]


def _model(settings: dict[str, Any], role: str) -> str | None:
    name = settings.get(role)
    if name is None:
        return None
    checkpoint = settings[f"{role}_checkpoint"]
    return (
        name + (f" {_words(settings[f'{role}_kwargs'])}").rstrip() + (f", weights {checkpoint}" if checkpoint else "")
    )


def _words(values: dict[str, Any]) -> str:
    """The settings that say something, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", [], {}))


@torch.no_grad()
def _check(model: nn.Module, use: str, folder: Path, shape: tuple[int, ...]) -> None:
    """Run the code of the card."""
    names: dict[str, Any] = {}
    exec(compile(use, str(folder / "README.md"), "exec"), names)
    images, adapter = torch.randn(shape, generator=torch.Generator().manual_seed(0)), adapter_for(model)
    with evaluating(model):
        if not torch.equal(adapter.forward(names["model"], images), adapter.forward(model, images)):
            raise RuntimeError(f"{folder}: what is loaded from it is not the student of the run")
