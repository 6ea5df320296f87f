"""Both sides of a comparison, torch's and this package's, and small models to wrap with either."""

from types import ModuleType
from typing import Any

import torch
import torch.distributed.fsdp as torchs
from device import DEVICE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from training import full

import torch_hsdp_ckpt as ours

SIDES = (ours, torchs)
HERE = torch.device(DEVICE)


def layers(count: int = 2, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def whole(tensor: Tensor) -> Tensor:
    return full(tensor) if isinstance(tensor, DTensor) else tensor


def whole_in(value: Any) -> Any:
    """Nested dicts and sequences with whole tensors for DTensors."""
    return tree_map_only(DTensor, lambda tensor: full(tensor).clone(), value)


def fsdp1(side: ModuleType, module: nn.Module, **arguments) -> nn.Module:
    given = {"device_id": HERE, "use_orig_params": True, **arguments}
    return side.FullyShardedDataParallel(module, **given)


def sharded(side: ModuleType, module: nn.Module, **arguments) -> nn.Module:
    """Each child a unit, and the whole."""
    for child in module.children():
        side.fully_shard(child, **arguments)
    return side.fully_shard(module, **arguments)


def values(side: ModuleType, model: nn.Module) -> list[Tensor]:
    with side.FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in model.parameters()]


def gradients(side: ModuleType, model: nn.Module) -> list[Tensor]:
    with side.FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return [p.grad.clone() for p in model.parameters()]


def assert_same(outcomes: list) -> None:
    """One outcome a side."""
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-6, atol=1e-6)
