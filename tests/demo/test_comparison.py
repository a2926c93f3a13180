"""`attnkd demo --all`: four methods, and what they are compared with."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from attnkd.commands import cli
from attnkd.demo import comparison, comparison_report, models
from attnkd.demo.arms import ARMS, COMPARISONS, RULERS, Comparison
from attnkd.demo.contrastive import SimCLR
from attnkd.demo.data import RandomAffine, load_digits
from attnkd.demo.report import holm
from attnkd.demo.training import recipe, train

DOCS = Path(__file__).parents[2] / "docs"


class Run(NamedTuple):
    directory: Path
    text: str
    summary: dict


def run_all(directory: Path) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = cli.main(["demo", "--all", "--quick", "--device", "cpu", "--output-dir", str(directory)])
    assert status == 0, text.getvalue()
    return Run(directory, text.getvalue(), json.loads((directory / "summary.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("demo all"))


def test_comparisons_are_paired_corrected_together_and_printed(quick: Run) -> None:
    found, arms = quick.summary["comparisons"], quick.summary["arms"]
    assert len(found) == len(COMPARISONS) and {change["arm"] for change in found} | {
        change["against"] for change in found
    } == set(arms) - {"labels_all"}
    for change in found:
        against, arm = (arms[change[name]][change["score"]]["values"] for name in ("against", "arm"))
        assert change["values"] == pytest.approx([b - a for a, b in zip(against, arm, strict=True)])
        assert change["p_holm"] >= change["p"] and change["verdict"] in quick.text
    assert [change["p_holm"] for change in found] == holm([change["p"] for change in found])


def test_every_attention_loss_brings_the_student_nearer_to_the_attention(quick: Run) -> None:
    distances = [change for change in quick.summary["comparisons"] if change["unit"] != "points"]
    assert len(distances) == 4
    for change in distances:
        against, arm = (quick.summary["arms"][change[name]][change["score"]]["values"] for name in ("against", "arm"))
        for without, with_attention in zip(against, arm, strict=True):
            assert with_attention < 0.7 * without, change["question"]


@pytest.mark.parametrize(
    ("mean", "p", "unit", "says"),
    [
        (2.0, 0.01, "points", "better (+2.0 points, 95 % interval +1.0 to +3.0, p = 0.01)"),
        (-2.0, 0.049, "points", "worse (-2.0 points, 95 % interval -3.0 to -1.0, p = 0.05)"),
        (2.0, 0.05, "points", "no difference shown (+2.0 points"),
        (2.0, 0.5, "points", "no difference shown (+2.0 points, 95 % interval +1.0 to +3.0, p = 0.50)"),
        (-0.2, 2e-5, "nats", "better (-0.200 nats, 95 % interval -1.200 to +0.800, p = 2e-05)"),
    ],
)
def test_a_sentence_says_what_stands_after_correction(mean: float, p: float, unit: str, says: str) -> None:
    change = {"mean": mean, "interval_95": [mean - 1, mean + 1], "p_holm": p}
    said = comparison_report.sentence(Comparison("question", "a", "b", "top1", unit), change)
    assert said.startswith(f"question: {says}")
    one = comparison_report.sentence(Comparison("question", "a", "b"), {"mean": mean, "interval_95": None})
    assert "cannot show" in one


def test_table_and_page_show_the_numbers_of_the_summary(quick: Run) -> None:
    page = (quick.directory / "methods.md").read_text(encoding="utf-8")
    arms, before = quick.summary["arms"], quick.summary["before"]
    for text, split in ((quick.text, r"\s{2,}"), (page, r"\s*\|\s*")):
        lines = [[cell for cell in re.split(split, line.strip()) if cell] for line in text.splitlines()]
        for arm in arms.values():
            accuracy, knn = arm["top1" if "top1" in arm else "linear_probe"], arm["knn"]
            cells = [arm["name"], " + ".join(str(count or "–") for count in arm["labels"].values())]
            cells += [f"{value['mean']:.1f} ± {value['std']:.1f}" for value in (accuracy, knn)]
            if len(RULERS[arm["group"]]) == 1:
                name = f"{RULERS[arm['group']][0]}_distance"
                cells.append(f"{before[name]['mean']:.3f} → {arm[name]['mean']:.3f} ± {arm[name]['std']:.3f}")
            assert any(line[start : start + len(cells)] == cells for line in lines for start in (0, 1)), cells


def test_labels_are_counted_equally(quick: Run) -> None:
    """All that reach a student: its own, and those of its teachers, on which heads are chosen too."""
    labels = {name: (arm["labels"]["own"], arm["labels"]["teachers"]) for name, arm in quick.summary["arms"].items()}
    assert labels["labels"] == (128, 0) and labels["labels_all"] == (320, 0)
    assert {labels[name] for name in labels if ARMS[name].group in ("Head-specific KD", "SSTA")} == {(128, 320)}
    assert {labels[name] for name in labels if ARMS[name].group in ("AttnDistill", "Attention Probe")} == {(0, 320)}
    for path in quick.directory.glob("importance-*.json"):
        assert json.loads(path.read_text())["images"] == 320


def test_every_seed_has_teachers_of_its_own(quick: Run) -> None:
    for name in ("teacher", "assistant"):
        first, second = quick.summary["teachers"][name]["linear_probe"]["values"]
        assert first != second
    teachers = [
        json.loads(path.read_text())["teachers"]
        for seed in (1, 2)
        for path in quick.directory.glob(f"student-*-seed{seed}-*/settings.json")
        if "teachers" in json.loads(path.read_text())
    ]
    assert len({json.dumps(each) for each in teachers if len(each) == 2}) == 2


def test_scores_are_of_the_checkpoints_and_spreads_of_the_seeds(quick: Run) -> None:
    digits = load_digits(comparison.QUICK["train_size"], comparison.QUICK["test_size"])
    assert len(quick.summary["checkpoints"]) == 2 * (2 + len(ARMS))
    for name in quick.summary["checkpoints"]:
        match = re.match(r"student-(\w+)-seed(\d)", name)
        if match is None or "top1" not in quick.summary["arms"][match[1]]:
            continue
        path = quick.directory / name
        model = timm.create_model(**json.loads(path.with_suffix(".json").read_text()), checkpoint_path=str(path)).eval()
        with torch.no_grad():
            right = (model(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()
        values = quick.summary["arms"][match[1]]["top1"]["values"]
        assert values[int(match[2]) - 1] == pytest.approx(100 * right, abs=1e-4)
    first, second = quick.summary["arms"]["labels"]["knn"]["values"]
    assert quick.summary["arms"]["labels"]["knn"]["std"] == pytest.approx(abs(first - second) / math.sqrt(2))


def test_heads_come_from_the_search_and_images_from_the_selection(quick: Run) -> None:
    found = {
        kind: [json.loads(path.read_text()) for path in quick.directory.glob(f"importance-{kind}-*.json")]
        for kind in ("heads", "combinations")
    }
    assert [len(found[kind]) for kind in ("heads", "combinations")] == [2, 4]

    def is_best(heads: list[list[int]], counts: list[list[int]]) -> bool:
        pairs = zip(heads, counts, strict=True)
        return all(sorted(count)[:2] == sorted(count[head] for head in kept) for kept, count in pairs)

    for heads in quick.summary["heads"]:
        chosen = heads["importance"]
        assert sum(is_best(chosen["head_kd"], search["correct"]) for search in found["heads"]) >= 1
        for name in ("teacher", "assistant"):
            searches = [torch.tensor(search["correct"]) for search in found["combinations"]]
            assert any(search[tuple(chosen[name])] == search.min() for search in searches)
    for seed in (1, 2):
        (listed,) = quick.directory.glob(f"wild-*-seed{seed}/selected.txt")
        kept = sum(name.startswith("digits/") for name in listed.read_text().splitlines())
        assert quick.summary["arms"]["v"]["digits_kept"]["values"][seed - 1] == kept
    for arm in ("vn", "va", "random"):
        assert (
            quick.summary["arms"][arm]["digits_kept"]["values"] != quick.summary["arms"]["v"]["digits_kept"]["values"]
        )


def test_a_second_run_reuses_everything_and_says_the_same(quick: Run) -> None:
    again = run_all(quick.directory)
    assert again.text.count("finished before, reused") == len(quick.summary["checkpoints"])
    assert {**again.summary, "seconds": 0} == {**quick.summary, "seconds": 0}


def test_the_picture_is_whole(quick: Run) -> None:
    from matplotlib.image import imread

    pixels = imread(quick.directory / "methods.png")[..., :3]
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(13 / 6, rel=0.02)
    assert pixels.std() > 0.05 and (pixels[0] == 1).all() and (pixels[:, -1] == 1).all()


def test_refuses_sizes_that_leave_no_digits_over(tmp_path: Path) -> None:
    config = comparison.ComparisonConfig(train_size=1197, test_size=400)
    with pytest.raises(ValueError, match="expected to leave 300 digits over, leave 200"):
        comparison.AllMethods(config, tmp_path, torch.device("cpu"), None)  # type: ignore[arg-type]


def test_simclr_is_equation_1_and_looks_at_no_labels() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1,
                              num_heads=2, num_classes=0).eval()  # fmt: skip
    images, views = torch.randn(4, 1, 16, 16), []

    def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        views.append(batch + 0.1 * torch.randn(batch.shape, generator=generator))
        return views[-1]

    task = SimCLR(model, augment, temperature=0.3)
    loss = task(images, torch.tensor([0, 0, 1, 1]))["loss"]
    z = [F.normalize(task.projector(model(view)), dim=1) for view in views]
    every = torch.cat(z)
    terms = []
    for i in range(8):
        similar = [torch.exp(every[i] @ every[k] / 0.3) for k in range(8) if k != i]
        terms.append(-torch.log(torch.exp(every[i] @ every[(i + 4) % 8] / 0.3) / sum(similar)))
    torch.testing.assert_close(loss, torch.stack(terms).mean())


class Stopped(Exception):
    pass


def test_views_drawn_by_the_task_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    digits = load_digits(128, 10)

    def run(name: str, stop_after: int | None) -> dict[str, torch.Tensor]:
        model = models.create({**models.COARSE_TEACHER, "depth": 1, "num_classes": 0}, seed=0)
        task = SimCLR(model, RandomAffine(digits.background))

        def on_epoch(record: dict) -> None:
            if record["epoch"] == stop_after:
                raise Stopped

        train(
            task, digits.train_images, digits.train_labels, recipe(3), seed=0, path=tmp_path / name, fingerprint="", on_epoch=on_epoch,
        )  # fmt: skip
        return task.state_dict()

    whole = run("whole.pt", None)
    with pytest.raises(Stopped):
        run("cut.pt", 2)
    torch.manual_seed(99)
    continued = run("cut.pt", None)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_the_page_shows_the_committed_run() -> None:
    summary = json.loads((DOCS / "results" / "methods.json").read_text(encoding="utf-8"))
    page = (DOCS / "methods" / "comparison.md").read_text(encoding="utf-8")
    assert comparison_report.markdown(summary) in page
    assert set(summary["arms"]) == set(ARMS) and len(summary["comparisons"]) == len(COMPARISONS)
    assert summary["config"]["seeds"] >= 3 and summary["seconds"]["cpu"] < 2 * 30 * 60
