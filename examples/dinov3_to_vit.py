"""DINOv3 of Hugging Face teaches a tiny ViT of timm, which has no rotary embedding: the captured attention has it.

python examples/dinov3_to_vit.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn
from transformers import AutoModel

from attnkd.methods.attn_distill import AttnDistill


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    return student, AutoModel.from_pretrained("facebook/dinov3-vits16-pretrain-lvd1689m")


def method(student: nn.Module, teacher: nn.Module) -> AttnDistill:
    # The last four blocks of the student learn from blocks spread over the teacher, the last from the last.
    return AttnDistill(student, teacher, blocks=[-4, -3, -2, -1], merge="logsum", verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1]))
