"""What ``torch.load(weights_only=True)`` would make of a pickle, found out without making any of
it.

That unpickler runs no code, but what it may call takes memory by a number (``bytearray``,
``torch.Tensor``), copies what a few bytes recall from the memo (``set``, ``BUILD``), or hands any
of these to ``_rebuild_from_type_v2``. Here its stack machine runs on sizes alone."""

import dataclasses
import io
import math
import pickle
import pickletools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

# Without one of these a pickle can call nothing.
NAMES_A_GLOBAL = re.compile(rb"c[\w.]+\n[\w.]+\n")

_CONSTANTS = frozenset(
    ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
)
_INTEGERS = frozenset(("BININT", "BININT1", "BININT2", "LONG1"))
_BYTES = frozenset(("_codecs.encode", "builtins.bytearray"))
_LATIN1 = frozenset(("latin1", "latin-1"))  # how pickle writes bytes: a byte a character
# These go through a tensor's elements, or copy them, if they are given one.
_ITERATORS = frozenset(
    ("builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size")
)
_CLASSES = frozenset(
    f"{c.__module__}.{c.__name__}"
    for c in (*torch._tensor_classes, *torch._storage_classes, torch.Tensor)
)
_REBUILD = "torch._utils._rebuild_"
_STRIDED = frozenset(_REBUILD + name for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_COPIERS = tuple(_REBUILD + name for name in ("device", "sparse", "nested", "qtensor"))
_PARAMETERS = frozenset(_REBUILD + name for name in ("parameter", "parameter_with_state"))


@dataclasses.dataclass(slots=True, eq=False)
class _Value:
    name: str = ""  # a global's, with its module; only together they say which, as torch has it
    text: str | None = None
    number: int | None = None
    length: int = 0  # characters, bytes, items
    is_bytes: bool = False
    items: Sequence["_Value"] | None = None  # a tuple's
    elements: float | None = None  # a tensor's or a storage's


class PickleCheck:
    """Checks pickles that share storages. ``limit``: bytes and items that they may make in all,
    besides those that they hold. ``entries``: the archive's, as bytes by name; without them the
    storages' sizes that the pickles give count as well."""

    def __init__(self, limit: int, entries: Mapping[str, int] | None = None) -> None:
        self._limit, self._entries = limit, entries
        self._storages: dict[str, int] = {}

    def run(self, stream: io.BytesIO) -> None:
        """Reads one pickle. Raises UnpicklingError for an opcode that plain data does not need,
        other exceptions for a pickle that is malformed or makes more than it should."""
        stack: list[_Value] = []
        below: list[list[_Value]] = []
        memo: dict[int, _Value] = {}

        def to_mark() -> list[_Value]:
            nonlocal stack
            items, stack = stack, below.pop()
            return items

        def tuple_of(items: list[_Value]) -> None:
            stack.append(_Value(items=items, length=len(items)))

        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("BINUNICODE", "SHORT_BINSTRING"):
                stack.append(_Value(text=argument, length=len(argument)))
            elif name in _INTEGERS:
                stack.append(_Value(number=argument))
            elif name in _CONSTANTS:
                stack.append(_Value())
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name == "TUPLE":
                tuple_of(to_mark())
            elif name == "EMPTY_TUPLE":
                tuple_of([])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                items = stack[-count:]
                del stack[-count:]
                tuple_of(items)
            elif name in ("APPEND", "SETITEM"):
                del stack[-1 if name == "APPEND" else -2 :]
                stack[-1].length += 1
            elif name in ("APPENDS", "SETITEMS"):
                added = len(to_mark())
                stack[-1].length += added
            elif name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
                module, attribute = NAME_MAPPING.get(
                    (module, attribute), (IMPORT_MAPPING.get(module, module), attribute)
                )
                stack.append(_Value(name=f"{module}.{attribute}"))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            elif name == "BUILD":
                state = stack.pop()
                if stack[-1].elements is not None:
                    raise ValueError("its pickle sets a tensor anew")
                self._make(_weight([state]))
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "STOP":
                return
            elif name != "PROTO":
                raise pickle.UnpicklingError(f"opcode {name}")

    def _make(self, size: float) -> None:
        self._limit -= math.ceil(min(size, _HUGE))
        if self._limit < 0:
            raise ValueError("its pickle makes more than its own size")

    def _storage(self, saved: _Value) -> _Value:
        _, kind, key, _, number = (saved.items or ())[:5]
        # As torch.save has them: in others an archive's entry can be named in several ways.
        if key.text is None or not key.text.isascii() or not key.text.isdigit():
            raise ValueError("its pickle names a storage by something that is no number")
        if number.number is None or not 0 <= number.number < _HUGE:
            raise ValueError(f"its pickle makes storage {key.text} of a size that none has")
        name = kind.name.rpartition(".")[2]
        unit = (
            1
            if name == "UntypedStorage"
            else torch.storage._get_dtype_from_pickle_storage_type(name).itemsize
        )
        size = number.number * unit
        first = key.text not in self._storages
        if self._storages.setdefault(key.text, size) != size:
            raise ValueError(f"its pickle has two sizes for storage {key.text}")
        if self._entries is None:
            self._make(size if first else 0)
        elif size > (held := self._entries.get(f"data/{key.text}", 0)):
            raise ValueError(
                f"its pickle makes storage {key.text} of {size} bytes, which has {held}"
            )
        return _Value(elements=number.number)

    def _call(self, function: _Value, arguments: _Value) -> _Value:
        name, items = function.name, arguments.items
        if items is None:
            raise ValueError(f"its pickle calls {name} without arguments in a tuple")
        if name in _BYTES:
            text = len(items) == 2 and items[0].text is not None and items[1].text in _LATIN1
            if not text and not (
                name == "builtins.bytearray"
                and (not items or (len(items) == 1 and items[0].is_bytes))
            ):
                raise ValueError(f"its pickle makes bytes by {name}, not from bytes that it holds")
            size = items[0].length if items else 0
            self._make(size)
            return _Value(length=size, is_bytes=True)
        if name in _CLASSES:
            raise ValueError(f"its pickle makes a tensor by {name}, not from bytes that it holds")
        if name == "torch._tensor._rebuild_from_type_v2":
            made, state = self._call(items[0], items[2]), items[3]
            self._make(_weight([state]))
            if made.elements is not None and state.length > 0:
                made.elements = math.inf  # the state may hold other data for it
            return made
        weight = _weight(items)
        elements: float | None = None
        if name in _ITERATORS or name.startswith(_COPIERS):
            weight += sum(
                item.elements or 0 for each in items for item in (each, *(each.items or ()))
            )
        if name in _STRIDED:
            storage, offset, sizes, strides = items[:4]
            elements, last = _extent(sizes, strides)
            if elements > 0 and (
                storage.elements is None or (offset.number or 0) + last >= storage.elements
            ):
                raise ValueError("its pickle makes a tensor larger than its storage")
            weight += elements if name.startswith(_COPIERS) else 0
        elif name in _PARAMETERS:
            elements = items[0].elements
        elif name.startswith(_REBUILD):
            elements = math.inf
        self._make(weight)
        return _Value(length=math.ceil(weight), elements=elements)


def _weight(values: Sequence[_Value]) -> float:
    """How many items a call may copy out of its arguments."""
    return sum(
        1 + value.length + sum(item.length for item in value.items or ()) for value in values
    )


def _extent(sizes: _Value, strides: _Value) -> tuple[float, int]:
    """A tensor's number of elements, and where in its storage the last one is, from its first
    one."""
    elements, last = 1, 0
    for size, stride in zip(sizes.items or (), strides.items or (), strict=True):
        for each in (size.number, stride.number):
            if each is None or not 0 <= each < _HUGE:
                raise ValueError("its pickle makes a tensor of a shape that none has")
        assert size.number is not None and stride.number is not None
        elements = min(elements * size.number, _HUGE)
        last += (size.number - 1) * stride.number
    return elements, last


_HUGE = 1 << 62
