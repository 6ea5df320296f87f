"""Optimizer state by parameter names: as it lies in the optimizer, or whole; and back, checked.
FSDP1's static methods.

A state is ``{"state": {name: {key: value}}, "param_groups": [{"params": [name, ...], ...}]}``. What
is not a tensor, or has no dimension (``step``), is the same on all ranks and stays as it is. State
that belongs to no parameter (anything but a dict, or under a key that ``optim.state`` has too) is
passed on."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    OptimStateKeyType,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictSettings,
    StateDictType,
)
from torch.distributed.tensor import DTensor

from ..runner import Runner, named_runners
from ..unit import ShardedUnit
from .full_state import gather, is_first
from .mismatch import groups_of
from .optim_load import Source, import_state
from .optim_names import PREFIX, Names, OptimInput, in_order, names_of

__all__ = ["PREFIX", "OptimStateMixin", "offload", "unit_holders"]


def unit_holders(module: nn.Module) -> list[Any]:
    """All modules inside that hold a unit of ours, outermost first."""
    return [m for m in module.modules() if isinstance(m.__dict__.get("_unit"), ShardedUnit)]


def offload(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) and value.device.type != "cpu" else value


def _settings(model: nn.Module) -> StateDictSettings:
    default = StateDictSettings(
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    )
    return next((m._settings for m in unit_holders(model) if hasattr(m, "_settings")), default)


def _runners(model: nn.Module) -> list[Runner]:
    runners = [runner for _, runner in named_runners(model)]
    if not runners:
        raise ValueError(f"{type(model).__name__} holds no module that was sharded here")
    return runners


def _mesh(model: nn.Module) -> DeviceMesh:
    """The model's, whose parameters are about to be loaded."""
    runners = _runners(model)
    for runner in runners:
        runner.reset()
    return runners[0].unit.mesh


@contextmanager
def _names(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    optim_input: OptimInput = None,
    whole: bool = False,
) -> Iterator[tuple[Names, DeviceMesh]]:
    """The names and the model's mesh, from any thread. ``whole``: states are going to be gathered
    within the block."""
    runners = _runners(model)
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(runner.reading("whole optimizer state" if whole else ""))
        yield names_of(model, optim, optim_input), runners[0].unit.mesh


