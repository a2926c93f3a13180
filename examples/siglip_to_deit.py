"""SigLIP of Hugging Face, which has no class token, teaches a DeiT of timm: the row of its attention pooling is the student's class row.

python examples/siglip_to_deit.py FOLDER_OF_IMAGES_BY_CLASS
"""

import sys

import timm
from loop import images, train
from torch import nn
from transformers import SiglipVisionModel

from attnkd.methods.attn_distill import AttnDistill


def models() -> tuple[nn.Module, nn.Module]:
    student = timm.create_model("deit_small_patch16_224", num_classes=0)
    return student, SiglipVisionModel.from_pretrained("google/siglip-base-patch16-224")


def method(student: nn.Module, teacher: nn.Module) -> AttnDistill:
    # rows="pool": both rows run over the patches alone, 6 heads against 12. PA compares the teacher's mean patch token.
    return AttnDistill(student, teacher, rows="pool", merge="logsum", verbose=False)


if __name__ == "__main__":
    train(method(*models()), images(sys.argv[1], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
