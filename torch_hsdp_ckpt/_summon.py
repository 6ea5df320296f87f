"""``summon_full_params``: the whole parameters in the module, outside of forward and backward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ._runner import Runner
from ._snapshot import hold
from ._unit import ShardedUnit, local_of


@contextmanager
def summon(runners: list[Runner], writeback: bool, rank0_only: bool, offload_to_cpu: bool, with_grads: bool) -> Iterator[None]:
    """For all ``runners``; see ``FullyShardedDataParallel.summon_full_params``. Collective over their meshes."""
    if writeback and rank0_only:
        raise NotImplementedError(
            "writeback=True with rank0_only=True is not served: what rank 0 writes would have to be sent to all. Pass "
            "writeback=False to look, or rank0_only=False to write"
        )
    hold()
    for runner in runners:
        if runner.unit.summoned:
            raise RuntimeError(f"the full parameters of module {runner.unit.core.name} have been summoned already")
        if runner.root is not None and runner.root.in_backward():
            raise RuntimeError("full parameters can't be summoned inside a backward")
        runner.reset()
    shown = not rank0_only or dist.get_rank() == 0
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(_one(runner.unit, writeback, shown, offload_to_cpu, with_grads))
        yield


@contextmanager
def _one(unit: ShardedUnit, writeback: bool, shown: bool, offload_to_cpu: bool, with_grads: bool) -> Iterator[None]:
    with torch.inference_mode(False):
        full = [nn.Parameter(_whole(p, offload_to_cpu), requires_grad=p.requires_grad) for p in unit.sharded]
    if with_grads:
        for parameter, sharded in zip(full, unit.sharded, strict=True):
            if sharded.grad is not None:
                if sharded.grad.dtype != sharded.dtype:  # mixed precision may keep lower ones, by autograd's leave
                    parameter.grad_dtype = sharded.grad.dtype
                parameter.grad = _whole(sharded.grad, offload_to_cpu)
    if not shown:
        full = []
    unit.summon(full)
    try:
        yield
    finally:
        current = unit.dismiss()
        if writeback:
            hold()
            with torch.no_grad():
                for held, sharded in zip(current, unit.sharded, strict=True):
                    unit.write_rows(held, sharded)
                    if with_grads and sharded.grad is not None and held.grad is not None:
                        unit.write_rows(held.grad, sharded.grad)


def _whole(tensor: torch.Tensor, offload_to_cpu: bool) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    with torch.inference_mode(False), torch.no_grad():
        whole = tensor.full_tensor()
        if offload_to_cpu:
            whole = whole.cpu()
        elif whole.untyped_storage().data_ptr() == local_of(tensor).untyped_storage().data_ptr():
            whole = whole.clone()  # a shard group of one: nobody expects writes to reach the shard before the end
        return whole
