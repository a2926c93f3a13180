"""Swin-S of timm teaches a Swin-T, with labels: the maps of the windows, stage by stage.

python examples/swin_to_swin.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn

from attnkd.methods.head_kd import HeadKD


def models(classes: int = 1000) -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("swin_tiny_patch4_window7_224", num_classes=classes)
    return student, timm.create_model("swin_small_patch4_window7_224", pretrained=True)


def method(student: nn.Module, teacher: nn.Module) -> HeadKD:
    # In the third stage, 6 blocks learn from every third of 18: windows that are shifted from windows that are shifted.
    return HeadKD(student, teacher, one_pass=True, verbose=False)


if __name__ == "__main__":
    batches = images(sys.argv[1])
    train(method(*models(len(batches.dataset.classes))), batches)
