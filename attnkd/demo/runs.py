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
from typing import Any

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
BATCH_SIZE = 64
SCORES = "scores.json"
VERSIONS = {"attnkd": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "timm")}}
Score = Callable[[nn.Module], dict[str, float]]
"""Trained model → its scores by name."""
Say = Callable[[str | int], None]
"""Is told lines, and numbers of epochs that are done."""


def recipe(epochs: int) -> Recipe:
    """AdamW with a linear warm-up and a cosine decay, and images that are cropped a little."""
    crop: dict[str, Any] = {"crop_scale": (0.85, 1.0), "hflip": 0.0}
    rate: dict[str, Any] = {"base_lr": 3e-3, "lr_batch": None, "min_lr": 3e-5, "warmup_epochs": round(0.15 * epochs)}
    return Recipe(epochs, BATCH_SIZE, betas=(0.9, 0.99), clip_grad=1.0, **rate, **crop)


def carrying(images: int) -> Carrying:
    """A checkpoint and a line of the log an epoch; a step that is not finite ends the run."""
    steps = images // BATCH_SIZE
    return Carrying(workers=0, save_steps=steps, log_steps=steps, nonfinite_limit=1)


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


@dataclass
class Runs:
    """Trains one model after the other, each in a folder of ``directory`` named after everything that determines it.

    Changed settings lead to another folder, so nothing is reused by mistake and nothing is overwritten.
    """

    directory: Path
    device: torch.device
    say: Say

    def distil(self, name: str, experiment: Experiment, score: Score) -> Trained:
        """A student of an experiment, whose output is decided here."""
        config = experiment.config

        def work(folder: Path, watcher: Watcher) -> None:
            own = replace(experiment, config=replace(config, output=str(folder)))
            train(own, self.device, lambda line: None, watcher)

        teachers = [(role, Path(path)) for role in TEACHERS if (path := getattr(config, role))]
        weights = {role: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for role, path in teachers}
        return self._run(name, {**experiment.settings(), "weights": weights}, config.train.epochs, work, score)

    def supervise(
        self, name: str, arguments: Mapping[str, Any], seed: int, data: Path, epochs: int, score: Score
    ) -> Trained:
        """A classifier of the training images, from new weights."""
        images, test, numbers = open_digits(data, "train"), open_digits(data, "validation"), recipe(epochs)
        settings = {"model": dict(arguments), "seed": seed, "data": str(data), "train_split": "train"}
        settings["train"] = asdict(numbers)

        def work(folder: Path, watcher: Watcher) -> None:
            model, described = new_classifier(arguments, seed), {**settings, "description": describe(arguments)}
            how = {"recipe": numbers, "layer_decay": 1.0, "carrying": carrying(len(images.images)), "seed": seed}
            told = {"device": self.device, "say": lambda line: None, "watcher": watcher}
            finetune(model, images, test, folder, image_config(model), described, **how, **told)  # type: ignore[arg-type]

        return self._run(name, settings, epochs, work, score)

    def contrast(
        self, name: str, arguments: Mapping[str, Any], seed: int, data: Path, epochs: int, score: Score
    ) -> Trained:
        """A self-supervised model of the training images, by SimCLR; its views are cropped more than other runs' images."""
        images, own = open_digits(data, "train").images, {**arguments, "num_classes": 0}
        numbers, how = replace(recipe(epochs), crop_scale=(0.4, 1.0)), carrying(len(images))
        settings = {"method": "SimCLR", "model": dict(arguments), "seed": seed, "data": str(data)}
        settings |= {"train": json.loads(json.dumps(asdict(numbers))), "run": asdict(how)}

        def work(folder: Path, watcher: Watcher) -> None:
            model = new_classifier(own, seed)
            views = TwoViews(numbers.transform_for((IMAGE_SIZE, IMAGE_SIZE), STATS["mean"], STATS["std"]))
            with opened(folder, self.device) as run:
                state, task = run.earlier(settings), SimCLR(model.to(self.device))
                seen = AugmentedImages(images, views, seed)
                trainer = Trainer(task, seen, len(images), numbers, run.world, how, seed=seed)
                if run.carry_out(trainer, state, settings, report=run.log(watcher)):
                    save_student(folder, model, describe(own))

        return self._run(name, settings, epochs, work, score)

    def _run(
        self, name: str, settings: Mapping[str, Any], epochs: int, work: Callable[[Path, Watcher], None], score: Score
    ) -> Trained:
        everything = {**settings, "device": self.device.type, "versions": VERSIONS}
        text = json.dumps(everything, sort_keys=True).replace(json.dumps(str(self.directory))[1:-1], "")
        folder, note = self.directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", ""
        if (folder / SCORES).exists():
            self.say(epochs)
            note = " (finished before, reused)"
        else:
            if any(self.directory.glob(f"{name}-*/{SCORES}")):
                note = " (trained again, with other settings)"
            with asked_to_stop() as stop:
                work(folder, _Epochs(self.say, name))
            if stop.signal is not None:  # the run has saved its state, or its student; the others shall not begin
                signal.raise_signal(stop.signal)
            files.write_json(folder / SCORES, score(load_saved(folder / WEIGHTS).to(self.device)))
        trained = Trained(folder, json.loads((folder / SCORES).read_text(encoding="utf-8")), self.device)
        self.say(f"{name}{note}: {', '.join(f'{key} {value:.4g}' for key, value in trained.scores.items())}")
        return trained


class _Epochs(Watcher):
    """Says how far a run is."""

    def __init__(self, say: Say, name: str) -> None:
        self.say, self.name = say, name

    def begin(self, step: int, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        if step:
            done, epochs = step // steps_per_epoch, steps // steps_per_epoch
            self.say(f"{self.name}: continued after epoch {done} of {epochs}")
            self.say(done)

    def record(self, record: dict[str, Any]) -> None:
        self.say(1)
