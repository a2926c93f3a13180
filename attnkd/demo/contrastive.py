"""A self-supervised teacher for the demo: SimCLR, which learns from images alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SimCLR(nn.Module):
    """Two views of an image shall be more similar to each other than to all other views of the batch.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020,
    Eq. 1, on the projected output of a timm model without classifier.

    Args:
        model: output [B, D], its ``num_features``.
        augment: (batch, CPU generator) → a random view of every image.
        temperature: of the cosine similarities.
    """

    def __init__(
        self, model: nn.Module, augment: Callable[[Tensor, torch.Generator], Tensor], temperature: float = 0.2
    ) -> None:
        super().__init__()
        dim = int(model.num_features)  # type: ignore[arg-type]
        self.model, self.augment, self.temperature = model, augment, temperature
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)).to(
            next(model.parameters()).device
        )

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        """images [B, C, H, W], not augmented → loss; targets are not looked at."""
        # The default generator is part of the saved state of a training run, so a continued run draws the same views.
        views = torch.cat([self.augment(images, torch.default_generator) for _ in range(2)])
        projected = F.normalize(self.projector(self.model(views)), dim=1)
        similarity = projected @ projected.T / self.temperature
        similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
        other_view = torch.arange(len(views), device=views.device).roll(len(images))
        return {"loss": F.cross_entropy(similarity, other_view)}
