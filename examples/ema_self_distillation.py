"""A student learns from its own moving average: the teacher is a copy, and follows the student after every step.

python examples/ema_self_distillation.py FOLDER_OF_IMAGES_BY_CLASS
"""

import copy
import sys

import timm
import torch
from loop import images, train
from torch import nn

from attnkd.methods.head_kd import HeadKD


def models(classes: int = 1000) -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch16_224", num_classes=classes)
    return student, copy.deepcopy(student)


class SelfKD(HeadKD):
    """HeadKD whose teacher moves towards the student as it is before every step."""

    decay = 0.999

    def forward(self, images, targets=None):
        teacher = self.teachers["teacher"].tap.model
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), self.student.parameters(), strict=True):
                average.lerp_(parameter, 1 - self.decay)
        return super().forward(images, targets)


def method(student: nn.Module, teacher: nn.Module) -> HeadKD:
    return SelfKD(student, teacher, alpha=0.5, verbose=False)


if __name__ == "__main__":
    batches = images(sys.argv[1])
    train(method(*models(len(batches.dataset.classes))), batches)
