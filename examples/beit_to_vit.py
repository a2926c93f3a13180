"""A fine-tuned BEiT of Hugging Face teaches a ViT its classes and its maps, in which the relative position bias is.

python examples/beit_to_vit.py FOLDER_OF_IMAGENET_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn
from transformers import BeitForImageClassification

from attnkd.methods.head_kd import HeadKD


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch16_224", num_classes=1000)
    return student, BeitForImageClassification.from_pretrained("microsoft/beit-base-patch16-224")


def method(student: nn.Module, teacher: nn.Module) -> HeadKD:
    # kd_weight adds the usual KL of class scores. Images that the teacher gets wrong teach half as much attention.
    return HeadKD(student, teacher, kd_weight=1.0, wrong_teacher_weight=0.5, verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
