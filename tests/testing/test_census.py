"""Of every family of the installed timm and transformers: captured exactly, or refused with a reason; never wrong."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from attnkd.commands import cli
from attnkd.testing import census

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
    ):
        assert by_family[family].status == census.EXACT, by_family[family]
    for family in ("cait", "xcit"):
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


def test_a_name_that_no_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--contains", "no such model"]) == 2
    assert capsys.readouterr().err.startswith("attnkd models: --contains: no model has 'no such model'")
