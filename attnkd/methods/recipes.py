"""How AttnDistill is trained: optimizer, learning rate and images, as timm builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from attnkd.capture.models import unwrap_model


@dataclass(frozen=True)
class AttnDistillRecipe:
    """The training recipe of AttnDistill (BMVC 2022) and its published code, which is that of MAE.

    AdamW; the learning rate rises linearly from 0 over the warm-up and falls to 0 along half a cosine over the remaining
    epochs, step by step. The loss's own numbers (λ = 0.1, T = 10 where heads are merged) are the defaults of
    :class:`attnkd.AttnDistill`. The position embeddings of a student are timm's, or see
    :func:`attnkd.sincos_pos_embed_`.

    Args:
        epochs: in all, warm-up included. The published script trains 800.
        batch_size: images an optimizer step, over all processes and accumulated steps. The published code uses 4096.
        base_lr: learning rate for 256 images a step.
        weight_decay: of weight matrices; biases, norms and what the student lists in ``no_weight_decay()`` have none.
        betas: of AdamW.
        warmup_epochs: length of the linear rise, less than ``epochs``.
        crop_scale: smallest and largest area of a random crop, as a share of the image.

    Raises:
        ValueError: a number out of range.

    Example::

        recipe = AttnDistillRecipe(epochs=800, batch_size=4096)
        optimizer = recipe.optimizer(task)
        scheduler = recipe.scheduler(optimizer, steps_per_epoch=len(loader))
        for step, images in enumerate(batches):
            scheduler.step_update(step)
            ...
    """

    epochs: int
    batch_size: int
    base_lr: float = 1.5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: int = 40
    crop_scale: tuple[float, float] = (0.2, 1.0)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs: expected 0 to {self.epochs - 1} for {self.epochs} epochs, got {self.warmup_epochs}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {self.crop_scale}")

    @property
    def lr(self) -> float:
        """The peak learning rate: base_lr · batch_size / 256."""
        return self.base_lr * self.batch_size / 256

    def optimizer(self, task: nn.Module, **options: Any) -> Optimizer:
        """AdamW over all that trains in a training task (student and projector), or over a model.

        Args:
            task: a task with a ``trainable_module``, wrapped for distributed training or compiled as it may be.
            options: for ``timm.optim.create_optimizer_v2``, such as fused=True or layer_decay.
        """
        from timm.optim import create_optimizer_v2

        # Without wrappers: DDP and torch.compile would hide the student's no_weight_decay().
        module = unwrap_model(getattr(task, "trainable_module", task))
        recipe: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas}
        return create_optimizer_v2(module, opt="adamw", **{**recipe, **options})

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Any:
        """A ``timm.scheduler.CosineLRScheduler``; call its ``step_update`` with the number of optimizer steps done.

        Args:
            optimizer: its learning rate is set to that of step 0.
            steps_per_epoch: optimizer steps an epoch.
        """
        from timm.scheduler import create_scheduler_v2

        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=self.epochs - self.warmup_epochs,  # warmup_prefix: the cosine begins where the warm-up ends
            warmup_epochs=self.warmup_epochs,
            warmup_prefix=True,
            warmup_lr=0.0,
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        return scheduler

    def transform(self, model: nn.Module) -> Callable[[Any], Any]:
        """Images for training: random crop, bicubic resize, horizontal flip; normalised as ``model`` wants them.

        Args:
            model: whose input size and mean and standard deviation count: the teacher, since a student from scratch can
                learn from any. If the student's ``pretrained_cfg`` names others, tell :class:`attnkd.AttnDistill`
                ``input_norm``.

        Returns:
            PIL image → [C, H, W] float32.
        """
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(model)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
        return create_transform(
            tuple(size),
            is_training=True,
            scale=self.crop_scale,
            hflip=0.5,
            color_jitter=None,  # type: ignore[arg-type]  # None is none; timm annotates float
            interpolation="bicubic",
            mean=config["mean"],
            std=config["std"],
        )
