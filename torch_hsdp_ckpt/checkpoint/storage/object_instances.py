"""Instances of users' classes, made without any code of these: no ``__new__``, ``__init__``,
``__setstate__`` or property runs. A class is used only if it is allowed (see
``object_classes.py``); what it can't be made of in this way is refused by name."""

import collections
import dataclasses
import enum
from types import MemberDescriptorType
from typing import Any

import torch

from ...errors import CheckpointError
from .object_table import (
    Arguments,
    Bounds,
    MalformedError,
    are,
    dict_of,
    expect,
    is_a,
    name_of,
    show,
)
from .tensor_kinds import set_attributes

# What classes derive from, the most special ones first; `object` takes no arguments.
_CONTAINERS = (
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    dict,
    list,
    set,
)
_VALUES = (str, bytes, int, float, complex, frozenset)
_FLAG_BITS = 64
# States that are no more than attributes, whatever the class says of itself.
_PLAIN_SETTERS = (
    torch.nn.Module.__setstate__,
    torch.Tensor.__setstate__,
    getattr(dataclasses, "_dataclass_setstate", None),
)


def _refused(cls: type, reason: str) -> CheckpointError:
    return CheckpointError(f"{name_of(cls)} {reason}")


def new_instance(bounds: Bounds, cls: type, arguments: Arguments) -> Any:
    """What ``cls.__new__(cls, *arguments)`` would have made, if that is no more than its built-in
    base's. Raises CheckpointError for other classes."""
    if issubclass(cls, (enum.Enum, torch.Tensor)):
        raise _refused(cls, "is not made by NEWOBJ")
    if issubclass(cls, tuple):
        return _new_tuple(bounds, cls, arguments)
    value: Any = next((each for each in _VALUES if issubclass(cls, each)), None)
    if value is not None:
        expect(len(arguments) < 2 and are(arguments, value), cls, arguments)
        return value.__new__(cls, *arguments)
    expect(not arguments, cls, arguments)
    base: Any = next((each for each in _CONTAINERS if issubclass(cls, each)), object)
    try:
        return base.__new__(cls)
    except TypeError as error:
        raise _refused(cls, f"can't be made without running it: {error}") from error


def _new_tuple(bounds: Bounds, cls: type, arguments: Arguments) -> Any:
    """A named tuple's arguments are its fields, any other's are one tuple."""
    fields = getattr(cls, "_fields", None)
    items = arguments
    if fields is None:
        expect(len(arguments) < 2 and are(arguments, tuple), cls, arguments)
        items = arguments[0] if arguments else ()
    else:  # fields that are new since the save have defaults
        defaults = getattr(cls, "_field_defaults", {})
        new = fields[len(arguments) :]
        if all(name in defaults for name in new):
            items = arguments + tuple(defaults[name] for name in new)
    if fields is not None and len(fields) != len(items):
        raise _refused(cls, f"has {len(fields)} fields, the checkpoint's has {len(arguments)}")
    bounds.spend(len(items))
    return tuple.__new__(cls, items)  # type: ignore[type-var]


def called_instance(bounds: Bounds, cls: type, arguments: Arguments) -> Any:
    """What ``cls(*arguments)`` has to be: an enum's member, a container's subclass. Raises
    CheckpointError for other classes, which are made by code of their own."""
    if issubclass(cls, enum.Enum):
        expect(len(arguments) == 1, cls, arguments)
        return _enum_member(cls, arguments[0])
    if issubclass(cls, collections.defaultdict) and len(arguments) == 1:
        expect(arguments[0] is None or is_a(arguments[0], type), cls, arguments)
        made: Any = collections.defaultdict.__new__(cls)
        made.default_factory = arguments[0]
        return made
    if issubclass(cls, collections.Counter) and len(arguments) == 1 and are(arguments, dict):
        counter = dict.__new__(cls)
        bounds.spend(len(arguments[0]))
        dict.update(counter, arguments[0])
        return counter
    if issubclass(cls, (set, frozenset)) and len(arguments) == 1 and are(arguments, list):
        return _called_set(bounds, cls, arguments[0])
    if issubclass(cls, collections.deque) and len(arguments) < 3 and are(arguments[:1], tuple):
        expect(are(arguments[1:], int, type(None)), cls, arguments)
        deque = collections.deque.__new__(cls)
        collections.deque.__init__(deque, *arguments)
        return deque
    if issubclass(cls, _CONTAINERS) and not arguments:
        return new_instance(bounds, cls, arguments)
    raise _refused(cls, "is made by a call, which is not run")


