"""A run from its settings to its folder: train, or continue what is there.

The folder holds config.yaml (all settings), log.jsonl, checkpoint.safetensors (the state), and at the end the student:
model.safetensors with, in model.json, its name and arguments.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attnkd import files
from attnkd.capture.loading import image_transform
from attnkd.capture.models import input_channels
from attnkd.methods.task import DistillTask
from attnkd.training import checkpoint, config, models, sources, teacher_cache
from attnkd.training.config import Experiment
from attnkd.training.data import AugmentedImages, Mixing
from attnkd.training.distributed import World, joined
from attnkd.training.figures import IMAGES, Figures
from attnkd.training.loop import Trainer, save_to
from attnkd.training.profile import Profile
from attnkd.training.report import Report
from attnkd.training.sharding import whole
from attnkd.training.trackers import Tracker, trackers
from attnkd.training.watchers import Watcher, Watchers

WEIGHTS, DESCRIPTION, CONFIG = "model.safetensors", "model.json", "config.yaml"


class Ended(NamedTuple):
    """How a call of :func:`train` ended."""

    finished: bool
    """False: it was asked to stop, and saved its state."""
    steps: int
    total: int
    nonfinite: int
    folder: Path


def train(
    experiment: Experiment,
    device: torch.device,
    say: Callable[[str], None] = print,
    watcher: Watcher | None = None,
) -> Ended:
    """Train, or continue a run that was stopped or killed, to its end or to a SIGTERM or Ctrl-C.

    Args:
        experiment: all settings.
        device: where to compute; under torchrun each process takes the GPU of its local rank.
        say: prints a line, on the first process alone.
        watcher: is told how the run goes, in place of the screen.

    Raises:
        ValueError: settings that cannot be honoured, or that are not those of the run in the folder.
        RuntimeError: another process at work in the folder, an unreadable checkpoint, a diverged run.
    """
    with opened(Path(experiment.config.output), device) as run:
        say = say if run.world.first else lambda line: None
        settings = experiment.settings()
        state = run.earlier(settings, experiment.config.resume)
        trainer, student, description = prepare(experiment, run.world, say)
        if run.world.first:
            files.write_text(run.folder / CONFIG, config.as_yaml(settings))
        report = watcher
        if run.world.first and (state is None or state["done"] < trainer.steps):
            report = reported(experiment, run, trainer, description, say, watcher)
        finished = run.carry_out(trainer, state, settings, say, report)
        if finished:
            averaged: Any = trainer.averaged
            save_student(run.folder, student if averaged is None else averaged.model, description, run.world)
    return Ended(finished, trainer.done, trainer.steps, trainer.tally.nonfinite, run.folder)


class Run(NamedTuple):
    """A folder in which this process, with the others of its world, may work."""

    folder: Path
    world: World
    stop: _Stop

    def earlier(self, settings: dict[str, Any], resume: str = "auto") -> dict[str, Any] | None:
        """The state of a run in the folder, which must have these settings."""
        path = self.folder / checkpoint.NAME
        if resume == "never" and path.exists():
            raise ValueError(
                f"resume: 'never', but {self.folder} has a run; choose another output, or continue with resume=auto"
            )
        state = checkpoint.load(path)
        if state is None:
            return None
        changed = config.differences(state["settings"], settings)
        if changed:
            raise ValueError(
                f"output: {self.folder} has a run with other settings ({'; '.join(changed)}); give it those, or choose another "
                "output"
            )
        return state

    def log(self, watcher: Watcher | None = None, told: Sequence[Tracker] = ()) -> Watcher:
        """The log in the folder and in ``told``, beside the screen or ``watcher``."""
        report = Report(self.folder, self.world.device, told, shown=watcher is None)
        return report if watcher is None else Watchers(report, watcher)

    def carry_out(
        self,
        trainer: Trainer,
        state: dict[str, Any] | None,
        settings: dict[str, Any],
        say: Callable[[str], None] = lambda line: None,
        report: Watcher | None = None,
    ) -> bool:
        """Train from ``state`` on, to the end or to a SIGTERM.

        Args:
            report: in place of the progress bar and the log alone.

        Returns:
            Whether the end was reached.

        Raises:
            KeyboardInterrupt: Ctrl-C came, and the state is saved.
        """
        if state is not None:
            trainer.load(state)
        most, least = self.world.largest([trainer.done, -trainer.done])
        if most != -least:
            raise RuntimeError(
                f"{self.folder}: the processes do not see the same checkpoint; it must be on a shared file system"
            )
        if trainer.done:
            say(f"{self.folder}: continues after step {trainer.done} of {trainer.steps}")
        with ExitStack() as stack:
            if self.world.first and trainer.done < trainer.steps:
                report = report or self.log()
                if trainer.carrying.profile is not None:
                    trainer.profile = Profile(trainer.task, self.world.device, trainer.carrying.profile, self.folder)
                    stack.callback(trainer.profile.close)
            if report is not None:
                stack.callback(report.close)
            finished = trainer.run(save_to(self.folder, settings), report, lambda: self.stop.signal is not None)
        if trainer.profile is not None:
            say(str(trainer.profile))
        if not finished and self.stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        return finished


@contextmanager
def opened(folder: Path, device: torch.device) -> Iterator[Run]:
    """Make the folder of a run and keep other runs out of it, see SIGTERM and Ctrl-C, and join the other processes."""
    with ExitStack() as stack:
        stop = stack.enter_context(asked_to_stop())
        world = stack.enter_context(joined(device))
        if world.first:
            files.make_folder("output", folder)
            stack.enter_context(files.locked(folder / ".lock"))
        yield Run(folder, world, stop)


def prepare(
    experiment: Experiment, world: World, say: Callable[[str], None] = lambda line: None
) -> tuple[Trainer, nn.Module, dict[str, Any]]:
    """The trainer of an experiment, the student in it, and the student's name and arguments."""
    made, settings = build(experiment, world, say), experiment.config
    images, count, recipe = made.images, len(made.images.images), settings.train
    if settings.teacher_cache is not None:
        teacher_cache.check_still(experiment.method, recipe)
        description = teacher_cache.describe(made.task, count, made.inputs.size, settings.run.precision)
        cache = teacher_cache.TeacherCache(Path(settings.teacher_cache), description)
        cache.check(images, count)
        images = AugmentedImages(images.images, images.transform, images.seed, cache.row)
    trainer = Trainer(made.task, images, count, recipe, world, settings.run, seed=settings.seed, mix=made.mix)
    sums = {role: models.checksum(teacher.tap.model) for role, teacher in made.task.teachers.items()}
    trainer.seen |= {role: f"weights of checksum {digest[:12]}" for role, digest in sums.items()}
    return trainer, made.task.student, made.description


