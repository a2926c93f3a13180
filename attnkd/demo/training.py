"""A small training loop that can be interrupted at any moment and continued exactly.

It trains any module whose ``forward(images, targets)`` returns a dict with the scalar ``loss`` and, under names that
end in ``_loss``, its parts: timm's ``TrainingTask`` classes and the distillation methods of this package. After every
epoch one file is replaced atomically. It holds weights, optimizer, scheduler, random state and the history so far; data
order and augmentation are functions of seed and epoch. With the same software and number of threads, a run on the CPU
that was killed and continued ends with the same bits as one that was not. (On a GPU not even two whole runs need to.)
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from attnkd import files

Record = dict[str, float]

_ADVICE = "Nothing of this epoch was saved; a lower learning rate is the first thing to try"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine decay, stepped every batch.

    lr is the peak learning rate, warmup the share of all steps before it, clip_grad the largest gradient norm.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.15
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def train(
    method: nn.Module,
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    state_path: Path,
    fingerprint: str,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    on_epoch: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Train ``method`` in place, from the state at ``state_path`` if there is one.

    Args:
        method: ``forward(images [B, ...], targets [B, ...])`` → dict with ``loss``. Its ``state_dict()`` must hold all
            that training changes. ``set_epoch``, if it has one, gets the epoch, from 0.
        images, targets: the training set [n, ...], on the device of ``method``. The last incomplete batch is dropped.
        recipe: optimizer and schedule.
        seed: of data order and augmentation. Initial weights are the caller's.
        state_path: the file to continue from and to replace after every epoch.
        fingerprint: identifies everything that determines the result; a state with another one is refused.
        augment: (batch, CPU generator) → batch.
        evaluate: metrics, measured before the first and after every epoch.
        on_epoch: is called with every new record.

    Returns:
        A record for every epoch: epoch, seconds, mean of each part of the loss, and the metrics. Record 0 is from
        before training.

    Raises:
        ValueError: fewer images than a batch.
        TrainingError: a loss that is not finite (no state of that epoch is written), or a state that does not fit.
    """
    steps = len(images) // recipe.batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size: expected at most {len(images)}, the number of training images, got {recipe.batch_size}"
        )
    total = recipe.epochs * steps
    optimizer = create_optimizer_v2(
        getattr(method, "trainable_module", method),
        opt="adamw",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        fused=images.device.type in ("cpu", "cuda"),
    )
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=recipe.lr / 100,
        warmup_t=round(recipe.warmup * total),
        warmup_lr_init=recipe.lr / 100,
        t_in_epochs=False,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = load_state(state_path, fingerprint)
    if state is None:
        history: list[Record] = [{"epoch": 0, "seconds": 0.0, **(evaluate() if evaluate else {})}]
    else:
        history = state["history"]
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    for epoch in range(len(history), recipe.epochs + 1):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        sums: dict[str, float] = {}
        method.train()
        if hasattr(method, "set_epoch"):
            method.set_epoch(epoch - 1)  # type: ignore[operator]  # scheduled weights count from 0
        for step in range(steps):
            scheduler.step_update((epoch - 1) * steps + step)
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = images[chosen] if augment is None else augment(images[chosen], generator)
            result = method(batch, targets[chosen])
            parts = _finite_parts(result, epoch, step)
            optimizer.zero_grad()
            result["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(f"the gradient is not finite in epoch {epoch}, step {step}. {_ADVICE}")
            optimizer.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
        record = {"epoch": epoch, "seconds": 0.0, **{name: value / steps for name, value in sums.items()}}
        record.update(evaluate() if evaluate else {})
        record["seconds"] = time.perf_counter() - start
        history.append(record)
        save_state(
            state_path,
            {
                "fingerprint": fingerprint,
                "history": history,
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        )
        if on_epoch is not None:
            on_epoch(record)
    return history


def load_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state that a run left at ``path``; None when there is none.

    Raises:
        TrainingError: an unreadable file, or the state of another run.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["fingerprint"]
    except Exception as error:
        raise TrainingError(f"{path}: cannot be read ({error}). Delete it to train from the start") from error
    if found != fingerprint:
        raise TrainingError(
            f"{path}: is the state of a run with other settings (fingerprint {found}, expected {fingerprint}). "
            "Delete it or choose another output directory"
        )
    return state


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` in one step: whoever reads it, even after a kill, finds the old state or the new one, whole."""
    content = io.BytesIO()
    torch.save(state, content)
    files.write_bytes(path, content.getvalue())


def _finite_parts(result: Mapping[str, Tensor], epoch: int, step: int) -> Record:
    """Loss and its parts as numbers, in one transfer from the device."""
    names = ["loss", *(name for name in result if name.endswith("_loss"))]
    parts = dict(zip(names, torch.stack([result[name].detach().float() for name in names]).tolist(), strict=True))
    bad = [name for name in names if not math.isfinite(parts[name])]
    if bad:
        culprits = [name for name in bad if name != "loss"] or ["loss"]
        values = ", ".join(f"{name} = {value:g}" for name, value in parts.items())
        raise TrainingError(f"{' and '.join(culprits)} not finite in epoch {epoch}, step {step} ({values}). {_ADVICE}")
    return parts
