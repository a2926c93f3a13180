"""The parts of training: which images come when, checkpoints, settings, named rows."""

import contextlib
import dataclasses
import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkd import Schedule
from attnkd.methods.recipes import Recipe
from attnkd.training import checkpoint, config
from attnkd.training.data import AugmentedImages, Mixing, Plan, Steps, loader
from attnkd.training.rows import ROWS


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 40),
    batch=st.integers(1, 12),
    size=st.integers(1, 4),
    at_once=st.none() | st.integers(1, 5),
    drop=st.booleans(),
)
def test_every_image_comes_once_an_epoch_and_counts_the_same(images, batch, size, at_once, drop):
    if batch < size or (drop and batch > images):
        return
    plans = [Plan(images, batch, drop, 7, rank, size, at_once) for rank in range(size)]
    steps = plans[0].steps_per_epoch
    for step in range(steps):
        parts = [part for plan in plans for part in plan.parts(step)]
        assert len({len(plan.parts(step)) for plan in plans}) == 1, "processes wait for each other in every part"
        assert all(at_once is None or len(positions) <= at_once for positions, _ in parts)
        counted = {position: factor / len(where) for where, factor in parts if factor for position in where}
        expected = range(step * batch, min((step + 1) * batch, images))
        assert set(counted) == set(expected)
        assert all(weight == pytest.approx(size / len(expected)) for weight in counted.values())
    seen = [key for plan in plans for keys in Steps(plan, steps, 2 * steps) for key in keys]
    assert {epoch for epoch, _ in seen} == {1} and len({index for _, index in seen}) == min(images, steps * batch)


def test_epochs_differ_and_a_later_start_is_the_rest():
    plan = Plan(20, 4, True, 0)
    whole = list(Steps(plan, 0, 10))
    assert list(Steps(plan, 7, 10)) == whole[7:] and [i for _, i in whole[0]] != [i for _, i in whole[5]]


def test_augmentation_belongs_to_the_image_and_the_epoch():
    def noisy(image):
        return torch.rand(1) + torch.tensor([image])

    images = AugmentedImages([(index, index) for index in range(5)], noisy, seed=3)
    first = images[0, 2][0]
    images[0, 3], images[1, 2]
    assert torch.equal(images[0, 2][0], first) and not torch.equal(images[1, 2][0], first)
    assert not torch.equal(AugmentedImages(images.images, noisy, seed=4)[0, 2][0], first)


def test_a_worker_outlives_one_sigterm_and_not_two():
    """The first may be its group's; a main process whose worker ignores it at its end would wait for ever."""
    images = AugmentedImages([(torch.full((1, 2, 2), float(i)), i) for i in range(40)], None, seed=0)
    batches = iter(loader(images, Steps(Plan(40, 4, True, 0), 0, 10), workers=1, pin=False))
    seen = [next(batches)[1].tolist()]
    worker = batches._workers[0]
    os.kill(worker.pid, signal.SIGTERM)
    seen += [next(batches)[1].tolist() for _ in range(8)]
    assert len({label for labels in seen for label in labels}) == 36 and worker.is_alive()
    with contextlib.suppress(RuntimeError):  # the loader reports its worker's end, unless join() has it first
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(30)
    worker.join(30)
    assert worker.exitcode == -signal.SIGTERM


def test_mixing_takes_any_number_of_images():
    mix = Mixing(0.8, 1.0, 0.1, 5)
    for count in (1, 2, 5):
        images, targets = mix(torch.rand(count, 3, 8, 8), torch.arange(count) % 5)
        assert images.shape == (count, 3, 8, 8) and targets.shape == (count, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))


def test_a_checkpoint_gives_back_what_it_got(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = [torch.randn(3, 2).t(), torch.tensor(5), torch.zeros(0, dtype=torch.bfloat16), torch.tensor([True])]
    state = {"a": [1, 0.1 + 0.2, float("inf"), None, True, "x"], 3: {"tensor": (tensors, ())}, "tuple": []}
    assert checkpoint.load(path) is None
    checkpoint.save(path, state)
    found = checkpoint.load(path)
    loaded, empty = found[3].pop("tensor")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(loaded, tensors, strict=True)) and empty == ()
    state[3] = {}
    assert found == state
    with pytest.raises(TypeError, match="got set"):
        checkpoint.save(path, {"x": {1}})


