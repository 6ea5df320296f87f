"""Rules of the placements of torch's sharded tensors, which are plain descriptions: a dimension,
the name of a reduction. The tensors themselves are not objects of a checkpoint."""

from typing import Any

from torch.distributed.tensor import placement_types

from .object_table import Arguments, Bounds, Table, are, expect

_MODULES = ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")
# By class: a state, whose names and types all others have.
_STATES: dict[str, dict[str, Any]] = {
    "Replicate": {},
    "Shard": {"dim": 0},
    "_StridedShard": {"dim": 0, "split_factor": 1},
    "Partial": {"reduce_op": "sum"},
}
_NUMBERS = 1 << 31


def add_placements(table: Table) -> None:
    for name, first in _STATES.items():
        cls = getattr(placement_types, name)
        table.add_class(cls, *(f"{module}.{name}" for module in _MODULES))
        _add_placement(table, cls, first)


def _add_placement(table: Table, cls: Any, first: dict[str, Any]) -> None:
    def _new(bounds: Bounds, arguments: Arguments) -> Any:
        """Torch reads memory that nobody has set if it is used before its BUILD."""
        expect(not arguments, cls, arguments)
        made = cls.__new__(cls)
        bounds.unset[id(made)] = made
        return made

    table.news[cls] = _new

    @table.on_state(cls)
    def _set(bounds: Bounds, made: Any, state: Any) -> None:
        fits = type(state) is dict and are(state, str) and state.keys() == first.keys()
        expect(fits, cls, (state,))
        for name, value in state.items():
            expect(type(value) is type(first[name]), cls, (value,))
            expect(type(value) is not int or abs(value) < _NUMBERS, cls, (value,))
        expect(bounds.unset.pop(id(made), None) is made, cls, (state,))
        made.__setstate__(state)
