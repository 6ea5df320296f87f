"""Optimizers that can't step on sharded parameters, with clear words for it."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import Optimizer


def check_can_step(optimizer: Optimizer) -> None:
    """NotImplementedError, before anything changes, where ``optimizer`` computes what torch has not
    for DTensors."""
    if isinstance(optimizer, torch.optim.Adafactor):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _check_is_whole(parameter)


def _check_is_whole(parameter: torch.Tensor) -> None:
    """Adafactor scales its step by norms. Of a sharded matrix torch's DTensor has not all of them;
    of a sharded vector each rank would take the norm of its own part."""
    if not parameter.requires_grad or not isinstance(parameter, DTensor):
        return
    if any(isinstance(placement, Shard) for placement in parameter.placements):
        raise NotImplementedError(
            f"rank {dist.get_rank()}: torch.optim.Adafactor has no step for a sharded parameter "
            f"(here one of shape {tuple(parameter.shape)}), as it scales its step by norms that "
            "torch does not have of one: use another optimizer, such as AdamW, or leave its "
            "parameters whole (ignored_states, ignored_params), to be reduced by yourself"
        )
