"""The training loop: continues exactly where it was stopped or killed, on one process or many.

All that a step does is a function of the state before it, the seed and the step's number: learning rate and scheduled weights
are set from the number, images and augmentation come from it (:mod:`attnkd.training.data`), and the random generators are set
anew in every step. So the checkpoint is weights, optimizer and a few numbers. With the same software and number of threads
a run on the CPU that was killed and continued ends with the same bits as one that was not; on a GPU not even two whole runs
need to.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.checkpointing import recompute_blocks
from attnkd.capture.models import unwrap_model
from attnkd.methods.recipes import Recipe
from attnkd.methods.student_teacher import TrainedStudent
from attnkd.training import checkpoint, sharding
from attnkd.training.carrying import PRECISIONS, Carrying
from attnkd.training.data import AugmentedImages, Plan, Steps, drawn, loader, reseed
from attnkd.training.distributed import World
from attnkd.training.profile import STEP, Profile
from attnkd.training.watchers import Watcher

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DivergedError(RuntimeError):
    """Too many steps in a row were not finite; the message says what was and what to try."""


@dataclass
class Tally:
    """What the log's next record is made of."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    nonfinite: int = 0
    """Steps left out so far, in the whole run."""
    in_row: int = 0

    def add(self, parts: Mapping[str, float]) -> None:
        self.steps += 1
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The means so far; the sums start again."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


