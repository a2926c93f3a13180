"""`attnkd cache`: the teacher runs once for every image; training from what was kept is the same training."""

import collections
import functools
import shutil
import types
from pathlib import Path

import pytest
import torch

from attnkd import Schedule
from attnkd.commands import cache, cli
from attnkd.methods.student_teacher import FeatureTeacher
from attnkd.training import run, sources, teacher_cache
from attnkd.training.distributed import World
from tests.training.test_train import experiment as plain  # noqa: F401  fixture
from tests.training.test_train import log, teachers, train  # noqa: F401  fixtures

STILL = {"train__crop_scale": (1.0, 1.0), "train__hflip": 0.0, "train__opt": "sgd", "train__betas": None}
STILL |= {"method__patch_weight": 0.5, "method__pa_weight": Schedule(1.0, stop=1), "run__log_steps": 1}


@pytest.fixture
def experiment(plain, teachers, tmp_path):  # noqa: F811
    """Its teacher's attention is not uniform."""
    from safetensors.torch import load_file, save_file

    state = load_file(teachers["teacher"])
    for name, value in state.items():
        if name.endswith("qkv.weight"):
            value *= 8
    (tmp_path / "sharp").mkdir()
    save_file(state, tmp_path / "sharp" / "model.safetensors")
    shutil.copy(Path(teachers["teacher"]).with_suffix(".json"), tmp_path / "sharp")
    return functools.partial(plain, teacher=str(tmp_path / "sharp" / "model.safetensors"))


@pytest.fixture
def make(experiment, tmp_path, monkeypatch):
    """Fills the folder 'kept', four files of 150 images; returns it."""
    monkeypatch.setattr(teacher_cache, "SHARD", 40)

    def made(dtype="float32", method="attn_distill", world=None, **changes):
        found = experiment(method, "kept", **{**STILL, **changes})
        if world is not None:
            built = run.build(found, world)
            teacher_cache.write(
                tmp_path / "kept", built.task, built.images, 150, built.inputs.size, world, found.config.run
            )
            return tmp_path / "kept"
        words = collections.namedtuple("Words", "experiment dtype device")
        assert cache.run(words(found, dtype, "cpu")) == 0
        return tmp_path / "kept"

    return made


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_was_stopped_is_continued_to_the_same_bytes(make, capsys, monkeypatch):
    folder = make()
    whole = bytes_of(folder)
    assert len(whole) == 5 and "bytes an image" in capsys.readouterr().out
    (folder / "images-000001.safetensors").unlink()
    seen, forward = [], FeatureTeacher.forward
    monkeypatch.setattr(
        FeatureTeacher, "forward", lambda self, images, *rest: seen.append(len(images)) or forward(self, images, *rest)
    )
    make()
    assert bytes_of(folder) == whole and sum(seen) == 40 + 1, "one file, and an image for the sizes"
    for number in range(4):
        (folder / f"images-{number:06d}.safetensors").unlink()
    for rank in (1, 0):  # a process after the other: what one has written does not change what the other writes
        make(world=World(torch.device("cpu"), rank, 2))
        assert len(bytes_of(folder)) == {1: 3, 0: 5}[rank]
    assert bytes_of(folder) == whole


