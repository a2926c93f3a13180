"""`attnkd select` as a user types it: options are named, statuses tell what went wrong."""

import pytest
import timm
import torch
from PIL import Image

from attnkd.commands import cli
from attnkd.demo import runs
from attnkd.evaluation.embedding import sampled, tsne
from attnkd.training.run import save_student


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wild").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "wild" / f"im {index}.png")
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).state_dict(), tmp_path / "t.pth")
    return tmp_path


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
TEACHER = ["--teacher", "vit_tiny_patch16_224", "--model-kwargs", *(f"{name}={value}" for name, value in SMALL.items())]


def select(*words):
    options = ["--data", "wild", *TEACHER, "--checkpoint", "t.pth", "--num-select", "5", "--workers", "0"]
    return cli.main(["select", *options, "--out", "list.txt", *words])


def test_lists_the_images_and_reports_what_it_could_not_read(folder, capsys):
    (folder / "wild" / "broken.png").write_text("no image")
    (folder / "wild" / "two\nlines.png").write_text("no image")
    assert select() == 0
    said = capsys.readouterr()
    assert "5 of 13 images listed in list.txt, all scores in list.csv" in said.out
    assert "1 could not be read" in said.err and "1 images were left out: their names have line breaks" in said.err
    assert len((folder / "list.txt").read_text().splitlines()) == 5


def test_a_picture_of_selected_original_and_rejected_images(folder, capsys):
    (folder / "wild" / "broken.png").write_text("no image")
    (folder / "train" / "a").mkdir(parents=True)
    for index in range(3):
        Image.radial_gradient("L").convert("RGB").rotate(index * 30).save(folder / "train" / "a" / f"{index}.png")
    assert select("--picture", "points.png", "--original", str(folder)) == 0
    assert "wrote points.png" in capsys.readouterr().out
    with Image.open("points.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert select("--original", str(folder)) == 2
    assert "--original: needs the --picture" in capsys.readouterr().err
    assert select("--picture", "points.png", "--original", "nowhere") == 2
    assert "--original: 'nowhere' is no folder and no list" in capsys.readouterr().err
    assert select("--picture", "points.xyz") == 2
    assert "--picture: expected a suffix among" in capsys.readouterr().err


def test_embedding_keeps_clusters_and_sampling_is_fair():
    generator = torch.Generator().manual_seed(0)
    clouds = {name: torch.randn(40, 8, generator=generator) + 12 * shift for shift, name in enumerate("abc")}
    points = tsne(clouds)
    centres = {name: places.mean(0) for name, places in points.items()}
    for name, places in points.items():
        nearest = [min(centres, key=lambda other: ((place - centres[other]) ** 2).sum()) for place in places]
        assert len(places) == 40 and nearest.count(name) >= 38
    assert sampled(range(5), 9) == [0, 1, 2, 3, 4]
    counts = torch.bincount(torch.tensor([i for seed in range(400) for i in sampled(range(20), 5, seed)]), minlength=20)
    assert counts.sum() == 2000 and counts.min() > 60 and counts.max() < 140  # 100 each, 4.3 standard deviations


def test_a_saved_model_is_a_teacher(folder, capsys):
    save_student(folder, runs.new_classifier(runs.TEACHER, 0), runs.describe(runs.TEACHER))
    words = ["select", "--data", "wild", "--teacher", "model.safetensors", "--num-select", "3", "--out", "list.txt"]
    assert cli.main([*words, "--workers", "0", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--num-select", "13"], 2, "--num-select: expected at most 12, the number of images under wild"),
        (["--head", "best"], 2, "--head: expected 'mean' or an index from 0"),
        (["--attn-weight", "0", "--output-weight", "0"], 2, "--attn-weight, --output-weight: both are 0"),
        (["--data", "nowhere"], 2, "--data: expected a folder"),
        (["--teacher", "vit_of_mine"], 2, "--teacher: 'vit_of_mine' is neither a timm model nor"),
        (["--checkpoint", "none.pth"], 2, "none.pth: expected a file with weights"),
        (["--checkpoint", "wild/im 0.png"], 2, "im 0.png: cannot be read as a checkpoint"),
        (["--num-classes", "7"], 2, "t.pth: does not fit VisionTransformer: 2 of another shape"),
        (["--model-kwargs", "flavour=1"], 2, "vit_tiny_patch16_224: timm cannot build it with these arguments"),
        (["--std", "0"], 2, "--std: expected finite numbers above 0"),
        (["--img-size", "30"], 2, "--img-size: this model takes 32x32 pixels only, got 30"),
        (["--interpolation", "foo"], 2, "--interpolation: expected one of nearest"),
        (["--device", "abacus"], 2, "--device: expected a device PyTorch can use here, 'cpu'"),
        (["--out", "wild"], 2, "--out: cannot write wild (Is a directory)"),
        (["--out", "t.pth/list.txt"], 2, "--out: cannot make the folder t.pth"),
        (["--out", "list.csv"], 2, "--out, --scores: list and table are the same file"),
        (["--scores", "none/scores.csv"], 2, "--scores: cannot write none/scores.csv (No such file or directory)"),
    ],
)
def test_refusals_name_option_or_file(words, status, message, folder, capsys):
    assert select(*words) == status
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("attnkd select: ") and message in said
    assert not (folder / "list.txt").exists()


def test_settings_that_changed_are_named(folder, capsys):
    assert select() == 0 and select("--head", "mean") == 1
    assert "list.txt.work: holds scores made with another head" in capsys.readouterr().err
    assert select("--head", "mean", "--restart") == 0
