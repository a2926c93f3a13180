"""Choosing images: scores, choice, resuming, unreadable files, refusals, on real images."""

import copy
import csv
import io
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from attnkd import files
from attnkd.capture.loading import image_config, image_transform
from attnkd.demo.data import digits_folder, wild_folder
from attnkd.demo.runs import TEACHER, Runs
from attnkd.methods.probe_scores import ProbeScorer, cosine_to_uniform
from attnkd.methods.selection import select_images


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher that learnt digits for some seconds, and a folder of 60 digits it has not seen and 140 pieces of photographs."""
    folder = tmp_path_factory.mktemp("wild")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = digits_folder(folder, 960, 777, 0)
    runs = Runs(folder, torch.device("cpu"), print)
    arguments = {**TEACHER, "patch_size": 4}
    teacher = runs.supervise("teacher", arguments, 0, digits, 12, lambda model: {}).model
    torch.set_num_threads(threads)
    wild_folder(folder / "images", digits, 60, 140, seed=0)
    return folder, teacher


def transform(teacher):
    return image_transform(image_config(teacher))


@pytest.fixture
def select(world, tmp_path):
    """``select_images`` for 60 images; on the CPU, since a GPU's convolutions round to TF32 and depend on the batch size."""
    folder, teacher = world

    def run(**options) -> list[str]:
        where = {"data": folder / "images", "out": tmp_path / "list.txt", "num_select": 60}
        defaults = {"device": torch.device("cpu"), "progress": False, "transform": transform(teacher)}
        return select_images(teacher, **{**where, **defaults, **options}).names()

    return run


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


def test_prefers_digits_to_random_choice(select):
    """Six of ten images kept must be digits where random choice keeps three."""
    kept = select()
    assert len(set(kept)) == 60
    found = sum(name.startswith("digits/") for name in kept)
    assert found >= 36, f"{found} of 60 kept images are digits"


