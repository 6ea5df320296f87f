"""Before an optimizer's state goes in: everything is checked against the model and the optimizer,
nothing is changed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from .from_first_rank import FirstRank, ReceivedState, receive_state
from .mismatch import raise_on_all_ranks
from .optimizer_mismatch import (
    ParameterState,
    has_dimensions,
    keys_with_dimensions,
    state_mismatch,
)
from .optimizer_names import GroupMatch, ParameterNames, in_order, match_groups
from .sharded_tensors import convert_sharded_tensors


@dataclass(frozen=True)
class OptimizerLoadRequest:
    """A ``state`` by names that ``optim``, which may not be at hand, is to load.

    ``find_names`` raises ValueError where the optimizer's parameters are not the model's.
    ``from_first_rank``: the state of the mesh's first rank counts, and is sent to all; else every
    rank has its own. ``keyed_by_name``: the optimizer keys its state by names itself, not by
    numbers. ``needs_groups``: a state without ``param_groups`` can't be loaded where it goes."""

    state: Any
    mesh: DeviceMesh
    find_names: Callable[[], ParameterNames]
    optim: torch.optim.Optimizer | None
    from_first_rank: bool = False
    keyed_by_name: bool = False
    needs_groups: bool = False


class StateEntry(NamedTuple):
    """``target``: None for what somebody keeps in ``optim.state`` under a key of their own."""

    value: Any
    target: ParameterState | None


@dataclass(frozen=True)
class OptimizerLoadPlan:
    """A state that fits on all ranks, under the keys that the optimizer has. ``param_groups``: None
    if the state has none. ``sender``: has the tensors that are not here yet, if any."""

    entries: dict[Any, StateEntry]
    param_groups: list[dict[str, Any]] | None
    sender: FirstRank | None


class _GivenState(NamedTuple):
    """The state as far as it has the form of one, and what is wrong with it."""

    state: dict[Any, Any]
    param_groups: Sequence[dict[str, Any]] | None
    problems: list[str]

    @property
    def named_in_groups(self) -> set[Any]:
        return {name for group in self.param_groups or () for name in group["params"]}


def plan_optimizer_load(request: OptimizerLoadRequest) -> OptimizerLoadPlan:
    """Checks everything. ValueError on all ranks of the mesh, which lists what does not fit, or on
    none. Collective over the mesh."""
    received = _received(request)
    names = _names_on_all_ranks(request)
    saved = _as_given_state(received)
    if not request.from_first_rank:
        converted = convert_sharded_tensors(saved.state, names, request.mesh)
        saved = saved._replace(state=converted)
    groups = _check_groups(request, names, saved)
    targets = _targets(request.optim, names, saved.state)
    mismatches = _mismatches(request.optim, saved, targets)
    _refuse(request.mesh, [*saved.problems, *groups.problems, *mismatches])
    entries = {
        _key(request, names, name): StateEntry(value, targets.get(name))
        for name, value in saved.state.items()
    }
    param_groups = _ordered_groups(request, names, saved, groups.order)
    return OptimizerLoadPlan(entries, param_groups, received.sender)


def _received(request: OptimizerLoadRequest) -> ReceivedState:
    if request.from_first_rank:
        return receive_state(request.state, request.mesh)
    return ReceivedState(request.state, problem="", sender=None)


def _names_on_all_ranks(request: OptimizerLoadRequest) -> ParameterNames:
    """The ranks hear of one another's problems here, before they gather ShardedTensors together."""
    names, problems = None, []
    try:
        names = request.find_names()
    except ValueError as error:
        problems.append(str(error))
    _refuse(request.mesh, problems)
    assert names is not None
    return names


def _refuse(mesh: DeviceMesh, problems: list[str]) -> None:
    raise_on_all_ranks(mesh, problems, ValueError, "the optimizer state does not fit")


def _as_given_state(received: ReceivedState) -> _GivenState:
    given = received.state
    if received.problem:
        return _GivenState({}, None, [received.problem])
    if not isinstance(given, dict) or not isinstance(given.get("state"), dict):
        problem = (
            'an optimizer state is a dict with "state" and "param_groups", not '
            f"{_describe_type(given)}"
        )
        return _GivenState({}, None, [problem])
    if "param_groups" not in given:
        return _GivenState(given["state"], None, [])
    if not _are_groups(given["param_groups"]):
        problem = (
            '"param_groups" of an optimizer state is a list of dicts, each with its parameters\' '
            'names under "params" (and as many under "param_names", if at all)'
        )
        return _GivenState(given["state"], None, [problem])
    return _GivenState(given["state"], given["param_groups"], [])


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, (list, tuple)) and all(_is_group(group) for group in groups)


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict):
        return False
    keys = group.get("params")
    if not isinstance(keys, (list, tuple)):
        return False
    names = group.get("param_names", keys)
    are_keys = all(isinstance(key, (str, int)) for key in keys)
    return are_keys and isinstance(names, (list, tuple)) and len(names) == len(keys)


