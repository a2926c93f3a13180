"""All four tasks under DistributedDataParallel: two processes with half a batch each train like one with all of it."""

import functools
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.multiprocessing

from attnkd import SSTA, AttentionProbe, AttnDistill, HeadKD
from attnkd.methods.task import DistillTask


def vit(seed: int, dim: int, heads: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=dim,
        depth=2,
        num_heads=heads,
        num_classes=5,
    )


def tasks() -> dict[str, Callable[[], DistillTask]]:
    student, teacher = functools.partial(vit, 1, 16, 2), functools.partial(vit, 2, 32, 4)
    return {
        "AttnDistill": lambda: AttnDistill(student(), teacher(), verbose=False),
        "AttnDistill, attention alone": lambda: AttnDistill(student(), teacher(), pa_weight=0, verbose=False),
        "HeadKD": lambda: HeadKD(student(), teacher(), verbose=False),
        "SSTA": lambda: SSTA(student(), teacher(), vit(3, 32, 4), blocks="all", teacher_heads=[0, 1],
                             assistant_heads=[2, 3], stop_epoch=None, verbose=False),
        "AttentionProbe": lambda: AttentionProbe(student(), teacher(), 0.9, verbose=False),
        "AttentionProbe, no relations": lambda: AttentionProbe(student(), teacher(), 0.9, relation_weight=0, verbose=False),
    }  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 1, 16, 16), torch.arange(4)


def gradients(task: DistillTask) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in task.student.named_parameters() if p.grad is not None}


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images, targets = (part.chunk(2)[rank] for part in batch())
    found = {}
    for name, make in tasks().items():
        task = make().prepare_distributed().train()
        for _ in range(2):  # DDP complains about the first step's unused parameters at the second
            task.student.zero_grad()
            task(images, targets)["loss"].backward()
        found[name] = gradients(task)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "gradients.pt")), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    images, targets = batch()
    for name, make in tasks().items():
        task = make().train()
        task(images, targets)["loss"].backward()
        want = gradients(task)
        assert set(want) <= set(found[name]), name
        for parameter, grad in want.items():
            torch.testing.assert_close(found[name][parameter], grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")
