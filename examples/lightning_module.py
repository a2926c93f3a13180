"""PyTorch Lightning trains a student: the task is a part of a LightningModule.

python examples/lightning_module.py FOLDER_OF_IMAGES_BY_CLASS     (pip install lightning)
"""

from __future__ import annotations

import sys

import lightning
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from attnkd.methods.head_kd import HeadKD


class Distillation(lightning.LightningModule):
    """Checkpoints have the student and what trains beside it; the teacher follows the module to its device."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.task = HeadKD(student, teacher, verbose=False)

    def on_train_epoch_start(self) -> None:
        self.task.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        result = self.task(images, targets)
        self.log_dict({name: result[name] for name in ("attn_loss", "task_loss")})
        return result["loss"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.task.parameters(), lr=5e-4)


if __name__ == "__main__":
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(sys.argv[1], create_transform(224, is_training=True))
    student = timm.create_model("vit_tiny_patch16_224", num_classes=len(folder.classes))
    module = Distillation(student, timm.create_model("vit_small_patch16_224", pretrained=True))
    trainer = lightning.Trainer(max_epochs=100, precision="bf16-mixed", strategy="ddp_find_unused_parameters_true")
    trainer.fit(module, DataLoader(folder, batch_size=256, shuffle=True, num_workers=8))
    student = module.task.student
