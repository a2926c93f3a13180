"""A finished run as a folder that timm loads by itself: weights, configuration, and a card that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnkd
from attnkd import files
from attnkd.capture.loading import load_saved
from attnkd.training.config import METHODS
from attnkd.training.rows import ROWS
from attnkd.training.run import CONFIG, DESCRIPTION, WEIGHTS

CARD = """---
library_name: timm
tags: [image-feature-extraction, timm, knowledge-distillation, attnkd]
---
# {title}

{student} ({parameters:.1f} million parameters), trained with {method} of attnkd {version}.

| | |
|---|---|
{facts}

## Use

```python
import timm

model = timm.create_model("local-dir:PATH OF THIS FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Results

{results}
"""
KEPT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "classifier", "first_conv")
"""What timm's description of a pretrained model says of the student, whose weights are others."""


def export(run: Path, folder: Path) -> Path:
    """Write the student of a finished run so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` is it.

    Args:
        run: the run's folder.
        folder: gets model.safetensors, config.json and README.md, the model card with the run's method, teacher, recipe and the
            results of `attnkd eval` in its folder.

    Raises:
        ValueError: no finished run, or a folder that cannot be written.
        RuntimeError: what timm loads from the folder is not the student, bit by bit.
    """
    import yaml

    if not (run / WEIGHTS).is_file() or not (run / CONFIG).is_file():
        raise ValueError(f"run: expected the folder of a finished run, with {WEIGHTS} and {CONFIG}, got {run}")
    files.make_folder("output", folder)
    model: Any = load_saved(run / WEIGHTS)
    arguments = json.loads((run / DESCRIPTION).read_text(encoding="utf-8"))
    kept = {k: v for k, v in arguments.items() if k not in ("model_name", "num_classes", "pretrained_cfg_overlay")}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    channels = kept.get("in_chans", 3)
    described = {
        "architecture": arguments["model_name"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": kept,
        "pretrained_cfg": {
            **{name: model.pretrained_cfg[name] for name in KEPT if model.pretrained_cfg.get(name) is not None},
            "input_size": [channels, *size],
            "num_classes": model.num_classes,
        },
    }
    files.write_json(folder / "config.json", described)
    files.write_bytes(folder / WEIGHTS, (run / WEIGHTS).read_bytes())
    settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    files.write_text(folder / "README.md", card(settings, run, model))
    _check(model, folder, (1, channels, *size))
    return folder


def card(settings: dict[str, Any], run: Path, model: nn.Module) -> str:
    """The model card of a run with these settings, as its config.yaml has them."""
    method, train, row = settings["task"], settings["train"], ROWS.get(settings["recipe"] or "")
    facts = {
        "method": f"attnkd.{METHODS[method]}, {_words(settings['method'])}",
        "teacher": _model(settings, "teacher"),
        "assistant": _model(settings, "assistant"),
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
    )


def _results(run: Path) -> str:
    """Tables of what `attnkd eval` left in the run's folder."""
    lines = []
    for path in sorted(run.glob("eval_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        where = f"{found['val_images']} images of {found['data']}"
        if found.get("subset") is not None:
            where += f", learnt from {found['train_images']} labelled ones"
        if found["evaluation"] == "knn":
            lines += [f"k-NN on {where}, top-1:", "", "| k | % |", "|---:|---:|"]
            lines += [f"| {k} | {score['top1']:.2f} |" for k, score in found["scores"].items()]
        elif found["evaluation"] == "finetune":
            lines += [f"Fine-tuned, on {where}, top-1: {found['top1']:.2f} % ({found['epochs']} epochs)"]
        else:
            lines += [f"Linear probe on {where}, top-1: {found['top1']:.2f} % (learning rate {found['lr']:g})"]
        lines.append("")
    return "\n".join(lines).rstrip() or "None were measured: `attnkd eval knn RUN`, `attnkd eval linear RUN`."


def _model(settings: dict[str, Any], role: str) -> str | None:
    name = settings[role]
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
def _check(model: nn.Module, folder: Path, shape: tuple[int, ...]) -> None:
    import timm

    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if not torch.equal(again(images), model.eval()(images)):
        raise RuntimeError(f"{folder}: what timm loads from it is not the student of the run")
