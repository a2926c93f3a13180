"""Draws small models and options for the four methods, and holds a training step against the textbook.

``str(case)`` is one line; :func:`parse_method` brings the case back. The loss, its parts and the gradient of every parameter must
be those of :mod:`attnkd.testing.textbook`, which works on written-out maps in float64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.problem import DIVERGENCES, MERGES
from attnkd.attention.resample import MODES
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import MODES as HEAD_MODES
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.ssta import SSTA
from attnkd.testing import textbook
from attnkd.testing.textbook import Model, Parts
from attnkd.testing.tolerance import Result

METHODS = ("HeadKD", "SSTA", "AttentionProbe", "AttnDistill")
CLASSES, SIZE = 5, (16, 24)
INPUT_NORM = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""How the images come normalised; the rotary models are used to another mean and std."""
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative error of a loss or of a parameter's gradient. The tasks round some parts to float32 by design."""
SMALL = 1e-3
"""A gradient is judged relative to at least this fraction of all gradients together."""

WITH_CLS = ("plain", "registers", "qk_norm", "bias", "rotary")
KINDS = (*WITH_CLS, "pooled")


@dataclass(frozen=True)
class MethodCase:
    """One training step of a method; everything else follows from the seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"method={self.method},seed={self.seed}"


def parse_method(text: str) -> MethodCase:
    """The case that ``str(case)`` wrote.

    Raises:
        ValueError: another form, or an unknown method.
    """
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    if set(fields) != {"method", "seed"} or fields["method"] not in METHODS or not fields["seed"].isdecimal():
        raise ValueError(f"case: expected method=({'|'.join(METHODS)}),seed=(number), got {text!r}")
    return MethodCase(fields["method"], int(fields["seed"]))


def draw_method(rng: random.Random) -> MethodCase:
    """A random case."""
    return MethodCase(rng.choice(METHODS), rng.randrange(10**6))


def prove_method(case: MethodCase, impl: str, device: torch.device) -> list[Result]:
    """The method's loss, its parts and all gradients against the textbook's; float64 models but for 'triton'."""
    rng = random.Random(case.seed)
    dtype = torch.float32 if impl == "triton" else torch.float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        images = torch.randn(3, 3, *SIZE).to(device, dtype)
        targets = torch.randint(0, CLASSES, (3,)).to(device)
        setting = _Setting(rng, impl, device, dtype)
        task, restated, trained = _TRIALS[case.method](setting)
        truth: Parts = restated(images.double(), targets)
        truth["loss"].backward()
        result = task(images, targets)
        result["loss"].backward()
    label = f"{impl} {case.method}"
    allowed = ALLOWED[dtype]
    results = []
    for name, value in truth.items():
        if name in result:
            ours, theirs = (float(x.detach()) for x in (result[name], value))
            results.append(_judge(f"{label} {name}", abs(ours - theirs) / max(abs(theirs), 1.0), allowed))
    pairs = [pair for mine, plain in trained for pair in _gradients(mine, plain)]
    whole = math.sqrt(sum(float(plain.square().sum()) for _, _, plain in pairs))
    for name, mine, plain in pairs:
        size = max(float(plain.norm()), SMALL * whole)
        results.append(_judge(f"{label} d{name}", float((mine.double() - plain).norm()) / size, allowed))
    return results


class _Setting:
    """Random models, and their twins for the textbook."""

    def __init__(self, rng: random.Random, impl: str, device: torch.device, dtype: torch.dtype) -> None:
        self.rng, self.impl, self.device, self.dtype = rng, impl, device, dtype

    def model(self, kinds: tuple[str, ...], heads: int, patch: int = 8, frozen: bool = False) -> tuple[Any, Model]:
        """A small timm model, and a float64 copy. A frozen one gets the images in its own normalisation."""
        import timm

        kind, width = self.rng.choice(kinds), 12 * heads
        extra: dict[str, dict[str, Any]] = {
            "registers": {"reg_tokens": 2}, "qk_norm": {"qk_norm": True}, "pooled": {"class_token": False, "global_pool": "avg"},
        }  # fmt: skip
        options = extra.get(kind, {})
        names = {"bias": "beit_base_patch16_224", "rotary": "eva02_tiny_patch14_224"}
        if kind in names:
            options = {"global_pool": "token"}
        model: Any = timm.create_model(
            names.get(kind, "vit_tiny_patch16_224"), img_size=SIZE, patch_size=patch, embed_dim=width, num_heads=heads,
            depth=self.rng.randint(2, 4), num_classes=CLASSES, **options,
        )  # fmt: skip
        with torch.no_grad():  # what starts at 0 or 1 is to matter too, and attention is not to be uniform
            for name, parameter in model.named_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
                if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                    parameter.mul_(4)
        model = model.to(self.device, self.dtype).eval()
        prefix = model.num_prefix_tokens
        norm = INPUT_NORM if frozen else None
        grid = SIZE[0] // patch, SIZE[1] // patch
        return model, Model(copy.deepcopy(model).double(), prefix, kind != "pooled", grid, norm)

    def blocks(self, depth: int) -> list[int]:
        return self.rng.sample(range(depth), self.rng.randint(1, depth))

    def paired(self, student: Any, teacher: Any, blocks: list[int]) -> tuple[list[int] | None, list[tuple[int, int]]]:
        """``teacher_blocks`` for a task, and the (student block, teacher block) pairs that it means."""
        depth, theirs = len(student.blocks), len(teacher.blocks)
        if self.rng.random() < 0.5:
            return None, textbook.block_pairs(blocks, depth, theirs)
        chosen = [self.rng.randrange(theirs) for _ in blocks]
        return chosen, list(zip(blocks, chosen, strict=True))

    def weight(self) -> float:
        return round(self.rng.uniform(0.2, 2.0), 2)


_Trial = tuple[nn.Module, Callable[[Tensor, Tensor], Parts], list[tuple[nn.Module, nn.Module]]]
"""The task, the textbook's losses, and the pairs of modules whose gradients must agree."""


