"""Every Python example in README and docs runs as it stands; every path, link, name and command in them exists."""

import functools
import pkgutil
import re
from pathlib import Path

import pytest
import timm
import torch

from attnkd.commands import cli
from benchmarks import __main__ as benchmarks

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
    methods = {f"docs/methods/{name}.md" for name in ("attn_distill", "head_kd", "ssta", "attention_probe", "minilm")}
    assert {"README.md", "docs/capture.md"} | methods <= found


CODE = re.compile(r"^```\w*\n(.*?)^```|^(?: {4}|\t)(.*?)$|(?<!`)`([^`\n]+)`(?!`)", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"\.?[\w-]+(?:/[\w.-]+)*/?(?:\.\w+)?(?:::\w+)?")
HOMES = (ROOT, ROOT / "attnkd", ROOT / "kernels" / "attnkd_kernels")  # a page may leave these out
WRITTEN = {"benchmarks/results/matrix/matrix.json", "results.md"}  # by a command
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
         ROOT / "benchmarks" / "results" / "README.md"]  # fmt: skip
each_text = pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """What a page shows as code: blocks, indented lines and words between back quotes."""
    return ["".join(found) for found in CODE.findall(page.read_text(encoding="utf-8"))]


def is_our_path(word: str) -> bool:
    """A Python or Markdown file, or anything below a folder of the repository. `summary.json` is written by a command."""
    first, slash, _ = word.partition("/")
    if PATH.fullmatch(word) is None or first.startswith("."):
        return False
    return (
        word.partition("::")[0].endswith((".py", ".md"))
        or bool(slash)
        and any((home / first).is_dir() for home in HOMES)
    )


def exists(word: str) -> bool:
    path, _, name = word.partition("::")
    found = [home / path for home in HOMES if (home / path).exists()]
    return bool(found) and (not name or f"def {name}(" in found[0].read_text(encoding="utf-8"))


@each_text
def test_every_path_exists(page: Path) -> None:
    named = {word for text in code(page) for word in text.split() if is_our_path(word)}
    assert {word for word in named - WRITTEN if not exists(word)} == set()


@each_text
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, target


@each_text
def test_every_name_can_be_imported(page: Path) -> None:
    for name in {found for text in code(page) for found in re.findall(r"(?<![\w.-])attnkd(?:\.\w+)+", text)}:
        module, _, attribute = name.rpartition(".")
        try:
            assert pkgutil.resolve_name(name) is not None
        except AttributeError:
            raise AssertionError(f"{page.name}: {module} has no {attribute}") from None


def test_every_command_and_option_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    programs = {"attnkd": (cli.COMMANDS, cli.main), "python -m benchmarks": (benchmarks.COMMANDS, benchmarks.main)}
    monkeypatch.setenv("COLUMNS", "200")
    helps: dict[str, str] = {}
    for page in TEXTS:
        lines = [line.partition(" #")[0].strip() for text in code(page) for line in text.splitlines()]
        assert {line.split()[1] for line in lines if re.match(r"make [a-z]", line)} <= targets, page
        for line in lines:
            for program, (commands, main) in programs.items():
                if (called := re.match(rf"{program} ([a-z]+)(.*)", line)) is None:
                    continue
                name, options = called.groups()
                assert name in commands, f"{page.name}: {line}"
                if program + name not in helps:
                    with pytest.raises(SystemExit):
                        main([name, "--help"])
                    helps[program + name] = capsys.readouterr().out
                given = set(re.findall(r"(?<!\S)--[\w-]+", options))
                assert given <= set(re.findall(r"--[\w-]+", helps[program + name])), f"{page.name}: {line}"


def test_every_page_and_object_named_in_the_source_exists() -> None:
    for top in ("attnkd", "kernels", "benchmarks", "tests"):
        for source in (ROOT / top).rglob("*.py"):
            text = source.read_text(encoding="utf-8")
            for name in re.findall(r"\b(?:docs|tests|benchmarks|attnkd|kernels)/[\w/]+\.(?:md|py)\b", text):
                assert (ROOT / name).exists(), f"{source.relative_to(ROOT)}: {name}"
            for name in re.findall(
                r":(?:mod|func|class|meth|data):`~?((?:attnkd|attnkd_kernels|benchmarks)\.[\w.]+)`", text
            ):
                try:
                    pkgutil.resolve_name(name)
                except (ImportError, AttributeError) as error:
                    raise AssertionError(f"{source.relative_to(ROOT)}: {error}") from None
