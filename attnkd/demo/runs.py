"""The demo's training runs: by the functions behind `attnkd train` and `attnkd eval`, each in a folder that those commands take."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from attnkd import __version__, files
from attnkd.capture.loading import image_config, load_saved, new_model
from attnkd.demo.contrastive import SimCLR, TwoViews
from attnkd.demo.data import IMAGE_SIZE, open_digits
from attnkd.evaluation.finetune import finetune
from attnkd.methods.pos_embed import sincos_pos_embed_
from attnkd.methods.recipes import Recipe
from attnkd.training.carrying import Carrying
from attnkd.training.config import TEACHERS, Experiment
from attnkd.training.data import AugmentedImages
from attnkd.training.loop import Trainer
from attnkd.training.run import WEIGHTS, asked_to_stop, opened, save_student, train
from attnkd.training.sources import DIGITS_STATS as STATS
from attnkd.training.watchers import Watcher

MODEL = "vit_tiny_patch16_224"
WHOLE = {"crop_pct": 1.0}
"""Digits are scored whole: they reach to the edges."""
_COMMON = {"img_size": IMAGE_SIZE, "in_chans": 1, "depth": 3, "weight_init": "jax", "pretrained_cfg_overlay": WHOLE}
TEACHER: dict[str, Any] = {**_COMMON, "embed_dim": 64, "num_heads": 4, "patch_size": 2}
STUDENT: dict[str, Any] = {**_COMMON, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
FEATURES = {**STUDENT, "num_classes": 0}
BATCH_SIZE = 64
SCORES = "scores.json"
Score = Callable[[nn.Module], dict[str, float]]
"""Trained model → its scores by name."""


def recipe(epochs: int) -> Recipe:
    """AdamW with a linear warm-up and a cosine decay, and images that are cropped a little."""
    return Recipe(
        epochs,
        BATCH_SIZE,
        base_lr=3e-3,
        lr_batch=None,
        betas=(0.9, 0.99),
        warmup_epochs=round(0.15 * epochs),
        min_lr=3e-5,
        clip_grad=1.0,
        crop_scale=(0.85, 1.0),
        hflip=0.0,
    )


def carrying(images: int) -> Carrying:
    """A checkpoint and a line of the log an epoch; a step that is not finite ends the run."""
    steps = images // BATCH_SIZE
    return Carrying(workers=0, save_steps=steps, log_steps=steps, nonfinite_limit=1)


class Listener(Protocol):
    """Gets reports on the progress; several runs may be under way."""

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        """``done`` of ``epochs`` were trained before; ``note`` says what is reused, or why not."""

    def epoch(self, name: str, record: Mapping[str, float]) -> None: ...
    def end(self, name: str, scores: Mapping[str, float]) -> None: ...


@dataclass
class Trained:
    """A finished run: its folder, and what its model scores."""

    folder: Path
    scores: dict[str, float]
    device: torch.device

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @cached_property
    def model(self) -> nn.Module:
        """As it is loaded from the folder, on the run's device."""
        return load_saved(self.weights).to(self.device)

    def __reduce__(self) -> tuple:
        return Trained, (self.folder, self.scores, self.device)  # whoever gets it loads the model


