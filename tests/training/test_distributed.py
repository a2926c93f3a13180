"""Two processes train like one, up to rounding: uneven shares, the smaller last step, continuing on another number of processes; the
same with the student spread over them (FSDP2)."""

import json
import multiprocessing

import pytest
import timm
import torch
import torch.multiprocessing

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from attnkd import files
from attnkd.training import config, run, sources
from attnkd.training.carrying import Carrying
from attnkd.training.distributed import World
from attnkd.training.loop import Trainer
from attnkd.training.sharding import shard

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="the two processes are forks"
)
CPU = torch.device("cpu")
SPREAD = {"shard": True, "checkpointing": True}
FP16 = {"shard": True, "precision": "fp16"}


def experiment(folder, teacher, method, **carrying):
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
    settings["run"] = {"workers": 0, "save_steps": 1, "log_steps": 1, "at_once": 8, **carrying}
    settings["method"] = dict(row.get("method", {}))
    if method == "attn_distill":
        # The attention alone: the forward stops in the last block. A frozen parameter, and a norm that is cut.
        settings |= {"pos_embed": "fixed_sincos"}
        settings["method"] |= {"pa_weight": 0.0, "attn_weight": 1.0}
        settings["train"] |= {"clip_grad": 0.1}
    if "precision" in carrying:
        settings["train"] |= {"opt": "adamw", "base_lr": 1e-3}
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

    def train(name, method, **carrying):
        return run.train(experiment(folder / name, teacher, method, **carrying), CPU, say=lambda line: None)

    for method in ("head_kd", "attention_probe"):
        assert train(method, method).finished
    for method in ("head_kd", "attn_distill"):
        assert train(f"{method}_spread", method, **SPREAD).finished
    assert train("fp16", "head_kd", **FP16).finished
    trained = Trainer.run
    Trainer.run = lambda self, save, watcher, stop: trained(self, save, watcher, lambda: rank == 1 and self.done >= 2)
    for name, carrying in {"half": {}, "half_spread": SPREAD, "half_fp16": FP16}.items():
        ended = train(name, "head_kd", **carrying)
        assert not ended.finished and ended.steps == 2, "all stop when one is asked to"
    Trainer.run = trained
    torch.distributed.barrier()  # the first process writes the checkpoint that both read
    assert train("half_fp16", "head_kd", **FP16).finished
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(sources, "_digits", sources._digits)  # put back at the end
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 3}
    arguments |= {"embed_dim": 24, "num_heads": 4, "num_classes": 10}
    model = timm.create_model(**arguments)
    with torch.no_grad():
        for block in model.blocks:  # attention that is not uniform
            block.attn.qkv.weight.mul_(8)
    run.save_student(tmp_path, model, arguments)
    teacher = str(tmp_path / "model.safetensors")
    multiprocessing.set_forkserver_preload(["attnkd.training.run", "sklearn.datasets", "timm", "pytest"])
    torch.multiprocessing.start_processes(worker, (tmp_path / "two", teacher), nprocs=2, start_method="forkserver")
    few_digits()

    def train(name, method):
        return run.train(experiment(tmp_path / name, teacher, method), CPU, say=lambda line: None)

    for method in ("head_kd", "attention_probe", "attn_distill"):
        train(f"one/{method}", method)
    for name in ("half", "half_spread"):
        assert train(f"two/{name}", "head_kd").steps == 6
    pairs = [("two/attention_probe", "one/attention_probe"), ("two/attn_distill_spread", "one/attn_distill")]
    pairs += [(f"two/{name}", "one/head_kd") for name in ("head_kd", "head_kd_spread", "half", "half_spread")]
    for found, wanted in pairs:
        for file in ("model.safetensors", "checkpoint.safetensors"):
            one, two = (load_file(tmp_path / name / file) for name in (wanted, found))
            assert one.keys() == two.keys()
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=f"{found}, {file}: {name}")
        logs = [records(tmp_path / name) for name in (wanted, found)]
        assert len(logs[0]) == len(logs[1]) == 6
        for one, two in zip(*logs, strict=True):
            assert two == pytest.approx(one, rel=1e-3), found
    whole, parts = ((tmp_path / "two" / name / "model.safetensors").read_bytes() for name in ("fp16", "half_fp16"))
    assert parts == whole, "two processes continue exactly"
    one, two = (records(tmp_path / name)[0] for name in ("one/head_kd", "two/fp16"))
    assert [two[name] for name in ("loss", "grad_norm")] == pytest.approx([one["loss"], one["grad_norm"]], rel=0.02)


def records(folder):
    """The log without speeds."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def test_what_cannot_be_spread_is_named(tmp_path):
    with pytest.raises(ValueError, match="shard, compile: not both"):
        Carrying(shard=True, compile=True)
    with pytest.raises(ValueError, match="figures: not with run.shard"):
        config.TrainConfig("folder", "student", figures=1, run=Carrying(shard=True))
    with pytest.raises(ValueError, match="run.shard: .* this one is alone; start it with torchrun"):
        shard(torch.nn.Linear(2, 2), World(CPU))
