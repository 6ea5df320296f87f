"""Rules of Python's own everyday kinds: collections, numbers, times, paths."""

import argparse
import array
import collections
import datetime
import decimal
import fractions
import pathlib
import re
import sys
import types
import uuid
import zoneinfo
from typing import Any

from ...errors import CheckpointError
from .object_table import Arguments, Bounds, MalformedError, Table, are, expect, is_a, show

PLAIN_CLASSES = (
    bool,
    bytearray,
    bytes,
    complex,
    dict,
    float,
    frozenset,
    int,
    list,
    object,
    set,
    str,
    tuple,
)
_FRACTION = re.compile(r"-?\d{1,4000}(/\d{1,4000})?")
# Beyond that numbers are divided in time that their bytes do not explain.
_DIVIDED_BITS = 1 << 16
_ZONE = re.compile(r"[\w+-]+(/[\w+-]+)*")
_SCALARS = (bool, bytes, float, int, str, type(None))
# Instances of these have nothing but attributes.
NAMESPACES: tuple[type, ...] = (
    argparse.Namespace,
    collections.ChainMap,
    collections.UserDict,
    collections.UserList,
)


def add_python_kinds(table: Table) -> None:
    for cls in (*PLAIN_CLASSES, slice, range, type):
        table.add_class(cls)
    table.names["builtins.Ellipsis"] = Ellipsis
    table.names["builtins.NotImplemented"] = NotImplemented
    _add_bytes(table)
    _add_collections(table)
    _add_numbers(table)
    _add_times(table)
    _add_paths(table)
    _add_namespaces(table)


def _add_bytes(table: Table) -> None:
    encode = table.add_function("_codecs.encode")

    @table.on_call(encode)
    def _encode(bounds: Bounds, arguments: Arguments) -> bytes:
        """How protocol 2 writes bytes: a character each."""
        if len(arguments) != 2 or not are(arguments, str) or not _is_latin1(arguments[1]):
            raise MalformedError("makes bytes by _codecs.encode, not from bytes that it holds")
        bounds.spend(len(arguments[0]))
        return bytes(arguments[0], "latin1")

    @table.on_call(bytes)
    def _bytes(bounds: Bounds, arguments: Arguments) -> bytes:
        expect(not arguments, bytes, arguments)
        return b""

    @table.on_call(bytearray)
    def _bytearray(bounds: Bounds, arguments: Arguments) -> bytearray:
        if arguments and type(arguments[0]) is str and len(arguments) == 2:
            arguments = (_encode(bounds, arguments),)
        if len(arguments) > 1 or not are(arguments, bytes):
            raise MalformedError("makes bytes by builtins.bytearray, not from bytes that it holds")
        bounds.spend(len(arguments[0]) if arguments else 0)
        return bytearray(*arguments)

    table.add_class(array.array)

    @table.on_call(array.array)
    def _array(bounds: Bounds, arguments: Arguments) -> "array.array[Any]":
        """(code, numbers or characters)"""
        fits = len(arguments) == 2 and are(arguments[:1], str) and are(arguments[1:], list, str)
        expect(fits and are(arguments[1], int, float, str), array.array, arguments)
        bounds.spend(8 * len(arguments[1]))
        return array.array(*arguments)

    @table.on_call(table.add_function("array._array_reconstructor"))
    def _array_of_bytes(bounds: Bounds, arguments: Arguments) -> "array.array[Any]":
        """(class, code, the bytes' format, bytes): how protocol 3 and newer write arrays."""
        fits = len(arguments) == 4 and arguments[0] is array.array and are(arguments[1:2], str)
        fits = fits and are(arguments[2:3], int) and are(arguments[3:], bytes)
        expect(fits, "array._array_reconstructor", arguments)
        bounds.spend(4 * len(arguments[3]))
        made: array.array[Any] = array._array_reconstructor(*arguments)  # type: ignore[attr-defined]
        return made


def _is_latin1(encoding: str) -> bool:
    return encoding in ("latin1", "latin-1")


