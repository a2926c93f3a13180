"""Whole training steps: AttnDistill on timm models with the attention loss off, from stored maps, and from the package.

``off`` and ``ours`` are :class:`attnkd.methods.attn_distill.AttnDistill`, without and with its attention loss. ``maps`` is what people
do today: ``fused_attn = False`` in both models, a hook on the last block's attention dropout that keeps the map, and the loss in
plain PyTorch. ``maps_last_block`` switches the fused attention off only in the block whose map is needed, which is the best
that this way allows. All four train the same student, projector and class-token loss under bfloat16 autocast with fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkd import merge_attention, resample_attention
from attnkd.capture.models import cls_features
from attnkd.methods.attn_distill import AttnDistill, make_projector
from benchmarks import measure, timing
from benchmarks.measure import Settings

PA_WEIGHT, ATTN_WEIGHT = 1.0, 0.1
MIN_STEPS, BUDGET_MS = 10, 4000.0
GATE_FRACTION = 5e-3  # in float32, between two computations of the same loss (and of its gradients)


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, timm names."""

    student: str
    teacher: str
    batch: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.student} <- {self.teacher}"

    def build(self, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Both models with random weights; speed and memory do not depend on what the weights are."""
        torch.manual_seed(0)
        models = [timm.create_model(name, num_classes=0, **dict(self.options)) for name in (self.student, self.teacher)]
        for model in models:
            # Random weights attend almost uniformly, and then the check below would compare rounding errors.
            nn.init.normal_(model.blocks[-1].attn.qkv.weight, std=2.0 * model.embed_dim**-0.5)
        models[0].pretrained_cfg = models[1].pretrained_cfg  # one normalisation of the images, which are random anyway
        return models[0].to(device), models[1].to(device)


PAIRS = (
    Pair("vit_tiny_patch16_224", "vit_small_patch16_224", 512),
    Pair("vit_small_patch16_224", "vit_base_patch16_224", 256),
    Pair("vit_small_patch16_224", "vit_small_patch8_224", 128),
)
_TINY = (("img_size", 32), ("depth", 2))
SMOKE = (
    Pair("vit_tiny_patch16_224", "vit_small_patch16_224", 2, _TINY),
    Pair("vit_small_patch16_224", "vit_small_patch8_224", 2, _TINY),
)
"""Merged heads, and another patch grid."""


class DistillFromMaps(nn.Module):
    """The loss of AttnDistill from stored attention maps.

    Args:
        student, teacher: timm Vision Transformers with a class token and no other prefix token.
        projector: from student to teacher features.
        all_blocks: switch the fused attention off everywhere, or in the last block only.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, projector: nn.Module, all_blocks: bool) -> None:
        super().__init__()
        self.student, self.projector = student, projector
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()
        self.__dict__["maps"] = {}
        for name, model in (("student", student), ("teacher", teacher)):
            for block in model.blocks if all_blocks else model.blocks[-1:]:
                block.attn.fused_attn = False
            model.blocks[-1].attn.attn_drop.register_forward_hook(self._keep(name))

    teacher: nn.Module
    maps: dict[str, Tensor]

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.maps[name] = output

        return hook

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.projector(cls_features(self.student, self.student.forward_features(images)))
        with torch.no_grad():
            wanted = cls_features(self.teacher, self.teacher.forward_features(images))
        rows = {name: attention[:, :, :1].float() for name, attention in self.maps.items()}
        grids = [model.patch_embed.grid_size for model in (self.teacher, self.student)]
        rows["teacher"] = resample_attention(rows["teacher"], *grids)
        if rows["student"].shape[1] != rows["teacher"].shape[1]:
            rows = {name: merge_attention(row, "logsum", 10.0) for name, row in rows.items()}
        attn_loss = F.kl_div(rows["student"].log(), rows["teacher"].log(), reduction="batchmean", log_target=True)
        pa_loss = F.mse_loss(features.float(), wanted.float())
        loss = PA_WEIGHT * pa_loss + ATTN_WEIGHT * attn_loss
        if not bool(torch.isfinite(loss)):  # training scripts look, and AttnDistill does
            raise RuntimeError("the loss is not finite")
        return {"loss": loss, "pa_loss": pa_loss, "attn_loss": attn_loss}


def make_task(variant: str, pair: Pair, device: torch.device, impl: str) -> nn.Module:
    """A training task; every variant starts from the same weights."""
    student, teacher = pair.build(device)
    torch.manual_seed(1)
    if variant.startswith("maps"):
        projector = make_projector(student.num_features, teacher.num_features).to(device)
        return DistillFromMaps(student, teacher, projector, all_blocks=variant == "maps")
    weight = 0.0 if variant == "off" else ATTN_WEIGHT
    task = AttnDistill(student, teacher, pa_weight=PA_WEIGHT, attn_weight=weight, impl=impl, verbose=False)
    torch.manual_seed(1)
    projector = make_projector(student.num_features, teacher.num_features)
    task.trainable_module.projector.load_state_dict(projector.state_dict())
    return task


