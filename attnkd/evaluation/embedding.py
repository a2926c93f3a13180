"""Groups of images as points in a plane, close where a model's features are: t-SNE (van der Maaten and Hinton, JMLR 2008), scikit-learn's."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


def sampled(items: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """At most ``count`` of the items, each with the same probability; memory does not grow with their number."""
    kept: list[Item] = []
    draw = random.Random(seed)
    for index, item in enumerate(items):
        if index < count:
            kept.append(item)
        elif (place := draw.randrange(index + 1)) < count:
            kept[place] = item
    return kept


def tsne(groups: Mapping[str, Tensor], seed: int = 0) -> dict[str, np.ndarray]:
    """Points [n, 2] of every group's features [n, D], embedded together.

    Raises:
        ValueError: fewer than four images in all.
    """
    from sklearn.manifold import TSNE

    features = torch.cat(list(groups.values())).float().numpy()
    if len(features) < 4:
        raise ValueError(f"picture: expected at least 4 images to place, got {len(features)}")
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    ends = np.cumsum([len(values) for values in groups.values()])[:-1]
    return dict(zip(groups, np.split(points, ends), strict=True))


def draw_points(points: Mapping[str, np.ndarray], title: str) -> Any:
    """A matplotlib figure of the groups' points [n, 2], the first groups on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for order, (name, places) in enumerate(points.items()):
        axes.scatter(
            places[:, 0],
            places[:, 1],
            s=12,
            alpha=0.75,
            linewidths=0,
            label=f"{name} ({len(places)})",
            zorder=10 - order,
        )
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, markerscale=1.6)
    return figure
