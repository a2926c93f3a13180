"""All four tasks under DistributedDataParallel and FSDP2, with one_pass and without: two processes with half a batch each train like one
with all of it."""

import functools
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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


def tasks() -> dict[str, Callable[..., DistillTask]]:
    student, teacher = functools.partial(vit, 1, 16, 2), functools.partial(vit, 2, 32, 4)
    return {
        "AttnDistill": lambda **o: AttnDistill(student(), teacher(), verbose=False, **o),
        "AttnDistill, attention alone": lambda **o: AttnDistill(student(), teacher(), pa_weight=0, verbose=False, **o),
        "HeadKD": lambda **o: HeadKD(student(), teacher(), verbose=False, **o),
        "SSTA": lambda **o: SSTA(student(), teacher(), vit(3, 32, 4), blocks="all", teacher_heads=[0, 1],
                                 assistant_heads=[2, 3], stop_epoch=None, verbose=False, **o),
        "AttentionProbe": lambda **o: AttentionProbe(student(), teacher(), 0.9, verbose=False, **o),
        "AttentionProbe, no relations": lambda **o: AttentionProbe(student(), teacher(), 0.9, relation_weight=0, verbose=False, **o),
    }  # fmt: skip


def sharded(task: DistillTask) -> DistillTask:
    """FSDP2: every block's parameters lie in two halves, and are gathered when it runs."""
    for block in task.student.blocks:
        fully_shard(block)
    fully_shard(task.trainable_module)
    return task


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 1, 16, 16), torch.arange(4)


def gradients(task: DistillTask) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in task.student.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images, targets = (part.chunk(2)[rank] for part in batch())
    found = {}
    for name, make in tasks().items():
        wrapped = {
            "DDP": make().prepare_distributed(),
            "DDP, one pass": make(one_pass=True).prepare_distributed(),
            "FSDP2, one pass": sharded(make(one_pass=True)),
        }
        for kind, task in wrapped.items():
            task.train()
            for _ in range(2):  # DDP complains about the first step's unused parameters at the second
                task.student.zero_grad()
                task(images, targets)["loss"].backward()
            found[name, kind] = gradients(task)
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
        for kind in ("DDP", "DDP, one pass", "FSDP2, one pass"):
            grads = found[name, kind]
            assert set(want) <= set(grads), f"{name}, {kind}"
            for parameter, grad in want.items():
                message = f"{name}, {kind}: {parameter}"
                torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=1e-6, msg=message)
