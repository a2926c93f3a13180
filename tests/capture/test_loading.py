"""Models by name and file: what differs is named, and nothing in a file is run."""

import json
import pickle

import pytest
import timm
import torch

from attnkd.capture.loading import image_config, load_model, load_saved
from attnkd.demo.runs import STUDENT, describe, new_classifier
from attnkd.training.run import save_student

NAME, SMALL = "test_vit", {"img_size": 32, "patch_size": 8}


@pytest.fixture
def checkpoint(tmp_path):
    def write(state=None, **options):
        path = tmp_path / "model.pth"
        torch.save(timm.create_model(NAME, **{**SMALL, **options}).state_dict() if state is None else state, path)
        return path

    return write


@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_the_classifier_is_the_checkpoints(checkpoint, classes):
    path = checkpoint(num_classes=classes)
    model = load_model("teacher", NAME, path, **SMALL)
    assert model.num_classes == classes and not model.training
    for name, value in torch.load(path).items():
        assert torch.equal(model.state_dict()[name], value)


def test_training_checkpoints_are_understood(checkpoint):
    state = timm.create_model(NAME, **SMALL).state_dict()
    path = checkpoint({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3})
    assert torch.equal(load_model("teacher", NAME, path, **SMALL).state_dict()["cls_token"], state["cls_token"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 4}, "1 of another shape (patch_embed.proj.weight"),
        ({"depth": 5}, "missing (blocks.5."),
        ({"depth": 7}, "not in the model (blocks.6."),
        ({"num_classes": 7}, "2 of another shape (head.weight (7, 64), here (10, 64)"),
    ],
)
def test_what_else_differs_is_named(checkpoint, options, words):
    asked = {"num_classes": 10} if "num_classes" in options else {}
    with pytest.raises(ValueError) as raised:
        load_model("teacher", NAME, checkpoint(**options), **SMALL, **asked)
    assert "model.pth: does not fit" in str(raised.value) and words in str(raised.value), raised.value


class Shout:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_rough_checkpoints_are_named_and_not_run(tmp_path, checkpoint, capsys):
    whole = checkpoint().read_bytes()
    rough = {
        "empty.pth": b"",
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"some words",
        "pickle.pth": pickle.dumps({"weight": Shout()}, protocol=2),
        "cut.safetensors": whole[:1000],
        "empty.safetensors": b"",
    }
    for name, content in rough.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a checkpoint of tensors"):
            load_model("teacher", NAME, tmp_path / name, **SMALL)
    torch.save({"epoch": 1, "weights": Shout()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code.pth: cannot be read as a checkpoint of tensors"):
        load_model("teacher", NAME, tmp_path / "code.pth", **SMALL)
    for state, message in (
        ({"epoch": 1}, "expected weights by name"),
        ([1], "cannot be read|expected weights by name"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model("teacher", NAME, checkpoint(state), **SMALL)
    with pytest.raises(ValueError, match="none.pth: expected a file with weights"):
        load_model("teacher", NAME, tmp_path / "none.pth", **SMALL)
    assert "ran" not in capsys.readouterr().out


def test_saved_models_and_their_descriptions(tmp_path):
    path = tmp_path / "model.safetensors"
    save_student(tmp_path, new_classifier(STUDENT, 0), describe(STUDENT))
    assert load_saved(path).pretrained_cfg["mean"] == [0.31]
    described = json.loads(path.with_suffix(".json").read_text())
    for change, message in (
        ("{", "expected the arguments of timm.create_model as JSON"),
        (json.dumps([1]), "expected the arguments of timm.create_model as JSON"),
        (json.dumps({**described, "checkpoint_path": "other.pth"}), "has 'checkpoint_path', which loads other weights"),
        (json.dumps({**described, "flavour": 3}), "timm cannot build it with these arguments"),
        (json.dumps({**described, "embed_dim": 64}), "does not fit"),
    ):
        path.with_suffix(".json").write_text(change)
        with pytest.raises(ValueError, match=message):
            load_saved(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": [0.0]}, "std: expected finite numbers above 0"),
        ({"mean": [float("nan")]}, "mean: expected finite numbers"),
        ({"mean": [0.5, 0.5]}, "mean: expected 1 or 3 numbers for 3 channels"),
        ({"img_size": 30}, "img_size: this model takes 32x32 pixels only, got 30"),
        ({"interpolation": "foo"}, "interpolation: expected one of nearest, bilinear"),
        ({"crop_pct": 0.0}, "crop_pct: expected a share above 0"),
    ],
)
def test_image_options_are_checked(options, message):
    model = timm.create_model(NAME, **SMALL, dynamic_img_size=False)
    with pytest.raises(ValueError, match=message):
        image_config(model, **options)
    assert image_config(model, mean=[0.1], crop_pct=1.0)["input_size"] == (3, 32, 32)
