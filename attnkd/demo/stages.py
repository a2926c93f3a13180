"""Named training runs under one directory: each is reused, continued or trained again, depending on its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnkd import files
from attnkd.demo import models
from attnkd.demo.training import Augment, Record, load_state, train
from attnkd.methods.recipes import Recipe
from attnkd.training import checkpoint


class Listener(Protocol):
    """Gets reports on the progress of the run; several stages may be under way."""

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        """``done`` of ``epochs`` were trained before; ``note`` says what is reused, or why not."""

    def epoch(self, name: str, record: Record) -> None: ...
    def end(self, name: str, scores: Mapping[str, float]) -> None: ...


@dataclass
class Trained:
    """A finished stage: where its model is kept, the history of its training, and what it scores on the test images."""

    checkpoint: Path
    history: list[Record]
    scores: dict[str, float]
    device: torch.device

    @cached_property
    def model(self) -> nn.Module:
        """As timm loads it, on the stage's device."""
        return models.load(self.checkpoint).to(self.device)

    @property
    def sha256(self) -> str:
        """Of the checkpoint: a stage that learns from this one names it in its settings."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()

    def __reduce__(self) -> tuple:
        return Trained, (self.checkpoint, self.history, self.scores, self.device)  # whoever gets it loads the model


class Stages:
    """Trains one stage after the other and keeps each in its own directory.

    Args:
        directory: where the stages' directories are made.
        circumstances: what every result depends on besides a stage's own settings.
        listener: gets reports on the progress.
        stats: mean and standard deviation that all images are normalised with.
        images: every saved model is loaded again, and its features of these compared.
    """

    def __init__(
        self,
        directory: Path,
        circumstances: dict[str, Any],
        listener: Listener,
        stats: tuple[float, float],
        images: Tensor,
    ) -> None:
        self.directory, self.circumstances, self.listener = directory, circumstances, listener
        self.stats, self.images = stats, images

    def train(
        self,
        name: str,
        method: nn.Module,
        model: nn.Module,
        settings: dict[str, Any],
        recipe: Recipe,
        data: tuple[Tensor, Tensor],
        *,
        score: Callable[[list[Record]], dict[str, float]],
        augment: Augment | None = None,
        evaluate: Callable[[], Record] = dict,
    ) -> Trained:
        """Train ``method`` in place, or take from its directory what was trained there before.

        Args:
            name: of the stage and, with a fingerprint of all settings, of its directory.
            method: what trains, see :func:`attnkd.demo.training.train`.
            model: the timm model in it that is kept.
            settings: everything that determines the result besides recipe and circumstances; ``model`` (the arguments of
                ``timm.create_model``) and ``seed`` among it.
            recipe: optimizer and schedule.
            data: images [n, C, H, W] and targets [n].
            score: history → the scores of the trained model, by name.
            augment, evaluate: see :func:`attnkd.demo.training.train`.
        """
        place = StageDirectory(self.directory, name, {**settings, "recipe": asdict(recipe), **self.circumstances})
        done, note = place.situation(recipe.epochs)
        self.listener.begin(name, recipe.epochs, done, note)
        history = train(
            method,
            *data,
            recipe,
            seed=settings["seed"],
            path=place.state,
            fingerprint=place.fingerprint,
            augment=augment,
            evaluate=evaluate,
            on_epoch=lambda record: self.listener.epoch(name, record),
        )
        models.save(model, settings["model"], place.weights, self.stats)
        models.check_reload(model, place.weights, self.images)
        scores = score(history)
        self.listener.end(name, scores)
        return Trained(place.weights, history, scores, self.images.device)


class StageDirectory:
    """Where one stage of the experiment is kept: named after everything that determines its result.

    Changed settings lead to another directory, so nothing is reused by mistake and nothing is overwritten.
    """

    def __init__(self, parent: Path, name: str, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.parent, self.name, self.settings = parent, name, settings
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:10]
        self.path = parent / f"{name}-{self.fingerprint}"
        self.state, self.weights = self.path / checkpoint.NAME, self.path / "model.safetensors"

    def situation(self, epochs: int) -> tuple[int, str]:
        """Epochs already done here, and in words what will be reused. Makes the directory."""
        state = load_state(self.state, self.fingerprint)
        if state is not None:
            done = len(state["history"]) - 1
            return done, "finished before, reused" if done >= epochs else f"continued after epoch {done} of {epochs}"
        others = sorted(self.parent.glob(f"{self.name}-*/settings.json"), key=lambda path: path.stat().st_mtime)
        others = [path for path in others if path.parent != self.path]
        files.make_folder("output_dir", self.path)
        files.write_json(self.path / "settings.json", self.settings)
        if not others:
            return 0, ""
        changed = "; ".join(_differences(json.loads(others[-1].read_text()), self.settings))
        return 0, f"trained again, {others[-1].parent.name} has other settings ({changed})"


def _differences(old: Any, new: Any, path: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(old) != json.dumps(new):
        yield f"{path} {old}, now {new}"
