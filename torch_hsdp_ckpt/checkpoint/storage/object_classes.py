"""Which classes of users' an object may be made of: those that are in the place where it goes, and
those that somebody has allowed. No module is imported for one."""

import collections
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from .object_table import attributes_of

_LOOKED_AT = 10_000  # values of one target
_LEAVES = (str, bytes, bytearray, int, float, complex, type(None), torch.Tensor)
# Objects of these start process groups, or are parts of something that other ranks hold too.
_NEVER = ("torch.distributed",)


class Classes(Protocol):
    """Finds the class of a module's name, as "Outer.Inner", or says None."""

    def find(self, module: str, name: str) -> type | None: ...
    def has_inner(self, module: str, name: str) -> bool:
        """Whether it finds classes within the one of that name."""
        ...


def has_finalizer(cls: type) -> bool:
    """Whether instances run code of their class when they are let go of."""
    return any("__del__" in vars(base) for base in cls.__mro__)


def may_be_allowed(cls: type) -> bool:
    return not cls.__module__.startswith(_NEVER)


@dataclasses.dataclass(frozen=True)
class AllowedClasses:
    """By module and name."""

    classes: dict[tuple[str, str], type]

    @staticmethod
    def of(classes: Iterable[type]) -> "AllowedClasses":
        """Those, and what ``torch.serialization.add_safe_globals`` has been given, but for torch's
        own distributed classes, which it allows by itself."""
        given = {(cls.__module__, cls.__qualname__): cls for cls in classes}
        for entry in torch.serialization.get_safe_globals():
            cls, name = entry if isinstance(entry, tuple) else (entry, "")
            if isinstance(cls, type):
                module, _, attribute = name.rpartition(".")
                key = (module, attribute) if name else (cls.__module__, cls.__qualname__)
                given[key] = cls
        return AllowedClasses({key: cls for key, cls in given.items() if may_be_allowed(cls)})

    def find(self, module: str, name: str) -> type | None:
        return self.classes.get((module, name))

    def has_inner(self, module: str, name: str) -> bool:
        keys = self.classes.keys()
        return any(owner == module and inner.startswith(f"{name}.") for owner, inner in keys)

    def with_those_in(self, target: Any) -> "AllowedClasses":
        """These, and the classes of what ``target`` holds."""
        if isinstance(target, _LEAVES) and type(target) in _LEAVES:
            return self
        found = {(cls.__module__, cls.__qualname__): cls for cls in _classes_in(target)}
        return AllowedClasses({**found, **self.classes}) if found else self


@dataclasses.dataclass(frozen=True)
class ClassesOfTensors:
    """For a tensor's record, of which only the numbers are taken: a class that is not allowed is
    left out, the tensor is a plain one."""

    allowed: AllowedClasses

    def find(self, module: str, name: str) -> type | None:
        found = self.allowed.find(module, name)
        return torch.Tensor if found is None or has_finalizer(found) else found

    def has_inner(self, module: str, name: str) -> bool:
        return self.allowed.has_inner(module, name)


class ImportedClasses:
    """All classes of the modules that are there: for what this process has itself just written."""

    def __init__(self) -> None:
        self.found: set[type] = set()

    def find(self, module: str, name: str) -> type | None:
        value: Any = sys.modules.get(module)
        for part in name.split("."):
            value = getattr(value, part, None)
        if not isinstance(value, type) or not may_be_allowed(value):
            return None
        self.found.add(value)
        return value

    def has_inner(self, module: str, name: str) -> bool:
        return False  # the outer class is found itself


def _classes_in(target: Any) -> set[type]:
    classes: set[type] = set()
    pending, seen = collections.deque([target]), {id(target)}
    while pending and len(seen) < _LOOKED_AT:
        value = pending.popleft()
        if isinstance(value, type):
            classes.add(value)
            continue
        classes.add(type(value))
        for each in _parts_of(value):
            if id(each) not in seen and type(each) not in _LEAVES:
                seen.add(id(each))
                pending.append(each)
    return {cls for cls in classes if cls.__module__ != "builtins" and may_be_allowed(cls)}


def _parts_of(value: Any) -> list[Any]:
    parts: list[Any] = []
    if isinstance(value, dict):
        parts += [*dict.keys(value), *dict.values(value)]
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        parts += list(value)
    if isinstance(value, collections.defaultdict):
        parts.append(value.default_factory)
    return parts + list(attributes_of(value).values())
