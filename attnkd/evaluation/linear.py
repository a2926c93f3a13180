"""A linear probe on frozen features: stochastic gradient descent, many learning rates at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.evaluation.features import Features

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Probe(NamedTuple):
    """Accuracies in percent."""

    top1: float
    top5: float | None
    """None for at most five classes."""
    lr: float
    """The learning rate that was best on the held-out training images."""
    held_out: dict[float, float]
    """Top-1 accuracy on those, for every learning rate."""
    weight: Tensor
    """[classes, D] and..."""
    bias: Tensor
    """... [classes] of the chosen classifier, for features as they are."""


def linear_probe(
    train: Features,
    test: Features,
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    rates: Sequence[float] = RATES,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    hold_out: float = 0.1,
    seed: int = 0,
    device: torch.device | None = None,
) -> Probe:
    """Train a linear classifier with cross-entropy for every learning rate, and score the best.

    Features are standardised by the training images' mean and standard deviation. SGD with momentum, the learning rate falls
    to 0 along half a cosine. The rate is chosen on a share of the training images that no classifier was trained on; the test
    images decide nothing.

    Args:
        train, test: [n, D] and [m, D] features with labels.
        epochs, batch_size, momentum, weight_decay: of SGD.
        rates: learning rates, all trained at once on the same batches.
        hold_out: share of the training images to choose the rate on; 0 with one rate.
        seed: of the order and of the images held out.
        device: where to compute; None is the CPU.

    Raises:
        ValueError: numbers out of range, or no rate with a finite result.
    """
    if epochs < 1 or batch_size < 1 or not rates or min(rates) <= 0:
        raise ValueError("epochs, batch_size, rates: expected numbers above 0")
    if not (0 < hold_out < 1 or hold_out == 0 and len(rates) == 1):
        raise ValueError(
            f"hold_out: expected a share above 0 and below 1 to choose of {len(rates)} rates, got {hold_out}"
        )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.values), generator=generator)
    kept = order[: max(1, round(len(order) * (1 - hold_out)))]
    held = order[len(kept) :]
    values, labels = train.values.to(device), train.labels.to(device)
    mean, std = values[kept.to(device)].mean(0), values[kept.to(device)].std(0).clamp(min=1e-6)
    values = (values - mean) / std
    lr = torch.tensor(rates, device=device).view(-1, 1, 1)
    weight = torch.zeros(len(rates), values.shape[1] + 1, classes, device=device)  # the last row is the bias
    speed = torch.zeros_like(weight)
    steps, step = epochs * -(-len(kept) // batch_size), 0
    for _ in range(epochs):
        shuffled = kept[torch.randperm(len(kept), generator=generator)].to(device)
        for batch in shuffled.split(batch_size):
            grad = _gradient(_with_one(values[batch]), labels[batch], weight)
            grad[:, :-1] += weight_decay * weight[:, :-1]
            speed.mul_(momentum).add_(grad)
            fall = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps))
            weight -= lr * fall * speed
            step += 1
    chosen, scores = 0, torch.zeros(len(rates))
    if len(held):
        found = _with_one(values[held.to(device)]) @ weight  # [rates, held, classes]
        scores = (found.argmax(-1) == labels[held.to(device)]).float().mean(-1).cpu()
        scores[~weight.isfinite().flatten(1).all(1).cpu()] = -1
        chosen = int(scores.argmax())
    best = weight[chosen]
    if not bool(best.isfinite().all()):
        raise ValueError(f"rates: no classifier was finite with {list(rates)}; give lower ones")
    matrix = best[:-1].T / std
    bias = best[-1] - matrix @ mean
    outputs = test.values.to(device) @ matrix.T + bias
    hits = outputs.topk(min(5, classes), dim=1).indices == test.labels.to(device)[:, None]
    one, five = (100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5))
    held_out = {rate: 100 * max(score, 0.0) for rate, score in zip(rates, scores.tolist(), strict=True)}
    return Probe(one, five if classes > 5 else None, rates[chosen], held_out, matrix.cpu(), bias.cpu())


def _with_one(values: Tensor) -> Tensor:
    return F.pad(values, (0, 1), value=1.0)


def _gradient(values: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Of the mean cross-entropy, for every classifier: values [b, D + 1], weight [L, D + 1, C] → [L, D + 1, C]."""
    error = (values @ weight).softmax(-1)
    error[:, torch.arange(len(labels)), labels] -= 1
    return values.T @ error / len(values)
