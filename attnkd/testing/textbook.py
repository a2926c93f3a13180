"""The four methods as their papers write them: on attention maps that are written out, in float64.

The models run with their unfused attention, whose scores are taken from in front of the softmax; nothing here knows of taps,
of fused losses or of the tasks' code. Masters of the formulas: ``docs/methods``. A loss is returned with its parts, under the
names that the tasks use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnkd.testing import oracle

Parts = dict[str, Tensor]


class Seen(NamedTuple):
    """What one run of a model showed."""

    output: Tensor
    """[B, classes]."""
    scores: list[Tensor]
    """Of every block, [B, H, N, N]: what enters its softmax."""
    tokens: list[Tensor]
    """Of every block, [B, N, D]: what it puts out."""
    features: Tensor
    """[B, N, D]: the last tokens, normalised."""


class Model(NamedTuple):
    """A timm Vision Transformer in float64, and what its tokens are."""

    module: nn.Module
    prefix: int
    has_cls: bool
    grid: tuple[int, int]
    input_norm: tuple[Sequence[float], Sequence[float]] | None = None
    """(mean, std) per channel that images come normalised with; None: with the model's own."""

    def run(self, images: Tensor) -> Seen:
        """images [B, C, H, W] through the model with unfused attention."""
        model: Any = self.module
        if self.input_norm is not None:
            own = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
            (mean, std), (own_mean, own_std) = (
                [torch.tensor(x, dtype=images.dtype, device=images.device).view(-1, 1, 1) for x in norm]
                for norm in (self.input_norm, own)
            )
            images = (images * std + mean - own_mean) / own_std
        tokens: list[Tensor] = []
        handles = [block.register_forward_hook(lambda _, __, out: tokens.append(out)) for block in model.blocks]
        try:
            with _unfused(model), _SoftmaxInputs() as seen:
                features = model.forward_features(images)
            output = model.forward_head(features)
        finally:
            for handle in handles:
                handle.remove()
        assert len(seen.scores) == len(tokens) == len(model.blocks)
        return Seen(output, seen.scores, tokens, features)


