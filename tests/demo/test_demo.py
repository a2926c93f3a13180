"""`attnkd demo`: its numbers, its files, its refusals, and that its runs are those of the other commands."""

import contextlib
import importlib.util
import io
import json
import math
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from attnkd.attention.merging import merge_attention
from attnkd.attention.resample import resample_attention
from attnkd.capture.class_maps import class_maps
from attnkd.capture.loading import load_saved
from attnkd.commands import cli
from attnkd.demo import runs
from attnkd.demo.arms import ARMS, GUIDANCE
from attnkd.demo.config import QUICK, Config
from attnkd.demo.data import digits_folder, wild_folder
from attnkd.demo.experiment import Demo, Teachers
from attnkd.demo.runs import SCORES, Runs, Trained
from attnkd.demo.workers import one_thread
from attnkd.training.distributed import World
from attnkd.training.run import asked_to_stop, build


class Run(NamedTuple):
    directory: Path
    text: str
    summary: dict

    def folder(self, name: str) -> Path:
        (found,) = self.directory.glob(f"{name}-*")
        return found


def run_demo(directory: Path, *options: str) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = cli.main(["demo", "--quick", "--device", "cpu", "--output-dir", str(directory), *options])
    assert status == 0, text.getvalue()
    return Run(directory, text.getvalue(), json.loads((directory / "summary.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_demo(tmp_path_factory.mktemp("demo"))


# What is printed, and what is written


def test_table_and_page_show_the_numbers_of_the_summary(quick: Run) -> None:
    page = (quick.directory / "results.md").read_text(encoding="utf-8")
    assert page in quick.text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    for name, arm in quick.summary["arms"].items():
        scores = [f"{arm[key]['mean']:.1f} ± {arm[key]['std']:.1f}" for key in ("linear_probe", "knn")]
        distance, before = arm["pa_ag_distance"], quick.summary["before"]["pa_ag_distance"]
        scores.append(f"{before['mean']:.3f} → {distance['mean']:.3f} ± {distance['std']:.3f}")
        assert [ARMS[name].words, "– + 320", *scores] in [row[1:] for row in rows]
    for name in ("teacher-seed1", "student-pa-seed2"):
        kept = json.loads((quick.folder(name) / SCORES).read_text())
        assert f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in kept.items())}" in quick.text
    for change in quick.summary["comparisons"]:
        assert f"* {change['verdict']}\n" in page
    assert len(quick.summary["comparisons"]) == len(GUIDANCE)
    assert {"config", "versions", "device", "seconds"} <= set(quick.summary) and quick.summary["config"]["seeds"] == 2


def test_spreads_are_of_the_runs_and_every_seed_has_its_own_teacher(quick: Run) -> None:
    for arm, values in quick.summary["arms"].items():
        for metric in ("knn", "linear_probe", "pa_ag_distance"):
            first, second = values[metric]["values"]
            assert values[metric]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))
            for seed, value in ((1, first), (2, second)):
                kept = json.loads((quick.folder(f"student-{arm}-seed{seed}") / SCORES).read_text())
                assert kept[metric] == value
    teachers = [load_saved(quick.folder(f"teacher-seed{seed}") / "model.safetensors") for seed in (1, 2)]
    assert not torch.equal(teachers[0].head.weight, teachers[1].head.weight)


def test_guidance_lowers_the_distance_to_the_attention(quick: Run) -> None:
    without, guided = (quick.summary["arms"][arm]["pa_ag_distance"]["values"] for arm in ("pa", "pa_ag"))
    assert all(b < 0.5 * a for a, b in zip(without, guided, strict=True))


