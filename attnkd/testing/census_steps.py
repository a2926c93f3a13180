"""Which methods take a step on a model: a copy of it teaches another, and loss and gradients must be numbers."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import attnkd
from attnkd.capture.adapters import find_adapter
from attnkd.methods.attention_probe import AttentionProbe
from attnkd.methods.attn_distill import AttnDistill
from attnkd.methods.head_kd import HeadKD
from attnkd.methods.minilm import MiniLM
from attnkd.methods.ssta import SSTA
from attnkd.methods.task import DistillTask

_HOME = Path(attnkd.__file__).parent
_ALONE: dict[str, Any] = {"pa_weight": 0.0}
_Make = Callable[[nn.Module, nn.Module, dict[str, Any], str], Any]
STEPS: dict[str, dict[str, _Make]] = {
    # method: with what said of it, the first of which that runs counts: (student, teacher, the attention, its block) → task
    "AttnDistill": {
        "": lambda s, t, at, _: AttnDistill(s, t, **at, verbose=False),
        "rows='mean'": lambda s, t, at, _: AttnDistill(s, t, **at, rows="mean", verbose=False),
        "attention alone": lambda s, t, at, _: AttnDistill(s, t, **at, **_ALONE, verbose=False),
        "rows='mean', attention alone": lambda s, t, at, _: AttnDistill(
            s, t, **at, rows="mean", **_ALONE, verbose=False
        ),
    },
    "HeadKD": {
        "": lambda s, t, at, _: HeadKD(s, t, **at, mode="block_to_block", alpha=0.0, criterion=None, verbose=False)
    },
    "SSTA": {
        "": lambda s, t, at, _: SSTA(s, t, **at, teacher_heads=[0], criterion=None, stop_epoch=None, verbose=False)
    },
    "AttentionProbe": {
        "": lambda s, t, _, block: AttentionProbe(s, t, 0.9, blocks=block, teacher_blocks=block, verbose=False),
        "rows='mean'": lambda s, t, _, block: AttentionProbe(
            s, t, 0.9, blocks=block, teacher_blocks=block, rows="mean", verbose=False
        ),
    },
    "MiniLM": {"": lambda s, t, at, _: MiniLM(s, t, **at, verbose=False)},
}


class Fault(Exception):
    """A method that took a model and then failed in another way than by refusing it."""


def steps(model: nn.Module, teacher: nn.Module, path: str, inputs: Any) -> dict[str, str]:
    """By method: how it ran ('' in its default form), or 'refused: ' and why its last form was.

    Args:
        model, teacher: two of one kind; left as they are.
        path: of the attention that is compared.
        inputs: [B, C, H, W], or text as a tokenizer gives it.

    Raises:
        Fault: see there.
    """
    at, block = {"blocks": [path], "teacher_blocks": [path]}, path.rpartition(".")[0]
    found = {}
    for method, forms in STEPS.items():
        pair: tuple[nn.Module, nn.Module] | None = None
        for form, make in forms.items():
            pair = pair or (_classifier(model, method), _classifier(teacher, method))
            try:
                task = make(*pair, at, block)
            except Exception as error:
                found[method] = _refusal(method, error)
                continue
            try:
                _step(task, inputs)
            except Exception as error:
                found[method], pair = _refusal(method, error), None
                continue
            found[method] = form
            break
    return found


def _step(task: DistillTask, inputs: Any) -> None:
    task.train()
    loss: Tensor = task(inputs)["loss"]
    loss.backward()
    grads = [parameter.grad for parameter in task.student.parameters() if parameter.grad is not None]
    if not bool(loss.isfinite()) or not all(bool(grad.isfinite().all()) for grad in grads):
        raise ArithmeticError("loss or gradients are not finite")
    if not any(bool(grad.any()) for grad in grads):
        raise ArithmeticError("no parameter has a gradient")


def _classifier(model: nn.Module, method: str) -> nn.Module:
    """A copy; where a method needs classes, of timm's models without any with some."""
    model = copy.deepcopy(model)
    adapter = find_adapter(model)
    if method == "AttentionProbe" and adapter is not None and adapter.num_classes(model) == 0:
        reset: Any = getattr(model, "reset_classifier", None)
        if reset is not None:
            reset(3)
    return model


def _refusal(method: str, error: Exception) -> str:
    """What the package itself raised with a reason. What PyTorch or a model raises is a fault."""
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = Path(frames[-1][0].f_code.co_filename).is_relative_to(_HOME)
    if not ours or not isinstance(error, (TypeError, ValueError, NotImplementedError, RuntimeError)):
        raise Fault(f"{method}: {type(error).__name__}: {error}") from error
    return f"refused: {error}"
