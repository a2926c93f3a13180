"""Attention Probe: a student learns from a classifier on unlabelled images, without the data the classifier was trained on.

Wang, Cao, Shi, Wu, Yang: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022. The formulas, and where
the authors' published code differs: docs/methods/attention_probe.md. Choosing the images: :mod:`attnkd.methods.selection`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd.capture.block_outputs import BlockOutputs, Blocks, pair_block_indices
from attnkd.capture.tokens import TrainingTask, token_layout, unwrap_model
from attnkd.methods.distill_task import FrozenClassifier
from attnkd.methods.noise_adaptation import NoiseAdaptation, noisy_cross_entropy
from attnkd.methods.schedule import Schedule, Schedules
from attnkd.methods.student_teacher import check_models
from attnkd.relation import relation_row_loss

_logger = logging.getLogger(__name__)


class AttentionProbe(TrainingTask):
    """Probe knowledge distillation: loss = kd_weight · KD + noisy_weight · NCE + relation_weight · R.

    KD is T²·KL(teacher ‖ student) of the class probabilities at temperature T. NCE is the cross-entropy with the teacher's
    predicted classes after the student's probabilities went through a matrix Q of class confusions, whose diagonal is the
    teacher's accuracy and whose rest is learned. R compares, block by block, the similarity of class token and patch tokens,
    see :func:`attnkd.relation.relation_row_loss`.

    A ``timm.task.TrainingTask``: EMA, DDP, compilation and checkpoints work as in timm's distillation tasks. Q and the
    schedules' time are task state. The teacher is frozen, stays in evaluation mode, and is not a submodule: it is in no
    optimizer, state_dict or checkpoint.

    Args:
        student: a timm Vision Transformer classifier with a class token, or a timm name (built from scratch for the teacher's
            classes).
        teacher: the same, trained; by name with its pretrained weights and classifier. Its parameters are frozen in place.
        teacher_accuracy: the teacher's top-1 accuracy in (0, 1] on the data it was trained for: the diagonal of Q.
        blocks: student blocks whose output is compared: index, sequence of indices, or 'all'. None: those at a third, two
            thirds and the whole of the depth, 4, 8 and 12 (counted from 1) of 12.
        teacher_blocks: the teacher block for each student block. None: block i of Ls learns from ⌈(i + 1)·Lt/Ls⌉ − 1.
        relation_weight: weight of R, the paper's α.
        kd_weight, noisy_weight: weights of KD and NCE; 1, as in the published code.
        temperature: T of KD.
        normalize_dim: of the features in R: -1 per token, -2 per channel as the published code does.
        input_norm: ((mean, ...), (std, ...)) the images arrive normalised with; the teacher then gets them in the
            normalisation of its ``pretrained_cfg``. None: the teacher gets them as they are.
        impl: implementation of R, see :mod:`attnkd.dispatch`.
        device, dtype: of Q; the student's when None.
        verbose: log the settings.

    Weights and temperature may be :class:`attnkd.methods.schedule.Schedule`; a part whose weight is 0 now is not computed.

    Raises:
        TypeError, ValueError: models that cannot be compared (no class token, other classes, fixed input sizes that differ,
            shared parameters), options out of range.

    Example::

        task = AttentionProbe("vit_tiny_patch16_224", "deit_base_patch16_224", teacher_accuracy=0.818)
        optimizers = task.optimizers()
        result = task(images)
        result["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
    """

    def __init__(
        self,
        student: str | nn.Module,
        teacher: str | nn.Module,
        teacher_accuracy: float,
        *,
        blocks: Blocks | None = None,
        teacher_blocks: Blocks | None = None,
        relation_weight: float | Schedule = 0.8,
        kd_weight: float | Schedule = 1.0,
        noisy_weight: float | Schedule = 1.0,
        temperature: float | Schedule = 4.0,
        normalize_dim: int = -1,
        input_norm: tuple[Sequence[float], Sequence[float]] | None = None,
        impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        teacher = _classifier(teacher, pretrained=True)
        student = _classifier(student, num_classes=getattr(teacher, "num_classes", None))
        check_models(student, teacher)
        classes, theirs = getattr(student, "num_classes", None), getattr(teacher, "num_classes", None)
        if not isinstance(theirs, int) or theirs < 2 or classes != theirs:
            raise ValueError(
                f"student: expected a classifier of the teacher's classes, got num_classes {classes} and {theirs}"
            )
        if normalize_dim not in (-1, -2):
            raise ValueError(f"normalize_dim: expected -1 or -2, got {normalize_dim!r}")
        parameter = next(student.parameters())
        super().__init__(device=device or parameter.device, dtype=dtype or parameter.dtype, verbose=verbose)
        self.schedules = Schedules(
            relation_weight=relation_weight, kd_weight=kd_weight, noisy_weight=noisy_weight, temperature=temperature
        )
        _check_schedules(self.schedules)
        self.normalize_dim, self.impl = normalize_dim, impl
        self.prefixes = token_layout(student).num_prefix_tokens, token_layout(teacher).num_prefix_tokens

        student_blocks, wanted = pair_block_indices(student, teacher, blocks, teacher_blocks)
        unique = sorted(set(wanted))
        self.pairs = [(i, unique.index(block)) for i, block in enumerate(wanted)]
        noise = NoiseAdaptation(theirs, teacher_accuracy).to(device=self.device, dtype=self.dtype)
        self.trainable_module = ProbeStudent(BlockOutputs(student, student_blocks), noise)
        # In __dict__, not in _modules: parameters(), state_dict(), train() and requires_grad_() must not reach it.
        self.__dict__["teacher"] = FrozenClassifier(cast(Any, BlockOutputs(teacher, unique)), input_norm).to(
            self.device
        )
        if verbose:
            numbers = {name: s.value if s.constant else s for name, s in self.schedules.numbers.items()}
            _logger.info(f"AttentionProbe: {numbers}, student blocks {student_blocks} <- teacher blocks {wanted}")

    teacher: FrozenClassifier
    trainable_module: Any  # ProbeStudent, or what DDP or torch.compile made of it

    @property
    def student(self) -> nn.Module:
        """The student model itself, without wrappers."""
        return unwrap_model(self.trainable_module).outputs.model

    @property
    def noise(self) -> NoiseAdaptation:
        return unwrap_model(self.trainable_module).noise

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            images: [B, C, H, W], normalised for the student.
            targets: not used, so that loops which have some can pass them: the teacher's predictions take their place.

        Returns:
            loss: what to call backward on. kd_loss, noisy_loss, relation_loss: its unweighted parts, those whose weight is not
            0. output: [B, classes], the student's.

        Raises:
            ValueError: images of another rank, models that cut the same images into different numbers of patches.
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected [B, C, H, W], got {got}")
        output, tokens, log_q = self.trainable_module(images)
        target_output, target_tokens = self.teacher(images)
        assert target_output is not None
        weights = {name: self.schedules[f"{name}_weight"] for name in ("kd", "noisy", "relation")}
        result = {}
        if weights["kd"]:
            result["kd_loss"] = kd_loss(output, target_output, self.schedules["temperature"])
        if weights["noisy"]:
            result["noisy_loss"] = noisy_cross_entropy(output, target_output.argmax(1), log_q)
        if weights["relation"]:
            losses = [
                relation_row_loss(
                    tokens[s],
                    cast(Any, target_tokens)[t],
                    student_prefix_tokens=self.prefixes[0],
                    teacher_prefix_tokens=self.prefixes[1],
                    normalize_dim=self.normalize_dim,
                    impl=self.impl,
                )
                for s, t in self.pairs
            ]
            result["relation_loss"] = torch.stack(losses).mean()
        if not result:
            raise RuntimeError("AttentionProbe: all weights are 0 now, nothing would be distilled")
        parts = [weights[name.removesuffix("_loss")] * value for name, value in result.items()]
        return {"loss": sum(parts[1:], parts[0]), **result, "output": output}

    def optimizers(
        self, lr: float = 7.5e-4, weight_decay: float = 0.025, noise_lr: float = 1e-3
    ) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The authors' two optimizers: AdamW for the student, Adam for Q."""
        return (
            torch.optim.AdamW(self.student.parameters(), lr=lr, weight_decay=weight_decay),
            torch.optim.Adam(self.noise.parameters(), lr=noise_lr),
        )

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch (0 at the start) to the scheduled numbers."""
        self.schedules.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Tell the number of optimizer steps done to numbers scheduled by step."""
        self.schedules.set_step(step)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> AttentionProbe:
        """Wrap student and Q in DistributedDataParallel; the teacher stays as it is on every rank."""
        weights = [self.schedules.numbers[f"{name}_weight"] for name in ("kd", "noisy", "relation")]
        if any(not w.constant or w.value == 0 for w in weights):
            ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile student and teacher; call it before :meth:`prepare_distributed`. Returns the eval model."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher.compile(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        resolved = super().get_eval_model(module=module, ema=ema)
        plain = None if resolved is None else unwrap_model(resolved)
        return plain.outputs.model if isinstance(plain, ProbeStudent) else resolved

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        if trainable is None:
            return {}
        return {"noise": unwrap_model(trainable).noise.state_dict(), "schedules": self.schedules.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        trainable = module if module is not None else self.get_trainable_module(ema=ema)
        if trainable is None:
            raise RuntimeError("AttentionProbe: setup_ema() comes before loading an EMA checkpoint")
        missing = {"noise", "schedules"} - set(state or {})
        if strict and missing:
            raise RuntimeError(
                f"AttentionProbe: the checkpoint has no task state {sorted(missing)} (strict=False ignores that)"
            )
        if state and "noise" in state:
            unwrap_model(trainable).noise.load_state_dict(state["noise"], strict=strict)
        if state and "schedules" in state:
            self.schedules.load_state_dict(state["schedules"])

    def close(self) -> tuple[nn.Module, nn.Module]:
        """Give student and teacher back as plain models, without hooks; the task cannot run after that."""
        outputs = unwrap_model(self.trainable_module).outputs, cast(Any, self.teacher.tap)
        return outputs[0].close(), outputs[1].close()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> AttentionProbe:
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


class ProbeStudent(nn.Module):
    """What trains: the student and Q. The module that DDP, EMA and torch.compile wrap."""

    def __init__(self, outputs: BlockOutputs, noise: NoiseAdaptation) -> None:
        super().__init__()
        self.outputs, self.noise = outputs, noise

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """images [B, C, H, W] → class scores [B, K], tokens [B, N, D] of the blocks, log Q [K, K]."""
        output, tokens = self.outputs(images)
        return output, tokens, self.noise()

    def no_weight_decay(self) -> set[str]:
        """The student's own list under the names its parameters have here, and Q; timm's optimizer factory asks for it."""
        listed = getattr(self.outputs.model, "no_weight_decay", None)
        return {f"outputs.model.{name}" for name in (listed() if listed else ())} | {"noise.weight"}


def kd_loss(output: Tensor, target_output: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(target / T) ‖ softmax(output / T)) of scores [B, K], averaged over the batch (Hinton et al., 2015)."""
    log_p, log_t = ((x.float() / temperature).log_softmax(1) for x in (output, target_output))
    return temperature**2 * F.kl_div(log_p, log_t, reduction="batchmean", log_target=True)


def _classifier(model: str | nn.Module, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """A model as it is, or by timm name with a classifier."""
    if not isinstance(model, str):
        return model
    import timm

    return timm.create_model(model, pretrained=pretrained, num_classes=num_classes)


def _check_schedules(schedules: Schedules) -> None:
    for name, schedule in schedules.numbers.items():
        reached = [schedule.value]
        reached += [schedule.start] if schedule.warmup else []
        reached += [] if schedule.stop is None else [schedule.end]
        positive = name == "temperature"
        if any(value < 0 or positive and value == 0 for value in reached):
            raise ValueError(f"{name}: expected a number {'> 0' if positive else '>= 0'}, got {schedule}")
    weights = [schedules.numbers[f"{name}_weight"] for name in ("kd", "noisy", "relation")]
    if all(weight.constant and weight.value == 0 for weight in weights):
        raise ValueError("relation_weight, kd_weight, noisy_weight: all are 0, nothing would be distilled")
