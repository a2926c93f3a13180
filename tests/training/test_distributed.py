"""Two processes train like one, up to rounding: uneven shares, the smaller last step, continuing on another number of processes."""

import multiprocessing

import pytest
import timm
import torch
import torch.multiprocessing

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from attnkd import files
from attnkd.training import config, run, sources
from attnkd.training.loop import Trainer

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="the two processes are forks"
)
CPU = torch.device("cpu")


def experiment(folder, teacher, method):
    """The last step of an epoch has one image, which is none for the second process. SGD does not enlarge rounding as Adam does."""
    row = config.ROWS[f"{method}_digits"].defaults
    settings = {**row, "output": str(folder), "teacher": teacher}
    settings["train"] = {
        **row["train"],
        "epochs": 2,
        "batch_size": 41,
        "warmup_epochs": 0,
        "opt": "sgd",
        "base_lr": 0.05,
    }
    settings["train"] |= {"drop_last": False, "ema_decay": 0.7}
    settings["run"] = {"workers": 0, "save_steps": 1, "log_steps": 1, "at_once": 8}
    settings["method"] = dict(row.get("method", {}))
    return config.build(settings, method)


def few_digits():
    whole = sources._digits

    def fewer(split):
        source = whole(split)
        return source._replace(images=sources._Digits(source.images.pixels[:83], source.images.labels[:83]))

    sources._digits = fewer


def worker(rank, folder, teacher):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=2)
    few_digits()
    if rank == 1:

        def written(*args, **kwargs):
            raise AssertionError("the second process writes")

        files.replacing = files.write_bytes = files.make_folder = written
    for method in ("head_kd", "attention_probe"):
        assert run.train(experiment(folder / method, teacher, method), CPU, say=lambda line: None).finished
    trained = Trainer.run
    Trainer.run = lambda self, save, watcher, stop: trained(self, save, watcher, lambda: rank == 1 and self.done >= 2)
    ended = run.train(experiment(folder / "half", teacher, "head_kd"), CPU, say=lambda line: None)
    assert not ended.finished and ended.steps == 2, "all stop when one is asked to"
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(sources, "_digits", sources._digits)  # put back at the end
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 3}
    arguments |= {"embed_dim": 24, "num_heads": 4, "num_classes": 10}
    run.save_student(tmp_path, timm.create_model(**arguments), arguments)
    teacher = str(tmp_path / "model.safetensors")
    multiprocessing.set_forkserver_preload(["attnkd.training.run", "sklearn.datasets", "timm", "pytest"])
    torch.multiprocessing.start_processes(worker, (tmp_path / "two", teacher), nprocs=2, start_method="forkserver")
    few_digits()
    for method in ("head_kd", "attention_probe"):
        run.train(experiment(tmp_path / "one" / method, teacher, method), CPU, say=lambda line: None)
    assert run.train(experiment(tmp_path / "two" / "half", teacher, "head_kd"), CPU, say=lambda line: None).steps == 6
    for found, wanted in (
        ("two/head_kd", "one/head_kd"),
        ("two/attention_probe", "one/attention_probe"),
        ("two/half", "one/head_kd"),
    ):
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in (wanted, found))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=f"{found}: {name}")
        logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in (wanted, found)]
        assert len(logs[0]) == len(logs[1]) == 6
