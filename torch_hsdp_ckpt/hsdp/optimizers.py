"""Optimizers that can't step on sharded parameters, with clear words for it."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import Optimizer
from torch.torch_version import TorchVersion


def check_can_step(optimizer: Optimizer) -> None:
    """NotImplementedError, before anything changes, where ``optimizer`` computes what torch has not
    for DTensors."""
    for group in optimizer.param_groups:
        if why := _why_not(optimizer, group):
            kind = "Rprop" if isinstance(optimizer, torch.optim.Rprop) else "Adafactor"
            for parameter in group["params"]:
                _check_is_whole(parameter, kind, why)


def _why_not(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Why there is no step for the group's parameters that are sharded; "" if there is."""
    if isinstance(optimizer, torch.optim.Adafactor):
        # Of a sharded matrix torch's DTensor has not all norms; of a sharded vector each rank would
        # take the norm of its own part.
        return "it scales its step by norms that torch does not have of one"
    if not isinstance(optimizer, torch.optim.Rprop):
        return ""
    if TorchVersion(torch.__version__) < "2.12":
        return "it assigns by masks, which torch has for one since 2.12 only"
    foreach = group["foreach"]
    if foreach is None:  # it is by default where all are on a device
        from torch.optim.optimizer import _default_to_fused_or_foreach

        _, foreach = _default_to_fused_or_foreach(group["params"], group["differentiable"])
    return "torch._foreach_copy_ takes none (foreach=False does without it)" if foreach else ""


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
