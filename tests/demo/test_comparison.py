"""`attnkd demo --all`: four methods, and what they are compared with."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import timm
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from attnkd.commands import cli
from attnkd.demo import report
from attnkd.demo.arms import ARMS, METHODS, RULERS
from attnkd.demo.contrastive import SimCLR, TwoViews
from attnkd.demo.data import open_digits
from attnkd.demo.runs import SCORES
from attnkd.evaluation.pairs import holm
from attnkd.training import config
from attnkd.training.distributed import World
from attnkd.training.run import build

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
    assert len(found) == len(METHODS) and {change["arm"] for change in found} | {
        change["against"] for change in found
    } == set(arms) - {"labels_all"}
    for change in found:
        against, arm = (arms[change[name]][change["score"]]["values"] for name in ("against", "arm"))
        assert change["values"] == pytest.approx([b - a for a, b in zip(against, arm, strict=True)])
        assert change["verdict"] in quick.text
    known = [change for change in found if change["p"] is not None]  # equal differences have none
    assert len(known) > 10 and [change["p_holm"] for change in known] == holm([change["p"] for change in known])


def test_every_attention_loss_brings_the_student_nearer_to_the_attention(quick: Run) -> None:
    distances = [change for change in quick.summary["comparisons"] if change["unit"] != "points"]
    assert len(distances) == 4
    for change in distances:
        against, arm = (quick.summary["arms"][change[name]][change["score"]]["values"] for name in ("against", "arm"))
        for without, with_attention in zip(against, arm, strict=True):
            assert with_attention < 0.7 * without, change["question"]


def test_table_and_page_show_the_numbers_of_the_summary(quick: Run) -> None:
    page = (quick.directory / "results.md").read_text(encoding="utf-8")
    assert page in quick.text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    before = quick.summary["before"]
    for arm in quick.summary["arms"].values():
        accuracy, knn = arm["top1" if "top1" in arm else "linear_probe"], arm["knn"]
        cells = [arm["name"], " + ".join(str(count or "–") for count in arm["labels"].values())]
        cells += [f"{value['mean']:.1f} ± {value['std']:.1f}" for value in (accuracy, knn)]
        if len(RULERS[arm["group"]]) == 1:
            name = f"{RULERS[arm['group']][0]}_distance"
            cells.append(f"{before[name]['mean']:.3f} → {arm[name]['mean']:.3f} ± {arm[name]['std']:.3f}")
        assert cells in [line[1 : 1 + len(cells)] for line in lines]


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
    for seed in (1, 2):
        for path in quick.directory.glob(f"student-*-seed{seed}-*/config.yaml"):
            assert f"/teacher-seed{seed}-" in path.read_text(), path


def test_students_of_a_seed_start_from_the_same_weights(quick: Run) -> None:
    """But for those that have no classifier."""
    first = None
    for arm in ("labels", "labels_all", "logits", "head_kd", "ssta", "v", "probe"):
        (path,) = quick.directory.glob(f"student-{arm}-seed1-*/config.yaml")
        task = build(config.parse(None, ["--config", str(path)]), World(torch.device("cpu"))).task
        weights = task.student.state_dict()
        first = first or weights
        assert all(torch.equal(first[name], weights[name]) for name in first), arm


def test_scores_are_of_the_checkpoints_and_spreads_of_the_seeds(quick: Run) -> None:
    source = open_digits(next(quick.directory.glob("digits-*")), "validation")
    pixels = torch.stack([torch.from_numpy(numpy.array(image)) for image, _ in source.images])[:, None]
    labels = torch.tensor([label for _, label in source.images])
    assert len(quick.summary["runs"]) == 2 * (2 + len(ARMS))
    for name in quick.summary["runs"]:
        match = re.match(r"student-(\w+)-seed(\d)", name)
        if match is None or "top1" not in quick.summary["arms"][match[1]]:
            continue
        path = quick.directory / name / "model.safetensors"
        model = timm.create_model(**json.loads(path.with_suffix(".json").read_text()), checkpoint_path=str(path)).eval()
        (mean,), (std,) = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        with torch.no_grad():
            right = (model((pixels / 255 - mean) / std).argmax(1) == labels).double().mean().item()
        values = quick.summary["arms"][match[1]]["top1"]["values"]
        assert values[int(match[2]) - 1] == pytest.approx(100 * right, abs=1e-4)
        assert json.loads((path.parent / SCORES).read_text())["top1"] == values[int(match[2]) - 1]
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
        (listed,) = quick.directory.glob(f"wild-teacher-seed{seed}-*/V.txt")
        kept = sum(name.startswith("digits/") for name in listed.read_text().splitlines())
        assert quick.summary["arms"]["v"]["digits_kept"]["values"][seed - 1] == kept
    for arm in ("vn", "va", "random"):
        assert (
            quick.summary["arms"][arm]["digits_kept"]["values"] != quick.summary["arms"]["v"]["digits_kept"]["values"]
        )


def test_a_second_run_reuses_everything_and_says_the_same(quick: Run) -> None:
    again = run_all(quick.directory)
    assert again.text.count("finished before, reused") == len(quick.summary["runs"])
    assert {**again.summary, "seconds": 0} == {**quick.summary, "seconds": 0}


def test_pictures_are_whole(quick: Run) -> None:
    from matplotlib.image import imread

    for name, ratio in (("comparison.png", 13 / 6), ("attention.png", 13 / 6.5)):
        pixels = imread(quick.directory / name)[..., :3]
        assert pixels.shape[1] / pixels.shape[0] == pytest.approx(ratio, rel=0.02)
        assert pixels.std() > 0.05 and (pixels[0] == 1).all() and (pixels[:, -1] == 1).all()


def test_simclr_is_equation_1_and_looks_at_no_labels() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1,
                              num_heads=2, num_classes=0).eval()  # fmt: skip
    views = torch.stack(
        [TwoViews(lambda image: image + 0.1 * torch.randn_like(image))(x) for x in torch.randn(4, 1, 16, 16)]
    )
    assert views.shape == (4, 2, 1, 16, 16) and not torch.equal(views[:, 0], views[:, 1])
    task = SimCLR(model, temperature=0.3)
    loss = task(views, torch.tensor([0, 0, 1, 1]))["loss"]
    every = torch.cat([F.normalize(task.projector(model(views[:, view])), dim=1) for view in (0, 1)])
    terms = []
    for i in range(8):
        similar = [torch.exp(every[i] @ every[k] / 0.3) for k in range(8) if k != i]
        terms.append(-torch.log(torch.exp(every[i] @ every[(i + 4) % 8] / 0.3) / sum(similar)))
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert torch.equal(loss, task(views, torch.tensor([1, 1, 1, 1]))["loss"])


def test_the_page_shows_the_committed_run() -> None:
    summary = json.loads((DOCS / "results" / "methods.json").read_text(encoding="utf-8"))
    page = (DOCS / "methods" / "comparison.md").read_text(encoding="utf-8")
    assert report.markdown(summary) in page
    assert set(summary["arms"]) == set(ARMS) and len(summary["comparisons"]) == len(METHODS)
    assert summary["config"]["seeds"] >= 3 and summary["seconds"]["cpu"] < 2 * 30 * 60
