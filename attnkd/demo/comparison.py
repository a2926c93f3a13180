"""All four methods on the digits, and what they are compared with: `attnkd demo --all`."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.demo import models, wild
from attnkd.demo.arms import ARMS, RULERS, Arm
from attnkd.demo.contrastive import SimCLR
from attnkd.demo.data import RandomAffine
from attnkd.demo.experiment import Config, Experiment, batches
from attnkd.demo.stages import Listener, Trained
from attnkd.demo.training import BATCH_SIZE, Record
from attnkd.demo.workers import Run
from attnkd.evaluation.linear import linear_probe
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_importance import HeadImportance, head_importance, select_heads
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.selection import select_images
from attnkd.methods.ssta import SSTA

CLASSIFIER = {**models.STUDENT, "num_classes": 10}
TEACHER = models.COARSE_TEACHER
ASSISTANT = {**TEACHER, "num_classes": 0}


@dataclass(frozen=True)
class ComparisonConfig(Config):
    """Fewer training images than in the demo, and students that see the labels of a third of them.

    seeds: each has its own teachers and one student in each arm.
    labelled: training images whose labels the students of the supervised arms see.
    wild_digits, wild_photos: images of the folder that Attention Probe chooses ``wild_digits`` from.
    """

    epochs: int = 40
    teacher_epochs: int = 40
    seeds: int = 5
    train_size: int = 597
    test_size: int = 900
    labelled: int = 200
    wild_digits: int = 300
    wild_photos: int = 700

    def epochs_on(self, images: int) -> int:
        """As many steps on that many images as ``epochs`` are on all training images."""
        return max(1, round(self.epochs * (self.train_size // BATCH_SIZE) / (images // BATCH_SIZE)))

    def images(self, arm: Arm) -> int:
        """How many images the students of an arm learn from."""
        if arm.images is not None:
            return self.wild_digits
        return self.labelled if arm.labels == "some" else self.train_size


QUICK: dict[str, Any] = {
    "epochs": 2,
    "teacher_epochs": 2,
    "seeds": 2,
    "train_size": 320,
    "test_size": 200,
    "labelled": 128,
}
QUICK |= {"wild_digits": 128, "wild_photos": 192}


class Teachers(NamedTuple):
    """Who the students of a seed learn from, and what they learn from them."""

    teacher: Trained
    assistant: Trained
    heads: dict[str, Any]
    """How they are chosen → whose → heads in every block."""
    images: dict[str, list[str]]
    """How they are chosen → names."""


@dataclass
class Outcome:
    """Everything that table, figure and JSON are made of. ``students[arm][seed]``, ``before[seed]`` untrained scores."""

    config: ComparisonConfig
    teachers: list[Teachers]
    students: dict[str, list[Trained]]
    before: list[dict[str, float]]

    def stages(self) -> list[Trained]:
        return [stage for seed in self.teachers for stage in (seed.teacher, seed.assistant)] + [
            run for runs in self.students.values() for run in runs
        ]


def count_epochs(config: ComparisonConfig) -> int:
    """Epochs of all stages together."""
    students = sum(config.epochs_on(config.images(arm)) for arm in ARMS.values())
    return config.seeds * (2 * config.teacher_epochs + students)


class AllMethods:
    """Trains teachers and all arms, and continues what ``directory`` already has of exactly this comparison."""

    def __init__(self, config: ComparisonConfig, directory: Path, device: torch.device, listener: Listener) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.lab = Experiment(config, directory, device, listener)
        self.spare = self.lab.digits.spare_images[: config.wild_digits]
        if len(self.spare) < config.wild_digits:
            raise ValueError(
                f"train_size, test_size: expected to leave {config.wild_digits} digits over, leave {len(self.spare)}"
            )

    def run(self, run: Run) -> Outcome:
        """All stages; those that do not depend on each other at the same time."""
        seeds = range(1, self.config.seeds + 1)
        trained = run(AllMethods.train_teacher, [(name, seed) for seed in seeds for name in ("teacher", "assistant")])
        pairs = list(zip(trained[::2], trained[1::2], strict=True))
        chosen = run(AllMethods.choose, [(seed, *pair) for seed, pair in zip(seeds, pairs, strict=True)])
        teachers = [Teachers(*pair, *theirs) for pair, theirs in zip(pairs, chosen, strict=True)]
        calls = [(arm, seed, each) for seed, each in zip(seeds, teachers, strict=True) for arm in ARMS]
        trained = run(AllMethods.train_student, calls)
        students = {arm: trained[place :: len(ARMS)] for place, arm in enumerate(ARMS)}
        before = []
        for seed, each in zip(seeds, teachers, strict=True):
            found: dict[str, float] = {}
            for arm in ("pa", "labels", "probe"):
                found |= self.distances(ARMS[arm], self.student(ARMS[arm], seed), each)
            before.append(found)
        return Outcome(self.config, teachers, students, before)

    def train_teacher(self, name: str, seed: int) -> Trained:
        if name == "assistant":
            return self.train_assistant(seed)
        return self.lab.train_teacher(f"teacher-seed{seed}", TEACHER, seed)

    def train_assistant(self, seed: int) -> Trained:
        """SSTA's self-supervised model; stronger augmentation than the others', which is all that it learns from."""
        lab = self.lab
        model = models.create(ASSISTANT, seed).to(self.device)
        augment = RandomAffine(lab.digits.background, degrees=15, scale=0.15, shear=0.2, shift=0.15)
        settings = {
            "task": "SimCLR",
            "views": [round(limit, 6) for limit in augment.limits.tolist()],
            "model": ASSISTANT,
            "seed": seed,
        }
        # The task makes two views itself, so the loop must not augment.
        epochs = self.config.teacher_epochs
        return lab.stage(f"assistant-seed{seed}", SimCLR(model, augment), model, settings, epochs, augment=None)

    def choose(
        self, seed: int, teacher: Trained, assistant: Trained
    ) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
        """The heads and the images that a seed's students learn from, by how they are chosen."""
        return self.choose_heads(seed, teacher, assistant), self.choose_images(seed, teacher)

    def choose_heads(self, seed: int, teacher: Trained, assistant: Trained) -> dict[str, dict[str, Any]]:
        """By importance on the images and labels that the teacher learned from: heads cost no further labels."""
        digits = self.lab.digits
        probe = linear_probe(*self.lab.features(assistant.model), device=self.device)
        weight, bias = probe.weight.to(self.device), probe.bias.to(self.device)

        def search(whose: Trained, combinations: bool, **options: Any) -> HeadImportance:
            kind = "combinations" if combinations else "heads"
            path = self.directory / f"importance-{kind}-{whose.sha256[:10]}.json"
            data = list(batches(digits.train_images, digits.train_labels))
            return head_importance(
                whose.model, data, "all", combinations=combinations, path=path, progress=False, **options
            )

        alone = search(teacher, combinations=False).importance()
        wanted = models.describe(models.create(CLASSIFIER, 0))["heads"]
        draw = random.Random(seed)
        return {
            "importance": {
                "head_kd": [sorted(importance.topk(wanted).indices.tolist()) for importance in alone],
                "teacher": search(teacher, combinations=True).best(),
                "assistant": search(
                    assistant, combinations=True, classifier=lambda output: F.linear(output, weight, bias)
                ).best(),
            },
            "random": {
                "head_kd": [sorted(draw.sample(range(len(importance)), wanted)) for importance in alone],
                "teacher": select_heads("random", teacher.model, "all", seed=seed),
                "assistant": select_heads("random", assistant.model, "all", seed=seed + 1_000_003),
            },
            "average": {"teacher": "average", "assistant": "average"},
        }

    def wild_folder(self, seed: int, teacher: Trained) -> Path:
        return self.directory / f"wild-{teacher.sha256[:10]}-seed{seed}"

    def choose_images(self, seed: int, teacher: Trained) -> dict[str, list[str]]:
        """Names of images of the seed's own wild folder."""
        config, digits = self.config, self.lab.digits.to(torch.device("cpu"))
        folder = self.wild_folder(seed, teacher)
        wild.make_wild_folder(folder / "images", digits, self.spare.cpu(), config.wild_photos, seed)
        everything = sorted(str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png"))

        def chosen(**options: Any) -> list[str]:
            return select_images(
                teacher.model,
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
            "V_n": chosen(restart=True, attn_weight=0.0),
            "V_a": chosen(output_weight=0.0),
            "V": chosen(),
        }

    def make_task(self, arm: Arm, student: nn.Module, teachers: Teachers, **options: Any) -> Any:
        """The training task of an arm, with ``options`` beside the arm's own."""
        teacher, heads = teachers.teacher, teachers.heads[arm.heads]
        options = {"verbose": False, **arm.options, **options}
        if arm.task == "labels":
            return ClassificationTask(student, device=self.device, **options)
        if arm.task == "attn_distill":
            weights = {"attn_weight": self.config.attn_weight, "temperature": self.config.temperature}
            return AttnDistill(student, teacher.model, **{**weights, **options})
        if arm.task == "head_kd":
            return HeadKD(student, teacher.model, teacher_heads=heads["head_kd"], **options)
        if arm.task == "probe":
            return AttentionProbe(student, teacher.model, teacher.scores["train_top1"] / 100, **options)
        return SSTA(
            student,
            teacher.model,
            teachers.assistant.model,
            blocks="all",
            teacher_heads=heads["teacher"],
            assistant_heads=heads["assistant"],
            **options,
        )

    def student(self, arm: Arm, seed: int) -> nn.Module:
        return models.create(CLASSIFIER if arm.classifies else models.STUDENT, seed).to(self.device)

    def train_student(self, name: str, seed: int, teachers: Teachers) -> Trained:
        arm, config, lab = ARMS[name], self.config, self.lab
        student = self.student(arm, seed)
        images, targets = self.data(arm, seed, teachers)
        epochs = config.epochs_on(len(images))
        options = {"stop_epoch": epochs / 3} if arm.task == "ssta" else {}  # as the paper: 100 of 300
        task = self.make_task(arm, student, teachers, **options)
        settings = {"arm": name, "task": arm.task, **arm.options, **options, "labels": arm.labels, "seed": seed}
        settings |= {"images": _digest(images), "model": CLASSIFIER if arm.classifies else models.STUDENT}
        if arm.task == "attn_distill":
            settings |= {"attn_weight": config.attn_weight, "temperature": config.temperature, **arm.options}
        if arm.taught:
            settings |= {"teachers": [teachers.teacher.sha256, teachers.assistant.sha256]}
            settings |= {"heads": teachers.heads[arm.heads]}
        listed = teachers.images.get(arm.images or "", [])

        def score(history: list[Record]) -> dict[str, float]:
            scores = lab.scores(student, history)
            if arm.classifies:
                scores["top1"] = lab.top1(student)
            if listed:
                scores["digits_kept"] = sum(image.startswith("digits/") for image in listed)
            return {**scores, **self.distances(arm, student, teachers)}

        stage = f"student-{name}-seed{seed}"
        trained = lab.stage(stage, task, student, settings, epochs, data=(images, targets), score=score)
        if arm.taught:
            task.untap()
        return trained

    def data(self, arm: Arm, seed: int, teachers: Teachers) -> tuple[Tensor, Tensor]:
        """Images [n, 1, H, W] and labels [n] that an arm's students learn from; zeros where there are no labels."""
        digits = self.lab.digits
        if arm.images is None:
            count = self.config.images(arm)
            return digits.train_images[:count], digits.train_labels[:count]
        folder = self.wild_folder(seed, teachers.teacher) / "images"
        images = wild.load_images(folder, teachers.images[arm.images], digits.to(torch.device("cpu")))
        return images, torch.zeros(len(images), dtype=torch.long)

    @torch.no_grad()
    def distances(self, arm: Arm, student: nn.Module, teachers: Teachers) -> dict[str, float]:
        """The attention losses between a student and its teachers, on the test images, that its arm is compared by."""
        found = {}
        for name in RULERS[arm.group]:
            copy = self.student(arm, seed=0)
            copy.load_state_dict(student.state_dict())
            options: dict[str, Any] = {"stop_epoch": None} if name == "ssta" else {}
            if name in ("head_kd", "ssta"):
                options["criterion"] = None
            task = self.make_task(ARMS[name], copy, teachers, **options)
            result = task.eval()(self.lab.digits.test_images)
            task.untap()
            parts = [value.item() for key, value in result.items() if key.endswith(("attn_loss", "relation_loss"))]
            found[f"{name}_distance"] = sum(parts) / len(parts)
        return found


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
