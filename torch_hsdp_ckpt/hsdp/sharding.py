"""Sharding the parameters of one module: a unit for each mesh that they go to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .. import _C
from .arguments import NotSupportedError
from .data_parallel import DataParallel
from .extensions import is_extended
from .layout import ParameterLayout, layout_of, share_meshes
from .precision import Precision
from .shards import why_not_shardable
from .slots import RegisteredParameter
from .unit import ShardedUnit


class Place(NamedTuple):
    """Where a parameter is sharded: on its dimension ``dim``, from the end if negative."""

    data_parallel: DataParallel
    dim: int = 0


@dataclass(frozen=True)
class UnitSettings:
    """What the units of one module have in common."""

    device: torch.device
    reshard_after_forward: bool | int | None
    precision: Precision
    memory: _C.ShardMemory = _C.ShardMemory.DEVICE


def shard(
    registered: Sequence[RegisteredParameter], places: Sequence[Place], settings: UnitSettings
) -> list[ShardedUnit]:
    """Units that hold ``registered``, one for each of the meshes of ``places``, in the order in
    which these come up; where there are no parameters, none.

    Raises ValueError, with rank, module and parameter, for what can't be sharded so; nothing is
    then."""
    layouts = share_meshes(
        [_layout(each, place, settings) for each, place in zip(registered, places, strict=True)]
    )
    members: dict[DataParallel, list[int]] = {}
    for number, place in enumerate(places):
        members.setdefault(place.data_parallel, []).append(number)
    return [
        _unit([registered[i] for i in numbers], [layouts[i] for i in numbers], over, settings)
        for over, numbers in members.items()
    ]


def empty_unit(data_parallel: DataParallel, settings: UnitSettings) -> ShardedUnit:
    """Of a module without parameters of its own, which takes part in the order of all."""
    return _unit([], [], data_parallel, settings)


def only_unit(
    registered: Sequence[RegisteredParameter], data_parallel: DataParallel, settings: UnitSettings
) -> ShardedUnit:
    """The unit of all parameters, where these go to one mesh and are cut by rows."""
    units = shard(registered, [Place(data_parallel)] * len(registered), settings)
    return units[0] if units else empty_unit(data_parallel, settings)


def _unit(
    registered: Sequence[RegisteredParameter],
    layouts: Sequence[ParameterLayout],
    data_parallel: DataParallel,
    settings: UnitSettings,
) -> ShardedUnit:
    return ShardedUnit(
        registered,
        layouts,
        data_parallel.mesh,
        settings.device,
        settings.reshard_after_forward,
        settings.precision,
        settings.memory,
    )


def _layout(
    registered: RegisteredParameter, place: Place, settings: UnitSettings
) -> ParameterLayout:
    try:
        problem = why_not_shardable(registered.parameter, settings.device)
        if problem:
            raise ValueError(problem)
        _check_extension(registered.parameter, settings)
        _check_dense(registered)
        settings.precision.param_dtype_of(registered.parameter)
        return layout_of(registered.parameter, place.data_parallel, place.dim)
    except ValueError as error:
        raise refusal(registered, str(error)) from error


def _check_extension(parameter: torch.Tensor, settings: UnitSettings) -> None:
    """Raises ValueError where a parameter that gathers itself would have to be kept among fewer
    ranks: torch keeps none either."""
    if type(settings.reshard_after_forward) is int and is_extended(parameter):
        raise ValueError(
            "gathers itself (fsdp_pre_all_gather), which goes with reshard_after_forward=True or "
            f"False, not with {settings.reshard_after_forward}"
        )


def _check_dense(registered: RegisteredParameter) -> None:
    """Raises ValueError for a parameter whose gradients would be sparse."""
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    modules = [slot.module for slot in registered.slots]
    is_sparse = any(isinstance(module, embeddings) and module.sparse for module in modules)
    if is_sparse and registered.parameter.requires_grad:
        raise ValueError(
            "has sparse gradients (sparse=True), and what is sharded has dense ones: pass "
            "sparse=False, or leave it out (ignored_params, ignored_states)"
        )


def refusal(registered: RegisteredParameter, problem: str) -> NotSupportedError:
    """The error that says what is wrong with a parameter. ``problem`` follows its name."""
    module = type(registered.slots[0].module).__name__
    return NotSupportedError(
        f"rank {dist.get_rank()}: module {module}: parameter {registered.name} of shape "
        f"{tuple(registered.parameter.shape)} {problem}"
    )
