"""A student as an ONNX graph, for any number of images, checked against the model with ONNX's own reference evaluator."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from attnkd import files
from attnkd.capture.adapters import adapter_for
from attnkd.capture.models import evaluating

NAME = "model.onnx"
TOLERANCE = 1e-3
"""How far an output may be off, relative to the largest one: other orders of sums, not other sums."""


def require_onnx() -> None:
    """Raises: ModuleNotFoundError: the packages are not there."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'onnx: needs {", ".join(missing)}: pip install "attnkd[onnx]"')


class _Output(nn.Module):
    """The model's output alone, whatever its library wraps it in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tokens, output = adapter_for(self.model).run(self.model, images, True)
        return tokens if output is None else output


@torch.no_grad()
def write_onnx(model: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    """Replace ``path`` by the graph of images [B, C, H, W] → the model's output, for any B.

    Args:
        shape: (C, H, W) of the images.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        RuntimeError: the graph computes something else than the model.
    """
    require_onnx()
    with evaluating(model), tempfile.TemporaryDirectory(dir=path.parent) as made:
        wrapped, file = _Output(model).eval(), Path(made, NAME)
        torch.onnx.export(
            wrapped,
            (torch.zeros(2, *shape),),
            file,
            input_names=["images"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        _check(wrapped, file, shape)
        files.write_bytes(path, file.read_bytes())


def _check(model: nn.Module, file: Path, shape: tuple[int, ...]) -> None:
    from onnx.reference import ReferenceEvaluator

    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    (found,), expected = ReferenceEvaluator(str(file)).run(None, {"images": images.numpy()}), model(images)
    error = (torch.as_tensor(found) - expected).abs().max() / expected.abs().max()
    if not error < TOLERANCE:
        raise RuntimeError(f"onnx: the graph's output is off by {error:.1e} of the largest number; no file was written")
