"""Rules of NumPy's kinds: arrays, scalars, dtypes, random states. Arrays are filled with bytes that
the pickle holds; of object arrays there are none."""

import math
import re
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError
from .object_table import (
    Arguments,
    Bounds,
    MalformedError,
    Table,
    are,
    are_sizes,
    expect,
    is_a,
    show,
)

_SIMPLE_DTYPE = re.compile(r"[biufcSUV]\d{1,9}|[mM]8")
# Fields of a dtype, those of its fields included, and how deep they lie in each other.
_FIELDS = 10_000
_DEPTH = 32
_COUNTS = 1 << 31  # of a time's unit
# What is done to a field of a dtype by NumPy, in steps of the other bounds.
_HASH_OF_FIELD = 16
_MASK_OF_FIELD = 16
# NumPy takes a seed's numbers apart in time that grows with the square of their length.
_SEED_BITS = 1 << 14
_UNIT = re.compile(rb"[A-Za-z]{1,7}")
_BIT_GENERATORS = {
    "MT19937": "_mt19937",
    "PCG64": "_pcg64",
    "PCG64DXSM": "_pcg64",
    "Philox": "_philox",
    "SFC64": "_sfc64",
}
# Bytes that a new generator takes beyond what a pickle says of it.
_GENERATOR_BYTES = {"MT19937": 2500}
_OTHER_BYTES = 300
# Where a state says how far it has gone in its buffer, and the buffer's length.
_POSITIONS = {"pos": 624, "buffer_pos": 4}


def add_numpy_kinds(table: Table) -> None:
    """Imports NumPy, and raises ImportError where there is none."""
    import numpy as np

    _add_dtypes(table, np)
    _add_arrays(table, np)
    _add_masked_arrays(table, np)
    _add_random_states(table, np)


def _multiarray(table: Table, name: str) -> Any:
    """NumPy 2 has renamed numpy.core."""
    return table.add_function(f"numpy._core.multiarray.{name}", f"numpy.core.multiarray.{name}")


def _add_dtypes(table: Table, np: Any) -> None:
    table.add_class(np.dtype)
    table.names["numpy.record"] = np.record
    for scalar in np.sctypeDict.values():
        table.names[f"numpy.{scalar.__name__}"] = scalar

    @table.on_call(np.dtype)
    def _dtype(bounds: Bounds, arguments: Arguments) -> Any:
        """A dtype that its BUILD makes complete."""
        fits = len(arguments) == 3 and are(arguments[1:], bool, int)
        if fits and arguments[0] is np.record:
            return np.dtype((np.record, []), copy=True)
        expect(fits and type(arguments[0]) is str, np.dtype, arguments)
        if arguments[0].startswith("O"):
            raise CheckpointError("it needs an array of objects")
        expect(_SIMPLE_DTYPE.fullmatch(arguments[0]) is not None, np.dtype, arguments)
        return np.dtype(arguments[0], copy=True)

    def _set_dtype(bounds: Bounds, made: Any, state: Any) -> None:
        # NumPy sets the state, but one that it has written itself of a dtype made by its public
        # names: what it does with a forged state is nobody's promise.
        expect(type(state) is tuple and len(state) in (8, 9), np.dtype, (state,))
        complete = _complete_dtype(bounds, np, made, state)
        made.__setstate__(complete.__reduce__()[2])

    for cls in {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSUVmM"}:
        table.names[f"numpy.dtypes.{cls.__name__}"] = cls
        table.states[cls] = _set_dtype
        table.weights[cls] = lambda value: _HASH_OF_FIELD * _fields_in(value)
    for cls in (np.void, np.record):
        table.weights[cls] = lambda value: (
            _HASH_OF_FIELD * _fields_in(value.dtype) + value.nbytes // 64
        )


def _fields_in(dtype: Any) -> int:
    """How many fields it has, unfolded, at least 1: what is done to it takes as many steps.
    MalformedError for more than any array has, or deeper ones than the stack takes."""
    pending, count = [(dtype, 1)], 0
    while pending:
        each, depth = pending.pop()
        count += 1
        if count > _FIELDS or depth > _DEPTH:
            raise MalformedError("makes a dtype of more fields than its own size explains")
        pending += [(part, depth + 1) for part in _parts_of(each)]
    return count


def _parts_of(dtype: Any) -> Iterator[Any]:
    if dtype.subdtype is not None:
        yield dtype.subdtype[0]
    for name in dtype.names or ():
        yield dtype.fields[name][0]


def _complete_dtype(bounds: Bounds, np: Any, made: Any, state: tuple[Any, ...]) -> Any:
    """(version, byte order, (dtype, shape) of a subarray, names, fields, size, alignment, flags,
    metadata of times)"""
    _, order, subarray, names, fields, size, _, flags = state[:8]
    if type(order) is not str or order not in ("<", ">", "|", "="):
        raise MalformedError(f"sets a dtype's byte order to {show(order)}")
    if names is not None:
        _check_fields(bounds, np, names, fields)
        expect(are((size, flags), int), np.dtype, state)
        layout = [fields[name] for name in names]
        formats, offsets = [each[0] for each in layout], [each[1] for each in layout]
        wanted = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size}
        complete = np.dtype(wanted, align=bool(flags & 0x80))
        return np.dtype((np.record, complete)) if made.type is np.record else complete
    if subarray is not None:
        fits = type(subarray) is tuple and len(subarray) == 2 and is_a(subarray[0], np.dtype)
        expect(fits and are_sizes(subarray[1]), np.dtype, state)
        # NumPy makes one dtype of two in a row: a pickle that does not is none of its own.
        expect(subarray[0].subdtype is None, np.dtype, state)
        bounds.spend(_fields_in(subarray[0]))
        return np.dtype(subarray)
    if made.kind in "mM":
        expect(len(state) == 9, np.dtype, state)
        return _time_dtype(np, made, state[8]).newbyteorder(order)
    return made.newbyteorder(order)