class OptimStateMixin:
    """The optimizer's side of FSDP1's interface. ``group`` is not needed: a parameter's mesh says
    who has it."""

    @staticmethod
    def optim_state_dict(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_state_dict: dict[str, Any] | None = None,
        group: Any = None,
    ) -> dict[str, Any]:
        """The optimizer's state by parameter names, in the form that ``set_state_dict_type`` has
        set.

        SHARDED_STATE_DICT: DTensors as the parameters are, sharing the optimizer's memory; nothing
        is sent. FULL_STATE_DICT: whole tensors, copies; collective; with ``rank0_only`` other ranks
        than the mesh's first get ``{}``. ``optim_state_dict``: what ``optim.state_dict()`` has
        returned, if it was called already."""
        source = optim.state_dict() if optim_state_dict is None else optim_state_dict
        settings = _settings(model)
        config: Any = settings.optim_state_dict_config
        whole = settings.state_dict_type is StateDictType.FULL_STATE_DICT
        finish = offload if config.offload_to_cpu else lambda tensor: tensor
        with _names(model, optim, whole=whole) as (names, mesh):
            if whole:
                return _whole(source, names, mesh, config.rank0_only, finish)
            named = _by_names(source, names)
        if config.offload_to_cpu:
            named["state"] = _map_leaves(named["state"], offload)
        return named

    @staticmethod
    def optim_state_dict_to_load(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_state_dict: dict[str, Any],
        is_named_optimizer: bool = False,
        load_directly: bool = False,
        group: Any = None,
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from what ``optim_state_dict`` returns. Loads it if
        ``load_directly``.

        DTensors are passed on as they are, whole tensors are cut: each rank keeps a copy of its
        rows. Under FULL_STATE_DICT with ``rank0_only`` the first rank's state is sent to all, and
        what others pass is ignored. ``is_named_optimizer``: ``optim`` keys its state by names
        itself.

        Collective: what does not fit on one rank is a ValueError on all of them that lists it, and
        nothing was loaded."""
        mesh = _mesh(model)
        settings = _settings(model)
        first_only = bool(getattr(settings.optim_state_dict_config, "rank0_only", False))
        source = Source(optim_state_dict, mesh if first_only else None)
        loadable = import_state(
            source, lambda: names_of(model, optim), mesh, optim, by_name=is_named_optimizer
        )
        if load_directly:
            optim.load_state_dict(loadable)
        return loadable

    @staticmethod
    def full_optim_state_dict(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_input: OptimInput = None,
        rank0_only: bool = True,
        group: Any = None,
    ) -> dict[str, Any]:
        """``optim_state_dict`` with whole tensors on the CPU, whatever type is set; ``{}`` on other
        ranks if ``rank0_only``."""
        source = optim.state_dict()
        with _names(model, optim, optim_input, whole=True) as (names, mesh):
            return _whole(source, names, mesh, rank0_only, offload)

    @staticmethod
    def sharded_optim_state_dict(
        model: nn.Module, optim: torch.optim.Optimizer, group: Any = None
    ) -> dict[str, Any]:
        """``optim_state_dict`` with DTensors, whatever type is set: no communication, no copy."""
        source = optim.state_dict()
        with _names(model, optim) as (names, _):
            return _by_names(source, names)

    @staticmethod
    def shard_full_optim_state_dict(
        full_optim_state_dict: dict[str, Any],
        model: nn.Module,
        optim_input: OptimInput = None,
        optim: torch.optim.Optimizer | None = None,
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from a whole state that every rank has. See
        ``optim_state_dict_to_load``."""
        mesh = _mesh(model)
        return import_state(
            Source(full_optim_state_dict, None),
            lambda: names_of(model, optim, optim_input),
            mesh,
            optim,
        )

    @staticmethod
    def flatten_sharded_optim_state_dict(
        sharded_optim_state_dict: dict[str, Any], model: nn.Module, optim: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from ``sharded_optim_state_dict``. (Nothing is flat
        here but the name.)"""
        return import_state(
            Source(sharded_optim_state_dict, None),
            lambda: names_of(model, optim),
            _mesh(model),
            optim,
        )

    @staticmethod
    def scatter_full_optim_state_dict(
        full_optim_state_dict: dict[str, Any] | None,
        model: nn.Module,
        optim_input: OptimInput = None,
        optim: torch.optim.Optimizer | None = None,
        group: Any = None,
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from a whole state that only the mesh's first rank
        has; others pass None.

        Each rank of the first rank's shard group is sent its rows, a tensor at a time, and passes
        them on to its replicas."""
        mesh = _mesh(model)
        return import_state(
            Source(full_optim_state_dict, mesh),
            lambda: names_of(model, optim, optim_input),
            mesh,
            optim,
        )

    @staticmethod
    def rekey_optim_state_dict(
        optim_state_dict: dict[str, Any],
        optim_state_key_type: OptimStateKeyType,
        model: nn.Module,
        optim_input: OptimInput = None,
        optim: torch.optim.Optimizer | None = None,
    ) -> dict[str, Any]:
        """The same state by parameter names (PARAM_NAME) or the optimizer's numbers (PARAM_ID).
        ``model`` need not be wrapped.

        A state that has such keys already is returned as it is. ValueError for a mixture, and for
        parameters that the optimizer does not have."""
        kinds = {type(key) for key in optim_state_dict["state"]}
        target = str if optim_state_key_type is OptimStateKeyType.PARAM_NAME else int
        if (
            not isinstance(optim_state_key_type, OptimStateKeyType)
            or len(kinds) > 1
            or not kinds <= {str, int}
        ):
            raise ValueError(
                f"rekeying to {optim_state_key_type}: keys of types "
                f"{sorted(k.__name__ for k in kinds)}"
            )
        if kinds <= {target}:
            return optim_state_dict
        names = names_of(model, optim, optim_input)
        table: dict[Any, Any] = dict(enumerate(names.flat)) if target is str else dict(names.index)
        keys = [
            *optim_state_dict["state"],
            *(key for g in optim_state_dict["param_groups"] for key in g["params"]),
        ]
        unknown = sorted({str(key) for key in keys if key not in table})
        if unknown:
            raise ValueError(f"the optimizer has no such parameters: {', '.join(unknown)}")
        groups = [
            in_order(g, table, sorted(g["params"], key=table.__getitem__))
            for g in optim_state_dict["param_groups"]
        ]
        return {
            "state": {table[key]: value for key, value in optim_state_dict["state"].items()},
            "param_groups": groups,
        }


def _by_names(source: dict[str, Any], names: Names) -> dict[str, Any]:
    flat = names.flat
    state = {
        flat[key] if isinstance(key, int) else key.replace(PREFIX, ""): dict(values)
        if isinstance(values, dict)
        else values
        for key, values in source["state"].items()
    }
    named: dict[str, Any] = {"state": state}
    if "param_groups" in source:
        named["param_groups"] = [
            {**saved, "params": list(group)}
            for saved, group in zip(source["param_groups"], names.groups, strict=True)
        ]
    return named


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map_leaves(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_leaves(item, function) for item in value)
    return function(value)


def _sharded_leaves(value: Any, path: str) -> Iterator[tuple[str, DTensor]]:
    """By path, in an order that all ranks share whatever order their dicts have."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _sharded_leaves(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _sharded_leaves(item, f"{path}/{i}")
    elif isinstance(value, DTensor):
        yield path, value


def _whole(
    source: dict[str, Any],
    names: Names,
    mesh: DeviceMesh,
    first_only: bool,
    finish: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    named = _by_names(source, names)
    leaves = list(_sharded_leaves(named["state"], ""))
    _check_equal([f"{path} {tuple(value.shape)} {value.dtype}" for path, value in leaves], mesh)
    whole = gather([value for _, value in leaves], first_only, finish)
    if first_only and not is_first(mesh):
        return {}
    by_value = {id(value): tensor for (_, value), tensor in zip(leaves, whole, strict=True)}

    def replace(value: Any) -> Any:
        if isinstance(value, DTensor):
            return by_value[id(value)]
        return finish(value.clone()) if isinstance(value, torch.Tensor) else value

    named["state"] = _map_leaves(named["state"], replace)
    return named


def _check_equal(lines: list[str], mesh: DeviceMesh) -> None:
    """RuntimeError on all ranks if they hold states of different parameters: their gathers would
    wait for each other."""
    digest = zlib.crc32("\n".join(lines).encode())
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=mesh.device_type)
    for group in groups_of(mesh):
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise RuntimeError(
            f"the ranks hold optimizer states of different tensors (rank {dist.get_rank()} has "
            f"{len(lines)}): a whole state "
            "needs the same on all of them; did every rank take part in every step?"
        )
