"""How a student is trained: optimizer, learning rate, images and class loss, as timm builds them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from attnkd.capture.adapters import find_adapter
from attnkd.capture.models import unwrap_model


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run that do not belong to one method.

    Args:
        epochs: in all, warm-up included.
        batch_size: images an optimizer step, over all processes and accumulated steps.
        base_lr: peak learning rate for ``lr_batch`` images a step.
        lr_batch: the learning rate is base_lr · batch_size / lr_batch; None: it is base_lr.
        opt: name of a timm optimizer.
        weight_decay: of weight matrices; biases, norms, and the student's position embeddings and tokens have none.
        betas: of the optimizer; None for one that has none, such as 'sgd'.
        sched: name of a timm schedule that depends on the step alone, such as 'cosine', 'step' or 'constant'.
        warmup_epochs: length of the linear rise from 0, less than ``epochs``. The schedule begins where the warm-up ends.
        min_lr: learning rate at the end of the schedule.
        clip_grad: largest norm of the gradient; None does not clip.
        ema_decay: of a moving average of the weights, which then is the result; None for no average.
        crop_scale: smallest and largest area of a random crop, as a share of the image; (1, 1) is the whole image, resized.
        crop_padding: in place of that: pixels around the resized image, from which a crop of its size is cut.
        hflip: probability of a horizontal flip.
        color_jitter: strength of random changes of brightness, contrast and saturation.
        auto_augment: timm's name of a policy, such as 'rand-m9-mstd0.5-inc1'.
        random_erasing: probability that a rectangle of an image is erased.
        mixup, cutmix: α of each; 0 is off. Only for methods with a class loss.
        label_smoothing: of the class loss.
        drop_last: leave out the last images of an epoch that fill no batch.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int
    batch_size: int
    base_lr: float = 5e-4
    lr_batch: int | None = 256
    opt: str = "adamw"
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    sched: str = "cosine"
    warmup_epochs: int = 5
    min_lr: float = 0.0
    clip_grad: float | None = None
    ema_decay: float | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_padding: int | None = None
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    drop_last: bool = True

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
        if self.sched in ("plateau", "none"):
            raise ValueError(f"sched: expected a schedule that depends on the step alone, got {self.sched!r}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value}")

    @property
    def lr(self) -> float:
        """The peak learning rate: base_lr · batch_size / lr_batch."""
        return self.base_lr if self.lr_batch is None else self.base_lr * self.batch_size / self.lr_batch

    def optimizer(self, task: nn.Module, **options: Any) -> Optimizer:
        """The optimizer of all that trains in a training task (student and what trains beside it), or of a model.

        Args:
            task: a task with a ``trainable_module``, wrapped for distributed training or compiled as it may be.
            options: for ``timm.optim.create_optimizer_v2``, such as fused=True or layer_decay.
        """
        from timm.optim import create_optimizer_v2, param_groups_weight_decay

        # Without wrappers: DDP and torch.compile would hide the student's no_weight_decay().
        module = unwrap_model(getattr(task, "trainable_module", task))
        recipe: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.betas is not None:
            recipe["betas"] = self.betas
        adapter = None if hasattr(module, "no_weight_decay") else find_adapter(module)
        if adapter is not None and not options.get("layer_decay"):
            recipe["param_group_fn"] = functools.partial(
                param_groups_weight_decay,
                weight_decay=options.get("weight_decay", self.weight_decay),
                no_weight_decay_list=adapter.no_weight_decay(module),
            )
        with _named("opt", self.opt, "an optimizer that timm knows and that takes these numbers, such as 'adamw'"):
            return create_optimizer_v2(module, opt=self.opt, **{**recipe, **options})

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> Any:
        """A timm scheduler; call its ``step_update`` with the number of optimizer steps done.

        Args:
            optimizer: its learning rate is set to that of step 0.
            steps_per_epoch: optimizer steps an epoch.
        """
        from timm.scheduler import create_scheduler_v2

        with _named("sched", self.sched, "a schedule that timm knows, such as 'cosine'"):
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=self.sched,
                num_epochs=self.epochs
                - self.warmup_epochs,  # warmup_prefix: the schedule begins where the warm-up ends
                warmup_epochs=self.warmup_epochs,
                warmup_prefix=True,
                warmup_lr=0.0,
                min_lr=self.min_lr,
                step_on_epochs=False,
                updates_per_epoch=steps_per_epoch,
            )
        return scheduler

    def transform(self, model: nn.Module) -> Callable[[Any], Any]:
        """Images for training, cropped, augmented, and normalised as ``model`` wants them.

        Args:
            model: whose input size and mean and standard deviation count: the teacher, since a student from scratch can
                learn from any. If the student's ``pretrained_cfg`` names others, tell the method ``input_norm``.

        Returns:
            PIL image → [C, H, W] float32.
        """
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
        return self.transform_for(tuple(size), config["mean"], config["std"])

    def transform_for(
        self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Callable[[Any], Any]:
        """The same for images of ``size`` (height, width), with a mean and standard deviation for each channel."""
        from timm.data import create_transform

        with _named("auto_augment", self.auto_augment, "a policy that timm knows, such as 'rand-m9-mstd0.5-inc1'"):
            made: Any = create_transform(
                size,
                is_training=True,
                scale=self.crop_scale,
                hflip=self.hflip,
                color_jitter=self.color_jitter or None,  # type: ignore[arg-type]  # None is none; timm annotates float
                auto_augment=self.auto_augment,
                interpolation="bicubic",
                mean=mean,
                std=std,
                re_prob=self.random_erasing,
                re_mode="pixel",
            )
        for step in made.transforms:
            for op in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
                if op.name.startswith("Posterize"):
                    op.level_fn = functools.partial(_one_bit_at_least, op.level_fn)
        if self.crop_padding is not None or self.crop_scale == (1.0, 1.0):
            from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

            # timm would still draw a crop's aspect ratio, and its place by a pixel.
            steps: list[Any] = [Resize(size, InterpolationMode.BICUBIC)]
            if self.crop_padding is not None:
                steps.append(RandomCrop(size, padding=self.crop_padding))
            made.transforms[0] = Compose(steps)
        return made


@contextmanager
def _named(name: str, value: Any, expected: str) -> Iterator[None]:
    """What timm does not know is an error of the argument."""
    try:
        yield
    except (AssertionError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name}: expected {expected}, got {value!r} ({error})") from None


def _one_bit_at_least(
    bits: Callable[..., tuple[int, ...]], level: float, options: Mapping[str, Any]
) -> tuple[int, ...]:
    """timm's strongest level keeps no bit of an image, which Pillow refuses since version 13."""
    return (max(1, bits(level, options)[0]),)


