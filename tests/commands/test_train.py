"""`attnkd train`, `eval` and `export` from the command line: stopped and continued, evaluated, handed to timm."""

import json
import os
import shutil
import signal
from importlib.util import find_spec

import pytest
import timm
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from attnkd.capture.loading import load_saved
from attnkd.commands import cli
from attnkd.training import config, run, sources


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    paths = {}
    for seed, (role, heads) in enumerate({"teacher": 4, "assistant": 2, "label_teacher": None}.items()):
        torch.manual_seed(seed)
        arguments = {"model_name": "test_resnet", "in_chans": 1, "num_classes": 10}
        if heads is not None:
            arguments |= {"model_name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 4, "depth": 3}
            arguments |= {"embed_dim": 24, "num_heads": heads}
        folder = tmp_path_factory.mktemp(role)
        run.save_student(folder, timm.create_model(**arguments), arguments)
        paths[role] = str(folder / "model.safetensors")
    return paths


def words(method, teachers, output):
    found = ["train", method, "--recipe", f"{method}_digits", "--teacher", teachers["teacher"], "--output", str(output)]
    found += ["--train.epochs", "2", "--train.warmup_epochs", "1", "--run.log_steps", "3", "--run.workers", "0"]
    found += ["--run.save_steps", "2", "--device", "cpu"]
    if method == "ssta":
        found += ["--student", "deit_tiny_distilled_patch16_224", "--method.at_weight", "0.1"]
        found += [word for role in ("assistant", "label_teacher") for word in (f"--{role}", teachers[role])]
    return found


@pytest.mark.parametrize("method", config.METHODS)
def test_train_stop_continue_evaluate_export_load(method, teachers, tmp_path, capsys, monkeypatch):
    digits = sources._digits

    def fewer(split):
        source = digits(split)
        return source._replace(images=sources._Digits(source.images.pixels[:200], source.images.labels[:200]))

    monkeypatch.setattr(sources, "_digits", fewer)
    step = run.Trainer._step

    def stopped(self, batches):
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(run.Trainer, "_step", stopped)
    assert cli.main(words(method, teachers, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert (
        f"task: {method}" in said and "step 4 of 6: stopped and saved; run the same command again to continue" in said
    )
    monkeypatch.setattr(run.Trainer, "_step", step)
    assert cli.main(words(method, teachers, tmp_path / "run")) == 0
    assert "continues after step 4 of 6" in (said := capsys.readouterr().out) and "step 6 of 6: finished" in said
    assert (
        cli.main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]

    options = ["--workers", "0", "--device", "cpu"]
    if method == "head_kd":
        tuning = ["eval", "finetune", str(tmp_path / "run"), "--subset", "0.5", "--epochs", "2", *options]
        tuning += ["--recipe", "batch_size=50", "warmup_epochs=1", "auto_augment=None"]
        assert cli.main(tuning) == 0
        tuned = json.loads((tmp_path / "run" / "eval_finetune_0.5.json").read_text())
        assert tuned["train_images"] == 100 and f"top-1 {tuned['top1']:.2f} %" in capsys.readouterr().out
        assert load_saved(tmp_path / "run" / "finetune_0.5" / "model.safetensors").num_classes == 10
    if method in ("attn_distill", "ssta"):
        capsys.readouterr()
        assert cli.main(["eval", "knn", str(tmp_path / "run"), "--k", "5", "20", *options]) == 0
        assert cli.main(["eval", "linear", str(tmp_path / "run"), "--epochs", "5", *options]) == 0
        said = capsys.readouterr().out
        scores = json.loads((tmp_path / "run" / "eval_knn.json").read_text())["scores"]
        linear = json.loads((tmp_path / "run" / "eval_linear.json").read_text())
        assert (
            scores["5"]["top1"] > (20 if method == "attn_distill" else 5)
            and f"{scores['20']['top1']:.2f}" in said
            and f"top-1 {linear['top1']:.2f} %" in said
        )
        assert cli.main(["eval", "compare", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
        said = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["linear", f"{linear['top1']:.2f}", "-"] in said and [
            "k-NN",
            "5",
            f"{scores['5']['top1']:.2f}",
            "-",
        ] in said

    graph = ["--onnx"] if method == "head_kd" and find_spec("onnxscript") else []
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "given"), *graph]) == 0
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "run", broken)
    for name, said in (("eval_x.json", "is no result of attnkd eval"), ("config.yaml", "cannot be read")):
        (broken / name).write_text("a: [")
        assert cli.main(["export", str(broken), "--output", str(tmp_path / "none")]) == 2
        assert f"attnkd export: --run: {broken / name} {said}" in capsys.readouterr().err
    student = timm.create_model(f"local-dir:{tmp_path / 'given'}", pretrained=True)
    assert student.pretrained_cfg["mean"] == pytest.approx((0.31,)) and student.pretrained_cfg["input_size"] == (
        1,
        16,
        16,
    )
    saved, images = load_saved(tmp_path / "run" / "model.safetensors"), torch.randn(2, 1, 16, 16)
    assert torch.equal(saved(images), student.eval()(images))
    card = (tmp_path / "given" / "README.md").read_text()
    assert f"{method}_digits" in card and teachers["teacher"] in card
    if method == "ssta":
        assert f"| label teacher | {teachers['label_teacher']} |" in card
        logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert all(record["label_loss"] > 0 and record["at_loss"] > 0 for record in logged)
    assert ("k-NN on" in card) == ("Linear probe on" in card) == (method in ("attn_distill", "ssta"))
    assert ("Fine-tuned, on 200 images of digits, learnt from 100" in card) == (method == "head_kd")
    if graph:
        from onnx.reference import ReferenceEvaluator

        (found,) = ReferenceEvaluator(str(tmp_path / "given" / "model.onnx")).run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.tensor(found), saved(images), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(student, (images,)).module()
    torch.testing.assert_close(exported(images), saved(images))


def test_help_and_mistakes(capsys, teachers, tmp_path):
    for asked, said in (
        (["train", "--help"], "attention_probe"),
        (["train", "--recipes"], "attn_distill_s16 (attn_distill)"),
    ):
        with pytest.raises(SystemExit):
            cli.main(asked)
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "ssta", "--help"])
    assert (
        "--method.beta" in (shown := capsys.readouterr().out)
        and "weight of KL_SL" in shown
        and "--run.workers" in shown
    )
    for asked, said in (
        (["train", "other"], "attnkd train: METHOD: expected one of"),
        ([*words("ssta", teachers, tmp_path / "x"), "--method.lamb", "1"], "attnkd train: "),
        (
            [*words("ssta", teachers, tmp_path / "x"), "--teacher", "no_model"],
            "attnkd train: --teacher: 'no_model' is neither",
        ),
        (["eval", "knn", str(tmp_path)], "attnkd eval: --data: expected a data set"),
        (["eval", "knn", "a", "b"], "attnkd eval: --model: knn takes one, got 2"),
        (["eval", "compare", str(tmp_path)], "attnkd eval: --model: no results in"),
        (["eval", "knn", "no_model", "--data", "digits"], "attnkd eval: --model: 'no_model' is neither"),
        (
            ["export", str(tmp_path), "--output", str(tmp_path / "y")],
            "attnkd export: --run: expected the folder of a finished run",
        ),
    ):
        assert cli.main(asked) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(said), asked