def _add_collections(table: Table) -> None:
    for cls in (collections.OrderedDict, collections.Counter, collections.defaultdict):
        table.add_class(cls)
    table.add_class(collections.deque)

    @table.on_call(collections.OrderedDict)
    def _ordered(bounds: Bounds, arguments: Arguments) -> "collections.OrderedDict[Any, Any]":
        expect(not arguments, collections.OrderedDict, arguments)
        return collections.OrderedDict()

    @table.on_call(collections.Counter)
    def _counter(bounds: Bounds, arguments: Arguments) -> "collections.Counter[Any]":
        expect(len(arguments) < 2 and are(arguments, dict), collections.Counter, arguments)
        counter: collections.Counter[Any] = collections.Counter()
        for counted in arguments:
            bounds.spend(len(counted))
            dict.update(counter, counted)
        return counter

    @table.on_call(collections.defaultdict)
    def _defaultdict(bounds: Bounds, arguments: Arguments) -> "collections.defaultdict[Any, Any]":
        fits = len(arguments) < 2 and all(each is None or is_a(each, type) for each in arguments)
        expect(fits, collections.defaultdict, arguments)
        return collections.defaultdict(*arguments)

    @table.on_call(collections.deque)
    def _deque(bounds: Bounds, arguments: Arguments) -> "collections.deque[Any]":
        fits = len(arguments) in (0, 1, 2) and are(arguments[:1], tuple, list)
        fits = fits and are(arguments[1:], int, type(None))
        expect(fits, collections.deque, arguments)
        bounds.spend(sum(map(len, arguments[:1])))
        return collections.deque(*arguments)

    @table.on_call(set)
    def _set(bounds: Bounds, arguments: Arguments) -> set[Any]:
        expect(len(arguments) < 2 and are(arguments, list, tuple, set), set, arguments)
        made: set[Any] = set()
        for items in arguments:
            bounds.spend(len(items))
            for item in items:
                bounds.check_key(made, item)
                made.add(item)
        return made

    table.calls[frozenset] = lambda bounds, arguments: frozenset(_set(bounds, arguments))


def _add_numbers(table: Table) -> None:
    table.add_class(decimal.Decimal)
    table.add_class(fractions.Fraction)
    table.add_class(uuid.UUID)
    table.add_class(uuid.SafeUUID)

    @table.on_call(complex)
    def _complex(bounds: Bounds, arguments: Arguments) -> complex:
        expect(len(arguments) == 2 and are(arguments, float, int), complex, arguments)
        return complex(*arguments)

    @table.on_call(slice)
    def _slice(bounds: Bounds, arguments: Arguments) -> slice:
        # What a slice holds is let go of without regard to depth: it holds nothing else.
        expect(len(arguments) == 3 and are(arguments, *_SCALARS), slice, arguments)
        return slice(*arguments)

    @table.on_call(range)
    def _range(bounds: Bounds, arguments: Arguments) -> range:
        fits = len(arguments) == 3 and are(arguments, int)
        fits = fits and all(each.bit_length() <= _DIVIDED_BITS for each in arguments)
        expect(fits, range, arguments)
        return range(*arguments)

    @table.on_call(decimal.Decimal)
    def _decimal(bounds: Bounds, arguments: Arguments) -> decimal.Decimal:
        expect(len(arguments) == 1 and are(arguments, str), decimal.Decimal, arguments)
        return decimal.Decimal(*arguments)

    @table.on_call(fractions.Fraction)
    def _fraction(bounds: Bounds, arguments: Arguments) -> fractions.Fraction:
        if len(arguments) == 1 and are(arguments, str) and _FRACTION.fullmatch(arguments[0]):
            return fractions.Fraction(arguments[0])  # before Python 3.12
        fits = len(arguments) == 2 and are(arguments, int)
        fits = fits and all(each.bit_length() <= _DIVIDED_BITS for each in arguments)
        expect(fits, fractions.Fraction, arguments)
        return fractions.Fraction(*arguments)

    @table.on_call(uuid.SafeUUID)
    def _safe_uuid(bounds: Bounds, arguments: Arguments) -> uuid.SafeUUID:
        expect(len(arguments) == 1 and are(arguments, int, type(None)), uuid.SafeUUID, arguments)
        return uuid.SafeUUID(*arguments)

    def _new_uuid(bounds: Bounds, arguments: Arguments) -> uuid.UUID:
        expect(not arguments, uuid.UUID, arguments)
        return object.__new__(uuid.UUID)

    table.news[uuid.UUID] = _new_uuid

    @table.on_state(uuid.UUID)
    def _set_uuid(bounds: Bounds, made: Any, state: Any) -> None:
        expect(type(state) is dict and type(state.get("int")) is int, uuid.UUID, (state,))
        is_safe = state.get("is_safe", uuid.SafeUUID.unknown)
        expect(are((is_safe,), uuid.SafeUUID, int, type(None)), uuid.UUID, (is_safe,))
        is_safe = uuid.SafeUUID(is_safe)
        for name, value in (("int", uuid.UUID(int=state["int"]).int), ("is_safe", is_safe)):
            object.__setattr__(made, name, value)


