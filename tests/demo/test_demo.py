"""`attnkd demo`: its numbers, its files, its refusals, and that an interrupted run ends like an uninterrupted one."""

import contextlib
import importlib.util
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import scipy.stats
import timm
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from attnkd.attention.resample import MODES
from attnkd.commands import cli
from attnkd.demo import attention, models, report
from attnkd.demo.data import RandomAffine, load_digits
from attnkd.demo.training import recipe, train
from attnkd.evaluation.features import extract
from attnkd.evaluation.knn import knn
from attnkd.methods.attn_distill import AttnDistill
from attnkd.training import checkpoint
from attnkd.training.loop import DivergedError

TEMPERATURE = 4.0


class Run(NamedTuple):
    directory: Path
    text: str
    summary: dict
    curves: dict


def run_demo(directory: Path, *options: str) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = cli.main(["demo", "--quick", "--device", "cpu", "--output-dir", str(directory), *options])
    assert status == 0, text.getvalue()
    load = [json.loads((directory / name).read_text(encoding="utf-8")) for name in ("summary.json", "curves.json")]
    return Run(directory, text.getvalue(), *load)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_demo(tmp_path_factory.mktemp("demo"))


def stage(directory: Path, name: str) -> Path:
    (found,) = directory.glob(f"{name}-*")
    return found


# What is printed, and what is written


def test_the_table_shows_the_numbers_of_the_summary(quick: Run) -> None:
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in quick.text.splitlines())}
    teacher = quick.summary["teacher"]
    assert rows["teacher"] == ["4", "64", f"{teacher['knn']:.1f}", f"{teacher['linear_probe']:.1f}"]
    for arm in quick.summary["students"].values():
        heads, patches, knn, probe, kl = rows[arm["name"]]
        assert (heads, patches) == ("2", "16")
        assert knn == f"{arm['knn']['mean']:.1f} ± {arm['knn']['std']:.1f}"
        assert probe == f"{arm['linear_probe']['mean']:.1f} ± {arm['linear_probe']['std']:.1f}"
        assert kl == f"{arm['kl_before']['mean']:.3f} → {arm['kl']['mean']:.3f} ± {arm['kl']['std']:.3f}"
    for sentence in quick.summary["verdict"]:
        assert sentence in quick.text


def test_means_and_spreads_come_from_the_seeds(quick: Run) -> None:
    for arm, values in quick.summary["students"].items():
        for metric in report.METRICS:
            first, second = values[metric]["values"]
            assert values[metric]["mean"] == pytest.approx((first + second) / 2)
            assert values[metric]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))
        assert values["kl"]["values"] == [history[-1]["kl"] for history in quick.curves[arm]]
    for key in ("config", "versions", "device", "seconds"):
        assert quick.summary[key]
    assert quick.summary["config"]["seeds"] == 2


def test_both_arms_start_every_seed_from_the_same_weights_and_guidance_lowers_the_kl(quick: Run) -> None:
    for without, guided in zip(quick.curves["pa"], quick.curves["pa_ag"], strict=True):
        assert without[0] == guided[0]
        assert guided[-1]["kl"] < 0.5 * without[-1]["kl"]
    assert quick.curves["pa"][0][0]["kl"] != quick.curves["pa"][1][0]["kl"]


def test_timm_loads_the_checkpoints_and_they_score_what_the_summary_says(quick: Run) -> None:
    digits = load_digits(train_size=320, test_size=200)
    teacher = quick.summary["teacher"]
    assert len(quick.summary["checkpoints"]) == 5
    for name in quick.summary["checkpoints"]:
        path = quick.directory / name
        args = json.loads(path.with_suffix(".json").read_text())
        model = timm.create_model(**args, checkpoint_path=str(path))
        found = [extract(model, [pair]) for pair in ((digits[0], digits[1]), (digits[2], digits[3]))]
        top1 = knn(*found, ks=(20,))[20]["top1"]
        match = re.match(r"student-(\w+)-seed(\d)", name)
        if match is None:
            assert top1 == teacher["knn"]
            continue
        arm = quick.summary["students"][match[1]]
        assert top1 == arm["knn"]["values"][int(match[2]) - 1]
        assert arm["heads"] < teacher["heads"] and arm["patches"] < teacher["patches"]


