"""``summon_full_params``: the whole parameters in the module, outside of forward and backward."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..common.gate import wait_at_gate
from .runner import Runner
from .state.whole import gather
from .unit import ShardedUnit


@dataclasses.dataclass(frozen=True)
class SummonOptions:
    """See ``FullyShardedDataParallel.summon_full_params``."""

    writeback: bool
    rank0_only: bool
    offload_to_cpu: bool
    with_grads: bool


@contextmanager
def summon(runners: list[Runner], options: SummonOptions) -> Iterator[None]:
    """Summons the units of all ``runners``. Collective over their meshes."""
    if options.writeback and options.rank0_only:
        raise NotImplementedError(
            "writeback=True with rank0_only=True is not supported: what rank 0 writes would have "
            "to be sent to all. Pass writeback=False to look, or rank0_only=False to write"
        )
    wait_at_gate()
    for runner in runners:
        if any(unit.summoned for unit in runner.units):
            raise RuntimeError(
                f"the full parameters of module {runner.name} have been summoned already"
            )
        if runner.root is not None and runner.root.in_backward():
            raise RuntimeError("full parameters can't be summoned inside a backward")
        for unit in runner.units:
            unit.check_materialized()
        runner.reset()
    with ExitStack() as stack:
        for unit in (unit for runner in runners for unit in runner.units):
            stack.enter_context(_summon_unit(unit, options))
        yield


@contextmanager
def _summon_unit(unit: ShardedUnit, options: SummonOptions) -> Iterator[None]:
    full = _full_parameters(unit, options)
    if options.with_grads:
        _gather_grads(unit, full, options)
    shown = not options.rank0_only or dist.get_rank() == 0
    unit.summon(full if shown else [])
    del full  # where they are not shown, nobody needs their memory
    try:
        yield
    finally:
        held = unit.dismiss()
        # A lone shard is the whole parameter, where torch's users write into it, writeback or not.
        if options.writeback or (shown and unit.mesh.size(unit.mesh.ndim - 1) == 1):
            _write_back(unit, held, options.with_grads)


def _full_parameters(unit: ShardedUnit, options: SummonOptions) -> list[nn.Parameter]:
    with torch.inference_mode(False):
        whole = _whole(unit.sharded, options.offload_to_cpu)
        return [
            nn.Parameter(unit.full_from(i, values), requires_grad=sharded.requires_grad)
            for i, (values, sharded) in enumerate(zip(whole, unit.sharded, strict=True))
        ]


def _gather_grads(unit: ShardedUnit, full: list[nn.Parameter], options: SummonOptions) -> None:
    """Gives the full parameters the whole gradients of those sharded ones that have one."""
    with_grad: list[int] = []
    sharded_grads: list[torch.Tensor] = []
    for index, sharded in enumerate(unit.sharded):
        if sharded.grad is not None:
            with_grad.append(index)
            sharded_grads.append(sharded.grad)
    grads = _whole(sharded_grads, options.offload_to_cpu)
    for index, whole in zip(with_grad, grads, strict=True):
        parameter, grad = full[index], unit.full_from(index, whole)
        if grad.dtype != parameter.dtype:
            # Mixed precision may keep gradients of lower precision, by autograd's leave.
            parameter.grad_dtype = grad.dtype
        parameter.grad = grad


def _write_back(unit: ShardedUnit, held: list[nn.Parameter], with_grads: bool) -> None:
    wait_at_gate()
    with torch.no_grad():
        for index, (full, sharded) in enumerate(zip(held, unit.sharded, strict=True)):
            unit.write_shard(index, full, sharded)
            if with_grads and sharded.grad is not None and full.grad is not None:
                unit.write_shard(index, full.grad, sharded.grad)


def _whole(tensors: Sequence[torch.Tensor], offload_to_cpu: bool) -> list[torch.Tensor]:
    def finish(whole: torch.Tensor) -> torch.Tensor:
        return whole.cpu() if offload_to_cpu else whole

    with torch.inference_mode(False), torch.no_grad():
        return cast(list[torch.Tensor], gather(cast(Sequence[DTensor], tensors), False, finish))