class Built(NamedTuple):
    """The parts of a run."""

    task: DistillTask
    description: dict[str, Any]
    """The student's name and arguments."""
    images: AugmentedImages
    inputs: models.Inputs
    mix: Mixing | None


def build(experiment: Experiment, world: World, say: Callable[[str], None] = lambda line: None) -> Built:
    """Models, training task and images of an experiment."""
    settings = experiment.config
    teachers = models.build_teachers(experiment)
    channels = input_channels(next(iter(teachers.values()))) or 3
    source = open_split(experiment, settings.train_split, "L" if channels == 1 else "RGB")
    if settings.subset is not None:
        source = sources.subset(source, settings.subset)
    if models.has_class_loss(experiment.method) and not source.labelled:
        raise ValueError(f"data: {experiment.method} has a class loss, but {settings.data} has no labels")
    inputs = models.inputs_of(experiment, teachers, source, channels)
    arguments = models.student_arguments(experiment, teachers, inputs, source.num_classes)
    student = models.build_student(experiment, arguments, inputs)
    description = models.described(settings.student, student, arguments, inputs, settings.train)
    task = models.build_task(experiment, student, teachers, inputs, world.device, verbose=world.first)
    recipe = settings.train
    if getattr(task, "criterion", None) is not None:
        _check_labels(source, arguments["num_classes"], experiment)
    elif recipe.mixup or recipe.cutmix:
        raise ValueError(
            f"train.mixup, train.cutmix: {experiment.method} has no class loss, and its labels are not used"
        )
    mix = None
    if recipe.mixup or recipe.cutmix:
        mix = Mixing(recipe.mixup, recipe.cutmix, recipe.label_smoothing, arguments["num_classes"])
    say(
        f"{experiment.method}: {settings.student} learns from "
        f"{' and '.join(getattr(settings, role) for role in teachers)} on {len(source.images)} images of "
        f"{settings.data}, {inputs.size[0]}x{inputs.size[1]} pixels"
    )
    transform = recipe.transform_for(inputs.size, inputs.mean, inputs.std)
    images = AugmentedImages(source.images, transform, settings.seed)
    return Built(task, description, images, inputs, mix)


