"""All four methods on the digits, each beside the same training without attention: `attnkd demo --all`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask
from torch import nn

from attnkd.demo import models, wild
from attnkd.demo.contrastive import SimCLR
from attnkd.demo.data import RandomAffine
from attnkd.demo.evaluate import features, linear_probe
from attnkd.demo.experiment import Config, Experiment
from attnkd.demo.stages import Listener, Trained
from attnkd.demo.training import Recipe, Record
from attnkd.demo.workers import Run
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.head_importance import HeadImportance, head_importance
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.selection import select_images
from attnkd.methods.ssta import SSTA

CLASSIFIER = {**models.STUDENT, "num_classes": 10}
ASSISTANT = {**models.COARSE_TEACHER, "num_classes": 0}

TEACHERS = ("teacher", "coarse_teacher", "assistant")
ARMS = {
    "pa": "class token (PA)",
    "pa_ag": "class token, its attention (PA + AG)",
    "labels": "labels",
    "head_kd": "labels, maps of chosen heads",
    "ssta": "labels, maps of two teachers",
    "random": "output, random images",
    "output": "output, images by V_n",
    "probe": "output, relation rows, images by V",
}


@dataclass(frozen=True)
class Comparison:
    """A method's arm beside the arm that does the same without attention.

    accuracy: the score they are compared by. distance: the score that the method's attention loss would be on test
    images, in ``unit``.
    """

    method: str
    without: str
    arm: str
    accuracy: str
    distance: str
    unit: str


COMPARISONS = (
    Comparison("AttnDistill", "pa", "pa_ag", "linear_probe", "kl", "nats"),
    Comparison("Head-specific KD", "labels", "head_kd", "top1", "head_kd_distance", "nats"),
    Comparison("SSTA", "labels", "ssta", "top1", "ssta_distance", "nats"),
    Comparison("Attention Probe", "output", "probe", "top1", "probe_distance", "squared cosine difference"),
)


@dataclass(frozen=True)
class ComparisonConfig(Config):
    """Fewer training images than in the demo, and students that see the labels of a third of them.

    A student that learns from all labels gains little from a teacher.

    labelled: training images whose labels the students of the supervised arms see.
    wild_digits, wild_photos: images of the folder that Attention Probe chooses ``wild_digits`` from.
    """

    epochs: int = 60
    teacher_epochs: int = 40
    train_size: int = 597
    test_size: int = 900
    labelled: int = 200
    wild_digits: int = 300
    wild_photos: int = 700

    def epochs_on(self, images: int) -> int:
        """As many steps on that many images as ``epochs`` are on all training images."""
        batch = Recipe(1).batch_size
        return max(1, round(self.epochs * (self.train_size // batch) / (images // batch)))


QUICK: dict[str, Any] = {
    "epochs": 2,
    "teacher_epochs": 2,
    "seeds": 2,
    "train_size": 320,
    "test_size": 200,
    "labelled": 128,
}
QUICK |= {"wild_digits": 128, "wild_photos": 192}


@dataclass
class Outcome:
    """Everything that table, figure and JSON are made of. ``students[arm][seed]``, ``before[seed]`` untrained scores."""

    config: ComparisonConfig
    teachers: dict[str, Trained]
    heads: dict[str, Any]
    students: dict[str, list[Trained]]
    before: list[dict[str, float]]

    def stages(self) -> list[Trained]:
        return [*self.teachers.values(), *(run for runs in self.students.values() for run in runs)]


def count_epochs(config: ComparisonConfig) -> int:
    """Epochs of all stages together."""
    students = 2 * config.epochs + 3 * config.epochs_on(config.labelled) + 3 * config.epochs_on(config.wild_digits)
    return 3 * config.teacher_epochs + config.seeds * students


class Teachers(NamedTuple):
    """Who the students of all arms learn from, and the heads they learn from."""

    fine: Trained
    coarse: Trained
    assistant: Trained
    heads: dict[str, list]


class AllMethods:
    """Trains teachers and all arms, and continues what ``directory`` already has of exactly this comparison."""

    def __init__(self, config: ComparisonConfig, directory: Path, device: torch.device, listener: Listener) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.lab = Experiment(config, directory, device, listener)
        spare = self.lab.digits.spare_images, self.lab.digits.spare_labels
        if len(spare[0]) < config.wild_digits:
            raise ValueError(
                f"train_size, test_size: expected to leave {config.wild_digits} digits over, leave {len(spare[0])}"
            )
        self.spare = tuple(part[: config.wild_digits] for part in spare)

    def run(self, run: Run) -> Outcome:
        """All stages; those that do not depend on each other at the same time."""
        fine, coarse, assistant = run(AllMethods.train_teacher, [(name,) for name in TEACHERS])
        teachers = Teachers(fine, coarse, assistant, self.choose_heads(coarse, assistant))
        seeds = range(1, self.config.seeds + 1)
        wild_images = run(AllMethods.choose_images, [(seed, coarse) for seed in seeds])
        calls = [
            (arm, seed, teachers, images.get(arm))
            for seed, images in zip(seeds, wild_images, strict=True)
            for arm in ARMS
        ]
        trained = run(AllMethods.train_student, calls)
        students = {arm: trained[place :: len(ARMS)] for place, arm in enumerate(ARMS)}
        before = []
        for seed, first in zip(seeds, students["pa"], strict=True):
            untrained = models.create(CLASSIFIER, seed).to(self.device)
            before.append({"kl": first.history[0]["kl"], **self.distances(untrained, teachers)})
        return Outcome(
            self.config, dict(zip(TEACHERS, (fine, coarse, assistant), strict=True)), teachers.heads, students, before
        )

    def train_teacher(self, name: str) -> Trained:
        if name == "assistant":
            return self.train_assistant()
        kind = models.TEACHER if name == "teacher" else models.COARSE_TEACHER
        return self.lab.train_teacher(name.replace("_", "-"), kind)

    def train_assistant(self) -> Trained:
        """SSTA's self-supervised model; stronger augmentation than the others', which is all that it learns from."""
        lab = self.lab
        model = models.create(ASSISTANT, seed=0).to(self.device)
        augment = RandomAffine(lab.digits.background, degrees=15, scale=0.15, shear=0.2, shift=0.15)
        settings = {
            "task": "SimCLR",
            "views": [round(limit, 6) for limit in augment.limits.tolist()],
            "model": ASSISTANT,
            "seed": 0,
        }
        # The task makes two views itself, so the loop must not augment.
        return lab.stage("assistant", SimCLR(model, augment), model, settings, self.config.teacher_epochs, augment=None)

    def train_student(self, arm: str, seed: int, teachers: Teachers, names: list[str] | None) -> Trained:
        """``names``: the images of an arm that chooses them."""
        if arm in ("pa", "pa_ag"):
            return self.lab.train_student(arm, seed, teachers.fine)
        if names is None:
            return self.train_on_labels(arm, seed, teachers)
        return self.train_in_the_wild(arm, seed, teachers, names)

    def choose_heads(self, coarse: Trained, assistant: Trained) -> dict[str, list]:
        """The teachers' most important heads on images that no model was trained on, for each of their blocks."""
        images, labels = self.spare
        batches = list(zip(images.split(100), labels.split(100), strict=True))
        probe = linear_probe(features(assistant.model, self.lab.digits.train_images), self.lab.digits.train_labels)

        def search(teacher: Trained, combinations: bool, **options: Any) -> HeadImportance:
            kind = "combinations" if combinations else "heads"
            path = self.directory / f"importance-{kind}-{teacher.sha256[:10]}.json"
            return head_importance(
                teacher.model, batches, "all", combinations=combinations, path=path, progress=False, **options
            )

        alone = search(coarse, combinations=False).importance()
        heads = models.describe(models.create(CLASSIFIER, 0))["heads"]
        return {
            "head_kd": [sorted(importance.topk(heads).indices.tolist()) for importance in alone],
            "teacher": search(coarse, combinations=True).best(),
            "assistant": search(assistant, combinations=True, classifier=lambda output: probe(output.double())).best(),
        }

    def make_task(self, arm: str, student: nn.Module, teachers: Teachers, **options: Any) -> Any:
        """The training task of an arm."""
        coarse, heads = teachers.coarse, teachers.heads
        if arm == "labels":
            return ClassificationTask(student, device=self.device, verbose=False)
        if arm == "head_kd":
            return HeadKD(student, coarse.model, teacher_heads=heads["head_kd"], verbose=False, **options)
        if arm == "ssta":
            return SSTA(
                student,
                coarse.model,
                teachers.assistant.model,
                blocks="all",
                teacher_heads=heads["teacher"],
                assistant_heads=heads["assistant"],
                verbose=False,
                **options,
            )
        accuracy = coarse.scores["top1"] / 100
        return AttentionProbe(student, coarse.model, min(accuracy, 0.99), verbose=False, **options)

    def train_on_labels(self, arm: str, seed: int, teachers: Teachers) -> Trained:
        student = models.create(CLASSIFIER, seed).to(self.device)
        labelled = self.config.labelled
        epochs = self.config.epochs_on(labelled)
        settings: dict[str, Any] = {"task": arm, "labelled": labelled, "model": CLASSIFIER, "seed": seed}
        options: dict[str, Any] = {}
        if arm == "ssta":
            options = {"stop_epoch": epochs / 3}  # as the paper: 100 of 300
            both = [teachers.coarse.sha256, teachers.assistant.sha256]
            settings |= {"teachers": both, "heads": teachers.heads, **options}
        elif arm == "head_kd":
            settings |= {"teachers": [teachers.coarse.sha256], "heads": teachers.heads["head_kd"]}
        task = self.make_task(arm, student, teachers, **options)
        digits = self.lab.digits
        return self.lab.stage(
            f"student-{arm}-seed{seed}",
            task,
            student,
            settings,
            epochs,
            data=(digits.train_images[:labelled], digits.train_labels[:labelled]),
            score=self.scorer(student, teachers),
        )

    def wild_folder(self, seed: int, coarse: Trained) -> Path:
        return self.directory / f"wild-{coarse.sha256[:10]}-seed{seed}"

    def choose_images(self, seed: int, coarse: Trained) -> dict[str, list[str]]:
        """For every arm the names of the images of the seed's own wild folder that it learns from."""
        config, digits = self.config, self.lab.digits.to(torch.device("cpu"))
        folder = self.wild_folder(seed, coarse)
        wild.make_wild_folder(folder / "images", digits, self.spare[0].cpu(), config.wild_photos, seed)
        everything = sorted(str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png"))

        def chosen(**options: Any) -> list[str]:
            return select_images(
                coarse.model,
                folder / "images",
                folder / "selected.txt",
                num_select=config.wild_digits,
                transform=wild.transform(digits),
                device=self.device,
                **options,
                progress=False,
            ).names()

        return {
            "random": random.Random(seed).sample(everything, config.wild_digits),
            "output": chosen(restart=True, attn_weight=0.0),
            "probe": chosen(),
        }

    def train_in_the_wild(self, arm: str, seed: int, teachers: Teachers, names: Sequence[str]) -> Trained:
        student = models.create(CLASSIFIER, seed).to(self.device)
        folder = self.wild_folder(seed, teachers.coarse) / "images"
        images = wild.load_images(folder, names, self.lab.digits.to(torch.device("cpu")))
        options = {} if arm == "probe" else {"relation_weight": 0.0}
        settings = {
            "task": "AttentionProbe",
            **options,
            "images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "teachers": [teachers.coarse.sha256],
            "model": CLASSIFIER,
            "seed": seed,
        }
        task = self.make_task("probe", student, teachers, **options)
        unlabelled = torch.zeros(len(names), dtype=torch.long, device=self.device)
        kept = {"digits_kept": float(sum(name.startswith("digits/") for name in names))}
        try:
            return self.lab.stage(
                f"student-{arm}-seed{seed}",
                task,
                student,
                settings,
                self.config.epochs_on(len(names)),
                data=(images.to(self.device), unlabelled),
                score=lambda history: {**self.scorer(student, teachers)(history), **kept},
            )
        finally:
            task.close()

    def scorer(self, student: nn.Module, teachers: Teachers) -> Callable[[list[Record]], dict[str, float]]:
        return lambda history: {
            "top1": self.lab.top1(student),
            "knn": self.lab.knn(student),
            **self.distances(student, teachers),
        }

    @torch.no_grad()
    def distances(self, student: nn.Module, teachers: Teachers) -> dict[str, float]:
        """Every method's attention loss between a student and its teachers, on the test images."""
        copy = models.create(CLASSIFIER, seed=0).to(self.device)
        copy.load_state_dict(student.state_dict())
        images = self.lab.digits.test_images
        rulers = {
            "head_kd": self.make_task("head_kd", copy, teachers, criterion=None),
            "ssta": self.make_task("ssta", copy, teachers, criterion=None, stop_epoch=None),
            "probe": self.make_task("probe", copy, teachers),
        }
        found = {}
        for name, task in rulers.items():
            result = task.eval()(images)
            parts = [value.item() for key, value in result.items() if key.endswith(("attn_loss", "relation_loss"))]
            found[f"{name}_distance"] = sum(parts) / len(parts)
        rulers["probe"].close()
        return found
