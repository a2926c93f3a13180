"""Handwritten digits as tensors, and a short training on them."""

import torch
from torch import nn

from attnkd.training.sources import open_source


def load_digits(train, test):
    """Normalised images [n, 1, 16, 16] and labels [n], for training and for testing."""
    source = open_source("digits", "train", mode="L")
    pixels, labels = torch.from_numpy(source.images.pixels), torch.from_numpy(source.images.labels)
    images = (pixels.float()[:, None] / 255 - source.mean[0]) / source.std[0]
    return (images[:train], labels[:train]), (images[-test:], labels[-test:])


def fit(task: nn.Module, images, labels, epochs=3, seed=0, before_epoch=lambda epoch: None):
    """The sums of the losses of each epoch, batches of 64."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 2e-3)
    generator, history = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        before_epoch(epoch)
        sums = {}
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            result = task(images[chosen], labels[chosen])
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            for name in result.keys() - {"output"}:
                sums[name] = sums.get(name, 0.0) + result[name].item()
        history.append(sums)
    return history
