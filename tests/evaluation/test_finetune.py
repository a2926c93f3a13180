"""Fine-tuning: exact continuation, learning rates by layer, accuracy; shares of the labels; results side by side."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from attnkd.capture.loading import image_config, load_saved
from attnkd.evaluation.features import batches
from attnkd.evaluation.finetune import RECIPE, accuracy, finetune
from attnkd.evaluation.results import as_text, compared
from attnkd.training import sources
from attnkd.training.carrying import Carrying
from attnkd.training.loop import Trainer

MODEL = {"img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
CPU = torch.device("cpu")


def digits(split, count):
    source = sources.open_source("digits", split, mode="L")
    return source._replace(images=sources._Digits(source.images.pixels[:count], source.images.labels[:count]))


def tune(folder, until=None, **recipe):
    """What fine-tuning returns, and the last learning rate of every parameter; ``until`` stops it after so many steps."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL, num_classes=0)
    config = image_config(model, mean=(0.3,), std=(0.4,))
    numbers = {"epochs": 2, "batch_size": 40, "warmup_epochs": 1, "drop_last": False, "auto_augment": None, **recipe}
    settings = {"model": "m", "description": {"model_name": "vit_tiny_patch16_224", **MODEL}}
    rates = {}
    go_on = Trainer.run

    def go(self, save, watcher, stop):
        ended = go_on(self, save, watcher, stop if until is None else lambda: self.done >= until)
        names = {id(parameter): name for name, parameter in self.trained.named_parameters()}
        rates.update({names[id(p)]: group["lr"] for group in self.optimizer.param_groups for p in group["params"]})
        return ended

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run", go)
        found = finetune(
            model, digits("train", 100), digits("validation", 60), folder, config, settings,
            recipe=replace(RECIPE, **numbers), carrying=Carrying(workers=0, at_once=25), device=CPU, say=lambda line: None,
        )  # fmt: skip
    return found, rates


def test_a_model_is_tuned_continued_exactly_and_scored(tmp_path):
    whole, _ = tune(tmp_path / "whole")
    assert whole.finished and whole.steps == whole.total == 6
    stopped, rates = tune(tmp_path / "parts", until=4)
    assert not stopped.finished and stopped.steps == 4 and stopped.top1 is None
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"output: .* other settings \(train.epochs was 2, now 3"):
        tune(tmp_path / "parts", epochs=3)
    assert tune(tmp_path / "parts")[0] == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    # The head has the whole learning rate, each layer before it three quarters of the next one's.
    rate = rates["head.weight"]
    layers = ["blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"]
    assert [rates[name] / rate for name in layers] == pytest.approx([0.75, 0.75**2, 0.75**3])
    # The score is that of the saved model.
    model, val = load_saved(tmp_path / "whole" / "model.safetensors"), digits("validation", 60)
    pixels = (
        torch.stack(
            [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 16, 16) for image, _ in val.images]
        )
        / 255
    )
    found = (model((pixels - 0.3) / 0.4).argmax(1) == torch.tensor([label for _, label in val.images])).float().mean()
    assert whole.top1 == pytest.approx(100 * found.item()) and whole.top5 >= whole.top1
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="class scores are not finite"):
        accuracy(model, batches(val.images, lambda image: torch.zeros(1, 16, 16), 30, 0))


def test_a_share_of_the_labels_has_all_classes_and_is_always_the_same():
    whole = sources.open_source("digits", "train", mode="L")
    labels = torch.as_tensor(whole.images.labels)
    tenth, again = (sources.subset(whole, "0.1").images for _ in range(2))
    assert tenth.indices == again.indices != sources.subset(whole, "0.1", seed=1).images.indices
    counts = labels[tenth.indices].bincount()
    assert counts.tolist() == [round(0.1 * n) for n in labels.bincount().tolist()]
    assert len(sources.subset(whole, "0.001").images) == 10
    for wrong in ("0", "1.5", "few", "nan"):
        with pytest.raises(ValueError, match="subset: expected a share"):
            sources.subset(whole, wrong)


def test_a_file_names_images_of_a_folder(tmp_path):
    for index in range(6):
        path = tmp_path / "data" / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    source = sources.open_source(str(tmp_path / "data"), "train")
    listed = tmp_path / "few.txt"
    for lines in ("1.png\n4.png\n", "class1/1.png\nclass0/4.png\n"):
        listed.write_text(lines)
        found = sources.subset(source, str(listed)).images
        assert sorted((image.getpixel((0, 0))[0], label) for image, label in found) == [(1, 1), (4, 0)]
    assert len(sources.subset(source, "0.34").images) == 2
    listed.write_text("1.png\n9.png\n")
    with pytest.raises(ValueError, match=r"subset: .*few.txt lists '9.png', which is not in the data set"):
        sources.subset(source, str(listed))


def test_results_of_several_runs_are_one_table(tmp_path):
    shared = {"data": "digits", "val_split": None, "subset": None}
    knn = {"evaluation": "knn", **shared, "scores": {"10": {"top1": 50.0, "top5": 90.0}}}
    tuned = {"evaluation": "finetune", **shared, "subset": "0.01", "top1": 70.25}
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, result in ((a, knn), (b, {**knn, "scores": {"10": {"top1": 60.5}}}), (b, tuned)):
        folder.mkdir(exist_ok=True)
        (folder / f"eval_{result['evaluation']}.json").write_text(json.dumps(result))
    table = compared([a, b])
    assert table == {
        "digits, validation": {
            "k-NN 10": {str(a): 50.0, str(b): 60.5},
            "fine-tuned, 0.01 of the labels": {str(b): 70.25},
        }
    }
    rows = [line.split()[-2:] for line in as_text(table, [a, b]).splitlines()]
    assert ["50.00", "60.50*"] in rows and ["-", "70.25"] in rows
    (a / "eval_x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model: .*eval_x.json is no result of attnkd eval"):
        compared([a, b])
