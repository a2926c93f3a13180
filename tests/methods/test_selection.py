"""`attnkd select` on real images: scores, choice, resuming, unreadable files, refusals."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.task import ClassificationTask
from torch.nn import functional as F

from attnkd.demo import models, wild
from attnkd.demo.data import RandomAffine, load_digits
from attnkd.demo.training import Recipe, train
from attnkd.methods.probe_scores import ProbeScorer, cosine_to_uniform


@pytest.fixture(scope="module")
def digits():
    return load_digits(960, 60)


@pytest.fixture(scope="module")
def world(tmp_path_factory, digits):
    """A teacher that learnt digits for some seconds, and a folder of 60 digits it has not seen and 140 pieces of photographs."""
    folder = tmp_path_factory.mktemp("wild")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher = models.create(models.COARSE_TEACHER, seed=0)
    task = ClassificationTask(teacher)
    train(
        task, digits.train_images, digits.train_labels, Recipe(12), seed=0, state_path=folder / "state.pt", fingerprint="",
        augment=RandomAffine(digits.background),
    )  # fmt: skip
    torch.set_num_threads(threads)
    models.save(teacher.eval(), models.COARSE_TEACHER, folder / "teacher.safetensors")
    wild.make_wild_folder(folder / "images", digits, digits.test_images, 140, seed=0)
    return folder, teacher


@pytest.fixture
def command(world, digits, tmp_path):
    """The command line, for 60 images; on the CPU, since a GPU's convolutions round to TF32 and depend on the batch size."""
    folder, _ = world
    arguments = wild.select_arguments(
        folder / "images", folder / "teacher.safetensors", models.COARSE_TEACHER, digits, 60, tmp_path / "list.txt"
    )
    return [*arguments, "--device", "cpu"]


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


# --- scores -----------------------------------------------------------------------------------------------------------


def test_cosine_to_uniform_is_the_cosine():
    probe = torch.rand(5, 16)
    torch.testing.assert_close(cosine_to_uniform(probe), F.cosine_similarity(probe, torch.full_like(probe, 1 / 16)))
    one_hot = F.one_hot(torch.tensor([3]), 16).float()
    torch.testing.assert_close(cosine_to_uniform(one_hot), torch.tensor([0.25]))  # 1/√P, the least there is


