"""The training loop of the examples, and the images of a folder. Nothing of attnkd is in it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def images(folder: str, size: int = 224, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD) -> DataLoader:
    """Batches of images [B, 3, size, size] and classes [B] of a folder of images by class, augmented; normalised as the teacher wants them."""
    data = ImageFolder(folder, create_transform(size, is_training=True, mean=mean, std=std))
    workers = min(8, os.cpu_count() or 1)
    return DataLoader(data, batch_size=min(256, len(data)), shuffle=True, num_workers=workers, drop_last=True)


def train(task: nn.Module, batches: Iterable[tuple[Tensor, ...]], lr: float = 5e-4) -> list[float]:
    """One epoch. A task is called with images, or with images and classes, and returns its loss."""
    device = next(task.parameters()).device
    optimizer, losses = torch.optim.AdamW(task.parameters(), lr), []
    for batch in batches:
        loss = task(*(part.to(device) for part in batch))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