def test_figures_are_whole(quick: Run) -> None:
    from matplotlib.image import imread

    for name, ratio in (("curves.png", 12 / 4.2), ("attention.png", 13 / 6.5)):
        pixels = imread(quick.directory / name)[..., :3]
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(ratio, rel=0.02)
        edge = torch.cat([torch.from_numpy(side).flatten() for side in (pixels[0], pixels[-1], pixels[:, 0])])
        assert edge.min() == 1  # nothing runs over the edge
        assert len({tuple(colour) for colour in pixels[::7, ::7].reshape(-1, 3).tolist()}) > 30


# Continuing


def test_a_second_run_reuses_what_has_not_changed_and_says_so(quick: Run, tmp_path: Path) -> None:
    import shutil

    directory = tmp_path / "copy"
    shutil.copytree(quick.directory, directory)
    states = {path: path.stat().st_mtime_ns for path in directory.glob(f"*/{checkpoint.NAME}")}
    again = run_demo(directory)
    assert again.text.count("finished before, reused") == 5
    assert again.summary["students"] == quick.summary["students"]
    assert again.curves == quick.curves

    other = run_demo(directory, "--seeds", "1", "--attn-weight", "0.2")
    assert other.text.count("finished before, reused") == 2  # teacher and PA only
    assert "student-pa_ag-seed1: trained again" in other.text and "attn_weight 0.1, now 0.2" in other.text
    assert other.curves["pa"] == quick.curves["pa"][:1]
    assert other.curves["pa_ag"] != quick.curves["pa_ag"][:1]
    assert "one seed" in other.text
    assert {path: path.stat().st_mtime_ns for path in states} == states


class Interrupts(nn.Module):
    """A small real classifier with dropout that is interrupted, as by Ctrl-C, in its n-th step."""

    def __init__(self, interrupt_in_step: int | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.Dropout(0.2), nn.GELU(), nn.Linear(32, 10))
        self.steps_left = interrupt_in_step

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise KeyboardInterrupt
        return {"loss": nn.functional.cross_entropy(self.model(images), targets)}


def test_an_interrupted_training_continues_exactly(tmp_path: Path) -> None:
    digits = load_digits(train_size=320, test_size=200)

    def fit(name: str, interrupt_in_step: int | None = None) -> tuple[bytes, list]:
        history = train(
            Interrupts(interrupt_in_step),
            digits.train_images,
            digits.train_labels,
            recipe(5),
            seed=3,
            path=tmp_path / name,
            fingerprint="x",
            augment=RandomAffine(digits.background),
        )
        return (tmp_path / name).read_bytes(), history

    whole, whole_history = fit("whole")
    for step in (2, 8, 6):  # in epoch 1, then in epoch 2, then in epoch 3 (5 steps an epoch)
        with pytest.raises(KeyboardInterrupt):
            fit("interrupted", step)
    torch.manual_seed(12345)
    continued, history = fit("interrupted")
    assert history == whole_history and [record["epoch"] for record in history] == [0, 1, 2, 3, 4, 5]
    assert continued == whole


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


def tiny_method(resample_mode: str = "area") -> AttnDistill:
    torch.manual_seed(0)
    student, teacher = models.create(models.STUDENT, seed=1), models.create(models.TEACHER, seed=0)
    return AttnDistill(student, teacher, temperature=TEMPERATURE, resample_mode=resample_mode, verbose=False)


def test_refuses_states_it_cannot_continue(tmp_path: Path) -> None:
    digits = load_digits(train_size=64, test_size=10)
    state = tmp_path / checkpoint.NAME

    def fit(fingerprint: str) -> None:
        inputs = (digits.train_images, digits.train_labels, recipe(1))
        train(Interrupts(None), *inputs, seed=0, path=state, fingerprint=fingerprint)

    fit("mine")
    fit("mine")
    with pytest.raises(RuntimeError, match="other settings .fingerprint mine, expected yours"):
        fit("yours")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="cannot be read"):
        fit("mine")


@pytest.mark.parametrize("broken", ["pa_loss", "attn_loss"])
def test_a_loss_that_is_not_finite_is_named_and_not_saved(broken: str, tmp_path: Path) -> None:
    digits = load_digits(train_size=64, test_size=10)
    method = tiny_method()
    with torch.no_grad():
        if broken == "pa_loss":
            method.student.norm.weight[0] = math.inf  # after the last attention
        else:
            method.student.blocks[-1].attn.qkv.weight[0] = math.inf
    inputs = (digits.train_images, digits.train_labels, recipe(1))
    with pytest.raises(DivergedError, match=f"last of them step 1 .*{broken} = (nan|inf).*lower train.base_lr"):
        train(method, *inputs, seed=0, path=tmp_path / "state", fingerprint="x")
    assert not (tmp_path / "state").exists()


