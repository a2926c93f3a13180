"""Training runs from settings to folder: all methods, exact continuation, what is refused."""

import gzip
import importlib.util
import json
import multiprocessing
import time

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from attnkd.training import checkpoint, config, run, sources
from attnkd.training.loop import DivergedError, Trainer

MODEL = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 3}
TEACHERS = {
    "teacher": {**MODEL, "embed_dim": 24, "num_heads": 4},
    "assistant": {**MODEL, "embed_dim": 16, "num_heads": 2},
}
CPU = torch.device("cpu")


def few(set_attribute, count):
    """Make the digits fewer."""
    whole = sources._digits

    def fewer(split):
        source = whole(split)
        return source._replace(images=sources._Digits(source.images.pixels[:count], source.images.labels[:count]))

    set_attribute(sources, "_digits", fewer)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Two untrained models in files, as other runs leave them."""
    paths = {}
    for seed, (role, arguments) in enumerate(TEACHERS.items()):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(role)
        run.save_student(folder, timm.create_model(**arguments, num_classes=10), {**arguments, "num_classes": 10})
        paths[role] = str(folder / "model.safetensors")
    return paths


@pytest.fixture
def experiment(teachers, tmp_path, monkeypatch):
    """An experiment on 150 digits by dotted settings: a row's, made small."""
    few(monkeypatch.setattr, 150)

    def make(method="attn_distill", output="run", **changes):
        row = config.ROWS[f"{method}_digits"].defaults
        settings = {
            **{name: value for name, value in row.items() if name not in ("train", "method")},
            "output": str(tmp_path / output),
            "teacher": teachers["teacher"],
            "train": {**row["train"], "epochs": 2, "warmup_epochs": 1, "batch_size": 40},
            "run": {"workers": 0, "save_steps": 1, "log_steps": 3},
            "method": dict(row.get("method", {})),
        }
        if method == "ssta":
            settings["assistant"] = teachers["assistant"]
        for name, value in changes.items():
            *groups, last = name.split("__")
            inside = settings
            for group in groups:
                inside = inside[group]
            inside[last] = value
        return config.build(settings, method)

    return make