@pytest.mark.parametrize("head", [0, 2, "mean"])
def test_scores_are_those_of_the_materialised_map(head):
    """The equations, from attention maps written down the plain way."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=6,
        num_heads=3,
        num_classes=10,
        reg_tokens=1,
    ).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)  # so that the rows are not uniform
    images = torch.randn(4, 3, 32, 32)
    inputs = {}
    handles = [
        model.blocks[i].attn.register_forward_hook(lambda m, args, out, i=i: inputs.__setitem__(i, args[0]))
        for i in (1, 3)
    ]
    logits = model(images)
    for handle in handles:
        handle.remove()
    scores = ProbeScorer(model, head=head)(images)
    for column, i in enumerate((1, 3)):  # a third and two thirds of 6 blocks
        attn = model.blocks[i].attn
        q, k, _ = attn.qkv(inputs[i]).view(4, 18, 3, 3, 8).permute(2, 0, 3, 1, 4)
        keys = torch.cat([k[:, :, :1], k[:, :, 2:]], 2)  # without the register
        row = (q[:, :, :1] @ keys.mT * 8**-0.5).softmax(-1)[:, :, 0, 1:]
        probe = row.mean(1) if head == "mean" else row[:, head]
        torch.testing.assert_close(scores.attention[:, column], F.cosine_similarity(probe, torch.ones_like(probe)))
    torch.testing.assert_close(scores.output, F.cross_entropy(logits, logits.argmax(1), reduction="none"))
    assert torch.equal(scores.label, logits.argmax(1))
    want = 0.05 * (scores.attention[:, 0] + scores.attention[:, 1]) + 0.9 * scores.output
    torch.testing.assert_close(scores.value(), want)


def test_prefers_digits_to_random_choice(world, command):
    """Six of ten images kept must be digits where random choice keeps three."""
    kept = wild.select(command)
    assert len(set(kept)) == 60
    found = sum(name.startswith("digits/") for name in kept)
    assert found >= 36, f"{found} of 60 kept images are digits"


def test_list_and_table_agree_with_the_scorer(world, command, digits, tmp_path):
    folder, teacher = world
    kept = wild.select(command)
    rows = table(tmp_path / "list.csv")
    assert set(rows) == {str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png")}
    names = list(rows)
    scores = ProbeScorer(teacher)(wild.load_images(folder / "images", names, digits))
    values = scores.value()
    torch.testing.assert_close(torch.tensor([float(rows[n]["value"]) for n in names]), values, rtol=1e-4, atol=1e-5)
    assert [int(rows[n]["label"]) for n in names] == scores.label.tolist()
    listed = [float(rows[n]["value"]) for n in kept]
    assert listed == sorted(listed) and {n for n in names if rows[n]["selected"] == "1"} == set(kept)
    assert max(listed) <= min(float(rows[n]["value"]) for n in names if n not in set(kept))


# --- streaming --------------------------------------------------------------------------------------------------------


def test_worker_processes_change_nothing(command, tmp_path):
    first = wild.select([*command, "--batch-size", "16"])
    again = wild.select([*command, "--batch-size", "7", "--workers", "2", "--out", str(tmp_path / "other.txt")])
    assert first == again and table(tmp_path / "list.csv") == table(tmp_path / "other.csv")


def test_resumes_after_a_kill_and_scores_nothing_twice(command, tmp_path, monkeypatch):
    """Cut down in the middle of a row, it goes on behind the last whole one."""
    whole = wild.select([*command, "--batch-size", "16"])
    parts = tmp_path / "list.txt.work" / "scores.csv"
    lines = parts.read_text().splitlines(keepends=True)
    (tmp_path / "list.txt").unlink()
    parts.write_text("".join(lines[:101]) + lines[101][:9])
    scored = []
    forward = ProbeScorer.forward
    monkeypatch.setattr(
        ProbeScorer, "forward", lambda self, images: scored.append(len(images)) or forward(self, images)
    )
    assert wild.select([*command, "--batch-size", "16"]) == whole
    assert sum(scored) == 200 - 101
    assert [line.split(",")[0] for line in parts.read_text().splitlines()] == [line.split(",")[0] for line in lines]


def test_really_killed(world, command, tmp_path):
    """A process that dies by SIGKILL after some batches; the next one finishes."""
    code = (
        "import os, sys\n"
        "from attnkd.demo import wild\n"
        "from attnkd.methods.probe_scores import ProbeScorer\n"
        "forward, calls = ProbeScorer.forward, []\n"
        "def dying(self, images):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), 9)\n"
        "    return forward(self, images)\n"
        "ProbeScorer.forward = dying\n"
        "wild.select(sys.argv[1:])\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [*command, "--batch-size", "16"]
    result = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True)
    assert result.returncode == -9
    assert not (tmp_path / "list.txt").exists()
    done = (tmp_path / "list.txt.work" / "scores.csv").read_text().count("\n")
    assert done == 5 * 16
    assert len(wild.select(command)) == 60


def test_another_number_or_weight_needs_no_new_scores(command, monkeypatch):
    wild.select(command)
    monkeypatch.setattr(ProbeScorer, "forward", lambda *_: pytest.fail("scored again"))
    fewer = wild.select([*command, "--num-select", "10"])
    assert len(fewer) == 10
    assert wild.select([*command, "--num-select", "10", "--attn-weight", "0"]) != fewer


def test_unreadable_files_are_reported_and_skipped(world, digits, tmp_path, capsys):
    folder, _ = world
    images = tmp_path / "images"
    (images / "a b" / 'ü,"q"').mkdir(parents=True)
    good = sorted((folder / "images" / "digits").glob("*.png"))[:5]
    for path in good:
        Image.open(path).save(images / "a b" / 'ü,"q"' / path.name)
    (images / "empty.png").write_bytes(b"")
    (images / "cut.png").write_bytes(good[0].read_bytes()[:60])
    (images / "text.jpg").write_text("no image")
    (images / "notes.txt").write_text("not even called an image")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "loop").symlink_to(images)
    arguments = wild.select_arguments(
        images, folder / "teacher.safetensors", models.COARSE_TEACHER, digits, 5, tmp_path / "list.txt"
    )
    assert sorted(Path(name).name for name in wild.select([*arguments, "--batch-size", "2"])) == sorted(
        p.name for p in good
    )
    assert "4 could not be read" in capsys.readouterr().err
    rows = table(tmp_path / "list.csv")
    assert {name for name, row in rows.items() if row["error"]} == {"empty.png", "cut.png", "text.jpg", "gone.png"}
    assert "UnidentifiedImageError" in rows["text.jpg"]["error"] and rows["text.jpg"]["value"] == ""


def test_memory_does_not_grow_with_the_folder(tmp_path):
    """50 times the files cost no more memory than the file system itself: names are never collected."""
    import tracemalloc

    from attnkd.methods.image_stream import list_images

    peaks = []
    for count in (100, 5000):
        folder = tmp_path / str(count)
        for index in range(count):
            path = folder / f"{index % 10}" / f"{index:060d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        tracemalloc.start()
        assert list_images(folder, tmp_path / f"{count}.txt") == (count, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse(capsys, arguments) -> str:
    with pytest.raises(RuntimeError, match="select failed"):
        wild.select(arguments)
    return capsys.readouterr().err


WRONG = {
    "too many": (["--num-select", "201"], "--num-select: expected at most 200, the number of images under"),
    "none": (["--num-select", "0"], "--num-select: expected at least 1"),
    "no folder": (["--data", "nowhere"], "--data: expected a folder"),
    "head": (["--head", "4"], "head: expected 'mean' or an index from 0 to 3"),
    "head name": (["--head", "best"], "--head: expected 'mean' or an index from 0"),
    "block": (["--blocks", "3"], r"blocks: expected indices in [-3, 2] for 3 blocks, got 3"),
    "weights": (["--attn-weight", "0", "--output-weight", "0"], "both are 0"),
    "weight": (["--attn-weight", "-1"], "--attn-weight: expected a finite number >= 0"),
    "checkpoint": (["--checkpoint", "nowhere.safetensors"], "--checkpoint: expected a file"),
    "mean": (["--mean", "0.5", "0.5"], "--mean: expected 1 or 1 numbers for 1 channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals_name_the_option(case, command, capsys):
    options, message = WRONG[case]
    assert message in refuse(capsys, [*command, *options])


def test_refuses_an_empty_folder_and_unreadable_images(command, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--data: no images under" in refuse(capsys, [*command, "--data", str(tmp_path / "empty")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("")
    out = str(tmp_path / "broken.txt")
    message = refuse(capsys, [*command, "--data", str(tmp_path / "broken"), "--out", out, "--num-select", "1"])
    assert "expected at most 0, the number of images that can be read" in message and not Path(out).exists()


def test_refuses_scores_made_with_other_settings(command, capsys):
    wild.select(command)
    assert "holds scores made with another head" in refuse(capsys, [*command, "--head", "mean"])
    assert len(wild.select([*command, "--head", "mean", "--restart"])) == 60


def test_refuses_teachers_without_a_probe():
    for options, message in (
        ({"class_token": False, "global_pool": "avg", "num_classes": 10}, "no class token"),
        ({"num_classes": 0}, "expected a classifier"),
    ):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, **options)
        with pytest.raises(ValueError, match=message):
            ProbeScorer(model)


def test_refuses_scores_that_are_not_finite(world, command, capsys, monkeypatch):
    forward = ProbeScorer.forward
    monkeypatch.setattr(ProbeScorer, "forward", lambda self, images: forward(self, images * torch.nan))
    assert "the teacher's scores are not finite" in refuse(capsys, command)
