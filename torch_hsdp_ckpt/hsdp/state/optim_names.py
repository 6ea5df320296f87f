"""Which name an optimizer's parameter has in the model, and which of its groups is which of a saved
state's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .module_load import INNER

PREFIX = INNER + "."

OptimInput = list[dict[str, Any]] | Iterable[nn.Parameter] | None


@dataclass(frozen=True)
class Names:
    """The optimizer's parameters in its order. ``groups``: their names by group. ``index``: of
    every name, also of the other names of a shared parameter."""

    parameters: list[torch.Tensor]
    groups: list[list[str]]
    index: dict[str, int]

    @property
    def flat(self) -> list[str]:
        return [name for group in self.groups for name in group]


def names_of(
    model: nn.Module, optim: torch.optim.Optimizer | None, optim_input: OptimInput = None
) -> Names:
    """``optim_input``: what the optimizer was made from, for where it is not at hand; None means
    ``model.parameters()``.

    ValueError if a parameter is not the model's: after wrapping these are others.
    """
    groups = _groups(model, optim, optim_input)
    flat = [p for group in groups for p in group]
    first: dict[int, str] = {}
    aliases: dict[int, list[str]] = {}
    for long_name, parameter in model.named_parameters(remove_duplicate=False):
        name = long_name.replace(PREFIX, "")
        first.setdefault(id(parameter), name)
        aliases.setdefault(id(parameter), []).append(name)
    strangers = sum(id(p) not in first for p in flat)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's parameters are not the model's: make the optimizer "
            "after wrapping, from "
            "model.parameters()"
        )
    index = {alias: i for i, p in enumerate(flat) for alias in aliases[id(p)]}
    return Names(flat, [[first[id(p)] for p in group] for group in groups], index)


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
        return [
            [group["params"]]
            if isinstance(group["params"], torch.Tensor)
            else list(group["params"])
            for group in items
        ]
    raise TypeError(
        "optim_input is an iterable of parameters, or of dicts with 'params', as the optimizer "
        "takes it"
    )


def in_order(
    group: dict[str, Any], index: Mapping[Any, Any], own: Sequence[Any], by_key: bool = False
) -> dict[str, Any]:
    """``group`` of a saved state with its parameters in the order of ``own``, and with them the
    names that the optimizer was given (``param_names``). ``index``: of the keys in both, what
    stands for them from now on, unless ``by_key``."""
    out = {**group, "params": list(own) if by_key else [index[key] for key in own]}
    if "param_names" in group:
        given = dict(
            zip((index[key] for key in group["params"]), group["param_names"], strict=True)
        )
        out["param_names"] = [given[index[key]] for key in own]
    return out


def match_groups(names: Names, saved: Sequence[dict[str, Any]], problems: list[str]) -> list[int]:
    """For each of the optimizer's groups the saved one with the same parameters; ``problems`` gets
    what has no counterpart."""
    if len(saved) != len(names.groups):
        problems.append(
            f"the optimizer has {len(names.groups)} parameter groups, the state {len(saved)}"
        )
    known = set(names.index)
    unknown = sorted(
        {str(name) for group in saved for name in group["params"] if name not in known}
    )
    problems += [f'the optimizer has no parameter "{name}", the state has' for name in unknown]
    listed = {names.index[name] for group in saved for name in group["params"] if name in known}
    lacking = [name for i, name in enumerate(names.flat) if i not in listed]
    problems += [f'the state has no parameter "{name}", the optimizer has' for name in lacking]
    if problems:
        return []
    free: dict[frozenset[int], list[int]] = {}
    for i, group in enumerate(saved):
        free.setdefault(frozenset(names.index[name] for name in group["params"]), []).append(i)
    order = []
    for i, own in enumerate(names.groups):
        candidates = free.get(frozenset(names.index[name] for name in own))
        if candidates:
            order.append(candidates.pop(0))
        else:
            problems.append(
                f"no group of the state has the parameters of the optimizer's group {i}: "
                f"{', '.join(own)}"
            )
    return order
