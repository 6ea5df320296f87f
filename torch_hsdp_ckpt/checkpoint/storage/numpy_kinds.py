"""Rules of NumPy's kinds: arrays, scalars, dtypes, random states. Arrays are filled with bytes that
the pickle holds; of object arrays there are none."""

import math
import re
from typing import Any

from ...errors import CheckpointError
from .object_table import Arguments, Bounds, MalformedError, Table, are, expect

_SIMPLE_DTYPE = re.compile(r"[biufcSUV]\d{1,9}|[mM]8")
_UNIT = re.compile(rb"[A-Za-z]{1,7}")
_BIT_GENERATORS = {
    "MT19937": "_mt19937",
    "PCG64": "_pcg64",
    "PCG64DXSM": "_pcg64",
    "Philox": "_philox",
    "SFC64": "_sfc64",
}
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
        complete = _complete_dtype(np, made, state)
        made.__setstate__(complete.__reduce__()[2])

    for cls in {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSUVmM"}:
        table.names[f"numpy.dtypes.{cls.__name__}"] = cls
        table.states[cls] = _set_dtype


def _complete_dtype(np: Any, made: Any, state: tuple[Any, ...]) -> Any:
    """(version, byte order, (dtype, shape) of a subarray, names, fields, size, alignment, flags,
    metadata of times)"""
    _, order, subarray, names, fields, size = state[:6]
    if order not in ("<", ">", "|", "="):
        raise MalformedError(f"sets a dtype's byte order {order!r}")
    if names is not None:
        layout = [(name, *fields[name]) for name in names]
        formats, offsets = [each[1] for each in layout], [each[2] for each in layout]
        wanted = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size}
        complete = np.dtype(wanted, align=bool(state[7] & 0x80))
        return np.dtype((np.record, complete)) if made.type is np.record else complete
    if subarray is not None:
        expect(type(subarray) is tuple and are(subarray[1], int), np.dtype, subarray)
        return np.dtype(subarray)
    if made.kind in "mM":
        return _time_dtype(np, made, state[8]).newbyteorder(order)
    return made.newbyteorder(order)


def _time_dtype(np: Any, made: Any, metadata: Any) -> Any:
    unit, count = metadata[1][:2]
    if type(unit) is not bytes or not _UNIT.fullmatch(unit) or type(count) is not int:
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
        _check_data(np, shape, dtype, data)
        bounds.spend(len(data))
        np.ndarray.__setstate__(made, (int(version), shape, dtype, bool(is_fortran), data))

    names = (f"numpy.{core}.numeric._frombuffer" for core in ("_core", "core"))

    @table.on_call(table.add_function(*names))
    def _frombuffer(bounds: Bounds, arguments: Arguments) -> Any:
        """(bytes, dtype, shape, order): how protocol 5 writes arrays."""
        fits = len(arguments) == 4 and are(arguments[:1], bytes, bytearray)
        fits = fits and arguments[3] in ("C", "F")
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
    fits = isinstance(dtype, np.dtype) and type(shape) is tuple and are(shape, int)
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
        return random.RandomState(_generator_of(np, generators, arguments or ("MT19937",)))

    @table.on_call(make_generator)
    def _generator(bounds: Bounds, arguments: Arguments) -> Any:
        return random.Generator(_generator_of(np, generators, arguments))

    @table.on_state(random.RandomState)
    def _set_random_state(bounds: Bounds, made: Any, state: Any) -> None:
        if type(state) is tuple and len(state) in (3, 5):  # of old versions
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


def _generator_of(np: Any, generators: dict[str, Any], arguments: Arguments) -> Any:
    """The bit generator that a constructor is given, or a new one of the name that it is given."""
    first = arguments[0] if arguments else None
    if type(first) is str and first in generators:
        return generators[first](0)
    expect(any(type(first) is cls for cls in generators.values()), "numpy.random", arguments)
    return first


def _add_bit_generators(table: Table, np: Any, generators: dict[str, Any]) -> None:
    make = table.add_function("numpy.random._pickle.__bit_generator_ctor")

    @table.on_call(make)
    def _bit_generator(bounds: Bounds, arguments: Arguments) -> Any:
        for cls in generators.values():
            if len(arguments) == 1 and arguments[0] is cls:
                return cls(0)
        return _generator_of(np, generators, arguments)

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
    """What NumPy leaves to its callers: it would read beyond a buffer."""
    expect(type(state) is dict and type(state.get("state")) is dict, "numpy.random", (state,))
    pending = [state]
    while pending:
        for key, value in pending.pop().items():
            if type(value) is dict:
                pending.append(value)
            elif key in _POSITIONS:
                is_inside = isinstance(value, (int, np.integer)) and 0 <= value <= _POSITIONS[key]
                expect(is_inside, "numpy.random", (value,))
            else:
                fits = type(value) in (str, int, float, bool, np.ndarray)
                expect(fits or isinstance(value, np.number), "numpy.random", (value,))


def _add_seeds(table: Table, np: Any) -> None:
    seeds = np.random.SeedSequence
    table.add_class(seeds, "numpy.random.bit_generator.SeedSequence")
    make = table.add_function("numpy.random.bit_generator.__pyx_unpickle_SeedSequence")

    @table.on_call(make)
    def _seeds(bounds: Bounds, arguments: Arguments) -> Any:
        fits = len(arguments) == 3 and arguments[0] is seeds and type(arguments[1]) is int
        expect(fits, seeds, arguments)
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
    if type(value) in (list, tuple):
        return are(value, int)
    return type(value) in (int, type(None)) or (type(value) is np.ndarray and value.ndim == 1)
