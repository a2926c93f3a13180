"""Fine-tuning: all weights of a trained model, and a new classifier, on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnkd.capture.loading import image_transform
from attnkd.capture.models import check_images, evaluating, parameter_dtype
from attnkd.evaluation.features import batches
from attnkd.methods.recipes import Recipe
from attnkd.training.carrying import PRECISIONS, Carrying
from attnkd.training.data import AugmentedImages, Mixing
from attnkd.training.loop import Trainer
from attnkd.training.models import class_loss
from attnkd.training.run import opened, save_student
from attnkd.training.sources import Source
from attnkd.training.watchers import Watcher

RECIPE = Recipe(
    epochs=100,
    batch_size=1024,
    base_lr=5e-4,
    lr_batch=512,
    min_lr=1e-5,
    auto_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)
"""Optimizer, augmentation and mixing of DeiT (Touvron et al., ICML 2021), for 100 epochs."""
LAYER_DECAY = 0.75
"""As in BEiT and MAE: the learning rate of a layer is this times that of the next one."""


class Finetuned(NamedTuple):
    """Accuracies in percent on the validation images; None before the end."""

    finished: bool
    """False: it was asked to stop, and saved its state."""
    steps: int
    total: int
    top1: float | None = None
    top5: float | None = None
    """None for at most five classes too."""


def finetune(
    model: Any,
    train: Source,
    val: Source,
    folder: Path,
    images: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    recipe: Recipe = RECIPE,
    layer_decay: float = LAYER_DECAY,
    carrying: Carrying,
    seed: int = 0,
    device: torch.device,
    say: Callable[[str], None] = print,
    watcher: Watcher | None = None,
) -> Finetuned:
    """Train, or continue what was stopped or killed, in the same way as `attnkd train`: exactly, and on many processes.

    Args:
        model: a timm model; is trained in place, with a new classifier for the classes of ``train``.
        folder: gets log, checkpoint, and at the end the fine-tuned model.
        images: size, mean and so on, see :func:`attnkd.capture.loading.image_config`.
        settings: what model and data sets are, by name: a run with others in the folder is refused. With 'description', the
            ``timm.create_model`` arguments of the model.
        recipe: of the training. Mixing, augmentation and schedule as in `attnkd train`.
        layer_decay: above 0; 1 is the same learning rate for all layers.
        watcher: is told how the training goes, in place of the screen.

    Raises:
        ValueError: data without labels, numbers out of range, settings that are not those of the run in the folder.
        RuntimeError: another process at work in the folder, an unreadable checkpoint, a diverged run.
    """
    from timm.task import ClassificationTask

    classes = train.num_classes
    if classes is None or not train.labelled or not val.labelled:
        raise ValueError("data: expected images with labels, of a known number of classes")
    if carrying.shard:
        raise ValueError("carrying: shard is for attnkd train; a fine-tuned model is whole on every process")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a number above 0, at most 1, got {layer_decay}")
    if not hasattr(model, "reset_classifier") or not hasattr(model, "group_matcher"):
        raise ValueError(
            f"model: fine-tuning needs a timm model, which can be given a new classifier and says which layer a weight belongs to, got "
            f"{type(model).__name__}; eval knn and linear take it, or train it with its own library"
        )
    with opened(folder, device) as run:
        say = say if run.world.first else lambda line: None
        numbers = {"train": asdict(recipe), "run": asdict(carrying), "layer_decay": layer_decay, "seed": seed}
        known = {"method": "finetune", **settings, **_as_json(numbers)}
        state = run.earlier(known)
        torch.manual_seed(seed)
        model.reset_classifier(classes)
        task = ClassificationTask(
            model.to(run.world.device), class_loss(recipe), device=run.world.device, verbose=run.world.first
        )
        mix = None
        if recipe.mixup or recipe.cutmix:
            mix = Mixing(recipe.mixup, recipe.cutmix, recipe.label_smoothing, classes)
        transform = recipe.transform_for(images["input_size"][1:], images["mean"], images["std"])
        augmented = AugmentedImages(train.images, transform, seed)
        trainer = Trainer(
            task, augmented, len(train.images), recipe, run.world, carrying, seed=seed, mix=mix, layer_decay=layer_decay
        )  # fmt: skip
        finished = run.carry_out(trainer, state, known, say, run.log(watcher))
        result = Finetuned(finished, trainer.done, trainer.steps)
        if finished and run.world.first:
            best = trainer.trained if trainer.averaged is None else trainer.averaged
            save_student(folder, best, {**settings["description"], "num_classes": classes})
            seen = batches(val.images, image_transform(images), carrying.at_once or 256, carrying.workers)
            top1, top5 = accuracy(best, seen, PRECISIONS[carrying.precision])
            result = result._replace(top1=top1, top5=top5)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[Any], precision: torch.dtype | None = None) -> tuple[float, float | None]:
    """Top-1 and top-5 accuracy in percent; top-5 is None for at most five classes.

    Args:
        model: a classifier; is put into evaluation mode meanwhile.
        data: batches (images [b, C, H, W], labels [b]).
        precision: of autocast; None for none.

    Raises:
        ValueError: no images, or class scores that are not finite.
    """
    device, hits, count, classes = next(model.parameters()).device, torch.zeros(2), 0, 0
    with evaluating(model), torch.autocast(device.type, precision, enabled=precision is not None):
        for images, labels in data:
            check_images("model", model, images)
            output: Tensor = model(images.to(device, parameter_dtype(model))).float().cpu()
            if not bool(output.isfinite().all()):
                raise ValueError("model: its class scores are not finite; check weights and precision")
            classes = output.shape[1]
            found = output.topk(min(5, classes), dim=1).indices == labels[:, None]
            hits += torch.stack([found[:, :1].sum(), found.sum()])
            count += len(labels)
    if not count:
        raise ValueError("data: no images")
    top1, top5 = (100 * hits / count).tolist()
    return top1, top5 if classes > 5 else None


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
