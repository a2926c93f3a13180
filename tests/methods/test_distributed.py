"""All four tasks under DistributedDataParallel and FSDP2, with one_pass and without, and attentions that yield their divergence on the way
(``AttentionTap.distil``) by themselves: two processes with half a batch each have the loss and the gradients of one with all of it. Head
importance over two shares of the images is that over all of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attnkd import SSTA, AttentionProbe, AttentionTap, AttnDistill, HeadKD
from attnkd.attention.dispatch import interpreting
from attnkd.methods.head_importance import head_importance
from attnkd.methods.task import DistillTask
from attnkd.testing import interpreter


def vit(seed: int, dim: int, heads: int, name: str = "vit_tiny_patch16_224") -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        name,
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
        "HeadKD": lambda **o: HeadKD(student(), teacher(), at_weight=0.5, verbose=False, **o),
        "SSTA": lambda **o: SSTA(student(name="deit_tiny_distilled_patch16_224"), teacher(), vit(3, 32, 4), blocks="all",
                                 label_teacher=vit(4, 16, 2), at_weight=0.5, teacher_heads=[0, 1], assistant_heads=[2, 3], stop_epoch=None, verbose=False, **o),
        "AttentionProbe": lambda **o: AttentionProbe(student(), teacher(), 0.9, verbose=False, **o),
        "AttentionProbe, no relations": lambda **o: AttentionProbe(student(), teacher(), 0.9, relation_weight=0, verbose=False, **o),
    }  # fmt: skip


class Distilled(torch.nn.Module):
    """The drop-in by itself, in autocast, where its queries are in half precision and one sweep can be the attention."""

    def __init__(self, rows: str, impl: str) -> None:
        super().__init__()
        self.student = vit(1, 16, 2)
        self.tap, self.options = AttentionTap(self.student, [0, 1]), {"rows": rows, "impl": impl}
        self.teacher = (AttentionTap(vit(2, 16, 2).eval(), [0, 1], stop=True),)  # in a tuple: it is not sharded

    @property
    def trainable_module(self) -> torch.nn.Module:
        return self

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                _, wanted = self.teacher[0](images)
            logits, _, losses = self.tap.distil(wanted, images, **self.options)
        return {"loss": torch.nn.functional.cross_entropy(logits, targets) + torch.stack(losses).mean()}


def drop_ins() -> dict[str, Callable[[], Distilled]]:
    found = {
        "distil, all rows": lambda: Distilled("all", "auto"),
        "distil, class row": lambda: Distilled("cls", "auto"),
    }
    if interpreting():
        found["distil, all rows, one sweep"] = lambda: Distilled("all", "triton")
    return found


def sharded(task: Any) -> Any:
    """FSDP2: every block's parameters lie in two halves, and are gathered when it runs."""
    for block in task.student.blocks:
        fully_shard(block)
    fully_shard(task.trainable_module)
    return task


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 1, 16, 16), torch.arange(4)


def teacher() -> torch.nn.Module:
    return vit(2, 32, 4)


def held_out() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(count, 1, 16, 16), torch.randint(0, 5, (count,))) for count in (20, 11, 6)]


def gradients(task: Any) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in task.student.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def step(task: Any, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of the student."""
    task.student.zero_grad()
    loss = task(images, targets)["loss"]
    loss.backward()
    return loss.detach(), gradients(task)


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    if interpreting():
        interpreter.install()
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
            step(task, images, targets)  # DDP complains about the first step's unused parameters at the second
            found[name, kind] = step(task, images, targets)
    for name, alone in drop_ins().items():
        found[name, "FSDP2"] = step(sharded(alone()), images, targets)
    for loss, _ in found.values():
        torch.distributed.all_reduce(loss)
        loss /= 2
    # Of three batches the first process has two; of one it has it, and the second none.
    importance = {}
    for count in (3, 1):
        path, held = f"{out}.{count}.json", held_out()[:count]
        result = head_importance(teacher(), held[rank::2], (0, 1), distributed=True, path=path, progress=False)
        assert result == head_importance(teacher(), [], (0, 1), distributed=True, path=path, progress=False)
        importance[count] = result.images, result.full, result.correct
    if rank == 0:
        torch.save(found, out)
        torch.save(importance, f"{out}.importance")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "gradients.pt")), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    for count, importance in torch.load(tmp_path / "gradients.pt.importance").items():
        one = head_importance(teacher(), held_out()[:count], (0, 1), progress=False)
        assert importance == (one.images, one.full, one.correct)
        assert len({number for row in one.correct for number in row}) > 1
    assert {kind for _, kind in found} == {"DDP", "DDP, one pass", "FSDP2, one pass", "FSDP2"}
    makers: dict[str, Callable[[], Any]] = {**tasks(), **drop_ins()}
    want = {name: step(make().train(), *batch()) for name, make in makers.items()}
    for (name, kind), (loss, grads) in found.items():
        exact = name in tasks()
        rtol, atol = (1e-4, 1e-6) if exact else (2e-2, 2e-3)  # bfloat16 adds up half a batch or all of it
        torch.testing.assert_close(
            loss, want[name][0], rtol=1e-4 if exact else 1e-3, atol=1e-6, msg=f"{name}, {kind}: loss"
        )
        assert set(want[name][1]) <= set(grads), f"{name}, {kind}"
        for parameter, grad in want[name][1].items():
            message = f"{name}, {kind}: {parameter}"
            torch.testing.assert_close(grads[parameter], grad, rtol=rtol, atol=atol, msg=message)
