"""A model in shards over all processes of a run, by FSDP2: each holds a part of every weight."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .. import ranks
from ..step import compiling


def shard(
    model: nn.Module,
    blocks: str,
    *,
    device: torch.device,
    offload: bool = False,
    reduced: torch.dtype | None = None,
) -> None:
    """Shards `model` in place: each block a unit, what is left another. It may still be on the CPU:
    a unit at a time goes to `device`.

    Weights are gathered in their own dtype, gradients summed over all processes in `reduced` (None:
    their own).
    Adapters (what trains beside frozen weights) stay whole on each process, as do their gradients.

    blocks: paths of the family's, as for `compiling.compile_blocks`, which may come first or after.
    offload: shards, their gradients and what the optimiser keeps of them are on the CPU.
    """
    # A second to import, and for those alone that shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    parameters = list(model.parameters())
    trains = {p for p in parameters if p.requires_grad}
    adapters = trains if len(trains) < len(parameters) else set()
    for p in adapters:
        p.data = p.data.to(device)  # FSDP moves its own alone
    # A transformer's output is a view; nothing here writes into it, of which this warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (ranks.world(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for part in [*compiling.blocks(model, blocks), model]:
        # After every forward, the root too: between steps a parameter is its shard, and no forward
        # without a backward leaves weights that a later one would take for those of then.
        unit = fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=True,
            offload_policy=policy,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced),
            ignored_params=adapters,
        )
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor in it


def whole(model: nn.Module) -> nn.Module | None:
    """On rank 0 a copy that is no longer in shards, on the CPU, to be written; None elsewhere. All
    processes call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not ranks.main():
        return None
    # FSDP has made it one of a class of its own.
    kind = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        copy = kind.from_config(model.config)
    copy.load_state_dict(state, assign=True)
    return copy


def local(tensor: Tensor) -> Tensor:
    """This process's part, of the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, on every process; all call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def finite(parameters: list[Tensor]) -> bool:
    """Whether all are, on all processes."""
    return all(ranks.gathered(all(bool(local(p).isfinite().all()) for p in parameters)))