def _check_fields(bounds: Bounds, np: Any, names: Any, fields: Any) -> None:
    """``fields``: by name, (dtype, offset[, title])."""
    fits = type(names) is tuple and are(names, str) and type(fields) is dict
    expect(fits and are(fields, str), np.dtype, (names, fields))
    count = 1
    for name in names:
        field = fields.get(name)
        fits = type(field) is tuple and len(field) in (2, 3) and is_a(field[0], np.dtype)
        expect(fits and are(field[1:2], int) and are(field[2:], str), np.dtype, (field,))
        parts = _fields_in(field[0])
        bounds.spend(parts)
        count += parts
        if count > _FIELDS:
            raise MalformedError("makes a dtype of more fields than its own size explains")


def _time_dtype(np: Any, made: Any, metadata: Any) -> Any:
    """``metadata``: (dict, (unit, count, ...))"""
    fits = type(metadata) is tuple and len(metadata) == 2 and type(metadata[1]) is tuple
    expect(fits and len(metadata[1]) >= 2, np.dtype, (metadata,))
    unit, count = metadata[1][:2]
    fits = type(unit) is bytes and _UNIT.fullmatch(unit) is not None and type(count) is int
    if not (fits and 0 < count < _COUNTS):
        raise MalformedError("sets a time's unit to what is none")
    if unit == b"generic":
        return made
    return np.dtype(f"{made.kind}8[{count}{unit.decode()}]")


def _add_arrays(table: Table, np: Any) -> None:
    kinds = (np.ndarray, np.matrix, np.recarray, np.memmap)
    for cls in kinds:
        table.add_class(cls, f"numpy.{cls.__name__}")
    table.add_class(np.recarray, "numpy.core.records.recarray", "numpy.rec.recarray")

    @table.on_call(_multiarray(table, "_reconstruct"))
    def _reconstruct(bounds: Bounds, arguments: Arguments) -> Any:
        """An empty array that its BUILD fills."""
        fits = len(arguments) == 3 and any(arguments[0] is cls for cls in kinds)
        expect(fits, "numpy._core.multiarray._reconstruct", arguments)
        cls = np.ndarray if arguments[0] is np.memmap else arguments[0]
        return np.ndarray.__new__(cls, (0,), "b")

    @table.on_state(np.ndarray, np.matrix, np.recarray)
    def _set_array(bounds: Bounds, made: Any, state: Any) -> None:
        expect(type(state) is tuple and len(state) == 5, np.ndarray, (state,))
        version, shape, dtype, is_fortran, data = state
        expect(are((version, is_fortran), int, bool), np.ndarray, state)
        _check_data(np, shape, dtype, data)
        bounds.spend(len(data))
        np.ndarray.__setstate__(made, (version, shape, dtype, bool(is_fortran), data))

    names = (f"numpy.{core}.numeric._frombuffer" for core in ("_core", "core"))

    @table.on_call(table.add_function(*names))
    def _frombuffer(bounds: Bounds, arguments: Arguments) -> Any:
        """(bytes, dtype, shape, order): how protocol 5 writes arrays."""
        fits = len(arguments) == 4 and are(arguments[:1], bytes, bytearray)
        fits = fits and are(arguments[3:], str) and arguments[3] in ("C", "F")
        expect(fits, "numpy._core.numeric._frombuffer", arguments)
        data, dtype, shape, order = arguments
        _check_data(np, shape, dtype, bytes(data))
        bounds.spend(len(data))
        return np.ndarray(shape, dtype, bytearray(data) or None, order=order)

    @table.on_call(_multiarray(table, "scalar"))
    def _scalar(bounds: Bounds, arguments: Arguments) -> Any:
        expect(len(arguments) == 2, "numpy._core.multiarray.scalar", arguments)
        _check_data(np, (), *arguments)
        bounds.spend(len(arguments[1]))
        holder = np.ndarray((), arguments[0], bytearray(arguments[1]) or None)
        return holder.copy()[()]