class Runs:
    """Trains one model after the other, each in a folder named after everything that determines it.

    Changed settings lead to another folder, so nothing is reused by mistake and nothing is overwritten.

    Args:
        directory: where the folders are.
        device: where to train.
        listener: gets reports on the progress.
    """

    def __init__(self, directory: Path, device: torch.device, listener: Listener) -> None:
        self.directory, self.device, self.listener = directory, device, listener

    def distil(self, name: str, experiment: Experiment, score: Score) -> Trained:
        """A student of an experiment, whose output is decided here."""

        def work(folder: Path, watcher: Watcher) -> None:
            own = replace(experiment, config=replace(experiment.config, output=str(folder)))
            train(own, self.device, lambda line: None, watcher)

        teachers = {role: digest(Path(path)) for role in TEACHERS if (path := getattr(experiment.config, role))}
        settings = {**experiment.settings(), "weights": teachers}
        return self._run(name, settings, experiment.config.train.epochs, work, score)

    def supervise(
        self, name: str, arguments: Mapping[str, Any], seed: int, data: Path, epochs: int, score: Score
    ) -> Trained:
        """A classifier of the training images, from new weights."""
        images, test = open_digits(data, "train"), open_digits(data, "validation")

        def work(folder: Path, watcher: Watcher) -> None:
            model = new_classifier(arguments, seed)
            finetune(
                model,
                images,
                test,
                folder,
                image_config(model),
                {**settings, "description": describe(arguments)},
                recipe=recipe(epochs),
                layer_decay=1.0,
                carrying=carrying(len(images.images)),
                seed=seed,
                device=self.device,
                say=lambda line: None,
                watcher=watcher,
            )

        settings = {"model": dict(arguments), "seed": seed, "data": str(data), "train_split": "train"}
        settings["train"] = asdict(recipe(epochs))
        return self._run(name, settings, epochs, work, score)

    def contrast(
        self, name: str, arguments: Mapping[str, Any], seed: int, data: Path, epochs: int, score: Score
    ) -> Trained:
        """A self-supervised model of the training images, by SimCLR; its views are cropped more than other runs' images."""
        images = open_digits(data, "train").images
        numbers = replace(recipe(epochs), crop_scale=(0.4, 1.0))
        settings = {"method": "SimCLR", "model": dict(arguments), "seed": seed, "data": str(data)}
        settings |= {"train": json.loads(json.dumps(asdict(numbers))), "run": asdict(carrying(len(images)))}

        def work(folder: Path, watcher: Watcher) -> None:
            model = new_classifier({**arguments, "num_classes": 0}, seed)
            views = TwoViews(numbers.transform_for((IMAGE_SIZE, IMAGE_SIZE), STATS["mean"], STATS["std"]))
            with opened(folder, self.device) as run:
                state = run.earlier(settings)
                task = SimCLR(model.to(self.device))
                seen = AugmentedImages(images, views, seed)
                trainer = Trainer(task, seen, len(images), numbers, run.world, carrying(len(images)), seed=seed)
                finished = run.carry_out(trainer, state, settings, report=run.log(watcher))
                if finished:
                    save_student(folder, model, describe({**arguments, "num_classes": 0}))

        return self._run(name, settings, epochs, work, score)

    def _run(
        self,
        name: str,
        settings: Mapping[str, Any],
        epochs: int,
        work: Callable[[Path, Watcher], None],
        score: Score,
    ) -> Trained:
        everything = {**settings, "device": self.device.type, "versions": VERSIONS}
        text = json.dumps(everything, sort_keys=True).replace(json.dumps(str(self.directory))[1:-1], "")
        folder = self.directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if (folder / SCORES).exists():
            self.listener.begin(name, epochs, epochs, "finished before, reused")
        else:
            note = "trained again, with other settings" if any(self.directory.glob(f"{name}-*/{SCORES}")) else ""
            with asked_to_stop() as stop:
                work(folder, _Told(self.listener, name, note))
            if stop.signal is not None:  # the run has saved its state, or its student; the others shall not begin
                signal.raise_signal(stop.signal)
            files.write_json(folder / SCORES, score(load_saved(folder / WEIGHTS).to(self.device)))
        trained = Trained(folder, json.loads((folder / SCORES).read_text(encoding="utf-8")), self.device)
        self.listener.end(name, trained.scores)
        return trained


class _Told(Watcher):
    """Passes a run's progress on."""

    def __init__(self, listener: Listener, name: str, note: str) -> None:
        self.listener, self.name, self.note = listener, name, note

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        done, epochs = step // steps_per_epoch, steps // steps_per_epoch
        self.listener.begin(self.name, epochs, done, f"continued after epoch {done} of {epochs}" if done else self.note)

    def record(self, record: dict[str, Any]) -> None:
        self.listener.epoch(self.name, record)


def new_classifier(arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """A timm model for the digits with the given arguments and reproducible weights.

    Two choices help on a thousand images as much as several times the epochs: Xavier weights (timm's default,
    a standard deviation of 0.02, is made for wide models) and position embeddings that start as 2-D sines and cosines.
    """
    described = describe(arguments)
    torch.manual_seed(seed)
    return sincos_pos_embed_(new_model("model", described.pop("model_name"), **described), learnable=True)


def describe(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's ``model.json`` has."""
    overlay = {**WHOLE, **{name: list(values) for name, values in STATS.items()}}
    return {"model_name": MODEL, "num_classes": 10, **arguments, "pretrained_cfg_overlay": overlay}


def digest(path: Path) -> str:
    """Of a file, as a run's settings name it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


VERSIONS = {"attnkd": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "timm")}}
