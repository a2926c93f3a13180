"""k-NN agrees with a restatement in NumPy, the linear probe with scikit-learn, the features with timm; the command keeps all results."""

import json

import numpy as np
import pytest
import timm
import torch

from attnkd.commands import cli
from attnkd.evaluation.features import Features, batches, extract
from attnkd.evaluation.knn import knn
from attnkd.evaluation.linear import linear_probe
from attnkd.training import run

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


def clusters(count, classes, width, spread, seed):
    """Noisy points around one centre for each class."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    values = centres[labels] + spread * rng.normal(size=(count, width))
    return Features(torch.from_numpy(values).float(), torch.from_numpy(labels))


def knn_restated(train, test, k, temperature):
    """One test image at a time, in float64; logarithms of votes, which themselves overflow at small temperatures."""
    a, b = (x.values.double().numpy() for x in (train, test))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    hits = np.zeros(2)
    for point, label in zip(b, test.labels.numpy(), strict=True):
        cosine = a @ point
        votes = np.full(int(max(train.labels.max(), test.labels.max())) + 1, -np.inf)
        for index in np.argsort(-cosine)[:k]:
            votes[train.labels[index]] = np.logaddexp(votes[train.labels[index]], cosine[index] / temperature)
        order = np.argsort(-votes, kind="stable")
        hits += [label == order[0], label in order[:5]]
    return 100 * hits / len(b)


@pytest.mark.parametrize(
    ("dtype", "block", "temperature"),
    [
        (torch.float32, (7, 13), 0.07),
        (torch.float32, (512, 65536), 0.07),
        (torch.float16, (50, 40), 0.07),
        (torch.float32, (512, 65536), 0.001),
    ],
)
def test_knn_is_the_restated_one_in_any_blocks(dtype, block, temperature):
    train, test = clusters(160, 9, 12, 1.5, seed=1), clusters(60, 9, 12, 1.5, seed=2)
    train, test = (x._replace(values=x.values.to(dtype)) for x in (train, test))
    found = knn(train, test, (1, 10, 20, 400), temperature, block=block)
    assert 20 < found[10]["top1"] < 99
    for k, scores in found.items():
        assert [scores["top1"], scores["top5"]] == pytest.approx(knn_restated(train, test, k, temperature), abs=1e-3), k
    nearest = knn(train, test, (1, 50), 1e-60)  # smaller than any float32
    assert nearest[50]["top1"] == nearest[1]["top1"]


def test_knn_of_few_classes_has_no_top5_and_mistakes_are_named():
    train = clusters(20, 3, 4, 0.1, seed=1)
    assert set(knn(train, train, (1,))[1]) == {"top1"} and knn(train, train, (1,))[1]["top1"] == 100
    with pytest.raises(ValueError, match="ks, temperature: expected numbers above 0"):
        knn(train, train, (0,))
    with pytest.raises(ValueError, match=r"test: expected features \[m, 4\]"):
        knn(train, clusters(5, 3, 5, 0.1, seed=1))


def test_the_linear_probe_is_as_good_as_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = clusters(900, 7, 10, 1.6, seed=1), clusters(700, 7, 10, 1.6, seed=2)
    scale, shift = torch.logspace(-2, 2, 10), torch.arange(10.0)  # which standardisation undoes
    train, test = (x._replace(values=x.values * scale + shift) for x in (train, test))
    probe = linear_probe(train, test, epochs=60, batch_size=128)
    a, b = (((x.values - shift) / scale).numpy() for x in (train, test))
    fitted = linear_model.LogisticRegression(max_iter=3000).fit(a, train.labels.numpy())
    score = 100 * fitted.score(b, test.labels.numpy())
    assert 50 < score < 98 and probe.top1 == pytest.approx(score, abs=2.0)
    assert (
        probe.top5 > probe.top1
        and probe.lr in probe.held_out
        and probe.held_out[probe.lr] == max(probe.held_out.values())
    )
    outputs = test.values @ probe.weight.T + probe.bias
    assert 100 * (outputs.argmax(1) == test.labels).float().mean().item() == pytest.approx(probe.top1, abs=1e-3)
    agreement = (outputs.argmax(1).numpy() == fitted.predict(b)).mean()
    assert agreement > 0.93


def test_the_gradient_of_many_probes_is_autograds():
    from attnkd.evaluation.linear import _gradient

    values, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    weight = torch.randn(3, 4, 3, requires_grad=True)
    losses = [torch.nn.functional.cross_entropy(values @ one, labels) for one in weight]
    (want,) = torch.autograd.grad(sum(losses), weight)
    torch.testing.assert_close(_gradient(values, labels, weight.detach()), want)


def test_a_rate_that_diverges_is_not_chosen():
    train = clusters(200, 3, 5, 0.3, seed=1)
    probe = linear_probe(train, train, epochs=5, batch_size=20, rates=(1e38, 0.1))
    assert probe.lr == 0.1 and probe.top1 > 90
    with pytest.raises(ValueError, match="rates: no classifier was finite"):
        linear_probe(train, train, epochs=5, batch_size=20, rates=(1e38,), hold_out=0)
    with pytest.raises(ValueError, match="hold_out: expected a share above 0"):
        linear_probe(train, train, hold_out=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_features_are_timms_normalised_class_tokens(name):
    model = timm.create_model(name, **SMALL).train()
    images = [(torch.randn(3, 32, 32), index % 2) for index in range(5)]
    found = extract(model, batches(images, lambda image: image, batch_size=2, workers=0))
    assert model.training and found.labels.tolist() == [0, 1, 0, 1, 0]
    stacked = torch.stack([image for image, _ in images])
    want = model.eval().forward_features(stacked)[:, 0].detach()
    torch.testing.assert_close(found.values, want)
    several = extract(model, [(stacked, found.labels)], last_blocks=2)
    assert several.values.shape == (5, 48)
    torch.testing.assert_close(several.values[:, 24:], want)
    with pytest.raises(ValueError, match="last_blocks: expected 1 to 3, got 4"):
        extract(model, [(stacked, found.labels)], last_blocks=4)


def test_models_without_class_token_and_broken_weights_are_named():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="class token is evaluated"):
        extract(model, [])
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ValueError, match="data: no images"):
        extract(model, [])
    with pytest.raises(
        ValueError, match="images: expected floating point numbers, normalised for model, got torch.uint8"
    ):
        extract(model, [(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([0]))])
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="features are not finite"):
        extract(model, [(torch.randn(1, 3, 32, 32), torch.tensor([0]))])


@pytest.fixture
def digits_run(tmp_path):
    """The folder of a run of attnkd train, as far as attnkd eval looks at it."""
    pytest.importorskip("safetensors")
    pytest.importorskip("sklearn")
    described = {
        **SMALL,
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "depth": 1,
        "model_name": "vit_tiny_patch16_224",
    }
    described |= {"pretrained_cfg_overlay": {"mean": (0.3,), "std": (0.4,)}}
    run.save_student(tmp_path, timm.create_model(**described), described)
    (tmp_path / run.CONFIG).write_text("data: digits\ntrain_split: train\nval_split: validation\n")
    return tmp_path


def test_no_result_takes_the_place_of_another(digits_run, capsys):
    words = ["eval", "knn", str(digits_run), "--k", "5", "--workers", "0", "--device", "cpu"]
    for options, name, row in (
        ([], "knn", "k-NN 5"),
        (["--val-split", "validation", "--temperature", "0.07"], "knn", "k-NN 5"),
        (
            ["--temperature", "0.1", "--subset", "0.5"],
            "knn_0.5_temperature_0.1",
            "k-NN 5, 0.5 of the labels, temperature 0.1",
        ),
        (["--train-split", "validation"], "knn_train_split_validation", "k-NN 5, learnt from validation"),
        (["--val-split", "train"], "knn_val_split_train", "k-NN 5"),
        (["--mean", "0", "--std", "0.5"], "knn_mean_0.0_std_0.5", "k-NN 5, mean 0.0, std 0.5"),
        (["--model-kwargs", "reg_tokens=0"], "knn_model_kwargs_reg_tokens_0", "k-NN 5, model_kwargs reg_tokens=0"),
    ):
        before = {path.name for path in digits_run.glob("eval_*")}
        assert cli.main([*words, *options]) == 0, capsys.readouterr().err
        assert {path.name for path in digits_run.glob("eval_*")} == before | {f"eval_{name}.json"}
        assert cli.main(["eval", "compare", str(digits_run), "--json", str(digits_run / "all.json")]) == 0
        found = json.loads((digits_run / f"eval_{name}.json").read_text())
        table = json.loads((digits_run / "all.json").read_text())[f"digits, {found['val_split']}"]
        assert table[row][str(digits_run)] == found["scores"]["5"]["top1"]
    assert cli.main([*words, "--temperature", "0.1", "--subset", ".50"]) == 0  # the same share
    assert not (digits_run / "eval_knn_.50_temperature_0.1.json").exists()
    path = digits_run / "eval_knn.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "a/digits"}))
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "eval_knn.json has the result of data a/digits, whose name is spelt alike" in capsys.readouterr().err
    path.unlink()


@pytest.mark.parametrize(
    ("how", "words", "message"),
    [
        ("compare", ["--data", "digits"], "--data: is for knn, linear, finetune, agree, not for compare"),
        ("compare", ["--subset", "0.1"], "--subset: is for knn, linear, finetune, not for compare"),
        ("knn", ["--epochs", "5"], "--epochs: is for linear, finetune, not for knn"),
        ("linear", ["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        ("knn", ["--k", "5", "0"], "--k: expected at least 1, got 5 0"),
        ("knn", ["--temperature", "nan"], "--temperature: expected finite numbers above 0, got nan"),
        ("knn", ["--img-size", "0"], "--img-size: expected at least 1, got 0"),
        ("finetune", ["--recipe", "batch_size=abc"], "--recipe batch_size: expected int, got 'abc'"),
        ("finetune", ["--recipe", "batch_size=0"], "--recipe batch_size: expected at least 1, got 0"),
        ("finetune", ["--recipe", "betas=(0.9,)"], "--recipe betas: expected tuple[float, float] | None, got (0.9,)"),
        ("finetune", ["--recipe", "epochs=2", "--epochs", "3"], "--epochs: is in --recipe too; give it once"),
    ],
)
def test_options_of_other_evaluations_and_wrong_numbers_are_refused(how, words, message, digits_run, capsys):
    assert cli.main(["eval", how, str(digits_run), *words]) == 2
    assert capsys.readouterr().err.strip() == f"attnkd eval: {message}"