def _check_data(np: Any, shape: Any, dtype: Any, data: Any) -> None:
    fits = is_a(dtype, np.dtype) and are_sizes(shape)
    if fits and (dtype.hasobject or type(data) is list):
        raise CheckpointError("it needs an array of objects")
    if not fits or type(data) is not bytes or math.prod(shape) * dtype.itemsize != len(data):
        raise MalformedError("makes an array of a shape that its bytes do not have")


def _add_masked_arrays(table: Table, np: Any) -> None:
    masked = np.ma.MaskedArray
    table.add_class(masked, "numpy.ma.core.MaskedArray", "numpy.ma.MaskedArray")

    @table.on_call(table.add_function("numpy.ma.core._mareconstruct"))
    def _reconstruct(bounds: Bounds, arguments: Arguments) -> Any:
        fits = len(arguments) == 4 and arguments[0] is masked and arguments[1] is np.ndarray
        expect(fits, "numpy.ma.core._mareconstruct", arguments)
        return masked(np.zeros((0,), "b"), mask=np.zeros((0,), bool))

    @table.on_state(masked)
    def _set_array(bounds: Bounds, made: Any, state: Any) -> None:
        expect(type(state) is tuple and len(state) == 7, masked, (state,))
        _, shape, dtype, is_fortran, data, mask, fill_value = state
        _check_data(np, shape, dtype, data)
        fits = fill_value is None or (type(fill_value) is np.ndarray and fill_value.ndim == 0)
        expect(fits and are((is_fortran,), int, bool), masked, state)
        expect(fill_value is None or fill_value.dtype == dtype, masked, state)
        bounds.spend(_MASK_OF_FIELD * _fields_in(dtype))
        mask_dtype = np.ma.make_mask_descr(dtype)
        _check_data(np, shape, mask_dtype, mask)
        bounds.spend(len(data) + len(mask))
        np.ndarray.__setstate__(made, (1, shape, dtype, bool(is_fortran), data))
        np.ndarray.__setstate__(made._mask, (1, shape, mask_dtype, bool(is_fortran), mask))
        made.fill_value = fill_value


def _add_random_states(table: Table, np: Any) -> None:
    random = np.random
    generators = {}
    for name, module in _BIT_GENERATORS.items():
        if hasattr(random, name):
            generators[name] = getattr(random, name)
            table.add_class(generators[name], f"numpy.random.{module}.{name}")
    _add_seeds(table, np)
    _add_bit_generators(table, np, generators)
    prefix = "numpy.random._pickle.__"
    make_state = table.add_function(f"{prefix}randomstate_ctor", "numpy.random.__RandomState_ctor")
    make_generator = table.add_function(f"{prefix}generator_ctor")

    @table.on_call(make_state)
    def _random_state(bounds: Bounds, arguments: Arguments) -> Any:
        named = arguments or ("MT19937",)
        return random.RandomState(_generator_of(bounds, generators, named))

    @table.on_call(make_generator)
    def _generator(bounds: Bounds, arguments: Arguments) -> Any:
        return random.Generator(_generator_of(bounds, generators, arguments))

    @table.on_state(random.RandomState)
    def _set_random_state(bounds: Bounds, made: Any, state: Any) -> None:
        if type(state) is tuple and len(state) in (3, 5):  # of old versions
            expect(are(state[3:], int, float), random.RandomState, state)
            has_gauss, gauss = state[3:] or (0, 0.0)
            state = {
                "bit_generator": state[0],
                "state": {"key": state[1], "pos": state[2]},
                "has_gauss": has_gauss,
                "gauss": gauss,
            }
        _check_state(np, state)
        made.set_state(state)

    @table.on_state(random.Generator)
    def _set_generator(bounds: Bounds, made: Any, state: Any) -> None:
        _check_state(np, state)
        made.bit_generator.state = state


