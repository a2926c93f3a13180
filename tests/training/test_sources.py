"""Data sets by name: which images a split has, and how they are labelled."""

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("sklearn")

from attnkd.capture.loading import image_config, image_transform
from attnkd.evaluation.features import batches
from attnkd.training.sources import open_source, subset, with_classes_of


def fill(folder, classes, each=2):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")


def test_a_split_is_its_folder_and_nothing_else(tmp_path):
    data = str(tmp_path / "data")
    fill(tmp_path / "data" / "training", ["a", "b"], 3)
    fill(tmp_path / "data" / "val", ["a", "b"], 1)
    fill(tmp_path / "data" / "odd", ["a"], 1)
    assert [len(open_source(data, split).images) for split in ("train", "validation", "val", "odd")] == [6, 2, 2, 1]
    with pytest.raises(ValueError, match="split: .*data has no folder 'nosuch'; it has the splits training, val"):
        open_source(data, "nosuch")
    assert len(open_source(str(tmp_path / "data" / "training"), "train").images) == 6
    with pytest.raises(ValueError, match="no folder 'validation'; it has no splits, and is 'train' as a whole"):
        open_source(str(tmp_path / "data" / "training"), "validation")
    fill(tmp_path / "half" / "validation", ["a"])
    with pytest.raises(ValueError, match="no folder 'train'; it has the splits validation"):
        open_source(str(tmp_path / "half"), "train")


@pytest.mark.parametrize("kind", ["folder", "torch/folder"])
def test_the_other_split_is_labelled_as_the_training_images_are(kind, tmp_path):
    """A class that it lacks shifts no other."""

    def split(name):
        data = {"name": str(tmp_path)} if kind == "folder" else {"name": kind, "root": str(tmp_path)}
        return open_source(split=name, **data)

    fill(tmp_path / "train", ["a", "b", "c10", "c9"])
    fill(tmp_path / "validation", ["b", "c9"])
    train, val = split("train"), split("validation")
    order = sorted("a b c10 c9".split()) if kind == "torch/folder" else ["a", "b", "c9", "c10"]  # timm counts
    same = with_classes_of(train, val)
    assert [label for _, label in same.images] == [
        order.index(name) for name in ("b", "b", "c9", "c9")
    ] and same.num_classes == train.num_classes == 4
    assert [label for _, label in subset(same, "0.5").images] == [order.index(name) for name in ("b", "c9")]
    assert with_classes_of(train, train) is train
    fill(tmp_path / "more", ["a", "d", "e"])
    with pytest.raises(
        ValueError, match="data: expected the classes of the training images, 4, .*got 'd' and 1 more there"
    ):
        with_classes_of(train, split("more"))


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_for_models_of_either_number_of_channels(channels):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=channels, depth=1)
    source = open_source("digits", "validation", mode={1: "L", 3: "RGB"}[channels])
    images, labels = next(
        iter(batches(source.images, image_transform(image_config(model, mean=[0.5], std=[0.5])), 4, 0))
    )
    assert images.shape == (4, channels, 16, 16) and images.std() > 0.1 and torch.equal(images[:, :1], images[:, -1:])
    assert len(subset(source, "0.1").images) == len(subset(open_source("digits", "validation", mode="L"), "0.1").images)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="data_root: expected the folder in which torch/cifar10 is kept, got None"):
        open_source("torch/cifar10", "train")
    fill(tmp_path, ["a"])
    (tmp_path / "list.txt").write_text("a/0.png\n")
    with pytest.raises(ValueError, match="subset: expected images with labels; a list"):
        subset(open_source(str(tmp_path / "list.txt"), "train", root=str(tmp_path)), "0.5")
    (tmp_path / "list.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="data: .*list.txt is a list without a name"):
        open_source(str(tmp_path / "list.txt"), "train", root=str(tmp_path))
    fill(tmp_path, ["b"])
    (tmp_path / "names.txt").write_text("0.png\n")
    with pytest.raises(ValueError, match="subset: .*lists '0.png', which 2 images are called; list their folders too"):
        subset(open_source(str(tmp_path), "train"), str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("b/0.png\n\n")
    assert [label for _, label in subset(open_source(str(tmp_path), "train"), str(tmp_path / "names.txt")).images] == [
        1
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_end_an_evaluation_in_one_line(workers, tmp_path):
    fill(tmp_path, ["a"])
    for path in (tmp_path / "a").iterdir():
        path.write_text("junk")
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1)
    with pytest.raises(RuntimeError, match="^[^\n]*Failed to load 10 consecutive samples$"):
        list(batches(open_source(str(tmp_path), "train").images, image_transform(image_config(model)), 2, workers))
