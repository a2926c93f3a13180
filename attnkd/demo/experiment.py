"""The experiment: a teacher, then students with fewer heads and fewer patches, without and with attention guidance."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from attnkd import __version__
from attnkd.demo import models
from attnkd.demo.data import Digits, RandomAffine, load_digits
from attnkd.demo.evaluate import attention_kl_per_image, cls_attention, features, knn_top1, linear_probe_top1
from attnkd.demo.training import Recipe, Record, load_state, train
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
    seeds: int = 5
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


class Listener(Protocol):
    """Is told how the run goes."""

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        """``done`` of ``epochs`` were trained before; ``note`` says what is reused, or why not."""

    def epoch(self, record: Record) -> None: ...
    def end(self, name: str, scores: Mapping[str, float]) -> None: ...


@dataclass
class Trained:
    """A finished stage: a model, how it came about, where it is kept and what it scores on the test images."""

    model: nn.Module
    history: list[Record]
    checkpoint: Path
    scores: dict[str, float]


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
    """Runs all stages one after the other and continues what ``directory`` already has of exactly this experiment."""

    def __init__(self, config: Config, directory: Path, device: torch.device, listener: Listener) -> None:
        self.config, self.directory, self.device, self.listener = config, directory, device, listener
        self.digits = load_digits(config.train_size, config.test_size).to(device)
        self.augment = RandomAffine(self.digits.background)
        side = models.STUDENT["img_size"] // models.STUDENT["patch_size"]
        self.student_grid = (side, side)

    def run(self) -> Outcome:
        teacher = self.train_teacher()
        images, config = self.digits.test_images, self.config
        target = cls_attention(teacher.model, images, config.temperature, self.student_grid, config.resample_mode)
        students: dict[str, list[Trained]] = {arm: [] for arm in ARMS}
        for seed in range(1, self.config.seeds + 1):
            for arm in ARMS:
                students[arm].append(self.train_student(arm, seed, teacher, target))
        return Outcome(self.config, self.digits, target, teacher, students)

    def train_teacher(self) -> Trained:
        model = models.create(models.TEACHER, seed=0).to(self.device)
        method = ClassificationTask(model, device=self.device, verbose=False)
        settings = {"task": "classification", "model": models.TEACHER, "seed": 0}
        return self._stage(
            "teacher", method, model, settings, Recipe(self.config.teacher_epochs), lambda: {"top1": self.top1(model)}
        )

    def train_student(self, arm: str, seed: int, teacher: Trained, target: Tensor) -> Trained:
        config = self.config
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
            "teacher": {"sha256": hashlib.sha256(teacher.checkpoint.read_bytes()).hexdigest()},
            "model": models.STUDENT,
            "seed": seed,
        }

        def evaluate() -> Record:
            rows = cls_attention(student, self.digits.test_images, config.temperature)
            return {"knn": self.knn(student), "kl": attention_kl_per_image(target, rows).mean().item()}

        return self._stage(f"student-{arm}-seed{seed}", method, student, settings, Recipe(config.epochs), evaluate)

    def _stage(
        self,
        name: str,
        method: nn.Module,
        model: nn.Module,
        settings: dict[str, Any],
        recipe: Recipe,
        evaluate: Callable[[], Record],
    ) -> Trained:
        everything = {**settings, "recipe": asdict(recipe), **self._circumstances()}
        place = StageDirectory(self.directory, name, everything)
        done, note = place.situation(recipe.epochs)
        self.listener.begin(name, recipe.epochs, done, note)
        history = train(
            method,
            self.digits.train_images,
            self.digits.train_labels,
            recipe,
            seed=settings["seed"],
            state_path=place.state,
            fingerprint=place.fingerprint,
            augment=self.augment,
            evaluate=evaluate,
            on_epoch=self.listener.epoch,
        )
        models.save(model, settings["model"], place.weights)
        scores = {key: value for key, value in history[-1].items() if key in ("top1", "kl")}
        scores |= {"knn": self.knn(model), "linear_probe": linear_probe_top1(*self._features(model))}
        self.listener.end(name, scores)
        return Trained(model, history, place.weights, scores)

    def _circumstances(self) -> dict[str, Any]:
        """What a result depends on besides a stage's own settings."""
        packages = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
        return {
            "digits": {"train": self.config.train_size, "test": self.config.test_size},
            "augment": [round(limit, 6) for limit in self.augment.limits.tolist()],
            "device": self.device.type,
            "versions": {"attnkd": __version__, **packages},
        }

    def knn(self, model: nn.Module) -> float:
        return knn_top1(*self._features(model))

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        model.eval()
        output = torch.cat([model(batch) for batch in self.digits.test_images.split(256)])
        return 100 * (output.argmax(1) == self.digits.test_labels).float().mean().item()

    def _features(self, model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digits = self.digits
        return (
            features(model, digits.train_images),
            digits.train_labels,
            features(model, digits.test_images),
            digits.test_labels,
        )


class StageDirectory:
    """Where one stage of the experiment is kept: named after everything that determines its result.

    Changed settings lead to another directory, so nothing is reused by mistake and nothing is overwritten.
    """

    def __init__(self, parent: Path, name: str, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.parent, self.name, self.settings = parent, name, settings
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:10]
        self.path = parent / f"{name}-{self.fingerprint}"
        self.state, self.weights = self.path / "state.pt", self.path / "model.safetensors"

    def situation(self, epochs: int) -> tuple[int, str]:
        """Epochs already done here, and in words what will be reused. Makes the directory."""
        state = load_state(self.state, self.fingerprint)
        if state is not None:
            done = len(state["history"]) - 1
            return done, "finished before, reused" if done >= epochs else f"continued after epoch {done} of {epochs}"
        others = sorted(self.parent.glob(f"{self.name}-*/settings.json"), key=lambda path: path.stat().st_mtime)
        others = [path for path in others if path.parent != self.path]
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "settings.json").write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        if not others:
            return 0, ""
        changed = "; ".join(_differences(json.loads(others[-1].read_text()), self.settings))
        return 0, f"trained anew, {others[-1].parent.name} has other settings ({changed})"


def _differences(old: Any, new: Any, path: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(old) != json.dumps(new):
        yield f"{path} {old}, now {new}"
