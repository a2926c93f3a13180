"""Activation checkpointing: the same training with fewer saved activations."""

import pytest
import timm
import torch

from attnkd.capture.checkpointing import recompute_blocks
from attnkd.training import config
from attnkd.training.loop import Trainer
from tests.training.test_train import experiment, log, teachers, train, weights  # noqa: F401  fixtures


@pytest.mark.parametrize("method", config.METHODS)
def test_recomputed_blocks_train_the_same_student_with_fewer_saved_activations(
    method, experiment, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    """With dropout: the second run of a block draws the same numbers."""
    saved, step = {}, Trainer._step

    def counted(self, batches):
        bytes_of = {}

        def keep(tensor):
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = step(self, batches)
        saved[self.carrying.checkpointing] = sum(bytes_of.values())
        return result

    monkeypatch.setattr(Trainer, "_step", counted)
    for on in (False, True):
        drop = config.ROWS[f"{method}_digits"].defaults["student_kwargs"] | {"proj_drop_rate": 0.1}
        assert train(experiment(method, str(on), student_kwargs=drop, run__checkpointing=on, run__log_steps=1)).finished
    assert log(tmp_path / "True") == log(tmp_path / "False")
    assert weights(tmp_path / "True") == weights(tmp_path / "False")
    assert saved[True] < 0.6 * saved[False], saved


def test_a_model_that_cannot_is_named():
    for model, why in (
        (timm.create_model("convit_tiny"), "gradient checkpointing not supported"),
        (torch.nn.Linear(2, 2), "neither set_grad_checkpointing"),
    ):
        with pytest.raises(ValueError, match=f"student: {type(model).__name__} cannot recompute .*{why}"):
            recompute_blocks(model, "student")
