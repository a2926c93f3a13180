"""The experiment: in every seed teachers, then a student in each arm, all trained and scored in the same way."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd import files
from attnkd.capture.loading import image_config, image_transform
from attnkd.capture.models import num_classes
from attnkd.demo import data, runs
from attnkd.demo.arms import ARMS, RULERS, Arm
from attnkd.demo.config import Config
from attnkd.demo.runs import STUDENT, Runs, Say, Trained
from attnkd.demo.workers import Run
from attnkd.evaluation.features import batches, extract
from attnkd.evaluation.finetune import accuracy
from attnkd.evaluation.knn import knn
from attnkd.evaluation.linear import linear_probe
from attnkd.methods.head_importance import HeadImportance, head_importance, select_heads
from attnkd.methods.selection import select_images
from attnkd.training.config import Experiment, experiment
from attnkd.training.distributed import World
from attnkd.training.run import build


class Teachers(NamedTuple):
    """Who the students of a seed learn from, and what."""

    teacher: Trained
    assistant: Trained | None
    heads: dict[str, Any]
    """How they are chosen → whose → heads in every block."""
    wild: Path | None
    """The folder with the wild images, and beside it a list of those chosen for each way of choosing."""
    chosen: dict[str, list[str]]


@dataclass
class Outcome:
    """Everything that table, figures and summary are made of. ``students[arm][seed]``, ``before[seed]`` untrained scores."""

    config: Config
    digits: Path
    teachers: list[Teachers]
    students: dict[str, list[Trained]]
    before: list[dict[str, float]]

    def runs(self) -> list[Trained]:
        first = [run for each in self.teachers for run in (each.teacher, each.assistant) if run is not None]
        return first + [run for runs in self.students.values() for run in runs]


class Demo:
    """Trains teachers and all arms, and continues what ``directory`` already has of exactly this experiment."""

    def __init__(self, config: Config, directory: Path, device: torch.device, say: Say) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.runs = Runs(directory, device, say)
        self.digits = data.digits_folder(directory, config.train_size, config.test_size, config.labelled)

    def run(self, run: Run) -> Outcome:
        """All runs; those that do not depend on each other at the same time."""
        config, seeds = self.config, range(1, self.config.seeds + 1)
        names = ["teacher"] + ["assistant"] * config.assisted
        trained = run(Demo.train_teacher, [(name, seed) for seed in seeds for name in names])
        pairs = [trained[place : place + len(names)] for place in range(0, len(trained), len(names))]
        teachers = run(Demo.choose, [(seed, *pair) for seed, pair in zip(seeds, pairs, strict=True)])
        calls = [(arm, seed, each) for seed, each in zip(seeds, teachers, strict=True) for arm in config.arms]
        trained = run(Demo.train_student, calls)
        students = {arm: trained[place :: len(config.arms)] for place, arm in enumerate(config.arms)}
        before = [self.untrained(seed, each) for seed, each in zip(seeds, teachers, strict=True)]
        return Outcome(config, self.digits, teachers, students, before)

    def train_teacher(self, name: str, seed: int) -> Trained:
        epochs, arguments = self.config.teacher_epochs, {**runs.TEACHER, "patch_size": self.config.teacher_patch}
        if name == "assistant":
            return self.runs.contrast(f"{name}-seed{seed}", arguments, seed, self.digits, epochs, self.scores)

        def score(model: nn.Module) -> dict[str, float]:
            return {**self.scores(model), "train_top1": accuracy(model, self.images("train"))[0]}

        return self.runs.supervise(f"{name}-seed{seed}", arguments, seed, self.digits, epochs, score)

    def choose(self, seed: int, teacher: Trained, assistant: Trained | None = None) -> Teachers:
        """The heads and the images that a seed's students learn from, by how they are chosen."""
        if assistant is None:
            return Teachers(teacher, None, {}, None, {})
        folder = self.directory / f"wild-{teacher.folder.name}"
        chosen = self.choose_images(folder, seed, teacher)
        return Teachers(teacher, assistant, self.choose_heads(seed, teacher, assistant), folder, chosen)

    def choose_heads(self, seed: int, teacher: Trained, assistant: Trained) -> dict[str, dict[str, Any]]:
        """By importance on the images and labels that the teacher learned from: heads cost no further labels."""
        probe = linear_probe(*self.features(assistant.model), device=self.device)
        weight, bias = probe.weight.to(self.device), probe.bias.to(self.device)

        def search(whose: Trained, kind: str, **options: Any) -> HeadImportance:
            how = {"combinations": kind == "combinations", "progress": False, **options}
            path = self.directory / f"importance-{kind}-{whose.folder.name}.json"
            return head_importance(whose.model, self.images("train"), "all", path=path, **how)

        wanted, draw = STUDENT["num_heads"], random.Random(seed)
        alone = search(teacher, "heads").importance()
        probed = search(assistant, "combinations", classifier=lambda output: F.linear(output, weight, bias))
        return {
            "importance": {
                "head_kd": [sorted(importance.topk(wanted).indices.tolist()) for importance in alone],
                "teacher": search(teacher, "combinations").best(),
                "assistant": probed.best(),
            },
            "random": {
                "head_kd": [sorted(draw.sample(range(len(importance)), wanted)) for importance in alone],
                "teacher": select_heads("random", teacher.model, "all", seed=seed),
                "assistant": select_heads("random", assistant.model, "all", seed=seed + 1_000_003),
            },
            "average": {"teacher": "average", "assistant": "average"},
        }

    def choose_images(self, folder: Path, seed: int, teacher: Trained) -> dict[str, list[str]]:
        """Names of images of the seed's own wild folder; also as lists in ``folder``."""
        count, wild = self.config.wild_digits, folder / "images"
        data.wild_folder(wild, self.digits, count, self.config.wild_photos, seed)
        everything = sorted(str(path.relative_to(wild)) for path in wild.rglob("*.png"))
        transform = image_transform(image_config(teacher.model))

        def chosen(**options: Any) -> list[str]:
            how = {"device": self.device, "progress": False, **options}
            return select_images(teacher.model, wild, folder / "selected.txt", count, transform, **how).names()

        found = {
            "random": random.Random(seed).sample(everything, count),
            "V_n": chosen(restart=True, attn_weight=0.0),
            "V_a": chosen(output_weight=0.0),
            "V": chosen(),
        }
        for how, names in found.items():
            files.write_text(folder / f"{how}.txt", "".join(f"{name}\n" for name in names))
        return found

    def experiment(self, name: str, seed: int, teachers: Teachers, **options: Any) -> Experiment:
        """What `attnkd train` is told for a student of an arm, with ``options`` of the method beside the arm's own."""
        arm, config = ARMS[name], self.config
        epochs, options = config.epochs_of(arm), {**arm.options, **options}
        settings: dict[str, Any] = {"data": str(self.digits)}
        if arm.images is not None:
            assert teachers.wild is not None
            settings = {"data": str(teachers.wild / f"{arm.images}.txt"), "data_root": str(teachers.wild / "images")}
        elif arm.labels == "some":
            settings["train_split"] = "labelled"
        if arm.task == "attn_distill":
            weights = {"attn_weight": config.attn_weight, "temperature": config.temperature}
            options = {**weights, "resample_mode": config.resample_mode, **options}
        elif arm.task == "head_kd":
            options["teacher_heads"] = teachers.heads[arm.heads]["head_kd"]
        elif arm.task == "attention_probe":
            options["teacher_accuracy"] = teachers.teacher.scores["train_top1"] / 100
        elif arm.task == "ssta":
            assert teachers.assistant is not None
            heads = teachers.heads[arm.heads]
            own = {"teacher_heads": heads["teacher"], "assistant_heads": heads["assistant"]}
            options = {"blocks": "all", "stop_epoch": epochs / 3, **own, **options}  # as the paper: 100 of 300
            settings["assistant"] = str(teachers.assistant.weights)
        settings |= {"student": runs.MODEL, "student_kwargs": STUDENT, "pos_embed": "sincos"}
        settings |= {"train": runs.recipe(epochs), "run": runs.carrying(config.images(arm)), "seed": seed}
        return experiment(arm.task, options, output="", teacher=str(teachers.teacher.weights), **settings)

    def train_student(self, name: str, seed: int, teachers: Teachers) -> Trained:
        arm = ARMS[name]

        def score(student: nn.Module) -> dict[str, float]:
            listed = teachers.chosen.get(arm.images or "", [])
            kept = {"digits_kept": sum(image.startswith("digits/") for image in listed)} if listed else {}
            return {**self.scores(student), **kept, **self.distances(arm, seed, teachers, student)}

        return self.runs.distil(f"student-{name}-seed{seed}", self.experiment(name, seed, teachers), score)

    def untrained(self, seed: int, teachers: Teachers) -> dict[str, float]:
        """Distances of a student to its teachers' attention before training."""
        groups = {arm.group: arm for arm in (ARMS[name] for name in self.config.arms)}
        return {key: value for arm in groups.values() for key, value in self.distances(arm, seed, teachers).items()}

    @torch.no_grad()
    def distances(self, arm: Arm, seed: int, teachers: Teachers, student: nn.Module | None = None) -> dict[str, float]:
        """The attention losses, on the test images, that an arm is compared by, between a trained student, or the untrained one,
        and its teachers."""
        found = {}
        images, labels = (torch.cat(parts).to(self.device) for parts in zip(*self.images("validation"), strict=True))
        for name in RULERS[arm.group]:
            options = {"stop_epoch": None} if ARMS[name].task == "ssta" else {}
            task: Any = build(self.experiment(name, seed, teachers, **options), World(self.device)).task
            if student is not None:
                task.student.load_state_dict(student.state_dict())
            result: dict[str, Tensor] = task.eval()(images, labels)
            task.untap()
            parts = [value.item() for key, value in result.items() if key.endswith(("attn_loss", "relation_loss"))]
            found[f"{name}_distance"] = sum(parts) / len(parts)
        return found

    @functools.cache  # noqa: B019  there is one for each process
    def images(self, split: str) -> list[Any]:
        """Batches (images, labels) of a split, as all the models want them."""
        transform = image_transform(image_config(runs.new_classifier(STUDENT, 0)))
        return list(batches(data.open_digits(self.digits, split).images, transform, 256, 0))

    def features(self, model: nn.Module) -> tuple[Any, Any]:
        """Of the training and the test images."""
        return tuple(extract(model, self.images(split)) for split in ("train", "validation"))  # type: ignore[return-value]

    def scores(self, model: nn.Module) -> dict[str, float]:
        """In percent: of the features, and of the classifier if there is one."""
        train, test = self.features(model)
        found = {
            "knn": knn(train, test, ks=(20,), device=self.device)[20]["top1"],  # as `attnkd eval knn --k 20`
            "linear_probe": linear_probe(train, test, device=self.device).top1,  # as `attnkd eval linear`
        }
        if num_classes(model):
            found["top1"] = accuracy(model, self.images("validation"))[0]
        return found