def train(experiment, until=None, monkeypatch=None):
    """A run; ``until`` stops it after so many steps, as a SIGTERM would."""
    if until is not None:
        run_until = Trainer.run
        monkeypatch.setattr(
            Trainer, "run", lambda self, save, watcher, stop: run_until(self, save, watcher, lambda: self.done >= until)
        )
    ended = run.train(experiment, CPU, say=lambda line: None)
    if until is not None:
        monkeypatch.setattr(Trainer, "run", run_until)
    return ended


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def log(folder):
    """Records without their speed."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]


@pytest.mark.parametrize("method", config.METHODS)
def test_every_method_trains_and_continues_exactly_in_the_middle_of_an_epoch(method, experiment, tmp_path, monkeypatch):
    changes = {"train__ema_decay": 0.9, "train__drop_last": False}
    if method in ("head_kd", "ssta"):
        changes |= {"train__mixup": 0.8, "train__random_erasing": 0.3, "train__auto_augment": None}
    whole = train(experiment(method, "whole", **changes))
    assert whole.finished and whole.steps == whole.total == 8 and whole.nonfinite == 0
    ended = train(experiment(method, "parts", **changes), 5, monkeypatch)
    assert not ended.finished and ended.steps == 5
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert train(experiment(method, "parts", **changes)).finished
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    first, last = log(tmp_path / "whole")[0], log(tmp_path / "whole")[-1]
    assert (
        last["step"] == 8
        and last["epoch"] == 2
        and {name for name in last if name.endswith("loss")} == set(name for name in first if name.endswith("loss"))
    )
    before = weights(tmp_path / "whole")
    assert train(experiment(method, "whole", **changes)).steps == 8 and weights(tmp_path / "whole") == before


@pytest.mark.parametrize("method", config.METHODS)
def test_every_method_learns(method, experiment, tmp_path, monkeypatch):
    """The same images in every step, all of them and whole: the losses of two steps can be compared."""
    few(monkeypatch.setattr, 40)
    still = {"train__crop_scale": (1.0, 1.0), "train__epochs": 15, "train__base_lr": 2e-3, "run__save_steps": None}
    assert train(experiment(method, **still, run__log_steps=1)).finished
    losses = [record["loss"] for record in log(tmp_path / "run")]
    assert len(losses) == 15 and losses[-1] < 0.95 * losses[0], losses


@pytest.mark.parametrize("method", ["attn_distill", "ssta"])
def test_compiled_models_train_like_others_and_continue_exactly(method, experiment, tmp_path, monkeypatch):
    """By AOTAutograd alone: TorchInductor needs a C++ compiler."""
    whole, calls = torch.nn.Module.compile, []

    def compile(module, *args, **kwargs):
        calls.append(type(module).__name__)
        whole(module, *args, **{**kwargs, "backend": "aot_eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    changes = {"train__ema_decay": 0.9, "train__opt": "sgd", "train__epochs": 1, "train__warmup_epochs": 0}
    assert train(experiment(method, "eager", **changes)).finished and not calls
    changes["run__compile"] = True
    assert train(experiment(method, "whole", **changes)).finished and calls
    assert not train(experiment(method, "parts", **changes), 2, monkeypatch).finished
    assert train(experiment(method, "parts", **changes)).finished
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    from safetensors.torch import load_file

    eager, compiled = (load_file(tmp_path / folder / "model.safetensors") for folder in ("eager", "whole"))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_result_does_not_depend_on_workers_parts_and_the_smaller_last_step(experiment, tmp_path):
    same = {"train__drop_last": False, "train__epochs": 2, "train__batch_size": 60, "train__opt": "sgd"}
    assert train(experiment("ssta", "one", **same)).finished
    assert train(experiment("ssta", "two", **same, run__workers=2)).finished
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert train(experiment("ssta", "parts", **same, run__at_once=17)).finished
    from safetensors.torch import load_file

    for folder in ("one", "parts"):
        assert checkpoint.load(tmp_path / folder / checkpoint.NAME)["done"] == 6
    one, parts = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_that_is_drawn_and_profiled_is_the_same_run(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    for method in ("head_kd", "attention_probe"):
        changes = {"train__epochs": 4, "run__workers": 1}
        train(experiment(method, output=f"{method}-plain", **changes))
        train(experiment(method, output=method, figures=3, run__profile=4, **changes))
        assert weights(tmp_path / method) == weights(tmp_path / f"{method}-plain")
        for name in ("curves.png", "attention.png"):
            with Image.open(tmp_path / method / name) as picture:
                assert min(picture.size) > 100 and len(picture.convert("L").getcolors()) > 20
        found = json.loads((tmp_path / method / "profile.json").read_text())
        shares = found["shares"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and min(shares.values()) >= 0
        assert min(shares[name] for name in ("teacher", "student", "losses", "backward", "update")) > 0
        assert 0 < found["attention_loss"] < shares["losses"] + shares["backward"]
        trace = json.loads(gzip.open(tmp_path / method / "trace.json.gz").read())
        assert sum(event.get("name") == "step" for event in trace["traceEvents"]) == found["steps"] == 4


def test_figures_of_models_without_class_token_are_curves_alone(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    said = []
    small = config.ROWS["head_kd_digits"].defaults["student_kwargs"]
    changes = {"train__epochs": 1, "train__warmup_epochs": 0}
    made = experiment(
        "head_kd", figures=1, student_kwargs={**small, "class_token": False, "global_pool": "avg"}, **changes
    )
    run.train(made, CPU, say=said.append)
    assert any("attention.png is not drawn (" in line for line in said), said
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"curves.png"}


@pytest.mark.parametrize(("option", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_records_go_to_trackers_too(option, package, experiment, tmp_path, monkeypatch):
    if importlib.util.find_spec(package) is None:
        with pytest.raises(ModuleNotFoundError, match=f"{package}: needs the package"):
            train(experiment(**option))
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(experiment(**option))
    assert any((tmp_path / "run" / package).rglob("*events*" if package == "tensorboard" else "*.wandb"))


def test_another_seed_is_another_run(experiment, tmp_path):
    for seed in (0, 1):
        train(experiment(output=str(seed), seed=seed, train__epochs=2))
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_a_subset_is_all_that_is_trained_on(experiment, tmp_path, monkeypatch):
    """The images that `attnkd eval --subset` takes, and what the others are makes no difference."""
    whole = sources._digits("train")
    chosen = sources.subset(whole, "0.1").images.indices
    given = {"subset": "0.1", "train__batch_size": 5}
    assert train(experiment(output="one", **given)).total == 2 * (len(chosen) // 5)
    pixels = torch.zeros_like(torch.as_tensor(whole.images.pixels)).numpy()
    pixels[chosen] = whole.images.pixels[chosen]
    blank = whole._replace(images=sources._Digits(pixels, whole.images.labels))
    monkeypatch.setattr(sources, "_digits", lambda split: blank)
    train(experiment(output="two", **given))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_changed_settings_are_named(experiment, tmp_path, monkeypatch):
    """A run that began before a setting was there continues with its default."""
    train(experiment(), 1, monkeypatch)
    path = tmp_path / "run" / checkpoint.NAME
    state = checkpoint.load(path)
    for settings, name in (
        (state["settings"], "teacher_cache"),
        (state["settings"]["train"], "cutmix"),
        (state["settings"]["options"], "patch_weight"),
    ):
        settings.pop(name)
    checkpoint.save(path, state)
    with pytest.raises(
        ValueError, match=r"other settings \(options.patch_weight was 0.0, now 1.0; train.cutmix was 0.0"
    ):
        train(experiment(method__patch_weight=1.0, train__cutmix=0.1))
    with pytest.raises(
        ValueError, match=r"output: .*other settings \(options.attn_weight was 0.1, now 0.2; train.base_lr"
    ):
        train(experiment(train__base_lr=1e-3, method__attn_weight=0.2))
    with pytest.raises(ValueError, match=r"run.precision was fp32, now bf16"):
        train(experiment(method__attn_weight=0.1, run__precision="bf16"))
    with pytest.raises(ValueError, match="resume: 'never', but .* has a run"):
        train(experiment(resume="never"))
    assert train(experiment(method__attn_weight=0.1, run__log_steps=1, run__workers=1)).finished


def test_a_cut_or_foreign_checkpoint_is_named(experiment, tmp_path, monkeypatch):
    train(experiment(), 1, monkeypatch)
    path = tmp_path / "run" / checkpoint.NAME
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], weights_of_a_stranger()):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"checkpoint.safetensors: cannot be read .* delete it to train"):
            train(experiment())
    path.write_bytes(whole)
    assert train(experiment()).finished


def weights_of_a_stranger():
    from safetensors.torch import save

    return save({"x": torch.zeros(1)})


def test_steps_that_are_not_finite_are_left_out_counted_and_end_the_run(experiment, tmp_path, monkeypatch):
    broken = {2, 3, 5}
    forward = Trainer._step

    def poisoned(self, batches):
        if self.done in broken:
            with torch.no_grad():
                self.task.forward = lambda images, targets: {
                    "loss": next(self.task.student.parameters()).sum() * float("nan")
                }
        try:
            return forward(self, batches)
        finally:
            self.task.__dict__.pop("forward", None)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    ended = train(experiment(run__log_steps=1, run__nonfinite_limit=3))
    assert ended.finished and ended.nonfinite == 3
    assert [record["nonfinite_steps"] for record in log(tmp_path / "run")] == [0, 0, 1, 2, 2, 3]
    from safetensors.torch import load_file

    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())
    broken |= {1}
    with pytest.raises(DivergedError, match=r"not finite in 3 steps in a row, the last of them step 4 .*loss = nan"):
        train(experiment(output="other", run__nonfinite_limit=3))


@pytest.mark.parametrize("method", ["head_kd", "ssta", "attention_probe", "attn_distill"])
def test_a_broken_teacher_is_named_before_anything_is_trained(method, experiment, teachers, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(teachers["teacher"])
    state["blocks.1.attn.qkv.weight"][3, 4] = torch.nan
    folder = tmp_path / "broken"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "model.json").write_text((tmp_path / teachers["teacher"]).with_suffix(".json").read_text())
    with pytest.raises(ValueError, match="teacher: expected finite weights, got NaN or infinity in blocks.1.attn.qkv"):
        train(experiment(method, teacher=str(folder / "model.safetensors")))


def test_a_run_without_a_finite_step_hands_over_no_student(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_update", poisoned_update(Trainer._update))
    with pytest.raises(DivergedError, match="not finite in 6 steps in a row"):
        train(experiment())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def poisoned_update(update):
    return lambda self, grad_norm, parts: update(self, float("nan"), parts)


def test_other_images_and_another_teacher_by_the_same_name_are_refused(experiment, teachers, tmp_path, monkeypatch):
    teacher = tmp_path / "own"
    teacher.mkdir()
    for name in ("model.safetensors", "model.json"):
        (teacher / name).write_bytes((tmp_path / teachers["teacher"]).with_name(name).read_bytes())
    train(experiment(teacher=str(teacher / "model.safetensors")), 1, monkeypatch)
    kept = (teacher / "model.safetensors").read_bytes()
    torch.manual_seed(9)
    run.save_student(
        teacher, timm.create_model(**TEACHERS["teacher"], num_classes=10), {**TEACHERS["teacher"], "num_classes": 10}
    )
    with pytest.raises(ValueError, match="teacher: the run began with weights of checksum [0-9a-f]{12}, got weights"):
        train(experiment(teacher=str(teacher / "model.safetensors")))
    (teacher / "model.safetensors").write_bytes(kept)
    few(monkeypatch.setattr, 149)
    with pytest.raises(ValueError, match="data: the run began with 150 images, got 149"):
        train(experiment(teacher=str(teacher / "model.safetensors")))


def test_half_precision_continues_with_its_gradient_scale(experiment, tmp_path, monkeypatch):
    assert train(experiment("head_kd", "whole", run__precision="fp16")).finished
    train(experiment("head_kd", "parts", run__precision="fp16"), 4, monkeypatch)
    assert train(experiment("head_kd", "parts", run__precision="fp16")).finished
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    state = checkpoint.load(tmp_path / "parts" / checkpoint.NAME)
    assert state["scaler"]["scale"] >= 1


def test_folders_lists_and_broken_images(experiment, tmp_path, caplog):
    """A folder of colour images by class, one of them broken; the same without labels, from a list."""
    for index in range(9):
        folder = tmp_path / "data" / "train" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 10 + 20 * index).convert("RGB").save(folder / f"{index}.png")
    (folder / "broken.png").write_text("no image")
    train(experiment("head_kd", data=str(tmp_path / "data"), train__batch_size=10, train__epochs=2))
    assert "broken.png" in caplog.text
    assert json.loads((tmp_path / "run" / "model.json").read_text())["num_classes"] == 3
    (tmp_path / "list.txt").write_text("class0/0.png\nclass1/1.png\n")
    listed = {"data": str(tmp_path / "list.txt"), "data_root": str(tmp_path / "data" / "train"), "train__batch_size": 2}
    assert train(experiment("attention_probe", "listed", **listed)).finished
    with pytest.raises(ValueError, match="data: head_kd has a class loss, but .*list.txt has no labels"):
        train(experiment("head_kd", "labels", **listed, num_classes=10))
    for name, text in (("cut.png", (folder / "2.png").read_bytes()[:300]), ("empty.png", b"")):
        (folder / name).write_bytes(text)
    (tmp_path / "list.txt").write_text("class0/0.png\nclass2/cut.png\nclass2/empty.png\n")
    with pytest.warns(UserWarning, match="cannot be read, and the next one takes its place"):
        assert train(experiment("attention_probe", "broken", **listed)).finished
    (tmp_path / "list.txt").write_text("class2/empty.png\nclass2/empty.png\n")
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match="in a worker of the data loader: RuntimeError: 10 images after one another cannot be read"
    ):
        train(experiment("attention_probe", "nothing", **listed, run__workers=2))
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()  # not when Python ends
    (tmp_path / "list.txt").write_text("class0/0.png\nclass1/5.png\n")
    with pytest.raises(ValueError, match="data_root: .* lists 'class1/5.png', which is not in"):
        train(experiment("attention_probe", "missing", **listed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "data: 'nowhere' is no folder and no list"),
        ({"data": "wds/x"}, "data: wds/x is a stream"),
        ({"data": "torch/nothing", "data_root": "."}, "data: torch/nothing cannot be opened"),
        ({"train_split": "other"}, "split: digits have"),
        ({"train__opt": "nosuch"}, "opt: expected an optimizer that timm knows .*got 'nosuch'"),
        ({"train__sched": "nosuch"}, "sched: expected a schedule that timm knows, .*got 'nosuch'"),
        ({"train__auto_augment": "nosuch"}, "auto_augment: expected a policy that timm knows, .*got 'nosuch'"),
        ({"train__batch_size": 2000}, "train.batch_size: expected at most 150"),
        ({"train__mixup": 0.5}, "train.mixup, train.cutmix: attn_distill has no class loss"),
        ({"assistant": "deit_tiny_patch16_224"}, "assistant: attn_distill has none"),
        ({"teacher": None}, "teacher: attn_distill needs one"),
        ({"student": "no_model"}, "student: 'no_model' is neither a timm model nor"),
        ({"method__merge": "sum"}, "merge: expected"),
    ],
)
def test_what_cannot_be_honoured_is_named(experiment, changes, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        train(experiment(**changes))


def test_two_runs_in_one_folder(experiment, tmp_path, monkeypatch):
    from attnkd import files

    monkeypatch.setattr(files, "PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    with (
        files.locked(tmp_path / "run" / ".lock"),
        pytest.raises(RuntimeError, match="another process is at work there"),
    ):
        train(experiment())