# The pieces


@pytest.mark.parametrize("resample_mode", MODES)
def test_the_reported_kl_is_what_attn_distill_minimises(resample_mode: str) -> None:
    images = load_digits(train_size=64, test_size=40).test_images
    method = tiny_method(resample_mode)
    method.eval()
    target = attention.cls_attention(method.teacher.tap.model, images, TEMPERATURE, (4, 4), method.resample_mode)
    rows = attention.cls_attention(method.student, images, TEMPERATURE)
    assert target.shape == rows.shape == (40, 17)
    kl = attention.attention_divergence_per_image(target, rows)
    assert kl.mean().item() == pytest.approx(method(images)["attn_loss"].item(), rel=1e-5)
    assert kl.std() > 0.01 * kl.mean()


def test_digits_are_split_by_class_and_the_same_every_time() -> None:
    digits, again = load_digits(1197, 600), load_digits(1197, 600)
    assert torch.equal(digits.test_images, again.test_images)
    assert digits.train_images.shape == (1197, 1, 16, 16)
    assert digits.train_images.mean().abs() < 1e-5 and abs(digits.train_images.std() - 1) < 1e-5
    shares = [labels.bincount() / len(labels) for labels in (digits.train_labels, digits.test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    everything = torch.cat([digits.train_images, digits.test_images])
    assert len(everything.unique(dim=0)) == 1797
    with pytest.raises(ValueError, match="at most 1797 in all, got 1197, 601"):
        load_digits(1197, 601)
    parts = load_digits(597, 900)
    everything = torch.cat([parts.train_images, parts.test_images, parts.spare_images])
    assert len(parts.spare_labels) == 300 and len(everything.unique(dim=0)) == 1797


def test_augmentation_is_seeded_light_and_can_be_off() -> None:
    digits = load_digits(1197, 600)
    images, augment = digits.test_images, RandomAffine(digits.background)
    moved, same, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(moved, same) and not torch.equal(moved, other)
    off = RandomAffine(digits.background, degrees=0, scale=0, shear=0, shift=0)
    assert torch.allclose(off(images, torch.Generator()), images, atol=1e-5)
    flat = [x.flatten(1) - digits.background for x in (images, moved)]
    likeness = nn.functional.cosine_similarity(*flat)
    assert 0.8 < likeness.mean() < 0.99 and likeness.min() > 0.5


@pytest.mark.parametrize(
    ("metric", "without", "guided", "says"),
    [
        ("knn", [90.0, 91, 92], [95.0, 96.2, 97], "k-NN top-1: better with attention guidance, +5.1 points"),
        ("knn", [95.0, 96, 97], [90.0, 91.2, 92], "k-NN top-1: worse with attention guidance, -4.9 points"),
        ("knn", [90.0, 91, 92], [92.0, 90, 92.5], "k-NN top-1: no difference shown"),
        ("kl", [1.0, 1.1, 1.2], [0.4, 0.5, 0.61], "KL to the teacher: better with attention guidance, -0.597 nats"),
        ("kl", [1.0], [0.4], "KL to the teacher: -0.600 nats with attention guidance in one seed"),
        ("knn", [90.0, 91.0], [90.0, 91.0], "no difference shown"),
    ],
)
def test_the_verdict_follows_the_numbers(metric: str, without: list, guided: list, says: str) -> None:
    assert says in report.sentence(metric, report.difference(without, guided))


def test_difference_is_paired_and_its_interval_students_t() -> None:
    change = report.difference([1.0, 2, 3, 4, 5], [2.0, 3, 4, 5, 8])
    assert change["mean"] == pytest.approx(1.4) and change["std"] == pytest.approx(math.sqrt(0.8))
    reach = 2.776445 * math.sqrt(0.8 / 5)
    assert change["interval_95"] == pytest.approx([1.4 - reach, 1.4 + reach], rel=1e-5)
    assert change["p"] == pytest.approx(scipy.stats.ttest_rel([2.0, 3, 4, 5, 8], [1.0, 2, 3, 4, 5]).pvalue)
    assert report.difference([1.0, 2.0], [1.0, 2.0])["p"] == 1 and report.difference([1.0, 2.0], [2.0, 3.0])["p"] == 0


def test_holm_corrects_step_by_step() -> None:
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.5, 0.6]) == [1, 1] and report.holm([0.02]) == [0.02]
