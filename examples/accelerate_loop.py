"""A loop of your own with Hugging Face accelerate: mixed precision, gradient accumulation, several GPUs.

accelerate launch --multi_gpu examples/accelerate_loop.py FOLDER_OF_IMAGES_BY_CLASS     (pip install accelerate)
"""

from __future__ import annotations

import sys

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader

from attnkd.methods.head_kd import HeadKD


def distil(student: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int, **options) -> list[float]:
    """loader: pairs of images [B, 3, H, W] and classes [B]. Trains the student; returns the last loss of every epoch."""
    task = HeadKD(student, teacher, verbose=False)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.leaves_parameters_unused())
    accelerator = Accelerator(kwargs_handlers=[ddp], **options)
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-4)
    prepared, optimizer, loader = accelerator.prepare(task, optimizer, loader)  # moves the teacher too
    losses = []
    for epoch in range(epochs):
        task.set_epoch(epoch)
        for images, targets in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(images, targets)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    task.untap()
    return losses


if __name__ == "__main__":
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(sys.argv[1], create_transform(224, is_training=True))
    student = timm.create_model("vit_tiny_patch16_224", num_classes=len(folder.classes))
    teacher = timm.create_model("vit_small_patch16_224", pretrained=True)
    batches = DataLoader(folder, batch_size=256, shuffle=True, num_workers=8)
    distil(student, teacher, batches, epochs=100, mixed_precision="bf16")
