"""The state of a run in one safetensors file: tensors as such, everything else as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from attnkd import files

FORMAT = 1
NAME = "checkpoint.safetensors"
_TENSOR, _TUPLE, _ITEMS = "tensor", "tuple", "items"


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace ``path`` in one step: whoever reads it, even after a kill, finds the old state or the new one, whole.

    Args:
        state: dicts, lists and tuples of tensors, numbers, strings and None.
    """
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    plain = json.dumps({"format": FORMAT, "state": _pack(state, tensors)})
    files.write_bytes(path, to_bytes(tensors, metadata={"attnkd": plain}))


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote, on the CPU; None where there is no file.

    Raises:
        RuntimeError: a file that is cut off, damaged, or not one of ours.
    """
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads((file.metadata() or {})["attnkd"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}, expected {FORMAT}")
        return _unpack(plain["state"], tensors)
    except Exception as error:  # whatever the reader meets in a damaged file
        raise RuntimeError(
            f"{path}: cannot be read as the checkpoint of a run ({type(error).__name__}: {error}); delete it to train from "
            "the start"
        ) from None


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; tensors go into ``tensors`` and leave their name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):  # as pairs: keys may be numbers, and be called 'tensor'
        return {_ITEMS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers and strings, got {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}
