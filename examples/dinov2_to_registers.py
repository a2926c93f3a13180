"""DINOv2 L/14 of torch.hub teaches a small ViT with registers of timm: class token, patch tokens, and where the class token looks.

python examples/dinov2_to_registers.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
import torch
from loop import images, train
from torch import nn

from attnkd.methods.attn_distill import AttnDistill


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224, num_classes=0)
    return student, torch.hub.load("facebookresearch/dinov2", "dinov2_vitl14_reg")


def method(student: nn.Module, teacher: nn.Module) -> AttnDistill:
    # Registers are left out on both sides. 6 heads against 16: merged. patch_weight: dense features, which DINOv2 is used for.
    return AttnDistill(student, teacher, merge="logsum", patch_weight=1.0, verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1]))
