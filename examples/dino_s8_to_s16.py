"""DINO S/8 teaches an S/16, as in the AttnDistill paper: 784 patches against 196, so that the teacher's rows are resized.

python examples/dino_s8_to_s16.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn

from attnkd.methods.attn_distill import AttnDistill


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch16_224", num_classes=0)
    return student, timm.create_model("vit_small_patch8_224.dino", pretrained=True, num_classes=0)


def method(student: nn.Module, teacher: nn.Module) -> AttnDistill:
    # The paper's weights are the defaults. Six heads each: compared head by head.
    return AttnDistill(student, teacher, resample_mode="bicubic", verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1]))
