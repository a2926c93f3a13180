"""FSDP2: of every weight, its gradient and its optimizer state, each process keeps a share; files hold them whole.

PyTorch's ``fully_shard``, on the student's blocks and on what trains as a whole. A block is gathered when it runs, and given up after it.
Teachers stay whole: no gradient and no optimizer state comes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from attnkd.capture.blocks import block_stack
from attnkd.capture.models import unwrap_model
from attnkd.methods.student_teacher import TrainedStudent
from attnkd.training.distributed import World


def shard(task: Any, world: World) -> None:
    """Spread what a task trains, and its moving average if it has one, over all processes. Before the optimizer is made: the
    parameters are new ones.

    Raises:
        ValueError: one process alone, or a task that trains something else than a student of attnkd's.
    """
    if world.size == 1:
        raise ValueError(
            "run.shard: spreads a student over several processes, but this one is alone; start it with torchrun"
        )
    ema = task.trainable_module_ema.module if getattr(task, "trainable_module_ema", None) is not None else None
    mesh = init_device_mesh(world.device.type, (world.size,))
    for wrapped in filter(None, (task.trainable_module, ema)):
        module = unwrap_model(wrapped)
        if not isinstance(module, TrainedStudent):
            raise ValueError(
                f"run.shard: for the methods of attnkd train, got a task that trains {type(module).__name__}"
            )
        blocks = [module.model.get_submodule(path) for path in block_stack(module.model, "run.shard: student's blocks")]
        for block in dict.fromkeys(blocks):  # a shared one once
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)


def whole(value: Any, keep: bool = True) -> Any:
    """Nested state with every shared tensor put together, on the CPU. All processes must call it.

    Args:
        value: dicts, lists and tuples of anything.
        keep: False: this process helps the others, and gets empty tensors in place of those.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor().detach()
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(value, dict):
        return {name: whole(item, keep) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, keep) for item in value)
    return value


def share(value: Any, like: Tensor) -> Any:
    """This process's share of a whole tensor that belongs to the parameter ``like``; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shares(state: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Any]:
    """A whole state_dict as that of a module that is spread."""
    return {name: share(value, like[name]) if name in like else value for name, value in state.items()}


def optimizer_shares(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """A whole optimizer's state_dict as that of one whose parameters, in this order, are spread."""
    own = {
        index: {name: share(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": own}


def number(value: Any) -> Tensor:
    """A scalar that all processes know whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value
