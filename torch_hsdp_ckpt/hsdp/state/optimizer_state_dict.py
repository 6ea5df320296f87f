"""What users call for an optimizer's state: FSDP1's static methods.

A state is ``{"state": {name: {key: value}}, "param_groups": [{"params": [name, ...], ...}]}``. What
is not a tensor, or has no dimension (``step``), is the same on all ranks and stays as it is. State
that belongs to no parameter (anything but a dict, or under a key that ``optim.state`` has too) is
passed on.

``optimizer_out`` names the state, ``whole`` gathers it, ``optimizer_in`` checks one to be loaded
and cuts it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    OptimStateKeyType,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictSettings,
    StateDictType,
)

from ..adoption import adopt
from ..runner import Runner, named_runners
from ..unit import ShardedUnit, mesh_of_state
from .initial_state import state_of
from .nested import map_leaves
from .optimizer_in import loadable_state
from .optimizer_names import OptimInput, ParameterNames, in_order, names_of
from .optimizer_out import by_names, make_whole
from .optimizer_plan import OptimizerLoadRequest
from .whole import keep, offload

_GATHERING = "whole optimizer state"


def unit_holders(module: nn.Module) -> list[Any]:
    """All modules inside that hold a unit of ours, outermost first."""
    return [m for m in module.modules() if isinstance(m.__dict__.get("_unit"), ShardedUnit)]


def default_settings() -> StateDictSettings:
    return StateDictSettings(
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    )


def _settings(model: nn.Module) -> StateDictSettings:
    """What ``set_state_dict_type`` has set; the default where that is not known, as under
    ``fully_shard``."""
    for holder in unit_holders(model):
        if hasattr(holder, "_settings"):
            settings: StateDictSettings = holder._settings
            return settings
    return default_settings()


def _runners(model: nn.Module) -> list[Runner]:
    runners = [runner for _, runner in named_runners(model)]
    if not runners:
        raise ValueError(f"{type(model).__name__} holds no module that was sharded here")
    return runners


def _mesh_to_load(model: nn.Module) -> DeviceMesh:
    """The mesh of a model whose optimizer is about to be loaded. Its parameters are made the
    sharded ones."""
    runners = _runners(model)
    for runner in runners:
        runner.reset()
    return _mesh_of(runners)


def _mesh_of(runners: Sequence[Runner]) -> DeviceMesh:
    return mesh_of_state([unit for runner in runners for unit in runner.units])


@contextmanager
def _reading(model: nn.Module, purpose: str = "") -> Iterator[DeviceMesh]:
    """Gives the model's mesh while nothing changes its state, on any thread. ``purpose``: what
    states are going to be gathered for within the block, if they are."""
    runners = _runners(model)
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(runner.reading(purpose))
        yield _mesh_of(runners)


def _names_of(
    model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: OptimInput = None
) -> ParameterNames:
    """``names_of``, where an optimizer that was made before wrapping has got the sharded parameters
    first."""
    if optim is not None:
        adopt(optim)
    return names_of(model, optim, optim_input)


def _named_state(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    optim_input: OptimInput = None,
    saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The optimizer's state by names; ``saved``: what its ``state_dict()`` has returned already."""
    names = _names_of(model, optim, optim_input)
    return by_names(state_of(optim) if saved is None else saved, names)


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

        SHARDED_STATE_DICT gives DTensors as the parameters are, which share the optimizer's memory;
        nothing is sent. FULL_STATE_DICT gives whole tensors, which are copies; it is collective,
        and with ``rank0_only`` other ranks than the mesh's first get ``{}``.
        ``optim_state_dict``: what ``optim.state_dict()`` has returned, if it was called already.

        An optimizer that has made no step yet gives the state that its first step begins with, for
        every parameter that requires a gradient: a checkpoint can be loaded into it. The optimizer
        stays as it is."""
        settings = _settings(model)
        config: Any = settings.optim_state_dict_config
        if settings.state_dict_type is StateDictType.FULL_STATE_DICT:
            finish = offload if config.offload_to_cpu else keep
            with _reading(model, _GATHERING) as mesh:
                named = _named_state(model, optim, saved=optim_state_dict)
                return make_whole(named, mesh, config.rank0_only, finish)
        with _reading(model):
            named = _named_state(model, optim, saved=optim_state_dict)
        if config.offload_to_cpu:
            named["state"] = map_leaves(named["state"], offload)
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
        rows. ShardedTensors are gathered one by one and cut likewise. Under FULL_STATE_DICT with
        ``rank0_only`` the first rank's state is sent to all, and what others pass is ignored.
        ``is_named_optimizer``: ``optim`` keys its state by names itself. A state without
        ``param_groups`` comes back without, to be completed; it can't be loaded directly.

        Collective: what does not fit on one rank is a ValueError on all of them that lists it, and
        nothing was loaded."""
        mesh = _mesh_to_load(model)
        config = _settings(model).optim_state_dict_config
        request = OptimizerLoadRequest(
            optim_state_dict,
            mesh,
            lambda: _names_of(model, optim),
            optim,
            from_first_rank=bool(getattr(config, "rank0_only", False)),
            keyed_by_name=is_named_optimizer,
            needs_groups=load_directly,
        )
        loadable = loadable_state(request)
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
        with _reading(model, _GATHERING) as mesh:
            named = _named_state(model, optim, optim_input)
            return make_whole(named, mesh, rank0_only, offload)

    @staticmethod
    def sharded_optim_state_dict(
        model: nn.Module, optim: torch.optim.Optimizer, group: Any = None
    ) -> dict[str, Any]:
        """``optim_state_dict`` with DTensors, whatever type is set: no communication, no copy."""
        with _reading(model):
            return _named_state(model, optim)

    @staticmethod
    def shard_full_optim_state_dict(
        full_optim_state_dict: dict[str, Any],
        model: nn.Module,
        optim_input: OptimInput = None,
        optim: torch.optim.Optimizer | None = None,
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from a whole state that every rank has. See
        ``optim_state_dict_to_load``."""
        mesh = _mesh_to_load(model)
        return loadable_state(
            OptimizerLoadRequest(
                full_optim_state_dict, mesh, lambda: _names_of(model, optim, optim_input), optim
            )
        )

    @staticmethod
    def flatten_sharded_optim_state_dict(
        sharded_optim_state_dict: dict[str, Any], model: nn.Module, optim: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """What ``optim.load_state_dict`` takes, from ``sharded_optim_state_dict``. (Nothing is flat
        here but the name.)"""
        mesh = _mesh_to_load(model)
        return loadable_state(
            OptimizerLoadRequest(
                sharded_optim_state_dict, mesh, lambda: _names_of(model, optim), optim
            )
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
        mesh = _mesh_to_load(model)
        return loadable_state(
            OptimizerLoadRequest(
                full_optim_state_dict,
                mesh,
                lambda: _names_of(model, optim, optim_input),
                optim,
                from_first_rank=True,
            )
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
        target = str if optim_state_key_type is OptimStateKeyType.PARAM_NAME else int
        if _key_types(optim_state_dict, optim_state_key_type) <= {target}:
            return optim_state_dict
        names = _names_of(model, optim, optim_input)
        if target is str:
            return _rekeyed(optim_state_dict, dict(enumerate(names.flat)))
        return _rekeyed(optim_state_dict, names.index)


def _key_types(state: dict[str, Any], wanted: OptimStateKeyType) -> set[type]:
    """The type of the state's keys, if there are any: str or int."""
    types = {type(key) for key in state["state"]}
    can_be_rekeyed = types in (set(), {str}, {int})
    if not can_be_rekeyed or not isinstance(wanted, OptimStateKeyType):
        names = sorted(each.__name__ for each in types)
        raise ValueError(f"rekeying to {wanted}: keys of types {names}")
    return types


def _rekeyed(saved: dict[str, Any], new_keys: Mapping[Any, Any]) -> dict[str, Any]:
    _check_known(saved, new_keys)
    state = {new_keys[key]: value for key, value in saved["state"].items()}
    groups = [_rekeyed_group(group, new_keys) for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def _check_known(state: dict[str, Any], known: Mapping[Any, Any]) -> None:
    keys = list(state["state"])
    for group in state["param_groups"]:
        keys += group["params"]
    unknown = sorted({str(key) for key in keys if key not in known})
    if unknown:
        raise ValueError(f"the optimizer has no such parameters: {', '.join(unknown)}")


def _rekeyed_group(group: dict[str, Any], new_keys: Mapping[Any, Any]) -> dict[str, Any]:
    """``group`` with the new keys, in their order."""
    keys = sorted(group["params"], key=new_keys.__getitem__)
    return {**in_order(group, keys, new_keys), "params": [new_keys[key] for key in keys]}
