"""Optimizers that can't step on sharded parameters, with clear words for it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import Optimizer
from torch.torch_version import TorchVersion


def check_can_step(optimizer: Optimizer) -> None:
    """NotImplementedError, before anything changes, where ``optimizer`` computes what torch has not
    for DTensors."""
    for kind, why_not in _WHY_NOT.items():
        for group in optimizer.param_groups if isinstance(optimizer, kind) else ():
            if why := why_not(group):
                for parameter in group["params"]:
                    _check_is_whole(parameter, kind.__name__, why)


def _why_not_adafactor(_: dict[str, Any]) -> str:
    # Of a sharded matrix torch's DTensor has not all norms; of a sharded vector each rank would
    # take the norm of its own part.
    return "it scales its step by norms that torch does not have of one"


def _why_not_rprop(group: dict[str, Any]) -> str:
    if TorchVersion(torch.__version__) < "2.12":
        return "it assigns by masks, which torch has for one since 2.12 only"
    foreach = group["foreach"]
    if foreach is None:  # it is by default where all are on a device
        from torch.optim.optimizer import _default_to_fused_or_foreach

        _, foreach = _default_to_fused_or_foreach(group["params"], group["differentiable"])
    return "torch._foreach_copy_ takes none (foreach=False does without it)" if foreach else ""


# Why there is no step for the sharded parameters of a group; "" if there is.
_WHY_NOT: dict[type[Optimizer], Callable[[dict[str, Any]], str]] = {
    torch.optim.Adafactor: _why_not_adafactor,
    torch.optim.Rprop: _why_not_rprop,
}


def _check_is_whole(parameter: torch.Tensor, kind: str, why: str) -> None:
    if not parameter.requires_grad or not isinstance(parameter, DTensor):
        return
    if any(isinstance(placement, Shard) for placement in parameter.placements):
        raise NotImplementedError(
            f"rank {dist.get_rank()}: torch.optim.{kind} has no step for a sharded parameter "
            f"(here one of shape {tuple(parameter.shape)}), as {why}: use another optimizer, such "
            "as AdamW, or leave its parameters whole (ignored_states, ignored_params), to be "
            "reduced by yourself"
        )