def _describe_type(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with {sorted(map(str, value))}"
    return f"a {type(value).__name__}"


def _check_groups(
    request: OptimizerLoadRequest, names: ParameterNames, saved: _GivenState
) -> GroupMatch:
    if saved.problems:
        return GroupMatch([], [])
    if saved.param_groups is None:
        lack = 'the optimizer state has no "param_groups"'
        return GroupMatch([], [lack] if request.needs_groups else [])
    match = match_groups(names, saved.param_groups)
    if request.optim is None or match.problems:
        return match
    return GroupMatch(match.order, _lacking_options(request.optim, saved.param_groups))


def is_torchs(optim: torch.optim.Optimizer | None) -> bool:
    """Whether it is one of torch's own, whose state is known, or Muon of this package, whose state
    is torch's."""
    own = ("torch.optim", "torch_hsdp_ckpt.optim")
    return optim is not None and type(optim).__module__.startswith(own)


def _lacking_options(optim: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> list[str]:
    """What a step of the optimizer would look for in its groups and not find, after
    ``load_state_dict`` has filled in what states of older torch versions lack."""
    if not is_torchs(optim):
        return []
    shadow = object.__new__(type(optim))
    shadow.__dict__.update(optim.__dict__)
    without_parameters = [{**group, "params": []} for group in groups]
    shadow.__setstate__({"state": {}, "param_groups": without_parameters})
    needed = _options_of_all(optim.param_groups, optim.defaults)
    given = _options_of_all(shadow.param_groups, optim.defaults)
    return [
        f'a parameter group of the state has no "{option}", the optimizer has'
        for option in sorted(needed - given)
    ]


def _options_of_all(groups: Sequence[dict[str, Any]], options: Iterable[str]) -> set[str]:
    return {option for option in options if all(option in group for group in groups)}


def _targets(
    optim: torch.optim.Optimizer | None, names: ParameterNames, state: Mapping[Any, Any]
) -> dict[Any, ParameterState]:
    """The parameters that states are of, by the name in ``state``. What belongs to no parameter is
    not among them."""
    elements = sum(parameter.numel() for parameter in names.parameters)
    like_parameters = keys_with_dimensions(state.values())
    may_convert = is_torchs(optim)
    targets = {}
    for name in state:
        index = names.index.get(name)
        if index is None:
            continue
        parameter = names.parameters[index]
        converts = may_convert and parameter.is_floating_point()
        targets[name] = ParameterState(
            parameter=parameter,
            current={} if optim is None else optim.state.get(parameter, {}),
            elements=elements,
            like_parameters=like_parameters,
            converted_to=parameter.dtype if converts else None,
        )
    return targets


def _mismatches(
    optim: torch.optim.Optimizer | None, saved: _GivenState, targets: Mapping[Any, ParameterState]
) -> list[str]:
    problems: list[str] = []
    named_in_groups = saved.named_in_groups  # match_groups has complained of unknown ones
    for name, value in saved.state.items():
        if name in targets:
            problems += _parameter_mismatches(name, value, targets[name])
        elif isinstance(value, dict) and name not in named_in_groups:
            if optim is None or name not in optim.state:
                problems.append(f'the optimizer has no parameter "{name}", the state has')
    return problems


def _parameter_mismatches(name: Any, value: Any, target: ParameterState) -> list[str]:
    if not isinstance(value, dict):
        return [f"the state of {name} is {_describe_type(value)}, not a dict"]
    problems = [
        f'the state of {name} has no "{key}", the optimizer has'
        for key in _lacking_keys(value, target)
    ]
    for key, item in value.items():
        mismatch = state_mismatch(f"{name}: {key}", key, item, target)
        if mismatch is not None:
            problems.append(mismatch)
    return problems


def _lacking_keys(value: dict[Any, Any], target: ParameterState) -> list[Any]:
    """The optimizer's tensors of the parameter's shape that are not in ``value``; none if that is
    empty, as it is for a parameter without gradients."""
    if not value:
        return []
    shape = target.parameter.shape
    return [
        key
        for key, item in target.current.items()
        if key not in value and has_dimensions(item) and item.shape == shape
    ]


def _key(request: OptimizerLoadRequest, names: ParameterNames, name: Any) -> Any:
    """Under which key the optimizer has what the state has under ``name``."""
    return name if request.keyed_by_name else names.index.get(name, name)


def _ordered_groups(
    request: OptimizerLoadRequest, names: ParameterNames, saved: _GivenState, order: list[int]
) -> list[dict[str, Any]] | None:
    if saved.param_groups is None:
        return None
    groups = []
    for i, group_names in zip(order, names.groups, strict=True):
        group = in_order(saved.param_groups[i], group_names, names.index)
        group["params"] = [_key(request, names, name) for name in group_names]
        groups.append(group)
    return groups