def test_a_run_is_one_for_the_other_commands(quick: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same scores from `attnkd eval`, the same student from its config.yaml, and a model for timm."""
    student = quick.folder("student-pa_ag-seed1")
    scores = json.loads((student / SCORES).read_text())
    assert cli.main(["eval", "knn", str(student), "--k", "20", "--workers", "0", "--device", "cpu"]) == 0
    assert json.loads((student / "eval_knn.json").read_text())["scores"]["20"]["top1"] == scores["knn"]
    teacher = quick.folder("teacher-seed1") / "model.safetensors"
    data = str(next(quick.directory.glob("digits-*")))
    words = ["eval", "linear", str(teacher), "--data", data, "--workers", "0", "--json", str(tmp_path / "l.json")]
    assert cli.main([*words, "--device", "cpu"]) == 0
    kept = json.loads((teacher.parent / SCORES).read_text())
    assert json.loads((tmp_path / "l.json").read_text())["top1"] == pytest.approx(kept["linear_probe"])
    again = ["train", "--config", str(student / "config.yaml"), "--output", str(tmp_path / "again"), "--device", "cpu"]
    with one_thread():
        assert cli.main(again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    assert cli.main(["export", str(student), "--output", str(tmp_path / "given")]) == 0
    given = timm.create_model(f"local-dir:{tmp_path / 'given'}", pretrained=True)
    assert torch.equal(given.pos_embed, load_saved(student / "model.safetensors").pos_embed)
    args = json.loads((student / "model.json").read_text())
    model = timm.create_model(**args, checkpoint_path=str(student / "model.safetensors"))
    assert model.pretrained_cfg["crop_pct"] == 1.0 and model.num_classes == 0
    assert len(quick.summary["runs"]) == 6 and all((quick.directory / name).is_dir() for name in quick.summary["runs"])


def test_figures_are_whole(quick: Run) -> None:
    from matplotlib.image import imread

    for name, ratio in (("comparison.png", 13 / 2.4), ("attention.png", 13 / 6.5)):
        pixels = imread(quick.directory / name)[..., :3]
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(ratio, rel=0.02)
        edge = torch.cat([torch.from_numpy(side).flatten() for side in (pixels[0], pixels[-1], pixels[:, 0])])
        assert edge.min() == 1  # nothing runs over the edge
        assert len({tuple(colour) for colour in pixels[::7, ::7].reshape(-1, 3).tolist()}) > 30


# Continuing


def test_a_second_run_reuses_what_has_not_changed_and_says_so(quick: Run, tmp_path: Path) -> None:
    directory = tmp_path / "moved [/red] é"
    shutil.copytree(quick.directory, directory)
    states = {path: path.stat().st_mtime_ns for path in directory.glob(f"*/{SCORES}")}
    again = run_demo(directory)
    assert again.text.count("finished before, reused") == 6
    assert again.summary["arms"] == quick.summary["arms"]

    other = run_demo(directory, "--seeds", "1", "--attn-weight", "0.2")
    assert other.text.count("finished before, reused") == 2  # teacher and PA only
    assert "student-pa_ag-seed1 (trained again, with other settings): knn" in other.text
    values = {arm: [run.summary["arms"][arm]["knn"]["values"][0] for run in (other, quick)] for arm in ("pa", "pa_ag")}
    assert values["pa"][0] == values["pa"][1]
    assert (
        "in one pair, which cannot show" in other.text
        and other.summary["arms"]["pa_ag"] != quick.summary["arms"]["pa_ag"]
    )
    assert {path: path.stat().st_mtime_ns for path in states} == states


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_last_step_of_a_run_lets_no_other_begin(number: signal.Signals, tmp_path: Path) -> None:
    def work(folder: Path, watcher: object) -> None:
        with asked_to_stop():  # as the training loop does
            signal.raise_signal(number)

    def stop(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(number, stop)
    try:
        with pytest.raises(InterruptedError):
            Runs(tmp_path, torch.device("cpu"), print)._run("one", {}, 1, work, lambda model: {})
    finally:
        signal.signal(number, before)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected an integer >= 1, got 0"),
        (["--epochs", "0"], "--epochs: expected an integer >= 1, got 0"),
        (["--attn-weight", "0"], "--attn-weight: expected a finite number > 0, got 0.0"),
        (["--temperature", "nan"], "--temperature: expected a finite number > 0, got nan"),
        (["--device", "meta"], "--device: expected a device PyTorch can use here, 'cpu'"),
        (["--device", "abacus"], "--device: expected a device PyTorch can use here, 'cpu'"),
    ],
)
def test_refuses_wrong_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["demo", "--quick", "--output-dir", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert cli.main(["demo", "--quick"]) == 2
    assert 'needs scikit-learn: pip install "attnkd[demo]"' in capsys.readouterr().err


# The pieces


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Teachers]:
    """An experiment whose teacher has not learned anything."""
    directory = tmp_path_factory.mktemp("small")
    demo = Demo(Config(**{**QUICK, "test_size": 40}), directory, torch.device("cpu"), print)
    teacher = Trained(directory / "teacher", {}, torch.device("cpu"))
    teacher.folder.mkdir()
    made = runs.new_classifier(runs.TEACHER, 0)
    with torch.no_grad():
        made.blocks[-1].attn.qkv.weight.mul_(4)
    runs.save_student(teacher.folder, made, runs.describe(runs.TEACHER))
    return demo, Teachers(teacher, None, {}, None, {})


def test_the_distance_is_the_kl_of_merged_rows(small: tuple[Demo, Teachers]) -> None:
    demo, teachers = small
    student = runs.new_classifier({**runs.STUDENT, "num_classes": 0}, 2)
    found = demo.distances(ARMS["pa"], 1, teachers, student)
    images = torch.cat([images for images, _ in demo.images("validation")])
    looks = {
        who: class_maps(model, images, merge="logsum", rollout=False, temperatures=[4.0])
        for who, model in (("teacher", teachers.teacher.model), ("student", student))
    }
    rows = resample_attention(looks["teacher"].rows, (8, 8), (4, 4), "area")
    target, row = merge_attention(rows, "logsum", 4.0)[:, 0, 0], looks["student"].merged[:, 0, 0]
    kl = F.kl_div(row.log(), target, reduction="none").sum(-1)
    assert found == {"pa_ag_distance": pytest.approx(kl.mean().item(), rel=1e-5)}
    assert kl.std() > 0.01 * kl.mean()
    assert demo.untrained(1, teachers) not in (found, demo.untrained(2, teachers))


def test_both_arms_start_a_seed_from_the_same_weights(small: tuple[Demo, Teachers]) -> None:
    demo, teachers = small
    tasks = [build(demo.experiment(arm, 1, teachers), World(torch.device("cpu"))).task for arm in ("pa", "pa_ag")]
    first, second = (task.trainable_module.state_dict() for task in tasks)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    untrained = runs.new_classifier({**runs.STUDENT, "num_classes": 0}, 1).state_dict()
    assert all(torch.equal(tasks[0].student.state_dict()[name], untrained[name]) for name in untrained)


def test_digits_are_split_by_class_and_the_same_every_time(tmp_path: Path) -> None:
    def pixels(folder: Path, split: str) -> dict[str, bytes]:
        return {path.name: Image.open(path).tobytes() for path in (folder / split).rglob("*.png")}

    folder = digits_folder(tmp_path, 597, 900, 200)
    parts = {split: pixels(folder, split) for split in ("train", "labelled", "validation", "spare")}
    assert [len(part) for part in parts.values()] == [597, 200, 900, 300]
    assert parts["labelled"].items() <= parts["train"].items()
    everything = {**parts["train"], **parts["validation"], **parts["spare"]}
    assert len(everything) == 1797 and len(set(everything.values())) == 1797
    for split, size in (("train", 597), ("validation", 900)):
        shares = [len(list((folder / split / str(digit)).iterdir())) / size for digit in range(10)]
        assert max(abs(share - 0.1) for share in shares) < 0.01
    (tmp_path / "other" / f".{folder.name}.new" / "train").mkdir(parents=True)  # a killed process left it
    again = digits_folder(tmp_path / "other", 597, 900, 200)
    assert {split: pixels(again, split) for split in parts} == parts
    with pytest.raises(ValueError, match="at most 1797 in all, got 1197, 601"):
        digits_folder(tmp_path, 1197, 601, 0)

    wild = wild_folder(tmp_path / "wild", folder, 300, 40, seed=1)
    assert {path.name: Image.open(path).tobytes() for path in (wild / "digits").iterdir()} == parts["spare"]
    assert len(list((wild / "photos").iterdir())) == 40
    with pytest.raises(ValueError, match="expected to leave 301 digits over, leave 300"):
        wild_folder(tmp_path / "wilder", folder, 301, 40, seed=1)