def _generator_of(bounds: Bounds, generators: dict[str, Any], arguments: Arguments) -> Any:
    """The bit generator that a constructor is given, or a new one of the name that it is given."""
    first = arguments[0] if arguments else None
    bounds.spend(_OTHER_BYTES)
    if type(first) is str and first in generators:
        return _new_generator(bounds, generators[first])
    expect(any(type(first) is cls for cls in generators.values()), "numpy.random", arguments)
    return first


def _new_generator(bounds: Bounds, cls: Any) -> Any:
    bounds.spend(_GENERATOR_BYTES.get(cls.__name__, _OTHER_BYTES))
    return cls(0)


def _add_bit_generators(table: Table, np: Any, generators: dict[str, Any]) -> None:
    make = table.add_function("numpy.random._pickle.__bit_generator_ctor")

    @table.on_call(make)
    def _bit_generator(bounds: Bounds, arguments: Arguments) -> Any:
        for cls in generators.values():
            if len(arguments) == 1 and arguments[0] is cls:
                return _new_generator(bounds, cls)
        return _generator_of(bounds, generators, arguments)

    @table.on_state(*generators.values())
    def _set_bit_generator(bounds: Bounds, made: Any, state: Any) -> None:
        """NumPy 1.24 and newer save the seed too."""
        seed = None
        if type(state) is tuple and len(state) == 2:
            state, seed = state
        expect(seed is None or type(seed) is np.random.SeedSequence, type(made), (seed,))
        _check_state(np, state)
        if seed is None:
            made.state = state
        else:
            made.__setstate__((state, seed))


def _check_state(np: Any, state: Any) -> None:
    """What NumPy leaves to its callers: it would read beyond a buffer. A state holds plain values
    and one dict of such, "state"."""
    expect(type(state) is dict and type(state.get("state")) is dict, "numpy.random", (state,))
    inner = [pair for pair in state.items() if pair[0] != "state"] + [*state["state"].items()]
    scalars = (int, *np.sctypeDict.values())
    for key, value in inner:
        expect(type(key) is str, "numpy.random", (key,))
        if key in _POSITIONS:
            fits = type(value) in scalars and is_a(value, int, np.integer)
            expect(fits and 0 <= value <= _POSITIONS[key], "numpy.random", (value,))
        else:
            fits = type(value) in (str, float, bool, np.ndarray, *scalars)
            expect(fits, "numpy.random", (value,))


def _add_seeds(table: Table, np: Any) -> None:
    seeds = np.random.SeedSequence
    table.add_class(seeds, "numpy.random.bit_generator.SeedSequence")
    make = table.add_function("numpy.random.bit_generator.__pyx_unpickle_SeedSequence")

    @table.on_call(make)
    def _seeds(bounds: Bounds, arguments: Arguments) -> Any:
        fits = len(arguments) == 3 and arguments[0] is seeds and type(arguments[1]) is int
        expect(fits, seeds, arguments)
        bounds.spend(_OTHER_BYTES)
        made = seeds(0)
        if arguments[2] is not None:
            _set_seeds(bounds, made, arguments[2])
        return made

    @table.on_state(seeds)
    def _set_seeds(bounds: Bounds, made: Any, state: Any) -> None:
        """(entropy, children spawned, pool, its size, spawn key): the pool follows from the
        others."""
        expect(type(state) is tuple and len(state) == 5, seeds, (state,))
        entropy, children, _, pool_size, spawn_key = state
        expect(are((children, pool_size), int) and pool_size <= 64, seeds, state)
        expect(_are_seeds(np, entropy) and _are_seeds(np, spawn_key), seeds, state)
        same = seeds(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=children)
        made.__setstate__(same.__reduce__()[2])


def _are_seeds(np: Any, value: Any) -> bool:
    numbers = value if type(value) in (list, tuple) else (value,)
    if are(numbers, int):
        return all(each.bit_length() <= _SEED_BITS for each in numbers)
    return value is None or (type(value) is np.ndarray and value.ndim == 1)
