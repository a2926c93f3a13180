"""The experiment: a teacher, then students with fewer heads and fewer patches, without and with attention guidance."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from attnkd import __version__
from attnkd.capture.models import evaluating
from attnkd.demo import models
from attnkd.demo.attention import attention_divergence_per_image, cls_attention
from attnkd.demo.data import Digits, RandomAffine, load_digits
from attnkd.demo.stages import Listener, Stages, Trained
from attnkd.demo.training import Record, recipe
from attnkd.demo.workers import Run
from attnkd.evaluation.features import Features, extract
from attnkd.evaluation.knn import knn
from attnkd.evaluation.linear import linear_probe
from attnkd.methods.attn_distill import AttnDistill

ARMS = {"pa": "PA only", "pa_ag": "PA + AG"}


@dataclass(frozen=True)
class Config:
    """What the command line decides; everything that determines the result is in here or in the code.

    attn_weight is the paper's λ. temperature is the number of the teacher's heads, so that 'logsum' takes the geometric
    mean of its heads (the paper's 10 is made for 6 and 12 heads). resample_mode is not the paper's 'bicubic': on grids
    this small its negative weights take about a fifth of all entries to the floor, and a patch that is at the floor in
    one head is dark after merging, however bright it is in the others.
    """

    epochs: int = 30
    teacher_epochs: int = 20
    seeds: int = 3
    attn_weight: float = 0.1
    temperature: float = 4.0
    resample_mode: str = "area"
    train_size: int = 1197
    test_size: int = 600

    def __post_init__(self) -> None:
        for name in ("epochs", "teacher_epochs", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        for name in ("attn_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")

    def arm_weight(self, arm: str) -> float:
        return self.attn_weight if arm == "pa_ag" else 0.0


@dataclass
class Outcome:
    """Everything that table, figures and summary are made of. ``students[arm][seed]``."""

    config: Config
    digits: Digits
    target: Tensor
    """[test images, 1 + student patches]: the teacher's attention rows, resized to the student's grid and merged."""
    teacher: Trained
    students: dict[str, list[Trained]]

    def stages(self) -> list[Trained]:
        return [self.teacher, *(run for runs in self.students.values() for run in runs)]


class Experiment:
    """Trains the stages and continues what ``directory`` already has of exactly this experiment."""

    def __init__(self, config: Config, directory: Path, device: torch.device, listener: Listener) -> None:
        self.config, self.device = config, device
        self.digits = load_digits(config.train_size, config.test_size).to(device)
        self.augment = RandomAffine(self.digits.background)
        side = models.STUDENT["img_size"] // models.STUDENT["patch_size"]
        self.student_grid = (side, side)
        packages = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
        circumstances = {
            "digits": {"train": config.train_size, "test": config.test_size},
            "augment": [round(limit, 6) for limit in self.augment.limits.tolist()],
            "device": device.type,
            "versions": {"attnkd": __version__, **packages},
        }
        self.stages = Stages(directory, circumstances, listener, self.digits.stats, self.digits.test_images)

    def run(self, run: Run) -> Outcome:
        """All stages; students do not depend on each other."""
        (teacher,) = run(Experiment.train_teacher, [("teacher", models.TEACHER)])
        calls = [(arm, seed, teacher) for seed in range(1, self.config.seeds + 1) for arm in ARMS]
        trained = run(Experiment.train_student, calls)
        students = {arm: trained[place :: len(ARMS)] for place, arm in enumerate(ARMS)}
        return Outcome(self.config, self.digits, self.target(teacher), teacher, students)

    def target(self, teacher: Trained) -> Tensor:
        """[test images, 1 + student patches]: the teacher's attention, resized to the student's grid and merged."""
        images, config = self.digits.test_images, self.config
        return cls_attention(teacher.model, images, config.temperature, self.student_grid, config.resample_mode)

    def train_teacher(self, name: str, args: dict[str, Any], seed: int = 0) -> Trained:
        model, digits = models.create(args, seed).to(self.device), self.digits
        method = ClassificationTask(model, device=self.device, verbose=False)
        settings = {"task": "classification", "model": args, "seed": seed}

        def score(history: list[Record]) -> dict[str, float]:
            known = self.top1(model, digits.train_images, digits.train_labels)
            return {**self.scores(model, history), "train_top1": known}

        epochs = self.config.teacher_epochs
        return self.stage(
            name, method, model, settings, epochs, evaluate=lambda: {"top1": self.top1(model)}, score=score
        )

    def train_student(self, arm: str, seed: int, teacher: Trained) -> Trained:
        config, target = self.config, self.target(teacher)
        student = models.create(models.STUDENT, seed).to(self.device)
        # The projector is drawn right after the student, so both arms start a seed from the same weights.
        method = AttnDistill(
            student,
            teacher.model,
            attn_weight=config.arm_weight(arm),
            temperature=config.temperature,
            resample_mode=config.resample_mode,
            verbose=False,
        )
        settings = {
            "task": "AttnDistill",
            "attn_weight": config.arm_weight(arm),
            "temperature": config.temperature,
            "resample_mode": config.resample_mode,
            "teacher": {"sha256": teacher.sha256},
            "model": models.STUDENT,
            "seed": seed,
        }

        def evaluate() -> Record:
            rows = cls_attention(student, self.digits.test_images, config.temperature)
            return {
                "knn": self.knn(*self.features(student)),
                "kl": attention_divergence_per_image(target, rows).mean().item(),
            }

        return self.stage(f"student-{arm}-seed{seed}", method, student, settings, config.epochs, evaluate=evaluate)

    def stage(
        self, name: str, method: nn.Module, model: nn.Module, settings: dict[str, Any], epochs: int, **options: Any
    ) -> Trained:
        """Train on the digits; by default score features, and what ``evaluate`` measured after the last epoch."""

        data = self.digits.train_images, self.digits.train_labels
        defaults = {"data": data, "augment": self.augment, "score": lambda history: self.scores(model, history)}
        return self.stages.train(name, method, model, settings, recipe(epochs), **{**defaults, **options})

    def scores(self, model: nn.Module, history: list[Record]) -> dict[str, float]:
        """What was measured after the last epoch, and scores of the features."""
        measured = {key: value for key, value in history[-1].items() if key in ("top1", "kl")}
        train, test = self.features(model)
        probe = linear_probe(train, test, device=self.device)
        return {**measured, "knn": self.knn(train, test), "linear_probe": probe.top1}

    def features(self, model: nn.Module) -> tuple[Features, Features]:
        """Of all training images and of the test images."""
        digits = self.digits
        return (
            extract(model, batches(digits.train_images, digits.train_labels)),
            extract(model, batches(digits.test_images, digits.test_labels)),
        )

    def knn(self, train: Features, test: Features) -> float:
        """Top-1 accuracy in percent with 20 neighbours, as DINO's."""
        return knn(train, test, ks=(20,), device=self.device)[20]["top1"]

    @torch.no_grad()
    def top1(self, model: nn.Module, images: Tensor | None = None, labels: Tensor | None = None) -> float:
        """Accuracy in percent of a classifier, on the test images unless others are given."""
        if images is None or labels is None:
            images, labels = self.digits.test_images, self.digits.test_labels
        with evaluating(model):
            right = sum(int((model(some).argmax(1) == theirs).sum()) for some, theirs in batches(images, labels))
        return 100 * right / len(labels)


def batches(images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """[n, C, H, W] and [n] → batches of both."""
    return zip(images.split(256), labels.split(256), strict=True)
