"""Every Python example in README and docs runs as it stands."""

import functools
import re
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parent.parent
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if EXAMPLE.search(path.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is downloaded: pretrained models start from scratch. `loader` is the reader's own.
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", functools.wraps(create)(
        lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})))  # fmt: skip
    for number, example in enumerate(EXAMPLE.findall(page.read_text(encoding="utf-8")), start=1):
        names = {"loader": [(torch.randn(2, 3, 224, 224), torch.tensor([1, 2]))]}
        exec(compile(example, f"{page.name}, example {number}", "exec"), names)
        losses = [value for value in names.values() if isinstance(value, torch.Tensor) and value.ndim == 0]
        assert all(loss.isfinite() for loss in losses)


def test_there_are_examples_where_people_look() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in PAGES}
    methods = {f"docs/methods/{name}.md" for name in ("attn_distill", "head_kd", "ssta", "attention_probe")}
    assert {"README.md", "docs/capture.md"} | methods <= found
