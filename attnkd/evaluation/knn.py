"""The weighted k-NN classifier on frozen features, as DINO uses it (Caron et al., ICCV 2021; Wu et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkd.evaluation.features import Features
from attnkd.training.distributed import World

KS, TEMPERATURE = (10, 20, 100, 200), 0.07
BLOCK = (512, 65536)
"""Test images and training images at a time: memory is that of one block of cosines, for data sets of any size."""
LEAST = 1e-30
"""Below this temperature votes are no float32 numbers; here already the nearest image alone decides."""


@torch.no_grad()
def knn(
    train: Features,
    test: Features,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    *,
    device: torch.device | None = None,
    block: tuple[int, int] = BLOCK,
    world: World | None = None,
) -> dict[int, dict[str, float]]:
    """Accuracy in percent for every k.

    The k training features nearest in cosine vote for their labels with weight exp(cosine / temperature); cosines and the
    logarithms of a class's votes are float32. Of two classes with equal votes the smaller label comes first.

    Args:
        train, test: [n, D] and [m, D] features with labels, of any floating dtype.
        ks: numbers of neighbours; those above n count as n.
        temperature: of the votes.
        device: where to compute; None is the CPU.
        block: (test, training) images at a time.
        world: processes that share the test images; each has all features, and gets all scores. None is this process alone.

    Returns:
        {k: {'top1': …, 'top5': …}}; 'top5' only for more than five classes.

    Raises:
        ValueError: no neighbours asked for, a temperature that is not positive, features of other widths.
    """
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ValueError(f"ks, temperature: expected numbers above 0, got {list(ks)}, {temperature}")
    if train.values.shape[1] != test.values.shape[1]:
        raise ValueError(f"test: expected features [m, {train.values.shape[1]}], got {tuple(test.values.shape)}")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    most = min(max(ks), len(train.values))
    correct = {k: torch.zeros(2, dtype=torch.float64) for k in ks}
    world = world or World(torch.device("cpu"))
    mine = slice(world.rank, None, world.size)
    for values, labels in zip(test.values[mine].split(block[0]), test.labels[mine].split(block[0]), strict=True):
        cosines, found = _nearest(values.to(device), train, most, block[1])
        votes = (cosines - cosines[:, :1]) / max(temperature, LEAST)
        for k in ks:
            tally = _tally(votes[:, :k], found[:, :k], classes)
            order = tally.argsort(dim=1, descending=True, stable=True)
            hits = (order == labels.to(order.device)[:, None]).cpu()
            correct[k] += torch.stack([hits[:, :1].sum(), hits[:, :5].sum()])
    scores = {k: [100 * hits / len(test.values) for hits in world.sum(own.tolist())] for k, own in correct.items()}
    return {k: {"top1": one, **({"top5": five} if classes > 5 else {})} for k, (one, five) in scores.items()}


def _tally(votes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[b, classes]: the logarithm of the sum of exp(votes) [b, k] by label; -inf for a class without one.

    Every class's largest vote is taken out first: at a small temperature exp would overflow, and the votes of all classes but
    one or two would be 0, which of them came next be lost.
    """
    largest = votes.new_full((len(votes), classes), -torch.inf).scatter_reduce_(1, labels, votes, "amax")
    sums = torch.zeros_like(largest).scatter_add_(1, labels, (votes - largest.gather(1, labels)).exp())
    return largest + sums.log()


def _nearest(values: Tensor, train: Features, most: int, block: int) -> tuple[Tensor, Tensor]:
    """Cosines [b, most] of the nearest training features, largest first, and their labels."""
    values = F.normalize(values.float(), dim=1)
    cosines, labels = values.new_empty(len(values), 0), torch.empty(len(values), 0, dtype=torch.long).to(values.device)
    for theirs, their_labels in zip(train.values.split(block), train.labels.split(block), strict=True):
        near = values @ F.normalize(theirs.to(values.device).float(), dim=1).T
        near, index = near.topk(min(most, near.shape[1]), dim=1)
        cosines = torch.cat([cosines, near], 1)
        labels = torch.cat([labels, their_labels.to(values.device)[index]], 1)
        cosines, index = cosines.topk(min(most, cosines.shape[1]), dim=1)
        labels = labels.gather(1, index)
    return cosines, labels