_RANGES = (
    ("base_lr", 0.0, float("inf")),
    ("weight_decay", 0.0, float("inf")),
    ("min_lr", 0.0, float("inf")),
    ("clip_grad", 0.0, float("inf")),
    ("ema_decay", 0.0, 1.0),
    ("crop_padding", 0, float("inf")),
    ("hflip", 0.0, 1.0),
    ("color_jitter", 0.0, float("inf")),
    ("random_erasing", 0.0, 1.0),
    ("mixup", 0.0, float("inf")),
    ("cutmix", 0.0, float("inf")),
    ("label_smoothing", 0.0, 1.0),
    ("lr_batch", 1, float("inf")),
)


@dataclass(frozen=True)
class AttnDistillRecipe(Recipe):
    """The training recipe of AttnDistill (BMVC 2022) and its published code, which is that of MAE.

    AdamW; the learning rate rises linearly from 0 over the warm-up and falls to 0 along half a cosine over the remaining
    epochs, step by step. The loss's own numbers (λ = 0.1, T = 10 where heads are merged) are the defaults of
    :class:`attnkd.AttnDistill`. The position embeddings of a student are timm's, or see
    :func:`attnkd.sincos_pos_embed_`. The published script trains 800 epochs with 4096 images a step.

    Example::

        recipe = AttnDistillRecipe(epochs=800, batch_size=4096)
        optimizer = recipe.optimizer(task)
        scheduler = recipe.scheduler(optimizer, steps_per_epoch=len(loader))
        for step, images in enumerate(batches):
            scheduler.step_update(step)
            ...
    """

    base_lr: float = 1.5e-4
    betas: tuple[float, float] | None = (0.9, 0.95)
    warmup_epochs: int = 40
    crop_scale: tuple[float, float] = (0.2, 1.0)
