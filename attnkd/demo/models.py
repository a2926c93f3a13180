"""The demo's timm Vision Transformers, and their checkpoints as timm reads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from attnkd import files
from attnkd.capture.loading import load_saved as load
from attnkd.demo.data import IMAGE_SIZE
from attnkd.evaluation.features import extract
from attnkd.methods.pos_embed import sincos_pos_embed_

_COMMON = {"model_name": "vit_tiny_patch16_224", "img_size": IMAGE_SIZE, "in_chans": 1}
TEACHER: dict[str, Any] = {**_COMMON, "patch_size": 2, "num_classes": 10, "embed_dim": 64, "depth": 3, "num_heads": 4}
COARSE_TEACHER = {**TEACHER, "patch_size": 4}
"""With the student's patches: whole maps and token similarities cannot be resized."""
STUDENT: dict[str, Any] = {**_COMMON, "patch_size": 4, "num_classes": 0, "embed_dim": 32, "depth": 3, "num_heads": 2}


def create(args: dict[str, Any], seed: int) -> nn.Module:
    """A timm model with the given ``timm.create_model`` arguments and reproducible initial weights.

    Two choices help on a thousand images as much as several times the epochs: Xavier weights (timm's default,
    a standard deviation of 0.02, is made for wide models) and position embeddings that start as 2-D sines and cosines.
    """
    torch.manual_seed(seed)
    return sincos_pos_embed_(timm.create_model(**args, weight_init="jax"), learnable=True)


def describe(model: Any) -> dict[str, int]:
    """The numbers by which two Vision Transformers compare."""
    return {
        "heads": model.blocks[-1].attn.num_heads,
        "patches": model.patch_embed.num_patches,
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def save(model: nn.Module, args: dict[str, Any], path: Path, stats: tuple[float, float] | None = None) -> None:
    """Write ``path`` (safetensors) and beside it, as .json, the ``timm.create_model`` arguments it belongs to.

    stats: mean and standard deviation that images are normalised with; timm finds them in the model's pretrained_cfg.
    """
    from safetensors.torch import save as to_bytes

    overlay = {} if stats is None else {"pretrained_cfg_overlay": {"mean": [stats[0]], "std": [stats[1]]}}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    files.write_json(path.with_suffix(".json"), {**args, **overlay})
    files.write_bytes(path, to_bytes(weights, metadata={"format": "pt"}))


def check_reload(model: nn.Module, path: Path, images: Tensor) -> None:
    """Load ``path`` with timm and compare with the model it was saved from, both on the CPU.

    Raises:
        RuntimeError: the reloaded model's features for ``images`` differ in any bit.
    """
    # GPU libraries may choose their kernels by memory address; on the CPU equal weights give equal bits.
    images = images.cpu()
    saved, loaded = (
        extract(each, [(images, torch.zeros(len(images)))]) for each in (copy.deepcopy(model).cpu(), load(path))
    )
    if not torch.equal(saved.values, loaded.values):
        raise RuntimeError(f"{path}: the model that timm loads from it does not give the features of the one saved")