def _head_kd(setting: _Setting) -> _Trial:
    rng = setting.rng
    mode, m = rng.choice(HEAD_MODES), rng.randint(1, 3)
    n = rng.randint(1 if mode == "head_to_head" else m, 4)
    student, plain = setting.model(KINDS, m)
    teacher, plain_teacher = setting.model(KINDS, n, frozen=True)
    depth = len(student.blocks)
    blocks = list(range(depth)) if mode == "encoder_to_encoder" else setting.blocks(depth)
    teacher_blocks, pairs = setting.paired(student, teacher, blocks)
    options: dict[str, Any] = {}
    heads: list[tuple[list[int], list[int]]]
    if mode == "head_to_head":
        options = {"heads": [rng.randrange(m) for _ in blocks], "teacher_heads": [rng.randrange(n) for _ in blocks]}
        heads = [([h], [g]) for h, g in zip(options["heads"], options["teacher_heads"], strict=True)]
    else:
        options["teacher_heads"] = [rng.sample(range(n), m) for _ in blocks]
        heads = [(list(range(m)), chosen) for chosen in options["teacher_heads"]]
    common: dict[str, Any] = {
        "divergence": rng.choice(DIVERGENCES), "alpha": round(rng.uniform(0.1, 0.9), 2), "temperature": rng.choice((1.0, 2.5)),
        "wrong_teacher_weight": rng.choice((1.0, 0.3)), "wrong_student_weight": rng.choice((1.0, 0.6)),
    }  # fmt: skip
    task = HeadKD(
        student, teacher, mode=mode, blocks=None if mode == "encoder_to_encoder" else blocks, teacher_blocks=teacher_blocks,
        impl=setting.impl, input_norm=INPUT_NORM, verbose=False, **options, **common,
    )  # fmt: skip

    def restated(images: Tensor, targets: Tensor) -> Parts:
        return textbook.head_kd(plain, plain_teacher, images, targets, pairs=pairs, heads=heads, **common)

    return task, restated, [(student, plain.module)]


def _ssta(setting: _Setting) -> _Trial:
    rng = setting.rng
    m = rng.randint(2, 4)
    student, plain = setting.model(KINDS, m)
    blocks, (first, second) = setting.blocks(len(student.blocks)), rng.sample(range(m), 2)
    divergence, temperature, alpha = rng.choice(DIVERGENCES), rng.choice((1.0, 2.5)), setting.weight()
    options: dict[str, Any] = {}
    teachers: dict[str, Any] = {}
    both = (("teacher", "beta"), ("assistant", "lam"))
    for name, weight in rng.choice((both, both[:1], both[1:])):
        n, role = rng.randint(1, 4), int(name == "assistant")
        model, twin = setting.model(KINDS, n, frozen=True)
        chosen = None if rng.random() < 0.4 and divergence != "logit_mse" else [rng.randrange(n) for _ in blocks]
        theirs, pairs = setting.paired(student, model, blocks)
        options |= {
            name: model,
            f"{name}_blocks": theirs,
            f"{name}_heads": chosen or "average",
            weight: setting.weight(),
        }
        teachers[name] = (twin, options[weight], (first, second)[role], pairs, chosen)
    task = SSTA(
        student, blocks=blocks, student_heads=(first, second), alpha=alpha, stop_epoch=rng.choice((None, 3)),
        temperature=temperature, divergence=divergence, impl=setting.impl, input_norm=INPUT_NORM, verbose=False, **options,
    )  # fmt: skip
    task.set_epoch(1)

    def restated(images: Tensor, targets: Tensor) -> Parts:
        return textbook.ssta(
            plain, teachers, images, targets, alpha=alpha, temperature=temperature, divergence=divergence
        )

    return task, restated, [(student, plain.module)]


