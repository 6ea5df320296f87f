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
                _check_has_no_factors(parameter)


def _check_has_no_factors(parameter: torch.Tensor) -> None:
    """Adafactor keeps means over rows and columns of what has both, and changes partial norms in
    place for it."""
    if parameter.ndim < 2 or not parameter.requires_grad or not isinstance(parameter, DTensor):
        return
    if any(isinstance(placement, Shard) for placement in parameter.placements):
        raise NotImplementedError(
            f"rank {dist.get_rank()}: torch.optim.Adafactor has no step for a sharded parameter "
            f"(here one of shape {tuple(parameter.shape)}), as torch has not the norms that it "
            "takes of one: use another optimizer, such as AdamW, or leave such parameters whole "
            "(ignored_states, ignored_params), to be reduced by yourself"
        )
