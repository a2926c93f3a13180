"""`attnkd demo --all`: four methods beside the same training without attention."""

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
from attnkd.demo.contrastive import SimCLR
from attnkd.demo.data import RandomAffine, load_digits
from attnkd.demo.training import Recipe, train
from attnkd.methods.schedule import Schedule, Schedules

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


def test_every_method_stands_beside_its_arm_without_attention_and_comes_nearer_to_the_attention(quick: Run) -> None:
    methods = [compared["method"] for compared in quick.summary["comparisons"]]
    assert methods == ["AttnDistill", "Head-specific KD", "SSTA", "Attention Probe"]
    for compared in quick.summary["comparisons"]:
        without, arm = (quick.summary["arms"][compared[name]] for name in ("without", "arm"))
        pairs = zip(without[compared["distance"]]["values"], arm[compared["distance"]]["values"], strict=True)
        assert all(with_attention < 0.7 * alone for alone, with_attention in pairs)
        change = compared["differences"]["accuracy"]["mean"]
        assert change == pytest.approx(arm[compared["accuracy"]]["mean"] - without[compared["accuracy"]]["mean"])
        assert compared["verdict"] in quick.text


def test_table_and_page_show_the_numbers_of_the_summary(quick: Run) -> None:
    page = (quick.directory / "methods.md").read_text(encoding="utf-8")
    arms, before = quick.summary["arms"], quick.summary["before"]
    for text, split in ((quick.text, r"\s{2,}"), (page, r"\s*\|\s*")):
        lines = [[cell for cell in re.split(split, line.strip()) if cell] for line in text.splitlines()]
        for compared in quick.summary["comparisons"]:
            for name in (compared["without"], compared["arm"]):
                accuracy, knn, distance = (
                    arms[name][key] for key in (compared["accuracy"], "knn", compared["distance"])
                )
                cells = [
                    arms[name]["name"],
                    f"{accuracy['mean']:.1f} ± {accuracy['std']:.1f}",
                    f"{knn['mean']:.1f} ± {knn['std']:.1f}",
                    f"{before[compared['distance']]['mean']:.3f} → {distance['mean']:.3f} ± {distance['std']:.3f}",
                ]
                assert any(line[-len(cells) :] == cells or line[-len(cells) - 1 : -1] == cells for line in lines), cells


def test_scores_are_of_the_checkpoints_and_spreads_of_the_seeds(quick: Run) -> None:
    digits = load_digits(comparison.QUICK["train_size"], comparison.QUICK["test_size"])
    assert len(quick.summary["checkpoints"]) == 3 + 2 * len(comparison.ARMS)
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
    heads = quick.summary["heads"]
    found = {
        kind: [json.loads(path.read_text()) for path in quick.directory.glob(f"importance-{kind}-*.json")]
        for kind in ("heads", "combinations")
    }
    assert [len(found[kind]) for kind in ("heads", "combinations")] == [1, 2]
    for block, counts in enumerate(found["heads"][0]["correct"]):
        worst_kept = max(counts[head] for head in heads["head_kd"][block])
        assert worst_kept <= min(count for head, count in enumerate(counts) if head not in heads["head_kd"][block])
    for name in ("teacher", "assistant"):
        best = [torch.tensor(search["correct"]).min().item() for search in found["combinations"]]
        chosen = [torch.tensor(search["correct"])[tuple(heads[name])].item() for search in found["combinations"]]
        assert any(a == b for a, b in zip(best, chosen, strict=True))
    for seed in (1, 2):
        (listed,) = quick.directory.glob(f"wild-*-seed{seed}/selected.txt")
        kept = sum(name.startswith("digits/") for name in listed.read_text().splitlines())
        assert quick.summary["arms"]["probe"]["digits_kept"]["values"][seed - 1] == kept


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
            task, digits.train_images, digits.train_labels, Recipe(3), seed=0, state_path=tmp_path / name, fingerprint="",
            on_epoch=on_epoch,
        )  # fmt: skip
        return task.state_dict()

    whole = run("whole.pt", None)
    with pytest.raises(Stopped):
        run("cut.pt", 2)
    torch.manual_seed(99)
    continued = run("cut.pt", None)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_the_loop_tells_scheduled_weights_the_epoch_from_zero(tmp_path: Path) -> None:
    class Task(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.schedules = Schedules(beta=Schedule(1.0, stop=2))
            self.set_epoch = self.schedules.set_epoch

        def forward(self, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.weight**2, "beta_loss": torch.tensor(self.schedules["beta"])}

    history = train(
        Task(), torch.zeros(64, 1), torch.zeros(64), Recipe(4), seed=0, state_path=tmp_path / "s.pt", fingerprint=""
    )
    assert [record["beta_loss"] for record in history[1:]] == [1, 1, 0, 0]


def test_the_page_shows_the_committed_run() -> None:
    summary = json.loads((DOCS / "results" / "methods.json").read_text(encoding="utf-8"))
    page = (DOCS / "methods" / "comparison.md").read_text(encoding="utf-8")
    assert comparison_report.markdown(summary) in page
    assert summary["config"]["seeds"] >= 5 and summary["seconds"]["wall"] < 30 * 60