def test_rows_cite_and_fit_their_methods():
    assert {row.method for row in ROWS.values()} == set(config.METHODS)
    known = {field.name for field in dataclasses.fields(config.TrainConfig)} | {"method"}
    for name, row in ROWS.items():
        assert name.startswith(row.method) and row.source and row.open and set(row.defaults) <= known, name
        Recipe(**row.defaults["train"])
    published = {name: Recipe(**row.defaults["train"]) for name, row in ROWS.items()}
    assert [published[f"attn_distill_{row}"].epochs for row in ("t16", "s16", "subset")] == [500, 800, 3200]
    assert published["attn_distill_s16"].lr == pytest.approx(2.4e-3)
    assert published["ssta_deit"].lr == pytest.approx(1e-3) and published["ssta_deit"].epochs == 300
    assert published["attention_probe_mnist_xtiny"].lr == 7e-4 and published["head_kd_cifar100"].lr == 1e-3


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _needs_the_parser(self):
        pytest.importorskip("jsonargparse")

    @pytest.mark.parametrize("name", ROWS)
    def test_every_row_is_parsed_and_its_file_gives_it_again(self, name, tmp_path):
        row = ROWS[name]
        words = ["--recipe", name, "--output", "x", "--teacher", "t"]
        if row.method == "attention_probe":
            words += ["--method.teacher_accuracy", "0.9"]
        if row.defaults.get("data") is None:
            words += ["--data", "somewhere"]
        made = config.parse(row.method, words)
        assert made.config.train == Recipe(**config._tuples(row.defaults["train"]))
        for option, value in row.defaults.get("method", {}).items():
            assert made.options[option] == value or option == "teacher_accuracy"
        (tmp_path / "config.yaml").write_text(config.as_yaml(made.settings()))
        assert config.parse(None, ["--config", str(tmp_path / "config.yaml")]) == made
        assert config.read(made.settings()) == made

    def test_the_command_line_comes_after_files_and_files_after_rows(self, tmp_path):
        (tmp_path / "a.yaml").write_text(
            "recipe: ssta_digits\noutput: x\ntrain: {epochs: 7, base_lr: 0.5}\nassistant: a\n"
        )
        words = ["--config", str(tmp_path / "a.yaml"), "--train.epochs", "9", "--method.beta.value", "0.3"]
        made = config.parse("ssta", [*words, "--method.beta.stop", "4", "--method.alpha", "2"])
        assert (made.config.train.epochs, made.config.train.base_lr, made.config.train.warmup_epochs) == (9, 0.5, 3)
        assert made.options["beta"] == Schedule(0.3, stop=4) and made.options["alpha"] == 2
        assert config.read(made.settings()) == made

    @pytest.mark.parametrize(
        ("method", "words", "message"),
        [
            ("head", [], "METHOD: expected one of attn_distill, head_kd"),
            (
                "head_kd",
                ["--recipe", "ssta_digits"],
                "recipe: expected one of head_kd_cifar100, head_kd_digits for head_kd",
            ),
            ("head_kd", ["--recipe", "head_kd_digits"], "output"),
            ("head_kd", ["--recipe", "head_kd_digits", "--output", "x", "--method.alfa", "1"], "method.alfa"),
            ("head_kd", ["--recipe", "head_kd_digits", "--output", "x", "--train.epochs", "many"], "epochs"),
            (
                "head_kd",
                ["--recipe", "head_kd_digits", "--output", "x", "--train.hflip", "2"],
                "^train.hflip: expected a number",
            ),
            (
                "head_kd",
                ["--recipe", "head_kd_digits", "--output", "x", "--run.workers", "-1"],
                "^run.workers, save_minutes: expected",
            ),
            ("head_kd", ["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml"),
        ],
    )
    def test_mistakes_are_named(self, method, words, message):
        with pytest.raises(ValueError, match=message):
            config.parse(method, words)