def reported(
    experiment: Experiment,
    run: Run,
    trainer: Trainer,
    description: dict[str, Any],
    say: Callable[[str], None],
    watcher: Watcher | None = None,
) -> Watcher:
    """All who look on: the log, the screen or ``watcher``, and what the experiment asks for."""
    settings = experiment.config
    told = trackers(run.folder, experiment.settings(), settings.tensorboard, settings.wandb)
    watchers = [run.log(watcher, told)]
    if settings.figures is not None:
        overlay, source = description["pretrained_cfg_overlay"], trainer.images.images
        size, stats = trainer.images[0, 0][0].shape, (tuple(overlay["mean"]), tuple(overlay["std"]))
        plain = image_transform(
            {"input_size": tuple(size), "interpolation": "bicubic", "crop_pct": 1.0}
            | {"mean": (0.0,) * size[0], "std": (1.0,) * size[0]}
        )
        pictures = torch.stack([plain(source[index][0]) for index in range(min(IMAGES, len(source)))])
        watchers.append(Figures(run.folder, settings.figures, trainer.task, pictures, *stats, say))
    return Watchers(*watchers)


def _check_labels(source: sources.Source, num_classes: int, experiment: Experiment) -> None:
    if source.num_classes is not None and source.num_classes > num_classes:
        raise ValueError(f"num_classes: expected at least the data set's {source.num_classes}, got {num_classes}")


def open_split(experiment: Experiment, split: str, mode: str) -> sources.Source:
    """Images and labels of a split of the experiment's data set."""
    settings = experiment.config
    return sources.open_source(
        settings.data, split, root=settings.data_root, download=settings.download, mode=mode
    )  # fmt: skip


def save_student(folder: Path, student: nn.Module, description: dict[str, Any], world: World | None = None) -> None:
    """The student as `attnkd maps`, `attnkd select` and other runs take it.

    Args:
        world: all its processes call this, and the first one writes; None is this process alone.
    """
    from safetensors.torch import save as to_bytes

    first = world is None or world.first
    state = whole(student.state_dict(), first)
    if not first:
        return
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    files.write_json(folder / DESCRIPTION, description)
    files.write_bytes(folder / WEIGHTS, to_bytes(weights, metadata={"format": "pt"}))


class _Stop:
    signal: int | None = None


@contextmanager
def asked_to_stop() -> Iterator[_Stop]:
    """While open, SIGTERM and Ctrl-C are kept for the loop to see, which ends after the step at work. A second one is not."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def remember(number: int, frame: Any) -> None:
        stop.signal = number
        signal.signal(number, before[number])
        if getattr(before[number], "__qualname__", None) == remember.__qualname__:  # of a block around this one
            before[number](number, frame)

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
