"""Where parameters are registered in modules, and how a unit exchanges them there."""

import weakref
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple, cast

from torch import nn

from .. import _C
from .module_tree import is_managed


class Slot:
    """One place where a parameter is registered. It does not keep the module: that has, through its
    runner, the unit and all its slots, and a model should be gone with its last reference."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.table = module._parameters
        self._module = weakref.ref(module)
        # Whether the table may be written past ``__setattr__``. Modules with one of their own
        # (nn.RNN keeps a list of its weights) have to hear of a change.
        self.is_plain = type(module).__setattr__ is nn.Module.__setattr__

    @property
    def module(self) -> nn.Module:
        """Where the slot is; only for those who hold the model."""
        return cast(nn.Module, self._module())

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, self.table[self.name])

    def put(self, parameter: nn.Parameter) -> None:
        module = None if self.is_plain else self._module()
        if module is None:  # or it is gone
            self.table[self.name] = parameter
        else:
            setattr(module, self.name, parameter)


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
    modules: Iterable[nn.Module], ignored: Set[nn.Parameter]
) -> list[RegisteredParameter]:
    """The parameters that no managed module inside holds, in the order of ``modules``, each once
    with all its slots."""
    found: dict[int, RegisteredParameter] = {}
    seen: set[nn.Module] = set()
    for module in modules:
        for name, slot in _named_slots(module, "", seen):
            if slot.parameter not in ignored:
                key = id(slot.parameter)
                found.setdefault(key, RegisteredParameter(name, [])).slots.append(slot)
    return list(found.values())


def _named_slots(
    module: nn.Module, prefix: str, seen: set[nn.Module]
) -> Iterator[tuple[str, Slot]]:
    """The slots of ``module`` and of all inside, down to managed modules and those ``seen``."""
    if module in seen or is_managed(module):
        return
    seen.add(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, Slot(module, name)
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_slots(child, f"{prefix}{name}.", seen)


class _PlainEntry(NamedTuple):
    """A parameter for a plain slot, whose module keeps it in ``table``."""

    table: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter


class SlotTable:
    """A parameter for every slot of a unit, at hand to be put there: that happens twice a step.

    ``parameters``: one for each of ``slots``, which lists each parameter's places."""

    def __init__(self, slots: Sequence[list[Slot]], parameters: Sequence[nn.Parameter]) -> None:
        self._plain: list[_PlainEntry] = []
        self._observed: list[tuple[Slot, nn.Parameter]] = []
        for places, parameter in zip(slots, parameters, strict=True):
            for slot in places:
                self._add(slot, parameter)

    def _add(self, slot: Slot, parameter: nn.Parameter) -> None:
        if slot.is_plain:
            self._plain.append(_PlainEntry(slot.table, slot.name, parameter))
        else:
            self._observed.append((slot, parameter))

    def fill_slots(self) -> None:
        """Puts every parameter into its slots."""
        _C.fill_slots(self._plain)
        for slot, parameter in self._observed:
            slot.put(parameter)

    def replaced_parameter(self) -> nn.Parameter | None:
        """The first parameter whose slot somebody has filled with another one, or emptied; None if
        there is none. Slots of modules with a ``__setattr__`` of their own are not looked at."""
        index = _C.first_replaced(self._plain)
        return None if index is None else self._plain[index].parameter
