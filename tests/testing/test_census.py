"""Of every family of the installed timm and transformers: captured exactly, or refused with a reason; never wrong."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkd.commands import cli
from attnkd.methods.head_kd import HeadKD
from attnkd.testing import census, census_steps
from attnkd.testing.census_page import as_line, read_lines

ROOT = Path(__file__).parents[2]


def test_a_sample_of_every_family() -> None:
    found = list(census.census(sample=True))
    assert [one for one in found if one.status == census.WRONG] == []
    assert all(one.why for one in found if one.status in (census.REFUSED, census.NOT_BUILT))
    by_family = {one.family: one for one in found if one.library == "timm"}
    assert len(by_family) > 40
    for family in (
        "vision_transformer",
        "deit",
        "eva",
        "beit",
        "naflexvit",
        "vision_transformer_relpos",
        "swin_transformer",
        "cait",
        "xcit",
    ):
        assert by_family[family].status == census.EXACT, by_family[family]
    for family in ("crossvit", "pvt_v2"):
        assert by_family[family].status == census.BY_PATH, by_family[family]
    for family in ("convit", "tnt"):
        assert by_family[family].status == census.REFUSED, by_family[family]
    if importlib.util.find_spec("transformers"):
        others = {one.name: one.status for one in found if one.library == "transformers"}
        assert others.keys() == census.HUGGING_FACE.keys() and set(others.values()) == {census.EXACT}


@pytest.mark.parametrize("fault", ["scale", "heads", "nothing"])
def test_a_wrong_capture_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = census.attention_map
    wrong = {
        "scale": lambda call: right(call._replace(scale=call.scale * 1.02)),
        "heads": lambda call: right(call).flip(1),
        "nothing": right,
    }
    monkeypatch.setattr(census, "attention_map", wrong[fault])
    page = tmp_path / "models.md"
    assert cli.main(["models", "--contains", "test_vit", "--output", str(page)]) == (0 if fault == "nothing" else 1)
    said, text = capsys.readouterr(), page.read_text()
    if fault == "nothing":
        assert "exact" in said.out and said.err == "" and "## WRONG" not in text
        assert re.search(r"\| timm, `vision_transformer` \| [1-9]", text)
    else:
        assert "a captured attention is not the model's" in said.err and "largest difference of a probability" in text


def test_a_method_that_breaks_is_found_and_one_that_refuses_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def breaks(*_: Any) -> Any:
        return torch.zeros(2).view(3)

    def refuses(*_: Any) -> Any:
        return HeadKD(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    (name, *_) = [name for _, name in census.timm_candidates() if name.startswith("test_vit")]
    page = tmp_path / "models.md"
    monkeypatch.setattr(census_steps, "STEPS", {"HeadKD": {"": refuses}})
    assert cli.main(["models", "--contains", name, "--output", str(page)]) == 0
    assert "HeadKD: refused: student: expected a Vision Transformer" in capsys.readouterr().out
    monkeypatch.setattr(census_steps, "STEPS", {"HeadKD": {"": breaks}})
    assert cli.main(["models", "--contains", name, "--output", str(page)]) == 1
    assert "HeadKD: RuntimeError: shape '[3]' is invalid" in page.read_text()


def test_it_continues_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = tmp_path / "found.jsonl"
    known = census.Found("timm", "vision_transformer", "test_vit", census.EXACT, "", {"HeadKD": "as it was"})
    found.write_text(as_line(known) + as_line(known)[:20])  # a kill cut the second line off
    assert cli.main(["models", "--contains", "test_vit", "--found", str(found)]) == 0
    lines = read_lines(found.read_text())
    assert lines[0] == known and len(lines) > 1 and "HeadKD: as it was" in capsys.readouterr().out
    assert {one.name for one in lines[1:]} == {n for _, n in census.timm_candidates() if "test_vit" in n} - {"test_vit"}


def test_a_name_that_no_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--contains", "no such model"]) == 2
    assert capsys.readouterr().err.startswith("attnkd models: --contains: no model has 'no such model'")
