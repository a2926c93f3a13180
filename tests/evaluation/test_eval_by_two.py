"""`attnkd eval` on two processes gives what it gives on one; the shares of their images are uneven."""

import json
import multiprocessing

import pytest
import timm
import torch
import torch.multiprocessing

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from attnkd.commands import cli
from attnkd.training import run
from attnkd.training.distributed import World

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="the two processes are forks"
)


def evaluate(folder, how, *options):
    words = ["eval", how, str(folder / "model.safetensors"), "--data", "digits", "--device", "cpu", "--workers", "0"]
    assert cli.main([*words, "--batch-size", "100", "--mean", "0.5", "--std", "0.5", *options]) == 0


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(torch.device("cpu"), rank, 2)
    for count in (1, 2, 5, 6):
        mine = torch.tensor([[10 * index] for index in world.share(count)])
        assert world.together(mine, count, at_once=2).tolist() == [[10 * index] for index in range(count)]
    assert world.sum([rank + 1, 2]) == [3, 4]
    for how, options in (("knn", ["--k", "1", "20"]), ("linear", ["--epochs", "3"])):
        path = folder / f"two_{how}.json" if rank == 0 else folder / "missing" / "not_written.json"
        evaluate(folder, how, *options, "--json", str(path))
    torch.distributed.destroy_process_group()


def test_two_processes_score_like_one(tmp_path):
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 2}
    arguments |= {"embed_dim": 24, "num_heads": 2, "num_classes": 10}
    run.save_student(tmp_path, timm.create_model(**arguments), arguments)
    multiprocessing.set_forkserver_preload(["attnkd.training.run", "sklearn.datasets", "timm", "pytest"])
    torch.multiprocessing.start_processes(worker, (tmp_path,), nprocs=2, start_method="forkserver")
    for how, options in (("knn", ["--k", "1", "20"]), ("linear", ["--epochs", "3"])):
        evaluate(tmp_path, how, *options, "--json", str(tmp_path / f"one_{how}.json"))
        one, two = (json.loads((tmp_path / f"{count}_{how}.json").read_text()) for count in ("one", "two"))
        assert two == one
    assert one["val_images"] % 2 == 1 and 15 < one["top1"] < 100
