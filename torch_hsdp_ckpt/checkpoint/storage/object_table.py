"""The list of harmless kinds: the names that an object's pickle may use, and what is made of them.

A name stands for a class, for a constant, or for a :class:`Function`, which is a token: nothing
that a pickle names is ever called. What a call of it makes is decided by a rule of ours, which is
looked up by the class or token and checks what it is given. ``object_kinds.py`` has the rules of
Python's own kinds, ``numpy_kinds.py`` and ``tensor_kinds.py`` those of NumPy's and torch's."""

import collections
import contextlib
import dataclasses
import decimal
import enum
import types
from collections.abc import Callable
from typing import Any

import torch

from ...errors import CheckpointError


class MalformedError(ValueError):
    """A pickle does what no ``torch.save`` writes. The message goes on from "its pickle"."""


@dataclasses.dataclass(frozen=True)
class Function:
    """Stands for a function or a class that only rules know; does nothing itself."""

    name: str

    def __str__(self) -> str:
        return self.name


_DEPTH = 1000
_COLLISIONS = 100  # keys of one hash in one container; nothing that is no attack has ten
_EXACT_HASHES = 1 << 60  # ints below it have hashes of their own
_DIMENSIONS = 64  # NumPy's and torch's most
_SIZES = 1 << 62
_SHOWN = 80  # characters of a value in a message
_SHOWN_TYPES = 10  # of arguments


class Bounds:
    """What a pickle may still make beyond what it holds: ``items``, in bytes and items; and
    ``hashed``, the values that are looked at when its keys are hashed, which unfolds what the
    pickle has once and names often.

    ``is_instance``: whether a value is an instance of a user's class, whose hash may be that of its
    attributes. ``weight``: how many steps a value's own hash takes."""

    def __init__(
        self, limit: int, is_instance: Callable[[Any], bool], weight: Callable[[Any], int]
    ) -> None:
        self.items = limit
        self.hashed = 2 * limit
        # By id: values that may not be used until a BUILD has given them a state.
        self.unset: dict[int, Any] = {}
        self._is_instance, self._weight = is_instance, weight
        # By container: it is kept, so that no other one gets its id.
        self._hashes: dict[int, tuple[Any, collections.Counter[int]]] = {}

    def spend(self, size: int) -> None:
        """MalformedError if that is more than is left."""
        if size > self.items:
            raise MalformedError("makes more than its own size explains")
        self.items -= size

    def check_all_set(self) -> None:
        if self.unset:
            raise MalformedError("makes what it does not give a state")

    def check_key(self, container: Any, key: Any) -> None:
        """MalformedError for a key whose hash takes more time than its bytes explain, or nests
        deeper than the interpreter's stack takes, or is that of too many keys of the container;
        CheckpointError for one whose class would run to hash or compare it."""
        if type(key) is str or (type(key) is int and abs(key) < _EXACT_HASHES):
            return
        self._charge(key)
        if id(container) not in self._hashes:
            self._hashes[id(container)] = container, collections.Counter()
        counts = self._hashes[id(container)][1]
        hashed = hash(key)
        counts[hashed] += 1
        if counts[hashed] > _COLLISIONS:
            raise MalformedError("makes keys that all have one hash")

    def _charge(self, key: Any) -> None:
        pending = [(key, 1)]
        while pending:
            value, depth = pending.pop()
            if id(value) in self.unset:
                self.check_all_set()
            self.hashed -= self._weight(value)
            if self.hashed < 0 or depth > _DEPTH:
                raise MalformedError("makes keys that unfold to more than its own size explains")
            parts = _items_of(value)
            if self._is_instance(value):
                _expect_plain_hash(type(value))
                parts += attributes_of(value).values()
            pending += [(part, depth + 1) for part in parts]


def _items_of(value: Any) -> list[Any]:
    """What is in a tuple or a frozenset, without any code of its class."""
    if is_a(value, tuple):
        return list(tuple.__iter__(value))
    return list(frozenset.__iter__(value)) if is_a(value, frozenset) else []


def _expect_plain_hash(cls: type) -> None:
    for name in ("__hash__", "__eq__"):
        method = getattr(cls, name)
        is_built_in = isinstance(method, types.WrapperDescriptorType)
        if not (is_built_in or method is enum.Enum.__hash__ or _is_dataclass_method(cls, method)):
            raise CheckpointError(
                f"{name_of(cls)} has a {name} of its own, which is not run, and is a key"
            )