VARIANTS = ("off", "ours", "maps", "maps_last_block")


def measure_pair(
    pair: Pair, settings: Settings, variants: tuple[str, ...] | None = None, compile_too: bool = False
) -> Iterator[dict[str, Any]]:
    """One record a variant; a variant whose losses or gradients differ from the maps' gets no time."""
    device = settings.device
    truth = None
    for variant in VARIANTS:
        if variants is not None and variant not in variants:
            continue
        for compiled in (False, True) if compile_too else (False,):
            name = f"{variant}_compiled" if compiled else variant
            record: dict[str, Any] = {
                "pair": pair.name, "variant": name, "batch": pair.batch, "dtype": "bfloat16 autocast",
            }  # fmt: skip
            try:
                if truth is None:
                    truth = losses_and_gradients(make_task("maps", pair, device, "auto"), pair, device)
                task = make_task(variant, pair, device, "triton")
                if compiled:
                    _compile(task, settings)
                record |= check(truth, losses_and_gradients(task, pair, device), variant)
                if record["status"] == "ok" and settings.clock is not None:
                    numbers = _numbers(task, pair, settings)
                    record |= numbers if settings.report else {}
                del task
            except Exception as error:
                status, detail = measure.failure(error, variant in ("ours", "off"), device)
                record |= {"status": status, "detail": detail}
            yield record
            measure.release(device)


def losses_and_gradients(task: nn.Module, pair: Pair, device: torch.device) -> dict[str, Tensor]:
    """In float32 on a small batch: the losses and the gradient of the last block's qkv weights. Leaves no gradient behind."""
    generator = torch.Generator(device).manual_seed(2)
    images = _images(pair, device, min(pair.batch, 4), generator)
    result = task(images)
    weight = task.student.blocks[-1].attn.qkv.weight
    (gradient,) = torch.autograd.grad(result["loss"], [weight])
    return {name: value.detach() for name, value in result.items() if name.endswith("loss")} | {"dqkv": gradient}


def check(truth: dict[str, Tensor], found: dict[str, Tensor], variant: str) -> dict[str, Any]:
    """Every variant has the same losses; all but 'off' the same gradient."""
    names = ["pa_loss"] if variant == "off" else ["pa_loss", "attn_loss", "loss", "dqkv"]
    errors = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in names}
    wrong = [f"{name} is {error:.2g} off" for name, error in errors.items() if not error <= GATE_FRACTION]
    record: dict[str, Any] = {"status": "FAIL" if wrong else "ok", "error": float(f"{max(errors.values()):.3g}")}
    return record | ({"detail": ", ".join(wrong)} if wrong else {})


def _numbers(task: nn.Module, pair: Pair, settings: Settings) -> dict[str, Any]:
    device = settings.device
    task.train()
    trainable = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    generator = torch.Generator(device).manual_seed(3)
    batches = [_images(pair, device, pair.batch, generator) for _ in range(2)]
    turn = 0

    def step(_: Any = None) -> None:
        nonlocal turn
        turn += 1
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = task(batches[turn % 2])["loss"]
        loss.backward()
        optimizer.step()

    step()  # states of the optimizer, plans of the libraries
    measure.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    measure.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    found = {"peak_bytes": peak}
    if settings.count_launches:
        found |= {k: v for k, v in measure.count_launches(step, lambda: None, device).items() if k == "launches"}
    assert settings.clock is not None
    ms = _time_steps(step, settings)
    return found | {"ms": ms, "images_per_s": round(pair.batch / ms["median"] * 1e3, 1)}


def _time_steps(step: Callable[[], None], settings: Settings) -> dict[str, Any]:
    """Steps back to back, as in training: what the host cannot hide counts."""
    clock = timing.GpuClock(settings.device, flush=None, ahead=False)
    budget = BUDGET_MS if settings.report else 1.0
    return timing.measure(lambda _: step(), clock=clock, budget_ms=budget, min_samples=MIN_STEPS).as_dict()


def _compile(task: nn.Module, settings: Settings) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": settings.compile_backend, "dynamic": False}
    if isinstance(task, AttnDistill):
        task.compile(**options)
        return
    for model in (task.student, task.teacher):  # it is not called itself
        model.forward_features = torch.compile(model.forward_features, **options)


def _images(pair: Pair, device: torch.device, batch: int, generator: torch.Generator) -> Tensor:
    size = dict(pair.options).get("img_size", 224)
    return torch.randn(batch, 3, size, size, generator=generator, device=device)