def _attention_probe(setting: _Setting) -> _Trial:
    rng = setting.rng
    student, plain = setting.model(WITH_CLS, rng.randint(1, 3))
    teacher, plain_teacher = setting.model(WITH_CLS, rng.randint(1, 4), frozen=True)
    depth = len(student.blocks)
    blocks = None if rng.random() < 0.3 else setting.blocks(depth)
    listed = sorted({math.ceil(k * depth / 3) - 1 for k in (1, 2, 3)}) if blocks is None else blocks
    teacher_blocks, pairs = setting.paired(student, teacher, listed)
    weights = setting.weight(), setting.weight(), setting.weight()
    common: dict[str, Any] = {
        "temperature": rng.choice((1.0, 4.0)),
        "normalize_dim": rng.choice((-1, -2)) if setting.impl != "triton" else -1,
    }
    accuracy = round(rng.uniform(0.5, 0.99), 2)
    task = AttentionProbe(
        student, teacher, accuracy, blocks=blocks, teacher_blocks=teacher_blocks, kd_weight=weights[0],
        noisy_weight=weights[1], relation_weight=weights[2], impl=setting.impl, input_norm=INPUT_NORM, verbose=False, **common,
    )  # fmt: skip
    with torch.no_grad():
        task.noise.weight.normal_()
    noise = copy.deepcopy(task.noise).double()

    def restated(images: Tensor, targets: Tensor) -> Parts:
        return textbook.attention_probe(
            plain, plain_teacher, noise.weight, images, accuracy=accuracy, pairs=pairs, weights=weights, **common
        )

    return task, restated, [(student, plain.module), (task.noise, noise)]


def _attn_distill(setting: _Setting) -> _Trial:
    rng = setting.rng
    m = rng.randint(1, 3)
    merge = rng.choice(MERGES)
    student, plain = setting.model(WITH_CLS, m, patch=rng.choice((8, 4)))
    n = m if merge is None else rng.randint(1, 4)
    teacher, plain_teacher = setting.model(WITH_CLS, n, patch=rng.choice((8, 4)), frozen=True)
    blocks = setting.blocks(len(student.blocks))
    teacher_blocks, pairs = setting.paired(student, teacher, blocks)
    weights = setting.weight(), setting.weight(), setting.weight(), setting.weight()
    given = rng.choice((None, 1.0, 3.0))
    temperature = (10.0 if merge == "logsum" else 1.0) if given is None else given
    mode = rng.choice(MODES)
    task = AttnDistill(
        student, teacher, blocks=blocks, teacher_blocks=teacher_blocks, pa_weight=weights[0], patch_weight=weights[1],
        attn_weight=weights[2], task_loss_weight=weights[3], criterion=nn.CrossEntropyLoss(), merge=merge, temperature=given,
        resample_mode=mode, impl=setting.impl, input_norm=INPUT_NORM, verbose=False,
    )  # fmt: skip
    projector = task.trainable_module.projector
    plain_projector = copy.deepcopy(projector).double()

    def restated(images: Tensor, targets: Tensor) -> Parts:
        return textbook.attn_distill(
            plain, plain_teacher, plain_projector, images, targets, pairs=pairs, weights=weights, merge=merge,
            temperature=temperature, resample_mode=mode,
        )  # fmt: skip

    return task, restated, [(student, plain.module), (projector, plain_projector)]


_TRIALS = {"HeadKD": _head_kd, "SSTA": _ssta, "AttentionProbe": _attention_probe, "AttnDistill": _attn_distill}


def _gradients(mine: nn.Module, plain: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Name, gradient and the textbook's gradient of every parameter; what takes no part has a gradient of 0."""
    theirs = dict(plain.named_parameters())
    found = []
    for name, parameter in mine.named_parameters():
        plain_parameter = theirs.pop(name)
        found.append((name, _gradient(parameter), _gradient(plain_parameter)))
    assert not theirs
    return found


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _judge(name: str, error: float, allowed: float) -> Result:
    ratio = error / allowed
    return Result(name, error, allowed, ratio, ratio <= 1.0, "relative")
