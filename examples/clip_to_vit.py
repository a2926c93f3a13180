"""The image tower of an open_clip model teaches a ViT of timm.

python examples/clip_to_vit.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import open_clip
import timm
from loop import images, train
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn

from attnkd.methods.attn_distill import AttnDistill


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("vit_small_patch16_224", num_classes=0)
    return student, open_clip.create_model("ViT-B-16", "laion2b_s34b_b88k").visual


def method(student: nn.Module, teacher: nn.Module) -> AttnDistill:
    # The tower's attention is torch.nn.MultiheadAttention; its tokens are compared after its last norm, before the projection.
    return AttnDistill(student, teacher, merge="logsum", verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1], mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD))
