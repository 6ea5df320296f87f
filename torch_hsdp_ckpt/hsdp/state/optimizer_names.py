"""Which name an optimizer's parameter has in the model, and which of its groups is which of a saved
state's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..module_tree import without_wrappers

OptimInput = list[dict[str, Any]] | Iterable[nn.Parameter] | None


@dataclass(frozen=True)
class ParameterNames:
    """The optimizer's parameters in its order. ``groups``: their names by group. ``index``: of
    every name, also of the other names of a shared parameter."""

    parameters: list[torch.Tensor]
    groups: list[list[str]]
    index: dict[str, int]

    @property
    def flat(self) -> list[str]:
        """The first name of each parameter."""
        return list(chain.from_iterable(self.groups))


@dataclass(frozen=True)
class GroupMatch:
    """``order``: for each of the optimizer's groups the number of the saved one with the same
    parameters. It is empty if there are ``problems``."""

    order: list[int]
    problems: list[str]


def names_of(
    model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: OptimInput = None
) -> ParameterNames:
    """``optim_input``: what the optimizer was made from, for where it is not at hand; None means
    ``model.parameters()``.

    ValueError if a parameter is not the model's: after wrapping these are others.
    """
    groups = _groups(model, optim, optim_input)
    parameters = list(chain.from_iterable(groups))
    names_by_id = _names_by_id(model)
    strangers = sum(id(parameter) not in names_by_id for parameter in parameters)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's parameters are not the model's: make the optimizer "
            "from model.parameters()"
        )
    index: dict[str, int] = {}
    for number, parameter in enumerate(parameters):
        for name in names_by_id[id(parameter)]:
            index[name] = number
    group_names = [_first_names(group, names_by_id) for group in groups]
    return ParameterNames(parameters, group_names, index)


def _first_names(
    parameters: Iterable[torch.Tensor], names_by_id: Mapping[int, list[str]]
) -> list[str]:
    return [names_by_id[id(parameter)][0] for parameter in parameters]


def _names_by_id(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter; a shared one has several."""
    names: dict[int, list[str]] = {}
    for long_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(without_wrappers(long_name))
    return names


def _groups(
    model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: OptimInput
) -> list[list[torch.Tensor]]:
    if optim is not None and optim_input is None:
        return [list(group["params"]) for group in optim.param_groups]
    items: list[Any] = list(model.parameters() if optim_input is None else optim_input)
    if not items:
        raise ValueError(
            "optim_input is empty: pass what the optimizer was made from, or the optimizer as optim"
        )
    if all(isinstance(item, torch.Tensor) for item in items):
        return [items]
    if all(isinstance(item, dict) for item in items):
        return [_as_list(group["params"]) for group in items]
    raise TypeError(
        "optim_input is an iterable of parameters, or of dicts with 'params', as the optimizer "
        "takes it"
    )


def _as_list(params: Any) -> list[torch.Tensor]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def in_order(
    group: dict[str, Any], keys: Sequence[Any], number: Mapping[Any, Any]
) -> dict[str, Any]:
    """``group`` of a saved state with its parameters in the order of ``keys``, and with them the
    names that the optimizer was given (``param_names``). The group may have other names of the same
    parameters than ``keys``; ``number`` says which are the same."""
    ordered = {**group, "params": list(keys)}
    if "param_names" in group:
        numbers = [number[key] for key in group["params"]]
        given = dict(zip(numbers, group["param_names"], strict=True))
        ordered["param_names"] = [given[number[key]] for key in keys]
    return ordered


def match_groups(names: ParameterNames, saved: Sequence[dict[str, Any]]) -> GroupMatch:
    """Finds the saved group of each of the optimizer's groups, whatever order both have."""
    problems = _unmatched_names(names, saved)
    if problems:
        return GroupMatch([], problems)
    unused = _numbers_by_members(names, saved)
    order: list[int] = []
    for i, group_names in enumerate(names.groups):
        candidates = unused.get(_members(names, group_names))
        if candidates:
            order.append(candidates.pop(0))
        else:
            problems.append(
                f"no group of the state has the parameters of the optimizer's group {i}: "
                f"{', '.join(group_names)}"
            )
    return GroupMatch([] if problems else order, problems)


def _numbers_by_members(
    names: ParameterNames, saved: Sequence[dict[str, Any]]
) -> dict[frozenset[int], list[int]]:
    """The numbers of the saved groups that have the same parameters, in order."""
    numbers: dict[frozenset[int], list[int]] = {}
    for i, group in enumerate(saved):
        numbers.setdefault(_members(names, group["params"]), []).append(i)
    return numbers


def _unmatched_names(names: ParameterNames, saved: Sequence[dict[str, Any]]) -> list[str]:
    problems: list[str] = []
    if len(saved) != len(names.groups):
        problems.append(
            f"the optimizer has {len(names.groups)} parameter groups, the state {len(saved)}"
        )
    unknown: set[str] = set()
    found: set[int] = set()
    for name in chain.from_iterable(group["params"] for group in saved):
        if name in names.index:
            found.add(names.index[name])
        else:
            unknown.add(str(name))
    for name in sorted(unknown):
        problems.append(f'the optimizer has no parameter "{name}", the state has')
    for number, name in enumerate(names.flat):
        if number not in found:
            problems.append(f'the state has no parameter "{name}", the optimizer has')
    return problems


def _members(names: ParameterNames, group_names: Iterable[Any]) -> frozenset[int]:
    return frozenset(names.index[name] for name in group_names)