def _is_dataclass_method(cls: type, method: Any) -> bool:
    """Whether the dataclass decorator has made it: no source file has it."""
    code = getattr(method, "__code__", None)
    return dataclasses.is_dataclass(cls) and code is not None and code.co_filename == "<string>"


def attributes_of(value: Any) -> dict[str, Any]:
    """An instance's attributes and filled slots, without any code of its class."""
    found: dict[str, Any] = {}
    for cls in type(value).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    found[name] = member.__get__(value, type(value))
    return {**found, **(dict_of(value) or {})}


def dict_of(value: Any) -> dict[str, Any] | None:
    """An instance's ``__dict__``, though its class may have a property of that name; None if it has
    none."""
    kinds = (types.GetSetDescriptorType, types.MemberDescriptorType)
    for cls in type(value).__mro__:
        member = vars(cls).get("__dict__")
        if isinstance(member, kinds):
            attributes: dict[str, Any] = member.__get__(value, type(value))
            return attributes
    return None


Arguments = tuple[Any, ...]
Rule = Callable[[Bounds, Arguments], Any]
Weight = Callable[[Any], int]
StateRule = Callable[[Bounds, Any, Any], None]


class Table:
    """``names``: what each name stands for. ``calls``: what a REDUCE of it makes, ``news`` a
    NEWOBJ, ``states`` what a BUILD does to an object of a class. ``weights``: how many steps a hash
    of a value of a class takes, where it is not one."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.calls: dict[Any, Rule] = {}
        self.news: dict[Any, Rule] = {}
        self.states: dict[type, StateRule] = {}
        self.weights: dict[type, Weight] = {
            int: lambda value: 1 + value.bit_length() // 64,
            decimal.Decimal: lambda value: 1 + value.__sizeof__() // 64,
        }

    def add_class(self, cls: type, *other_names: str) -> None:
        for name in (f"{cls.__module__}.{cls.__qualname__}", *other_names):
            self.names[name] = cls

    def add_function(self, *names: str) -> Function:
        token = Function(names[0])
        for name in names:
            self.names[name] = token
        return token

    def on_call(self, *targets: Any) -> Callable[[Rule], Rule]:
        """The decorated rule makes what calls of these classes and tokens give."""

        def register(rule: Rule) -> Rule:
            for target in targets:
                self.calls[target] = rule
            return rule

        return register

    def on_state(self, *classes: type) -> Callable[[StateRule], StateRule]:
        def register(rule: StateRule) -> StateRule:
            for cls in classes:
                self.states[cls] = rule
            return rule

        return register


def name_of(target: Any) -> str:
    """How messages call a class or a token."""
    if is_a(target, type):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target) if type(target) in (Function, str) else f"a {type(target).__name__}"


def show(value: Any) -> str:
    """How messages write a value: others than short ones would unfold in them, or run."""
    if type(value) is str:
        return repr(value[:_SHOWN])
    is_short = type(value) in (bool, type(None)) or (
        type(value) is int and value.bit_length() < _SHOWN
    )
    return repr(value) if is_short else name_of(type(value))


def expect(holds: bool, target: Any, arguments: Arguments) -> None:
    """MalformedError about a call of ``target`` with these arguments unless ``holds``."""
    if not holds:
        kinds = ", ".join(type(each).__name__ for each in arguments[:_SHOWN_TYPES])
        raise MalformedError(
            f"calls {name_of(target)} with ({kinds}), as nothing that is saved does"
        )


def are(values: Any, *types: type) -> bool:
    """Whether all values are of exactly these types; subclasses have code of their own."""
    return all(type(value) in types for value in values)


def is_a(value: Any, *types: type) -> bool:
    """``isinstance`` that asks the value's type alone, and no ``__class__`` of its own."""
    return issubclass(type(value), types)


def are_sizes(values: Any) -> bool:
    """Whether that is a shape or the like, whose product is small enough to be computed."""
    fits = type(values) in (tuple, torch.Size) and len(values) <= _DIMENSIONS
    return fits and are(values, int) and all(0 <= value < _SIZES for value in values)
