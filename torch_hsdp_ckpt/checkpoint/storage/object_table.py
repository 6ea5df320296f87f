"""The list of harmless kinds: the names that an object's pickle may use, and what is made of them.

A name stands for a class, for a constant, or for a :class:`Function`, which is a token: nothing
that a pickle names is ever called. What a call of it makes is decided by a rule of ours, which is
looked up by the class or token and checks what it is given. ``object_kinds.py`` has the rules of
Python's own kinds, ``numpy_kinds.py`` and ``tensor_kinds.py`` those of NumPy's and torch's."""

import collections
import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any


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


class Bounds:
    """What a pickle may still make beyond what it holds: ``items``, in bytes and items; and
    ``hashed``, the values that are looked at when its keys are hashed, which unfolds what the
    pickle has once and names often.

    ``is_instance``: whether a value is an instance of a user's class, whose hash may be that of its
    attributes."""

    def __init__(self, limit: int, is_instance: Callable[[Any], bool]) -> None:
        self.items = limit
        self.hashed = 2 * limit
        self._is_instance = is_instance
        # By container: it is kept, so that no other one gets its id.
        self._hashes: dict[int, tuple[Any, collections.Counter[int]]] = {}

    def spend(self, size: int) -> None:
        """MalformedError if that is more than is left."""
        if size > self.items:
            raise MalformedError("makes more than its own size explains")
        self.items -= size

    def check_key(self, container: Any, key: Any) -> None:
        """MalformedError for a key whose hash takes more time than its bytes explain, or nests
        deeper than the interpreter's stack takes, or is that of too many keys of the container."""
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
            self.hashed -= 1 + value.bit_length() // 64 if type(value) is int else 1
            if self.hashed < 0 or depth > _DEPTH:
                raise MalformedError("makes keys that unfold to more than its own size explains")
            if isinstance(value, (tuple, frozenset)):
                pending += [(item, depth + 1) for item in tuple(value)]
            elif self._is_instance(value):
                pending += [(item, depth + 1) for item in attributes_of(value).values()]


def attributes_of(value: Any) -> dict[str, Any]:
    """An instance's attributes and filled slots, without any code of its class."""
    found: dict[str, Any] = {}
    for cls in type(value).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    found[name] = member.__get__(value, type(value))
    with contextlib.suppress(AttributeError):
        found.update(object.__getattribute__(value, "__dict__"))
    return found


Arguments = tuple[Any, ...]
Rule = Callable[[Bounds, Arguments], Any]
StateRule = Callable[[Bounds, Any, Any], None]


class Table:
    """``names``: what each name stands for. ``calls``: what a REDUCE of it makes, ``news`` a
    NEWOBJ, ``states`` what a BUILD does to an object of a class."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.calls: dict[Any, Rule] = {}
        self.news: dict[Any, Rule] = {}
        self.states: dict[type, StateRule] = {}

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
    if isinstance(target, type):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target) if isinstance(target, (Function, str)) else f"a {type(target).__name__}"


def expect(holds: bool, target: Any, arguments: Arguments) -> None:
    """MalformedError about a call of ``target`` with these arguments unless ``holds``."""
    if not holds:
        kinds = ", ".join(type(each).__name__ for each in arguments)
        raise MalformedError(
            f"calls {name_of(target)} with ({kinds}), as nothing that is saved does"
        )


def are(values: Any, *types: type) -> bool:
    """Whether all values are of exactly these types; subclasses have code of their own."""
    return all(type(value) in types for value in values)
