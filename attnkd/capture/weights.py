"""Weights from files: published checkpoints of other projects under timm's names. Tensors only, no code in a file can run."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters import find_adapter
from attnkd.capture.adapters.timm_models import Timm

NESTED = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "student")
"""Where checkpoints keep weights; the first that is there counts: averages and teachers before what was trained."""
WRAPPERS = ("_orig_mod.", "module.")
"""What DistributedDataParallel and torch.compile put before names."""
BACKBONES = ("backbone.", "base_encoder.")
"""What DINO, iBOT and Mugs, and MoCo v3, put before those of the model among others."""
BESIDE = ("decoder_", "mask_token", "masked_embed", "relation_", "predictor.", "momentum_encoder.", "queue")
"""Beginnings of what is trained beside a backbone, in MAE, iBOT, Mugs and MoCo v3. Left out."""


def load_weights(model: nn.Module, path: str | Path, keep_classifier: bool = False) -> nn.Module:
    """Load a checkpoint into a Vision Transformer, in place. Models of other libraries take their own weights, name by name.

    For a timm model, reads what timm writes, and what DINO, iBOT, Mugs, MoCo v3, MAE and DeiT publish: weights on their own or nested in a
    checkpoint of a training run, with the names' prefixes taken off, the decoder and projection heads left out, and position
    embeddings resized to the model's patch grid. The table is in docs/weights.md.

    Args:
        model: gets the checkpoint's classifier, or none, where it differs.
        path: .safetensors, or what ``torch.save`` wrote; tensors only, so that no code in it can run.
        keep_classifier: refuse a checkpoint with another classifier too.

    Returns:
        ``model``.

    Raises:
        ValueError: no such file, a file that cannot be read, or weights that are missing, of another shape, or not known. The model is
            then as it was.

    Example::

        model = attnkd.load_weights(timm.create_model("vit_small_patch16_224"), "dino_deitsmall16_pretrain.pth")
    """
    if not isinstance(model, nn.Module):
        swapped = "; the model comes first, then the file" * isinstance(path, nn.Module)
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}{swapped}")
    path = Path(path)
    state = read_weights(path)
    before = None
    if isinstance(find_adapter(model), Timm):
        state = _resized(model, _backbone(state))
        if not keep_classifier:
            before = _parts(model)
            _match_classifier(model, state)
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "not in the model": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, here {tuple(own[key].shape)}"
            for key in own  # in the model's order
            if key in state and own[key].shape != state[key].shape
        ],
    }
    if any(problems.values()):
        if before is not None:
            _restore(before)
        words = (f"{len(keys)} {what} ({_listed(keys)})" for what, keys in problems.items() if keys)
        raise ValueError(f"{path}: does not fit {type(model).__name__}: {'; '.join(words)}")
    model.load_state_dict(state)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the names of wrappers.

    Raises:
        ValueError: no such file, a file that cannot be read, or one without weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file with weights, there is {'none' if not path.exists() else 'no file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the settings of a run: words and numbers
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a decoder meets in an empty, cut or foreign file
        refused = re.search(r"\bGLOBAL (\S+)", str(error))
        if refused is not None:
            raise ValueError(
                f"{path}: cannot be read as a checkpoint of tensors: it holds {refused[1]}, whose reading could run code; save the weights "
                "alone, torch.save(model.state_dict(), path). If you trust the file, torch.load(path, weights_only=False) reads it"
            ) from None
        raise ValueError(f"{path}: cannot be read as a checkpoint of tensors ({first_line(error)})") from None
    found = content
    if isinstance(content, Mapping):
        found = next((content[name] for name in NESTED if isinstance(content.get(name), Mapping)), content)
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path}: expected weights by name, or a checkpoint with one of {', '.join(map(repr, NESTED))}"
        )
    state = {}
    for name, value in found.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        state[name] = value
    return state


def first_line(error: BaseException) -> str:
    """Class and first line of an error, for a message: without the codes of a terminal's colours, as PyTorch's have."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights, without what was trained beside it."""
    for prefix in BACKBONES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            break
    kept = {name: value for name, value in state.items() if not name.startswith(BESIDE)}
    if "head.weight" not in kept:  # a projection head, which has layers of its own
        kept = {name: value for name, value in kept.items() if not name.startswith("head.")}
    return kept


def _resized(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings for the model's patch grid, if theirs is another square one."""
    own, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if own is None or theirs is None or grid is None or theirs.ndim != 3 or own.shape == theirs.shape:
        return state
    prefix = own.shape[1] - grid[0] * grid[1]
    side = round(max(theirs.shape[1] - prefix, 0) ** 0.5)
    if side < 1 or side * side != theirs.shape[1] - prefix or theirs.shape[2] != own.shape[2]:
        return state
    from timm.layers import resample_abs_pos_embed

    return {**state, "pos_embed": resample_abs_pos_embed(theirs, list(grid), num_prefix_tokens=prefix)}


def _match_classifier(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give the model as many classes as the checkpoint has, 0 if it has no classifier."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    head = heads if isinstance(heads, str) else heads[0]
    weight = state.get(f"{head}.weight")
    classes = 0 if weight is None else len(weight)
    if hasattr(model, "reset_classifier") and model.num_classes != classes:
        model.reset_classifier(classes)


def _parts(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """All that :func:`_match_classifier` may replace. No tensor is copied."""
    return [
        (module, {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()})
        for module in model.modules()
    ]


def _restore(parts: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, attributes in parts:
        vars(module).clear()
        vars(module).update(attributes)


def _listed(keys: list[str], most: int = 5) -> str:
    more = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {more} more" if more > 0 else "")
