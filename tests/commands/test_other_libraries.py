"""`attnkd train`, `eval`, `maps`, `select` and `export` with models of other libraries, from folders made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from attnkd.capture.adapters import adapter_for
from attnkd.capture.loading import load_saved
from attnkd.commands import cli

transformers = pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OPTIONS = ["--workers", "0", "--device", "cpu"]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A Hugging Face classifier in a folder, with its image processor."""
    folder = tmp_path / "teacher"
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=8, num_labels=2)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images by class, in two splits."""
    for split in ("train", "validation"):
        for number in range(8):
            folder = tmp_path / "data" / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * number, 255 * (number % 2), 90)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("method", "student", "arguments", "library"),
    [
        ("attn_distill", "hf:dinov2", "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, patch_size: 8}", "transformers"),
        ("head_kd", "hf:vit", "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, patch_size: 8}", "transformers"),
        ("head_kd", "torchvision:vit_b_16", "{}", "torchvision"),
    ],
)  # fmt: skip
def test_train_evaluate_export(
    method: str, student: str, arguments: str, library: str, teacher: str, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if library == "torchvision":  # as small as the others
        models = pytest.importorskip("torchvision.models")
        small = {"patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
        monkeypatch.setattr(
            models, "get_model", lambda name, weights=None, **more: models.VisionTransformer(**small, **more)
        )
    run = tmp_path / "run"
    words = ["train", method, "--teacher", teacher, "--student", student, "--student_kwargs", arguments]
    words += ["--data", str(pictures), "--output", str(run), "--train.epochs", "1", "--train.batch_size", "4"]
    words += ["--train.warmup_epochs", "0", "--run.workers", "0", "--device", "cpu"]
    assert cli.main(words) == 0, capsys.readouterr().err
    saved = load_saved(run / "model.safetensors")
    assert adapter_for(saved).num_classes(saved) == (0 if method == "attn_distill" else 2)
    assert cli.main(["eval", "knn", str(run), "--k", "1", *OPTIONS]) == 0
    assert cli.main(["export", str(run), "--output", str(tmp_path / "given")]) == 0, capsys.readouterr().err
    card = (tmp_path / "given" / "README.md").read_text()
    assert f"library_name: {library}" in card and teacher in card and "k-NN on" in card
    code = card.split("```python\n")[1].split("```")[0].replace("PATH OF THIS FOLDER", str(tmp_path / "given"))
    names: dict = {}
    exec(code, names)
    images, forward = torch.randn(2, 3, 32, 32), adapter_for(saved).forward
    assert torch.equal(forward(names["model"], images), forward(saved, images))
    if library == "transformers":
        assert list(names["processor"].image_mean) == [0.5, 0.5, 0.5]
        if method == "head_kd":
            again = ["eval", "agree", str(run), f"hf:{tmp_path / 'given'}", "--data", str(pictures), *OPTIONS]
            assert cli.main(again) == 2
            assert "expected a timm Vision Transformer, got ViTForImageClassification" in capsys.readouterr().err
            assert cli.main(["eval", "finetune", str(run), *OPTIONS]) == 2
            assert "attnkd eval: --model: fine-tuning needs a timm model" in capsys.readouterr().err
            assert cli.main(["eval", "knn", str(run), "--k", "1", "--last-blocks", "2", *OPTIONS]) == 2
            assert "attnkd eval: --last-blocks: expected 1 for ViTForImageClassification" in capsys.readouterr().err


def test_maps_and_select(teacher: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, images = tmp_path / "maps.png", sorted(pictures.rglob("*.png"))[:2]
    words = ["maps", "--teacher", teacher, "--student", teacher, "--output", str(figure), "--device", "cpu"]
    assert cli.main([*words, *map(str, images)]) == 0, capsys.readouterr().err
    assert figure.stat().st_size > 1000
    assert "mean of heads" in (said := capsys.readouterr().out)
    assert all(abs(float(line.split("heads ")[1].split()[0])) < 1e-5 for line in said.splitlines() if ":  mean" in line)
    out = tmp_path / "list.txt"
    words = [
        "select",
        "--data",
        str(pictures),
        "--teacher",
        teacher,
        "--num-select",
        "3",
        "--out",
        str(out),
        "--blocks",
        "0",
        "-1",
    ]
    assert cli.main([*words, *OPTIONS]) == 0, capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 3


def test_mistakes_name_the_option(
    teacher: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    transformers.ViTModel(transformers.ViTConfig(**TINY, image_size=32, patch_size=8)).save_pretrained(bare)
    train = ["train", "attn_distill", "--data", str(pictures), "--output", str(tmp_path / "run"), "--device", "cpu"]
    for words, said in (
        ([*train, "--student", "hf:vit", "--teacher", "hf:vit"], "--teacher: hf:vit cannot be built"),
        ([*train, "--student", "hf:nothing/here", "--teacher", teacher], "--student: hf:nothing/here c"),
        ([*train, "--student", "hub:a/b:c", "--teacher", teacher], "--student: hub:a/b:c runs the code of a repository"),
        ([*train, "--student", "hf:vit", "--teacher", f"hf:{bare}"], "--mean, --std: the teacher, ViTModel, does not say"),
        (["maps", "--teacher", teacher, "--student", f"hf:{bare}", "--output", str(tmp_path / "x.png")],
         "--student: ViTModel does not say its images' mean and std"),
        (["select", "--data", str(pictures), "--teacher", f"hf:{bare}", "--num-select", "1", "--out", str(tmp_path / "l")],
         "--mean: ViTModel does not say"),
    ):  # fmt: skip
        assert cli.main(words) in (1, 2)
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"attnkd {words[0]}: {said}"), words
