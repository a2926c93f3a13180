"""MAE B/16 teaches a small ViT, with labels: whole maps of the last block, since MAE's class token was not trained for anything.

python examples/mae_to_vit.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn

from attnkd.methods.head_kd import HeadKD


def models(classes: int = 1000) -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch16_224", num_classes=classes)
    return student, timm.create_model("vit_base_patch16_224.mae", pretrained=True)


def method(student: nn.Module, teacher: nn.Module) -> HeadKD:
    # Six student heads learn from six of the teacher's twelve. one_pass: the student's attention computes the loss on its way.
    return HeadKD(student, teacher, mode="block_to_block", alpha=0.5, one_pass=True, verbose=False)


if __name__ == "__main__":
    batches = images(sys.argv[1])
    train(method(*models(len(batches.dataset.classes))), batches)
