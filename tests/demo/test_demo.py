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
import timm
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from attnkd.attention.resample import MODES
from attnkd.commands import cli
from attnkd.demo import evaluate, models, report
from attnkd.demo.data import RandomAffine, load_digits
from attnkd.demo.training import Recipe, TrainingError, train
from attnkd.methods.attn_distill import AttnDistill

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
        assert {**without[0], "seconds": 0} == {**guided[0], "seconds": 0}
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
        vectors = [evaluate.features(model, images) for images in (digits.train_images, digits.test_images)]
        knn = evaluate.knn_top1(vectors[0], digits.train_labels, vectors[1], digits.test_labels)
        match = re.match(r"student-(\w+)-seed(\d)", name)
        if match is None:
            assert knn == teacher["knn"]
            continue
        arm = quick.summary["students"][match[1]]
        assert knn == arm["knn"]["values"][int(match[2]) - 1]
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
    states = {path: path.stat().st_mtime_ns for path in directory.glob("*/state.pt")}
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

    def fit(name: str, interrupt_in_step: int | None = None) -> tuple[dict, list]:
        method = Interrupts(interrupt_in_step)
        history = train(
            method,
            digits.train_images,
            digits.train_labels,
            Recipe(epochs=5),
            seed=3,
            state_path=tmp_path / name,
            fingerprint="x",
            augment=RandomAffine(digits.background),
        )
        state = torch.load(tmp_path / name, weights_only=True)
        return {**state["method"], **_flatten(state["optimizer"])}, [{**r, "seconds": 0} for r in history]

    whole, whole_history = fit("whole")
    for step in (2, 8, 6):  # in epoch 1, then in epoch 2, then in epoch 3 (5 steps an epoch)
        with pytest.raises(KeyboardInterrupt):
            fit("interrupted", step)
    torch.manual_seed(12345)
    continued, history = fit("interrupted")
    assert history == whole_history
    assert continued.keys() == whole.keys()
    assert all(torch.equal(continued[key], whole[key]) for key in whole)


def _flatten(optimizer: dict) -> dict[str, torch.Tensor]:
    return {f"{i}.{key}": value for i, slots in optimizer["state"].items() for key, value in slots.items()}


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
    state = tmp_path / "state.pt"

    def fit(fingerprint: str) -> None:
        inputs = (digits.train_images, digits.train_labels, Recipe(epochs=1))
        train(Interrupts(None), *inputs, seed=0, state_path=state, fingerprint=fingerprint)

    fit("mine")
    fit("mine")
    with pytest.raises(TrainingError, match="other settings .fingerprint mine, expected yours"):
        fit("yours")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot be read"):
        fit("mine")


@pytest.mark.parametrize("named", ["pa_loss", "pa_loss and attn_loss"])
def test_a_loss_that_is_not_finite_is_named_and_not_saved(named: str, tmp_path: Path) -> None:
    digits = load_digits(train_size=64, test_size=10)
    method = tiny_method()
    with torch.no_grad():
        if named == "pa_loss":
            method.student.norm.weight[0] = math.inf  # after the last attention
        else:
            method.student.blocks[-1].attn.qkv.weight[0] = math.inf
    inputs = (digits.train_images, digits.train_labels, Recipe(epochs=1))
    with pytest.raises(TrainingError, match=f"^{named} not finite in epoch 1, step 0 .*lower learning rate"):
        train(method, *inputs, seed=0, state_path=tmp_path / "state.pt", fingerprint="x")
    assert not (tmp_path / "state.pt").exists()


# The pieces


@pytest.mark.parametrize("resample_mode", MODES)
def test_the_reported_kl_is_what_attn_distill_minimises(resample_mode: str) -> None:
    images = load_digits(train_size=64, test_size=40).test_images
    method = tiny_method(resample_mode)
    method.eval()
    target = evaluate.cls_attention(method.teacher.tap.model, images, TEMPERATURE, (4, 4), method.resample_mode)
    rows = evaluate.cls_attention(method.student, images, TEMPERATURE)
    assert target.shape == rows.shape == (40, 17)
    kl = evaluate.attention_divergence_per_image(target, rows)
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


def test_knn_weighs_neighbours_by_exp_cosine_over_temperature() -> None:
    angles = torch.tensor([0.00, 0.30, 0.31, 3.0])
    vectors = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[5.0], [1.0], [1.0], [1.0]])
    labels, query = torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 0.0]])
    truth = torch.tensor([0])
    # exp(1 / T) against 2·exp(cos(0.3) / T): the nearest one wins when T < (1 - cos 0.3) / ln 2 = 0.064
    assert evaluate.knn_top1(vectors, labels, query, truth, k=3, temperature=0.05) == 100
    assert evaluate.knn_top1(vectors, labels, query, truth, k=3, temperature=0.09) == 0
    assert evaluate.knn_top1(vectors, labels, query, truth, k=1, temperature=0.09) == 100


def test_knn_of_half_precision_features() -> None:
    vectors, labels = torch.eye(4, dtype=torch.bfloat16), torch.arange(4)
    assert evaluate.knn_top1(vectors, labels, vectors.half(), labels, k=1) == 100


def test_linear_probe_separates_what_is_separable_only() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    vectors = torch.randn(200, 3)
    chance = evaluate.linear_probe_top1(vectors[:100], labels[:100], vectors[100:], labels[100:])
    vectors[:, 0] += 8 * labels
    assert evaluate.linear_probe_top1(vectors[:100], labels[:100], vectors[100:], labels[100:]) == 100
    assert chance < 70


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_is_scikit_learns_as_a_layer(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(0)
    labels = torch.arange(120) % classes
    vectors = 3 * torch.randn(120, 5) + 2 + labels[:, None]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(vectors.double(), labels)
    scores = evaluate.linear_probe(vectors, labels)(vectors.double())
    torch.testing.assert_close(scores.softmax(1), torch.from_numpy(fitted.predict_proba(vectors.double())))


@pytest.mark.parametrize(
    ("metric", "without", "guided", "says"),
    [
        ("knn", [90.0, 91, 92], [95.0, 96.2, 97], "k-NN top-1: better with attention guidance, +5.1 points"),
        ("knn", [95.0, 96, 97], [90.0, 91.2, 92], "k-NN top-1: worse with attention guidance, -4.9 points"),
        ("knn", [90.0, 91, 92], [92.0, 90, 92.5], "k-NN top-1: no significant difference"),
        ("kl", [1.0, 1.1, 1.2], [0.4, 0.5, 0.61], "KL to the teacher: better with attention guidance, -0.597 nats"),
        ("kl", [1.0], [0.4], "KL to the teacher: -0.600 nats with attention guidance in one seed"),
        ("knn", [90.0, 91.0], [90.0, 91.0], "no significant difference"),
    ],
)
def test_the_verdict_follows_the_numbers(metric: str, without: list, guided: list, says: str) -> None:
    assert says in report.sentence(metric, report.difference(without, guided))


def test_difference_is_paired_and_its_interval_students_t() -> None:
    change = report.difference([1.0, 2, 3, 4, 5], [2.0, 3, 4, 5, 8])
    assert change["mean"] == pytest.approx(1.4) and change["std"] == pytest.approx(math.sqrt(0.8))
    reach = 2.776445 * math.sqrt(0.8 / 5)
    assert change["interval_95"] == pytest.approx([1.4 - reach, 1.4 + reach], rel=1e-5)
