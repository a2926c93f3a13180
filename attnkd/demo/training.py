"""Trains on images in memory with the loop of `attnkd train`, and keeps a record of every epoch beside the run's state.

It trains any module whose ``forward(images, targets)`` returns a dict with the scalar ``loss`` and, under names that end in
``_loss``, its parts: timm's ``TrainingTask`` classes and the distillation methods of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attnkd.methods.recipes import Recipe
from attnkd.training import checkpoint
from attnkd.training.carrying import Carrying
from attnkd.training.data import AugmentedImages
from attnkd.training.distributed import World
from attnkd.training.loop import Trainer
from attnkd.training.watchers import Watcher

Record = dict[str, float]
Augment = Callable[[Tensor, torch.Generator], Tensor]
BATCH_SIZE = 64


def recipe(epochs: int) -> Recipe:
    """AdamW with a linear warm-up and a cosine decay; images are augmented batch by batch, see ``augment`` of :func:`train`."""
    return Recipe(
        epochs,
        BATCH_SIZE,
        base_lr=3e-3,
        lr_batch=None,
        betas=(0.9, 0.99),
        warmup_epochs=round(0.15 * epochs),
        min_lr=3e-5,
        clip_grad=1.0,
        crop_scale=(1.0, 1.0),
        hflip=0.0,
    )


def train(
    task: nn.Module,
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    path: Path,
    fingerprint: str,
    augment: Augment | None = None,
    evaluate: Callable[[], Mapping[str, float]] = dict,
    on_epoch: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Train ``task`` in place, or continue where the state at ``path`` ends.

    Args:
        task: what trains, on its device.
        images, targets: the training set [n, C, H, W] and [n].
        recipe: optimizer and schedule.
        seed: of data order and augmentation. Initial weights are the caller's.
        path: the state, replaced after every epoch.
        fingerprint: identifies everything that determines the result; a state with another one is refused.
        augment: (batch, CPU generator) → batch.
        evaluate: metrics, measured before the first and after every epoch.
        on_epoch: is called with every new record when it is on the disk.

    Returns:
        A record for every epoch: epoch, mean of each part of the loss, and the metrics. Record 0 is from before training.

    Raises:
        ValueError: fewer images than a batch.
        DivergedError: a gradient that is not finite (no state of that epoch is written).
        RuntimeError: a state that cannot be read or belongs to another run.
    """
    steps = len(images) // recipe.batch_size
    carrying = Carrying(
        workers=0, save_minutes=math.inf, save_steps=steps or None, log_steps=steps or 1, nonfinite_limit=1
    )

    def mix(batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert augment is not None
        return augment(batch, torch.default_generator), labels  # the loop seeds it anew in every step

    data = AugmentedImages(TensorDataset(images.cpu(), targets.cpu()), None, seed)
    world = World(next(task.parameters()).device)
    trainer = Trainer(task, data, len(images), recipe, world, carrying, seed=seed, mix=None if augment is None else mix)
    state = load_state(path, fingerprint)
    if state is None:
        history: list[Record] = [{"epoch": 0, **evaluate()}]
    else:
        history = state["history"]
        trainer.load(state)
    epochs = _Epochs(history, evaluate, on_epoch)
    trainer.run(lambda state: checkpoint.save(path, {**state, "history": history, "fingerprint": fingerprint}), epochs)
    return history


def load_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state that a run left at ``path``; None when there is none.

    Raises:
        RuntimeError: an unreadable file, or the state of another run.
    """
    state = checkpoint.load(path)
    if state is not None and state["fingerprint"] != fingerprint:
        raise RuntimeError(
            f"{path}: is the state of a run with other settings (fingerprint {state['fingerprint']}, expected {fingerprint}). "
            "Delete it or choose another output directory"
        )
    return state


class _Epochs(Watcher):
    """The loop's records are its epochs' means."""

    def __init__(
        self, history: list[Record], evaluate: Callable[[], Mapping[str, float]], on_epoch: Callable[[Record], None]
    ) -> None:
        self.history, self.evaluate, self.on_epoch = history, evaluate, on_epoch

    def record(self, record: dict[str, Any]) -> None:
        losses = {name: value for name, value in record.items() if name == "loss" or name.endswith("_loss")}
        self.history.append({"epoch": len(self.history), **losses, **self.evaluate()})

    def saved(self, step: int) -> None:
        self.on_epoch(self.history[-1])