@pytest.mark.parametrize(
    ("dtype", "options", "close"),
    [
        ("float32", {"run__workers": 2}, 1e-5),
        ("float32", {"method__one_pass": True, "method__merge": "mean", "method__blocks": [0, 2]}, 1e-5),
        ("float16", {"student_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}}, 2e-3),
    ],
)
def test_training_is_the_same_without_running_the_teacher(
    dtype, options, close, make, experiment, tmp_path, monkeypatch
):  # fmt: skip
    from safetensors.torch import load_file

    folder = make(dtype, **options)
    assert train(experiment(output="without", **STILL, **options)).finished

    def runs(*args):
        raise AssertionError("the teacher runs")

    monkeypatch.setattr(FeatureTeacher, "forward", runs)
    assert train(experiment(output="with", **STILL, **options, teacher_cache=str(folder))).finished
    for one, two in zip(log(tmp_path / "without"), log(tmp_path / "with"), strict=True):
        assert two == pytest.approx(one, rel=close)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=10 * close, atol=close, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__hflip": 0.5, "train__random_erasing": 0.1}, r"\(train.hflip=0.5, train.random_erasing=0.1\). Needed: crop_scale"),
        ({"train__crop_scale": (0.5, 1.0)}, r"changes an image's pixels .*train.crop_scale"),
        ({"method__temperature": 3.0}, r"is of something else \(needs: .*here .*3.0"),
        ({"method__temperature": Schedule(3.0, warmup=1, start=1.0)}, "keeps rows at one temperature"),
        ({"method__rows": "mean"}, "keeps the class token's row, got rows='mean'"),
        ({"run__precision": "bf16"}, "is of something else .precision: fp32, here bf16"),
        ({"subset": "0.5"}, "is of something else .images: 150, here"),
        ({"teacher_cache": "nowhere"}, "teacher_cache: nowhere has no cache.json"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(changes, message, make, experiment):
    folder = make()
    with pytest.raises((ValueError, NotImplementedError), match=message):
        train(experiment(**{**STILL, "teacher_cache": str(folder), **changes}))


def test_other_images_another_teacher_and_missing_files_are_refused(make, experiment, teachers, monkeypatch):  # noqa: F811
    folder = make()
    wanted = {**STILL, "teacher_cache": str(folder)}
    with pytest.raises(ValueError, match="is of something else .*teacher_sha256"):
        train(experiment(**wanted, teacher=teachers["assistant"]))
    with pytest.raises(ValueError, match="is of something else .*dtype: float32, here float16"):
        make("float16")
    one = sources._digits("train")
    pixels = one.images.pixels.copy()
    pixels[77] += 1
    with monkeypatch.context() as patched:
        patched.setattr(
            sources, "_digits", lambda split: one._replace(images=sources._Digits(pixels, one.images.labels))
        )
        with pytest.raises(ValueError, match="image 77 has other pixels than when .*kept was made"):
            train(experiment(**wanted))
    last = folder / "images-000003.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match="images-000003.safetensors cannot be read .*delete it and run the same"):
        train(experiment(**wanted))
    last.unlink()
    with pytest.raises(ValueError, match="lacks 1 of its files; run the same attnkd cache again"):
        train(experiment(**wanted))
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="output: .*kept needs .* GB, its disk has"):
        make()


@pytest.mark.parametrize(("method", "why"), [("head_kd", "whole maps"), ("attention_probe", "features of all tokens")])
def test_methods_whose_teacher_cannot_be_kept_are_named(method, why, experiment, tmp_path):
    words = collections.namedtuple("Words", "experiment dtype device")
    with pytest.raises(NotImplementedError, match=f"teacher_cache: for AttnDistill only; .*{why}"):
        cache.run(words(experiment(method, "kept"), "float32", "cpu"))


def test_on_the_command_line(teachers, tmp_path, capsys):  # noqa: F811
    words = ["attn_distill", "--recipe", "attn_distill_digits", "--teacher", teachers["teacher"], "--device", "cpu"]
    words += ["--run.workers", "0", "--train.epochs", "1", "--train.warmup_epochs", "0", "--subset", "0.1"]
    still, kept = ["--train.crop_scale", "[1, 1]"], str(tmp_path / "kept")
    assert cli.main(["cache", *words, "--output", kept]) == 2
    assert "changes an image's pixels from epoch to epoch (train.crop_scale=(0.7, 1.0))" in capsys.readouterr().err
    assert cli.main(["cache", *words, *still, "--output", kept, "--dtype", "float16"]) == 0
    assert f"{kept}: finished; attnkd train attn_distill --teacher_cache {kept} reads it" in capsys.readouterr().out
    assert cli.main(["train", *words, *still, "--output", str(tmp_path / "run"), "--teacher_cache", kept]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
