"""Where parameters are registered in modules, and how a unit exchanges them there."""

import operator
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from .module_tree import is_wrapped


class Slot(NamedTuple):
    """One place where a parameter is registered."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module._parameters[self.name])

    @property
    def is_plain(self) -> bool:
        """Whether the module's table of parameters may be written past ``__setattr__``. Modules
        with one of their own (nn.RNN keeps a list of its weights) have to hear of a change."""
        return type(self.module).__setattr__ is nn.Module.__setattr__

    def put(self, parameter: nn.Parameter) -> None:
        if self.is_plain:
            self.module._parameters[self.name] = parameter
        else:
            setattr(self.module, self.name, parameter)


class RegisteredParameter(NamedTuple):
    """A parameter by its slots: several, where modules share it. ``name``: the first slot's, seen
    from the wrapped module."""

    name: str
    slots: list[Slot]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the first slot holds now."""
        return self.slots[0].parameter


def parameters_of_unit(
    modules: list[nn.Module], ignored: set[nn.Parameter]
) -> list[RegisteredParameter]:
    """The parameters that no wrapped module inside holds, in the order of ``modules``, each once
    with all its slots."""
    found: dict[int, RegisteredParameter] = {}
    seen: set[nn.Module] = set()

    def visit(owner: nn.Module, prefix: str) -> None:
        if owner in seen or is_wrapped(owner):
            return
        seen.add(owner)
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter not in ignored:
                registered = RegisteredParameter(prefix + name, [])
                found.setdefault(id(parameter), registered).slots.append(Slot(owner, name))
        for name, child in owner._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    for module in modules:
        visit(module, "")
    return list(found.values())


class SlotTable:
    """A parameter for every slot of a unit, at hand to be put there: that happens twice a step.

    ``parameters``: one for each of ``slots``, which lists each parameter's places."""

    def __init__(self, slots: Sequence[list[Slot]], parameters: Sequence[nn.Parameter]) -> None:
        self._plain: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        self._observed: list[tuple[Slot, nn.Parameter]] = []
        for places, parameter in zip(slots, parameters, strict=True):
            for slot in places:
                if slot.is_plain:
                    self._plain.append((slot.module._parameters, slot.name, parameter))
                else:
                    self._observed.append((slot, parameter))
        self._plain_parameters = [parameter for _, _, parameter in self._plain]

    def fill_slots(self) -> None:
        """Puts every parameter into its slots."""
        for table, name, parameter in self._plain:
            table[name] = parameter
        for slot, parameter in self._observed:
            slot.put(parameter)

    def replaced_parameter(self) -> nn.Parameter | None:
        """The first parameter whose slot somebody has filled with another one, or emptied; None if
        there is none. Slots of modules with a ``__setattr__`` of their own are not looked at."""
        found = [table.get(name) for table, name, _ in self._plain]
        if all(map(operator.is_, found, self._plain_parameters)):
            return None
        pairs = zip(found, self._plain_parameters, strict=True)
        return next(expected for held, expected in pairs if held is not expected)
