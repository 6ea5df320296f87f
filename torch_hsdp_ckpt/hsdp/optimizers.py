"""Optimizers that can't step on sharded parameters, with clear words for it."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import Optimizer
from torch.torch_version import TorchVersion

# Adafactor: of a sharded matrix torch's DTensor has not all norms; of a sharded vector each rank
# would take the norm of its own part.
_WHY: dict[type[Optimizer], str] = {
    torch.optim.Adafactor: "it scales its step by norms that torch does not have of one"
}
if TorchVersion(torch.__version__) < "2.12":
    _WHY[torch.optim.Rprop] = "it assigns by masks, which torch has for one since 2.12 only"


def check_can_step(optimizer: Optimizer) -> None:
    """NotImplementedError, before anything changes, where ``optimizer`` computes what torch has not
    for DTensors."""
    for kind, why in _WHY.items():
        if isinstance(optimizer, kind):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    _check_is_whole(parameter, kind.__name__, why)


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
