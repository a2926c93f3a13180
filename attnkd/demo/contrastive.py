"""A self-supervised teacher for the demo: SimCLR, which learns from images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SimCLR(nn.Module):
    """Two views of an image shall be more similar to each other than to all other views of the batch.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
    Eq. 1, on the projected output of a timm model without classifier.

    Args:
        model: output [B, D], its ``num_features``.
        temperature: of the cosine similarities.
    """

    def __init__(self, model: nn.Module, temperature: float = 0.2) -> None:
        super().__init__()
        dim = int(model.num_features)  # type: ignore[arg-type]
        self.model, self.temperature = model, temperature
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)).to(
            next(model.parameters()).device
        )

    def forward(self, views: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """views [B, 2, C, H, W] → loss; targets are not looked at."""
        projected = F.normalize(self.projector(self.model(views.transpose(0, 1).flatten(0, 1))), dim=1)
        similarity = projected @ projected.T / self.temperature
        similarity = similarity.masked_fill(
            torch.eye(len(projected), dtype=torch.bool, device=views.device), -torch.inf
        )
        other_view = torch.arange(len(projected), device=views.device).roll(len(views))
        return {"loss": F.cross_entropy(similarity, other_view)}


class TwoViews:
    """image → [2, C, H, W], each augmented by itself."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        return torch.stack([self.transform(image), self.transform(image)])
