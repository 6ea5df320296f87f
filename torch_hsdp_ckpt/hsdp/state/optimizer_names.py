"""Which name an optimizer's parameter has in the model, and which of its groups is which of a saved
state's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        return [name for group in self.groups for name in group]


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
    parameters = [parameter for group in groups for parameter in group]
    names_by_id = _names_by_id(model)
    strangers = sum(id(parameter) not in names_by_id for parameter in parameters)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's parameters are not the model's: make the optimizer "
            "after wrapping, from model.parameters()"
        )
    index: dict[str, int] = {}
    for i, parameter in enumerate(parameters):
        for name in names_by_id[id(parameter)]:
            index[name] = i
    first_names = [[names_by_id[id(parameter)][0] for parameter in group] for group in groups]
    return ParameterNames(parameters, first_names, index)


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
    given = [name for group in saved for name in group["params"]]
    unknown = sorted({str(name) for name in given if name not in names.index})
    problems += [f'the optimizer has no parameter "{name}", the state has' for name in unknown]
    found = {names.index[name] for name in given if name in names.index}
    lacking = [name for i, name in enumerate(names.flat) if i not in found]
    problems += [f'the state has no parameter "{name}", the optimizer has' for name in lacking]
    return problems


def _members(names: ParameterNames, group_names: Iterable[Any]) -> frozenset[int]:
    return frozenset(names.index[name] for name in group_names)
