"""What torch's optimizers can't do with sharded parameters: refused with clear words, or done
another way."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim.optimizer import Optimizer
from torch.torch_version import TorchVersion

_logger = logging.getLogger(__name__)
_has_told = False
# Groups that step one tensor at a time until their step is over.
_stepping_singly: "weakref.WeakKeyDictionary[Optimizer, list[dict[str, Any]]]" = (
    weakref.WeakKeyDictionary()
)


def check_can_step(optimizer: Optimizer) -> None:
    """NotImplementedError, before anything changes, where ``optimizer`` computes what torch has not
    for DTensors."""
    for group in optimizer.param_groups:
        if any(group.get(way) for way in _FOR_LISTS) and _is_mixed(group["params"]):
            ways = " and ".join(way for way in _FOR_LISTS if group.get(way))
            raise NotImplementedError(
                f"rank {dist.get_rank()}: a group of torch.optim.{type(optimizer).__name__} has "
                f"sharded parameters and whole ones, and steps by torch's functions for lists "
                f"({ways}), which take one kind only: give the whole ones (ignored_states, "
                "ignored_params) a group of their own"
            )
    for kind, why_not in _WHY_NOT.items():
        for group in optimizer.param_groups if isinstance(optimizer, kind) else ():
            if why := why_not(group):
                for parameter in group["params"]:
                    _check_is_whole(parameter, kind.__name__, why)


def step_mixed_groups_singly(optimizer: Optimizer) -> None:
    """By default torch steps on a device by functions for lists of tensors, which take DTensors or
    plain tensors: a group that has both steps one tensor at a time, which is told once."""
    mixed = [
        group
        for group in optimizer.param_groups
        if group.get("foreach", False) is None and _is_mixed(group["params"])
    ]
    for group in mixed:
        group["foreach"] = False
    if mixed:
        _stepping_singly[optimizer] = mixed
        if any(each.device.type != "cpu" for group in mixed for each in group["params"]):
            _tell_once(optimizer)


def step_is_over(optimizer: Optimizer) -> None:
    """Leaves the groups as :func:`step_mixed_groups_singly` has found them."""
    for group in _stepping_singly.pop(optimizer, ()):
        group["foreach"] = None


def _is_mixed(parameters: Sequence[torch.Tensor]) -> bool:
    return len({isinstance(each, DTensor) for each in parameters if each.requires_grad}) == 2


def _tell_once(optimizer: Optimizer) -> None:
    global _has_told
    if _has_told:
        return
    _has_told = True
    _logger.warning(
        "%s has sharded parameters and whole ones in one group, and steps on one tensor at a time: "
        "a group of their own for the whole ones (ignored_states, ignored_params) is faster",
        type(optimizer).__name__,
    )


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


# Options by which a group steps by functions that take lists of tensors.
_FOR_LISTS = ("foreach", "fused")

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