class Trainer:
    """Trains a task in place.

    Args:
        task: ``forward(images [B, C, H, W], targets [B])`` → dict with the scalar ``loss`` and its parts, named ..._loss. All
            losses are means over images. A ``timm.task.TrainingTask``, or any module.
        images: the training set; what comes beside an image and its label is the task's third argument.
        count: number of images in it.
        recipe: the numbers of the run.
        world: this process and the others; the task is on its device.
        carrying: how the run is carried out.
        seed: of the order, the augmentation and everything random in a step.
        mix: mixes the images of a part and their targets.
        layer_decay: factor on the learning rate of each layer against that of the next one; the task trains a timm model alone.
    """

    def __init__(
        self,
        task: Any,
        images: AugmentedImages,
        count: int,
        recipe: Recipe,
        world: World,
        carrying: Carrying = Carrying(),  # noqa: B008  it is frozen
        *,
        seed: int = 0,
        mix: Mix | None = None,
        layer_decay: float | None = None,
    ) -> None:
        self.task = task
        self.images, self.recipe, self.world, self.carrying, self.seed, self.mix = (
            images, recipe, world, carrying, seed, mix
        )  # fmt: skip
        self.plan = Plan(count, recipe.batch_size, recipe.drop_last, seed, world.rank, world.size, carrying.at_once)
        self.steps, self.done, self.tally = recipe.epochs * self.plan.steps_per_epoch, 0, Tally()
        if recipe.ema_decay is not None:
            self.task.setup_ema(
                decay=recipe.ema_decay, foreach=not carrying.shard
            )  # shares and whole buffers do not mix
        if carrying.checkpointing:
            trained = self.trained
            recompute_blocks(
                trained.model if isinstance(trained, TrainedStudent) else trained, "run.checkpointing: student"
            )
        if carrying.shard:
            sharding.shard(task, world)
        self.optimizer = recipe.optimizer(task, layer_decay=layer_decay)
        self.scheduler = recipe.scheduler(self.optimizer, self.plan.steps_per_epoch)
        if carrying.compile:
            self.task.compile()
        if world.size > 1 and not carrying.shard:
            self.task.prepare_distributed(device_ids=[world.device.index] if world.device.type == "cuda" else None)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=carrying.precision == "fp16")
        self.profile: Profile | None = None
        self.seen = {"data": f"{count} images"}
        """By argument, what must be the same where the run continues, though its name may be."""

    @property
    def trained(self) -> nn.Module:
        """What trains, without wrappers."""
        return unwrap_model(getattr(self.task, "trainable_module", self.task))

    @property
    def averaged(self) -> nn.Module | None:
        """Its moving average, if there is one."""
        ema = getattr(self.task, "trainable_module_ema", None)
        return None if ema is None else unwrap_model(ema.module)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on. With ``shard`` all processes must call it; what the first one gets is whole."""
        tally = self.tally
        state = {
            "done": self.done,
            "seen": self.seen,
            "tally": [tally.sums, tally.steps, tally.nonfinite, tally.in_row],
            "trained": self.trained.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return sharding.whole(state, self.world.first) if self.carrying.shard else state

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`.

        Raises:
            ValueError: other images or teachers than those that the run began with.
        """
        for name, now in self.seen.items():
            if (before := state.get("seen", {}).get(name, now)) != now:
                raise ValueError(
                    f"{name}: the run began with {before}, got {now}; restore it, or choose another output"
                )
        self.done, self.tally = state["done"], Tally(*state["tally"])
        for name, module in (("trained", self.trained), ("averaged", self.averaged)):
            if module is not None:
                module.load_state_dict(sharding.shares(state[name], module.state_dict()))
        self.optimizer.load_state_dict(sharding.optimizer_shares(state["optimizer"], self.parameters))
        self.scaler.load_state_dict(state["scaler"])

    def run(
        self,
        save: Callable[[dict[str, Any]], None] | None = None,
        watcher: Watcher | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end, or until ``stop()``; the state is saved in between and at last.

        Args:
            save: keeps the state; is called on the first process alone.
            watcher: gets reports, on the first process alone.
            stop: is asked after every step, on all processes.

        Returns:
            Whether the end was reached.

        Raises:
            DivergedError: the gradient was not finite in too many steps in a row.
        """
        watcher = watcher if watcher is not None and self.world.first else Watcher()
        watcher.begin(self.done, self.steps, self.plan.steps_per_epoch, self.recipe.batch_size)
        if self.done == self.steps:
            return True
        steps = Steps(self.plan, self.done, self.steps)
        images = loader(self.images, steps, self.carrying.workers, self.world.device.type == "cuda")
        saved = time.monotonic()
        self.task.train()
        with contextlib.closing(drawn(images)) as batches:
            while self.done < self.steps:
                with self._part(STEP):
                    parts = self._step(batches)
                if self.profile is not None:
                    self.profile.step_done()
                if self.done % self.carrying.log_steps == 0 or self.done == self.steps:
                    watcher.record(self._record())
                watcher.step(self.done, parts)
                due = time.monotonic() - saved > 60 * self.carrying.save_minutes
                if self.carrying.save_steps is not None and self.done % self.carrying.save_steps == 0:
                    due = True
                stopping, due = (bool(x) for x in self.world.largest([stop(), due]))
                if due or stopping or self.done == self.steps:
                    if save is not None and (self.world.first or self.carrying.shard):
                        state = self.state()
                        if self.world.first:
                            save(state)
                    watcher.saved(self.done)
                    saved = time.monotonic()
                if stopping:
                    break
        self.world.wait()  # for the last checkpoint: whoever trains next in these processes may read it
        return self.done == self.steps

    def _step(self, batches: Any) -> dict[str, float]:
        """One optimizer step; the parts of its loss."""
        step, per_epoch = self.done, self.plan.steps_per_epoch
        self.scheduler.step_update(step)
        if hasattr(self.task, "set_epoch"):
            self.task.set_epoch(step / per_epoch)
        if hasattr(self.task, "set_step"):
            self.task.set_step(step)
        self.optimizer.zero_grad()
        factors = [factor for _, factor in self.plan.parts(step)]
        sums: dict[str, Tensor] = {}
        for number, factor in enumerate(factors):
            with self._part("data"):
                images, targets, *beside = _moved(next(batches), self.world.device)
            reseed(self.seed, step, self.world.rank, number)
            if self.mix is not None:
                images, targets = self.mix(images, targets)
            last = number == len(factors) - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.task.no_sync():
                autocast = torch.autocast(
                    self.world.device.type,
                    PRECISIONS[self.carrying.precision],
                    enabled=self.carrying.precision != "fp32",
                )
                with self._part("forward"), autocast:
                    result = self.task(images, targets, *beside)
                with self._part("backward"):
                    self.scaler.scale(result["loss"] * factor).backward()
            for name, value in result.items():
                if name == "loss" or name.endswith("_loss"):
                    sums[name] = sums.get(name, 0.0) + value.detach().float() * factor
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.clip_grad
        norm = sharding.number(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        # One transfer from the device for all numbers.
        *values, grad_norm = torch.stack([*sums.values(), norm.float()]).tolist()
        parts = dict(zip(sums, values, strict=True))
        with self._part("update"):
            self._update(grad_norm, parts)
        return parts

    def _part(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.profile is None else self.profile.part(name)

    def _update(self, grad_norm: float, parts: Mapping[str, float]) -> None:
        """The optimizer's step, unless the gradient, the same on all processes, is not finite."""
        finite = math.isfinite(grad_norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        if finite:
            self.tally.add({**parts, "grad_norm": grad_norm})
            self.tally.in_row = 0
            if self.recipe.ema_decay is not None:
                self.task.update_ema(step=self.done)
            return
        self.tally.nonfinite += 1
        self.tally.in_row += 1
        if self.tally.in_row >= min(self.carrying.nonfinite_limit, self.steps):  # a run without any step is no run
            values = ", ".join(f"{name} = {value:g}" for name, value in parts.items())
            rate = self.optimizer.param_groups[0]["lr"]
            raise DivergedError(
                f"the gradient was not finite in {self.tally.in_row} steps in a row, the last of them step {self.done} "
                f"({values}, gradient norm = {grad_norm:g}, learning rate = {rate:g}). The last checkpoint is of before; "
                "try a lower train.base_lr, a train.clip_grad, or fp32 or bf16 precision"
            )

    def _record(self) -> dict[str, Any]:
        """The log's next record; the same on every process."""
        skipped, means = self.tally.nonfinite, self.tally.means()
        shared = self.world.mean(list(means.values()))
        return {
            "step": self.done,
            "epoch": self.done / self.plan.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **dict(zip(means, shared, strict=True)),
            "nonfinite_steps": skipped,
        }


def _moved(batch: Any, device: torch.device) -> Any:
    """Nested tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _moved(value, device) for name, value in batch.items()}
    return [_moved(value, device) for value in batch]


def save_to(folder: Path, settings: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Keeps the state of a run with these settings in its folder."""
    return lambda state: checkpoint.save(folder / checkpoint.NAME, {**state, "settings": settings})