def test_list_and_table_agree_with_the_scorer_and_the_teacher_is_left_alone(world, select, tmp_path):
    folder, teacher = world
    kept = select()
    assert type(teacher.blocks[0].attn).__name__ == "Attention"
    rows = table(tmp_path / "list.csv")
    assert set(rows) == {str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.png")}
    names = list(rows)
    images = [transform(teacher)(Image.open(folder / "images" / name)) for name in names]
    scores = ProbeScorer(copy.deepcopy(teacher))(torch.stack(images))
    values = scores.value()
    torch.testing.assert_close(torch.tensor([float(rows[n]["value"]) for n in names]), values, rtol=1e-4, atol=1e-5)
    assert [int(rows[n]["label"]) for n in names] == scores.label.tolist()
    listed = [float(rows[n]["value"]) for n in kept]
    assert listed == sorted(listed) and {n for n in names if rows[n]["selected"] == "1"} == set(kept)
    assert max(listed) <= min(float(rows[n]["value"]) for n in names if n not in set(kept))


# --- streaming --------------------------------------------------------------------------------------------------------


def test_worker_processes_change_nothing(select, tmp_path):
    first = select(batch_size=16)
    again = select(batch_size=7, workers=2, out=tmp_path / "other.txt")
    assert first == again and table(tmp_path / "list.csv") == table(tmp_path / "other.csv")


def test_goes_on_behind_the_last_whole_batch_and_ends_with_the_same_bytes(select, tmp_path, monkeypatch):
    """Cut down in the middle of a row."""
    select(batch_size=16)
    files = [tmp_path / "list.txt", tmp_path / "list.csv", tmp_path / "list.txt.work" / "scores.csv"]
    whole = [path.read_bytes() for path in files]
    lines = whole[2].splitlines(keepends=True)
    files[2].write_bytes(b"".join(lines[:101]) + lines[101][:9])
    files[0].unlink()
    scored = []
    forward = ProbeScorer.forward
    monkeypatch.setattr(
        ProbeScorer, "forward", lambda self, images: scored.append(len(images)) or forward(self, images)
    )
    select(batch_size=16)
    assert sum(scored) == 200 - 96
    assert [path.read_bytes() for path in files] == whole


def test_another_number_or_weight_needs_no_new_scores(select, monkeypatch):
    select()
    monkeypatch.setattr(ProbeScorer, "forward", lambda *_: pytest.fail("scored again"))
    fewer = select(num_select=10)
    assert len(fewer) == 10
    assert select(num_select=10, attn_weight=0) != fewer


def huge_png() -> bytes:
    """A picture of 20,000 x 20,000 pixels in a few bytes."""
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    whole = bytearray(content.getvalue())
    whole[16:24] = struct.pack(">II", 20_000, 20_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


@pytest.fixture
def rough(world, tmp_path):
    """A folder with 5 digits under odd names, and everything that only looks like an image."""
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
    (images / "device.png").symlink_to("/dev/zero")
    (images / "loop").symlink_to(images)
    (images / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (images / "bomb.png").write_bytes(huge_png())
    Image.new("L", (1, 3000)).save(images / "narrow.png")
    os.mkfifo(images / "pipe.png")
    return images


REASONS = {
    "empty.png": "UnidentifiedImageError",
    "cut.png": "OSError",
    "text.jpg": "UnidentifiedImageError",
    "gone.png": "FileNotFoundError",
    "device.png": "not an ordinary file",
    "pipe.png": "not an ordinary file",
    "script.png": "UnidentifiedImageError",
    "bomb.png": "DecompressionBomb",
    "narrow.png": "too long and narrow",
}


def test_files_that_are_no_images_are_reported_skipped_and_read_again(rough, world, select, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))  # Ghostscript
    kept = select(data=rough, num_select=5, batch_size=2)
    assert not started
    assert {Path(name).parent.name for name in kept} == {'ü,"q"'}
    rows = table(tmp_path / "list.csv")
    assert {name for name, row in rows.items() if row["error"]} == set(REASONS)
    for name, reason in REASONS.items():
        assert reason in rows[name]["error"] and rows[name]["value"] == "", rows[name]
    before = {name: row for name, row in rows.items() if not row["error"]}

    # The disk that could not be read is back.
    (rough / "gone.png").unlink()
    shutil.copy(min((world[0] / "images" / "digits").glob("*.png")), rough / "gone.png")
    assert len(select(data=rough, num_select=6, batch_size=2)) == 6
    rows = table(tmp_path / "list.csv")
    assert {name for name, row in rows.items() if row["error"]} == set(REASONS) - {"gone.png"}
    changed = ("selected",)
    for name, row in before.items():
        assert {k: v for k, v in rows[name].items() if k not in changed} == {
            k: v for k, v in row.items() if k not in changed
        }


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

WRONG = {
    "too many": ({"num_select": 201}, "num_select: expected at most 200, the number of images under"),
    "none": ({"num_select": 0}, "num_select: expected at least 1"),
    "half": ({"num_select": 2.5}, "num_select: expected an integer, got float 2.5"),
    "device": ({"device": "gpu"}, "device: expected a device PyTorch can use here, .*got 'gpu'"),
    "batch": ({"batch_size": 0}, "batch_size: expected at least 1"),
    "no folder": ({"data": "nowhere"}, "data: expected a folder"),
    "head": ({"head": 4}, "head: expected 'mean' or an index from 0 to 3"),
    "head name": ({"head": "best"}, "head: expected"),
    "block": ({"blocks": 3}, r"blocks: expected indices in \[-3, 2\] for 3 blocks, got 3"),
    "weights": ({"attn_weight": 0, "output_weight": 0}, "both are 0"),
    "weight": ({"attn_weight": -1}, "attn_weight: expected a finite number >= 0"),
    "transform": (
        {"transform": lambda image: torch.zeros(1, 5, 5)},
        "transform, teacher: a plain grey image cannot be scored",
    ),
    "same file": ({"out": "x.csv"}, "list and table are the same file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals_name_the_argument(case, select, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        select(**options)


def test_refuses_outputs_that_cannot_be_written_before_the_work(select, tmp_path, monkeypatch):
    monkeypatch.setattr(ProbeScorer, "__init__", lambda *_: pytest.fail("began to work"))
    (tmp_path / "file").touch()
    for name, path in (
        ("out", "file/list.txt"),
        ("out", "."),
        ("scores", "file/scores.csv"),
        ("scores", "none/scores.csv"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: cannot "):
            select(**{name: tmp_path / path})


def test_refuses_an_empty_folder_and_unreadable_images(select, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: no images under"):
        select(data=tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("")
    out = tmp_path / "broken.txt"
    with pytest.raises(ValueError, match="num_select: expected at most 0, the number of images that can be read"):
        select(data=tmp_path / "broken", out=out, num_select=1)
    assert not out.exists()


def test_refuses_scores_made_with_other_settings_or_damaged(world, select, tmp_path):
    _, teacher = world
    select()
    with pytest.raises(RuntimeError, match="holds scores made with another head"):
        select(head="mean")
    other = copy.deepcopy(teacher)
    other.blocks[0].attn.num_heads = 2  # no weight and no text of the model shows it
    with pytest.raises(RuntimeError, match="holds scores made with another teacher"):
        select_images(other, world[0] / "images", tmp_path / "list.txt", 60, transform(other), progress=False)
    note = tmp_path / "list.txt.work" / "settings.json"
    note.write_text(note.read_text()[:-20])
    with pytest.raises(RuntimeError, match=r"settings.json: is not of this version or damaged"):
        select()
    mine = tmp_path / "list.txt.work" / "thesis.tex"
    mine.write_text("not ours")
    assert len(select(head="mean", restart=True)) == 60 and mine.exists()


def test_refuses_a_second_writer(select, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    select()
    with (
        files.locked(tmp_path / "list.txt.work" / "lock"),
        pytest.raises(RuntimeError, match="another process is at work"),
    ):
        select()


def test_refuses_teachers_without_a_probe():
    for options, message in (
        ({"class_token": False, "global_pool": "avg", "num_classes": 10}, "no class token"),
        ({"num_classes": 0}, "expected a classifier"),
    ):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, **options)
        with pytest.raises(ValueError, match=message):
            ProbeScorer(model)


def test_refuses_scores_that_are_not_finite(select, monkeypatch):
    forward = ProbeScorer.forward
    monkeypatch.setattr(ProbeScorer, "forward", lambda self, images: forward(self, images * torch.nan))
    with pytest.raises(RuntimeError, match="the teacher's scores are not finite"):
        select()