def _called_set(bounds: Bounds, cls: type, items: list[Any]) -> Any:
    bounds.spend(len(items))
    made: set[Any] = set()
    for item in items:
        bounds.check_key(made, item)
        made.add(item)
    base = set if issubclass(cls, set) else frozenset
    if base is frozenset:
        return frozenset.__new__(cls, made)
    instance: set[Any] = set.__new__(cls)
    set.update(instance, made)
    return instance


def _enum_member(cls: type[enum.Enum], value: Any) -> enum.Enum:
    """By the enum's own map of values; the members of flags may be united."""
    for member in cls._member_map_.values():
        if type(member._value_) is type(value) and _equal(member._value_, value):
            return member
    if issubclass(cls, enum.Flag) and type(value) is int and _unites_as_flags(cls, value):
        made: enum.Enum = enum.EnumMeta.__call__(cls, value)
        return made
    raise _refused(cls, f"has no member of the value {show(value)}")


def _unites_as_flags(cls: type[enum.Flag], value: int) -> bool:
    """Whether only Python's own code would look at it, and not for longer than the members say."""
    own = cls._missing_.__func__  # type: ignore[attr-defined]
    # Before Python 3.11 an IntFlag has its own.
    stock = [each._missing_.__func__ for each in (enum.Flag, enum.IntFlag)]  # type: ignore[attr-defined]
    bits = [member._value_.bit_length() for member in cls._member_map_.values()]
    return own in stock and value.bit_length() <= max(_FLAG_BITS, *bits, 0)


def _equal(member_value: Any, value: Any) -> bool:
    """Compared by built-in code alone, whose time the value's own bytes explain."""
    if is_a(value, tuple):
        items, others = list(tuple.__iter__(member_value)), list(tuple.__iter__(value))
        pairs = zip(items, others, strict=False)
        same = len(items) == len(others)
        return same and all(type(a) is type(b) and _equal(a, b) for a, b in pairs)
    plain = (bool, bytes, complex, float, int, str, type(None))
    return bool(member_value == value) if type(value) in plain else member_value is value


def set_instance_state(bounds: Bounds, made: Any, state: Any) -> None:
    """Attributes into ``__dict__``, others into the slots that the class has for them."""
    cls = type(made)
    setter = getattr(cls, "__setstate__", None)
    if setter is not None and setter not in _PLAIN_SETTERS:
        raise _refused(cls, "sets its state by a __setstate__ of its own, which is not run")
    if is_a(made, torch.Tensor):
        return set_attributes(bounds, made, (state,))
    attributes, slots = _parts_of_state(cls, state)
    for part in (attributes, slots):
        if not (type(part) is dict and are(part, str)):
            raise MalformedError(f"sets the state of {name_of(cls)} to a {type(part).__name__}")
        bounds.spend(len(part))
    _set_attributes(made, attributes)
    for name, value in slots.items():
        _set_slot(made, name, value)
    return None


def _parts_of_state(cls: type, state: Any) -> tuple[Any, Any]:
    """Attributes and slots."""
    if type(state) is list and dataclasses.is_dataclass(cls):  # a frozen one's, all in slots
        names = [field.name for field in dataclasses.fields(cls)]
        if len(names) != len(state):
            raise _refused(cls, f"has {len(names)} fields, the checkpoint's has {len(state)}")
        return {}, dict(zip(names, state, strict=True))
    attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    return ({} if attributes is None else attributes), ({} if slots is None else slots)


def _set_attributes(made: Any, attributes: dict[str, Any]) -> None:
    if not attributes:
        return
    dictionary = dict_of(made)
    if dictionary is None:
        raise MalformedError(f"sets attributes of {name_of(type(made))}, which has none")
    dictionary.update(attributes)


def _set_slot(made: Any, name: str, value: Any) -> None:
    for cls in type(made).__mro__:
        slot = vars(cls).get(name)
        if isinstance(slot, MemberDescriptorType):
            return slot.__set__(made, value)
    raise MalformedError(f"sets {name} of {name_of(type(made))}, which has no such slot")