def _add_times(table: Table) -> None:
    zones = (datetime.timezone, zoneinfo.ZoneInfo, type(None))
    for cls in (datetime.date, datetime.time, datetime.datetime, datetime.timedelta, *zones[:2]):
        table.add_class(cls)

    @table.on_call(datetime.timedelta)
    def _timedelta(bounds: Bounds, arguments: Arguments) -> datetime.timedelta:
        expect(len(arguments) == 3 and are(arguments, int), datetime.timedelta, arguments)
        return datetime.timedelta(*arguments)

    @table.on_call(datetime.timezone)
    def _timezone(bounds: Bounds, arguments: Arguments) -> datetime.timezone:
        fits = len(arguments) in (1, 2) and are(arguments[:1], datetime.timedelta)
        expect(fits and are(arguments[1:], str), datetime.timezone, arguments)
        return datetime.timezone(*arguments)

    @table.on_call(datetime.date)
    def _date(bounds: Bounds, arguments: Arguments) -> datetime.date:
        expect(len(arguments) == 1 and are(arguments, bytes), datetime.date, arguments)
        return datetime.date(*arguments)

    @table.on_call(datetime.time)
    def _time(bounds: Bounds, arguments: Arguments) -> datetime.time:
        fits = len(arguments) in (1, 2) and are(arguments[:1], bytes) and are(arguments[1:], *zones)
        expect(fits, datetime.time, arguments)
        return datetime.time(*arguments)

    @table.on_call(datetime.datetime)
    def _datetime(bounds: Bounds, arguments: Arguments) -> datetime.datetime:
        fits = len(arguments) in (1, 2) and are(arguments[:1], bytes) and are(arguments[1:], *zones)
        expect(fits, datetime.datetime, arguments)
        return datetime.datetime(*arguments)

    @table.on_call(table.add_function("zoneinfo.ZoneInfo._unpickle"))
    def _zone(bounds: Bounds, arguments: Arguments) -> zoneinfo.ZoneInfo:
        # Any other key would be a path, which might lead out of the system's folder of time zones.
        fits = len(arguments) == 2 and are(arguments[:1], str) and _ZONE.fullmatch(arguments[0])
        expect(bool(fits), zoneinfo.ZoneInfo, arguments)
        try:
            return zoneinfo.ZoneInfo(arguments[0])
        except zoneinfo.ZoneInfoNotFoundError as error:
            raise CheckpointError(f"it needs the time zone {show(arguments[0])}") from error


def _add_paths(table: Table) -> None:
    here = pathlib.WindowsPath if sys.platform == "win32" else pathlib.PosixPath
    kinds = (pathlib.PurePosixPath, pathlib.PureWindowsPath, here)
    for kind in kinds:
        # Python 3.13 calls the module pathlib._local.
        names = (f"{module}.{kind.__name__}" for module in ("pathlib", "pathlib._local"))
        table.add_class(kind, *names)

        def _path(bounds: Bounds, arguments: Arguments, kind: type = kind) -> Any:
            expect(are(arguments, str), kind, arguments)
            return kind(*arguments)

        table.calls[kind] = _path


def _add_namespaces(table: Table) -> None:
    for cls in NAMESPACES:
        table.add_class(cls)

        def _new(bounds: Bounds, arguments: Arguments, cls: type = cls) -> Any:
            expect(not arguments, cls, arguments)
            return object.__new__(cls)

        table.news[cls] = _new
    table.add_class(types.SimpleNamespace)

    @table.on_call(types.SimpleNamespace)
    def _simple(bounds: Bounds, arguments: Arguments) -> types.SimpleNamespace:
        expect(not arguments, types.SimpleNamespace, arguments)
        return types.SimpleNamespace()

    @table.on_call(type)
    def _type(bounds: Bounds, arguments: Arguments) -> type:
        expect(
            len(arguments) == 1 and (arguments[0] is None or arguments[0] is Ellipsis),
            type,
            arguments,
        )
        return type(arguments[0])
