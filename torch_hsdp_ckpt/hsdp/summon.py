"""``summon_full_params``: the whole parameters in the module, outside of forward and backward."""

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


@contextmanager
def summon(
    runners: list[Runner], writeback: bool, rank0_only: bool, offload_to_cpu: bool, with_grads: bool
) -> Iterator[None]:
    """For all ``runners``; see ``FullyShardedDataParallel.summon_full_params``. Collective over
    their meshes."""
    if writeback and rank0_only:
        raise NotImplementedError(
            "writeback=True with rank0_only=True is not served: what rank 0 writes would have to "
            "be sent to all. Pass "
            "writeback=False to look, or rank0_only=False to write"
        )
    wait_at_gate()
    for runner in runners:
        if runner.unit.summoned:
            raise RuntimeError(
                f"the full parameters of module {runner.unit.core.name} have been summoned already"
            )
        if runner.root is not None and runner.root.in_backward():
            raise RuntimeError("full parameters can't be summoned inside a backward")
        runner.reset()
    shown = not rank0_only or dist.get_rank() == 0
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(_one(runner.unit, writeback, shown, offload_to_cpu, with_grads))
        yield


@contextmanager
def _one(
    unit: ShardedUnit, writeback: bool, shown: bool, offload_to_cpu: bool, with_grads: bool
) -> Iterator[None]:
    with torch.inference_mode(False):
        whole = _whole(unit.sharded, offload_to_cpu)
        full = [
            nn.Parameter(w, requires_grad=p.requires_grad)
            for w, p in zip(whole, unit.sharded, strict=True)
        ]
    if with_grads:
        having = [
            (parameter, p.grad)
            for parameter, p in zip(full, unit.sharded, strict=True)
            if p.grad is not None
        ]
        grads = _whole([grad for _, grad in having], offload_to_cpu)
        for (parameter, sharded), grad in zip(having, grads, strict=True):
            if (
                sharded.dtype != parameter.dtype
            ):  # mixed precision may keep lower ones, by autograd's leave
                parameter.grad_dtype = sharded.dtype
            parameter.grad = grad
    if not shown:
        full = []
    unit.summon(full)
    try:
        yield
    finally:
        current = unit.dismiss()
        if writeback:
            wait_at_gate()
            with torch.no_grad():
                for held, sharded in zip(current, unit.sharded, strict=True):
                    unit.write_rows(held, sharded)
                    if with_grads and sharded.grad is not None and held.grad is not None:
                        unit.write_rows(held.grad, sharded.grad)


def _whole(tensors: Sequence[torch.Tensor], offload_to_cpu: bool) -> list[torch.Tensor]:
    def finish(whole: torch.Tensor) -> torch.Tensor:
        return whole.cpu() if offload_to_cpu else whole

    with torch.inference_mode(False), torch.no_grad():
        return cast(list[torch.Tensor], gather(cast(Sequence[DTensor], tensors), False, finish))
