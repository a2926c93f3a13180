"""Paired differences and their correction, against scipy and by hand."""

import json
import math
from pathlib import Path

import pytest
import scipy.stats
from PIL import Image

pytest.importorskip("matplotlib")

from attnkd.commands import cli
from attnkd.evaluation.pairs import correct, difference, holm, in_words, spread


def test_difference_is_paired_and_its_interval_students_t() -> None:
    change = difference([1.0, 2, 3, 4, 5], [2.0, 3, 4, 5, 8])
    assert change["mean"] == pytest.approx(1.4) and change["std"] == pytest.approx(math.sqrt(0.8))
    reach = 2.776445 * math.sqrt(0.8 / 5)
    assert change["interval_95"] == pytest.approx([1.4 - reach, 1.4 + reach], rel=1e-5)
    assert change["p"] == pytest.approx(scipy.stats.ttest_rel([2.0, 3, 4, 5, 8], [1.0, 2, 3, 4, 5]).pvalue)
    same = [100 * hits / 600 for hits in (585, 590, 592)], [100 * hits / 600 for hits in (586, 591, 593)]
    for against, values in (([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [2.0, 3.0]), same):
        change = difference(against, values)
        assert change["p"] is None and change["interval_95"] is None
    assert spread([3.0]) == {"mean": 3.0, "std": None, "values": [3.0]}


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.02]) == [0.02]
    changes = [{"p": 0.01}, {"p": None}, {"p": 0.03}]
    correct(changes)
    assert [change["p_holm"] for change in changes] == [pytest.approx(0.02), None, pytest.approx(0.03)]


@pytest.mark.parametrize(
    ("mean", "p", "options", "says"),
    [
        (2.0, 0.01, {"digits": 1}, "better (+2.0 points, 95 % interval +1.0 to +3.0, p = 0.01)"),
        (-2.0, 0.049, {"digits": 1}, "worse (-2.0 points, 95 % interval -3.0 to -1.0, p = 0.05)"),
        (2.0, 0.05, {}, "no difference shown (+2.00 points"),
        (2.0, 0.5, {}, "no difference shown (+2.00 points, 95 % interval +1.00 to +3.00, p = 0.50)"),
        (-0.2, 2e-5, {"unit": "nats", "more_is_better": False}, "better (-0.20 nats, 95 % interval -1.20 to +0.80, p = 2e-05)"),
        (0.2, 2e-5, {"unit": "nats", "more_is_better": False}, "worse (+0.20 nats"),
    ],
)  # fmt: skip
def test_words_say_what_stands_after_correction(mean: float, p: float, options: dict, says: str) -> None:
    change = {"mean": mean, "interval_95": [mean - 1, mean + 1], "p_holm": p}
    assert in_words(change, **options).startswith(says)
    equal = {"mean": mean, "values": [mean, mean], "interval_95": None}
    assert in_words(equal) == f"{mean:+.2f} points in each of 2 pairs, which cannot show whether this is chance"


def test_runs_are_compared_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"a1": (90.0, 80.0), "a2": (91.0, 81.0), "a3": (92.5, 80.0), "b1": (88.0, 80.5), "b2": (89.5, 80.0), "b3": (90.0, 81.0)}  # fmt: skip
    for name, (knn, linear) in scores.items():
        (tmp_path / name).mkdir()
        shared = {"data": "digits", "val_split": None, "subset": None}
        for how, more in (("knn", {"scores": {"20": {"top1": knn}}}), ("linear", {"top1": linear})):
            (tmp_path / name / f"eval_{how}.json").write_text(json.dumps({"evaluation": how, **shared, **more}))
    (tmp_path / "a1" / "eval_knn_10.json").write_text(
        json.dumps({"evaluation": "knn", **shared, "scores": {"10": {"top1": 1.0}}})
    )
    left, right = ([str(tmp_path / f"{side}{seed}") for seed in (1, 2, 3)] for side in "ab")
    words = ["eval", "compare", *left, "--against", *right, "--json", str(tmp_path / "found.json")]
    words += ["--picture", str(tmp_path / "found.png")]
    assert cli.main(words) == 0
    with Image.open(tmp_path / "found.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours  # one stands after correction, one does not
    found = json.loads((tmp_path / "found.json").read_text())["digits, validation"]
    assert found.keys() == {"k-NN 20", "linear"}  # one run alone has k-NN 10
    assert found["k-NN 20"]["values"] == [2.0, 1.5, 2.5]
    p = [
        scipy.stats.ttest_rel([90, 91, 92.5], [88, 89.5, 90]).pvalue,
        scipy.stats.ttest_rel([80, 81, 80], [80.5, 80, 81]).pvalue,
    ]
    assert [found[name]["p_holm"] for name in ("k-NN 20", "linear")] == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    printed = capsys.readouterr().out
    assert "differences in top-1 on digits, validation, 3 pairs, p corrected by Holm" in printed and "90.00" in printed
    assert "\nk-NN 20  better (+2.00 points, 95 % interval +0.76 to +3.24, p = 0.04)\nlinear   no difference" in printed
    for others, message in (
        (right[:2], "--against: expected as many runs as are compared with them, 3, each of them once"),
        ([*right[:2], left[0]], "--against: expected as many runs"),
    ):
        assert cli.main(["eval", "compare", *left, "--against", *others]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["eval", "compare", *left, "--picture", str(tmp_path / "x.png")]) == 2
    assert "--picture: is of differences; give --against too" in capsys.readouterr().err
    assert cli.main(["eval", "compare", left[0], "--against", right[0]]) == 0
    assert "in one pair, which cannot show whether this is chance" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "compare", "a2", "b2"]) == 0
    assert "\n               a2        b2\nk-NN 20    91.00*    89.50" in capsys.readouterr().out
    assert cli.main(["eval", "knn", left[0], "--against", right[0]]) == 2
    assert "--against: is for compare, not for knn" in capsys.readouterr().err