class _SoftmaxInputs(TorchFunctionMode):
    """Keeps what every softmax of [B, H, N, N] scores is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not F.scaled_dot_product_attention, "the model does not have an unfused attention"
        if func in (Tensor.softmax, torch.softmax, F.softmax) and args[0].ndim == 4:
            self.scores.append(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    before: list[tuple[Any, Any]] = [(m, m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")]
    try:
        for module, _ in before:
            module.fused_attn = False
        yield
    finally:
        for module, fused in before:
            module.fused_attn = fused


def head_kd(
    student: Model,
    teacher: Model,
    images: Tensor,
    targets: Tensor,
    *,
    pairs: Sequence[tuple[int, int]],
    heads: Sequence[tuple[Sequence[int], Sequence[int]]],
    divergence: str,
    alpha: float,
    temperature: float,
    wrong_teacher_weight: float = 1.0,
    wrong_student_weight: float = 1.0,
) -> Parts:
    """α · cross-entropy + (1 − α) · mean over block pairs, images, heads and rows of the divergence of their maps.

    Args:
        pairs: (student block, teacher block).
        heads: of every pair: student heads, teacher heads.
    """
    s, t = student.run(images), _rest(teacher.run(images))
    weight = torch.ones(len(images), dtype=torch.float64)
    weight[t.output.argmax(1) != targets] *= wrong_teacher_weight
    weight[s.output.argmax(1) != targets] *= wrong_student_weight
    parts = []
    for (i, j), (ours, theirs) in zip(pairs, heads, strict=True):
        z_s, z_t = _shared_maps(student, s.scores[i], teacher, t.scores[j])
        rows = _compare(z_s[:, list(ours)], z_t[:, list(theirs)], divergence, temperature)
        parts.append(torch.stack([w * image.mean() for w, image in zip(weight, rows, strict=True)]).mean())
    attn, task = sum(parts) / len(parts), F.cross_entropy(s.output, targets)
    return {"loss": alpha * task + (1 - alpha) * attn, "attn_loss": torch.as_tensor(attn), "task_loss": task}


def ssta(
    student: Model,
    teachers: dict[str, tuple[Model, float, int, Sequence[tuple[int, int]], Sequence[int] | None]],
    images: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: str,
) -> Parts:
    """α · cross-entropy + Σ over the teachers of weight · mean over blocks, images and rows of the divergence.

    Args:
        teachers: by name: model, weight, the student's head, (student block, teacher block) pairs, and the teacher's head for
            each pair, or None for the mean of its heads' maps.
    """
    s = student.run(images)
    result = {"task_loss": F.cross_entropy(s.output, targets)}
    loss = alpha * result["task_loss"]
    for name, (teacher, weight, head, pairs, chosen) in teachers.items():
        t = _rest(teacher.run(images))
        parts = []
        for index, (i, j) in enumerate(pairs):
            z_s, z_t = _shared_maps(student, s.scores[i], teacher, t.scores[j])
            if chosen is not None:
                parts.append(_compare(z_s[:, [head]], z_t[:, [chosen[index]]], divergence, temperature).mean())
                continue
            average = (z_t / temperature).softmax(-1).mean(1, keepdim=True)
            rows, _ = oracle.row_divergence((z_s[:, [head]] / temperature).log_softmax(-1), average.log(), divergence)
            parts.append(rows.mean())
        result[f"{name}_attn_loss"] = torch.stack(parts).mean()
        loss = loss + weight * result[f"{name}_attn_loss"]
    return {"loss": loss, **result}


def attention_probe(
    student: Model,
    teacher: Model,
    noise: Tensor,
    images: Tensor,
    *,
    accuracy: float,
    pairs: Sequence[tuple[int, int]],
    weights: tuple[float, float, float],
    temperature: float,
    normalize_dim: int,
) -> Parts:
    """kd · T² KL(teacher ‖ student) + noisy · NCE + relation · R.

    Args:
        noise: [K, K − 1], the logits of the confusions beside the diagonal of Q.
        weights: of KD, NCE and R.
    """
    s, t = student.run(images), _rest(teacher.run(images))
    p_s, p_t = ((x.output / temperature).softmax(1) for x in (s, t))
    kd = temperature**2 * (p_t * (p_t.log() - p_s.log())).sum(1).mean()

    classes = len(noise)
    rest = (1 - accuracy) * noise.softmax(1)
    rows = [torch.cat([rest[k, :k], noise.new_tensor([accuracy]), rest[k, k:]]) for k in range(classes)]
    q, label = torch.stack(rows), t.output.argmax(1)
    nce = torch.stack([-(p @ q[:, y]).log() for p, y in zip(s.output.softmax(1), label, strict=True)]).mean()

    relation = torch.stack(
        [
            oracle.relation_row_loss(
                s.tokens[i],
                t.tokens[j],
                student_prefix_tokens=student.prefix,
                teacher_prefix_tokens=teacher.prefix,
                normalize_dim=normalize_dim,
            )
            for i, j in pairs
        ]
    ).mean()
    loss = weights[0] * kd + weights[1] * nce + weights[2] * relation
    return {"loss": loss, "kd_loss": kd, "noisy_loss": nce, "relation_loss": relation}


def attn_distill(
    student: Model,
    teacher: Model,
    projector: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    pairs: Sequence[tuple[int, int]],
    weights: tuple[float, float, float, float],
    merge: str | None,
    temperature: float,
    resample_mode: str,
) -> Parts:
    """pa · PA + patch · PT + attn · AG + task · cross-entropy.

    Args:
        projector: from student to teacher features.
        weights: of PA, PT, AG and the class loss.
    """
    s, t = student.run(images), _rest(teacher.run(images))
    resized = student.grid != teacher.grid

    def tokens(model: Model, seen: Seen) -> Tensor:
        return torch.cat([seen.features[:, :1], seen.features[:, model.prefix :]], 1)

    ours, theirs = projector(tokens(student, s)), tokens(teacher, t)
    cls, patches = theirs[:, :1], theirs[:, 1:]
    if resized:
        down, across = (
            oracle.resize_weights(a, b, resample_mode) for a, b in zip(teacher.grid, student.grid, strict=True)
        )
        patches = torch.einsum("yv,xu,bvuc->byxc", down, across, patches.unflatten(1, teacher.grid)).flatten(1, 2)
    pa, pt = (ours[:, :1] - cls).square().mean(), (ours[:, 1:] - patches).square().mean()

    parts = []
    for i, j in pairs:
        z_s, z_t = (
            _keep(z, model.prefix, True)[:, :, :1] for z, model in ((s.scores[i], student), (t.scores[j], teacher))
        )
        log_s = oracle.log_merged(z_s, merge, temperature)
        if not resized:
            log_t = oracle.log_merged(z_t, merge, temperature)
        else:  # resized head by head, then merged
            rows = (z_t / (temperature if merge is None else 1.0)).softmax(-1)
            rows = oracle.resample_attention(rows, teacher.grid, student.grid, resample_mode)
            log_t = (rows if merge is None else oracle.merge_attention(rows, merge, temperature)).log()
        kl, _ = oracle.row_divergence(log_s, log_t, "forward_kl")
        parts.append(kl.sum() / len(images))
    ag, task = torch.stack(parts).mean(), F.cross_entropy(s.output, targets)
    loss = weights[0] * pa + weights[1] * pt + weights[2] * ag + weights[3] * task
    return {"loss": loss, "pa_loss": pa, "patch_loss": pt, "attn_loss": ag, "task_loss": task}


def block_pairs(blocks: Sequence[int], depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """(i, ⌈(i + 1)·Lt/Ls⌉ − 1) for every student block i."""
    return [(i, math.ceil((i + 1) * teacher_depth / depth) - 1) for i in blocks]


def _compare(z_s: Tensor, z_t: Tensor, divergence: str, temperature: float) -> Tensor:
    """The divergence of every row, [B, h, N]."""
    z_s, z_t = z_s / temperature, z_t / temperature
    if divergence != "logit_mse":
        z_s, z_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    return oracle.row_divergence(z_s, z_t, divergence)[0]


def _shared_maps(student: Model, z_s: Tensor, teacher: Model, z_t: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the tokens that both models have: patches, and the class token where both have one."""
    keep_cls = student.has_cls and teacher.has_cls
    return _keep(z_s, student.prefix, keep_cls), _keep(z_t, teacher.prefix, keep_cls)


def _keep(z: Tensor, prefix: int, keep_cls: bool) -> Tensor:
    """Rows and keys of scores [B, H, N, N] without registers, distillation token, and the class token if it is not kept."""
    kept = ([0] if keep_cls else []) + list(range(prefix, z.shape[-1]))
    return z[:, :, kept][..., kept]


def _rest(seen: Seen) -> Seen:
    """A teacher's run, without gradient."""
    scores, tokens = ([x.detach() for x in xs] for xs in seen[1:3])
    return Seen(seen.output.detach(), scores, tokens, seen.features.detach())
