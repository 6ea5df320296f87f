"""What ``async_save`` looks at before it returns: which tensors there are, what this rank writes of them, which can wait.

Planning costs tens of microseconds a tensor, and a training job saves the same structure again and again: what follows from it
is kept, and found again by the keys and by what ``_C.view_tensors`` says of all tensors at once.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from . import _C
from ._plan import LocalState, StaticPlan, make_static_plan
from ._tensors import RECORD_DTYPES
from ._unit import local_of

_KEPT = 4  # structures; a job has one or two
_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.Size, torch.device))


class Pickled(NamedTuple):
    """An object that may change, as the record that it will be."""

    data: bytes


class FrozenPlanner(DefaultSavePlanner):
    """DCP's planner, for a state dict whose objects are :class:`Pickled` where they may change."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return io.BytesIO(object.data) if isinstance(object, Pickled) else super().transform_object(write_item, object)


class Part(NamedTuple):
    """A record of this rank: bytes [first, first + size) of a tensor's, contiguous in its local memory."""

    tensor: int  # among the tensors of the state
    first: int
    size: int
    kind: str  # dtype, as records call it
    shape: tuple[int, ...]


@dataclasses.dataclass
class Structure:
    """All of a save that repeats while keys, types, shapes and meshes stay."""

    shape: list[Any]
    views: bytes
    kept: list[Any]  # specs, so that their addresses, which are in `views`, mean the same objects
    names: list[str]
    paths: Mapping[str, Any] | None
    places: list[int]  # of the tensors among the values
    digests: bytes
    static: StaticPlan
    parts: list[Part]
    key: Any


_structures: list[Structure] = []


class Captured:
    """A rank's state dict, flat. ``structure`` is None where DCP has to plan a part of it.

    ``tensors``: its tensors and DTensors; ``addresses`` and ``sizes``: of their local bytes, 0 where
    these do not lie there plainly.
    """

    def __init__(
        self, state_dict: dict[str, Any], planner: DefaultSavePlanner, rank: int, group_ranks: Sequence[int], coordinator: bool
    ) -> None:
        self.planner = FrozenPlanner(planner.flatten_state_dict, planner.flatten_sharded_tensors)
        values: list[Any] = []
        shape: list[Any] = []
        _walk(state_dict, values, shape)
        self.tensors = [value for value in values if isinstance(value, Tensor)]
        self._views, self.addresses, self.sizes = _C.view_tensors(self.tensors)
        key = (tuple(group_ranks), rank, coordinator)
        self.structure: Structure | None = None
        if planner.flatten_state_dict:
            for known in _structures:
                if known.views == self._views and known.key == key and known.shape == shape:
                    self.structure = known
        if self.structure is not None:
            self.planner.state_dict = dict(zip(self.structure.names, values, strict=True))
            self.planner.mappings = dict(self.structure.paths or {})
            self.planner.is_coordinator = coordinator
        else:
            self.planner.set_up_planner(state_dict, is_coordinator=coordinator)
            local = LocalState(self.planner)
            walked = list(self.planner.state_dict.values())
            same = len(walked) == len(values) and all(a is b for a, b in zip(walked, values, strict=True))
            if planner.flatten_state_dict and same and not local.rest:
                self._remember(local, shape, key, rank, group_ranks, coordinator)

    def _remember(
        self, local: LocalState, shape: list[Any], key: Any, rank: int, group_ranks: Sequence[int], coordinator: bool
    ) -> None:
        static = make_static_plan(local, rank, group_ranks, True, True, coordinator)
        names = list(self.planner.state_dict)
        places = [i for i, value in enumerate(self.planner.state_dict.values()) if isinstance(value, Tensor)]
        number = {names[place]: i for i, place in enumerate(places)}
        parts = []
        for index, offsets, sizes in static.pieces:
            whole = static.locals[index]
            first = 0
            for offset, start, size in zip(offsets, static.offsets[index], whole.shape, strict=True):
                first = first * size + offset - start
            at, kind = number[static.names[index]], RECORD_DTYPES[whole.dtype]
            parts.append(Part(at, first * whole.itemsize, math.prod(sizes) * whole.itemsize, kind, tuple(sizes)))
        digests = local.digests()
        static.locals = []
        kept = [t._spec for t in self.tensors if isinstance(t, DTensor)]
        paths = self.planner.mappings
        self.structure = Structure(shape, self._views, kept, names, paths, places, digests, static, parts, key)
        _structures.insert(0, self.structure)
        del _structures[_KEPT:]

    def freeze_objects(self) -> None:
        """Values that are no tensors no longer change."""
        state = self.planner.state_dict
        for name, value in state.items():
            if type(value) not in _PLAIN and not isinstance(value, Tensor):
                state[name] = _frozen(value)

    def freeze_tensors(self, which: Sequence[int]) -> None:
        """Copies some of the tensors, of which ``addresses`` then are the copies'."""
        assert self.structure is not None
        for i in which:
            tensor = self.tensors[i]
            with torch.no_grad():
                copy = local_of(tensor).detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            self.addresses[i], self.sizes[i] = copy.data_ptr(), copy.nbytes
            if isinstance(tensor, DTensor):
                copy = DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
            self.tensors[i] = copy
            self.planner.state_dict[self.name(i)] = copy

    def name(self, tensor: int) -> str:
        assert self.structure is not None
        return self.structure.names[self.structure.places[tensor]]

    def drop(self) -> None:
        """Lets go of the state; what is planned stays."""
        self.tensors = []


def _walk(value: Any, values: list[Any], shape: list[Any]) -> None:
    """The values in the order of DCP's flattening, and a description of what is around them: equal for equal structures."""
    if isinstance(value, Mapping):
        shape.append(tuple(value))
        items = value.values()
    else:
        shape.append(len(value))
        items = value
    for item in items:
        if isinstance(item, Tensor):
            values.append(item)
        elif isinstance(item, Mapping) or (isinstance(item, list) and _is_traversed(item)):
            shape.append(len(values))
            _walk(item, values, shape)
        else:
            shape.append((len(values), type(item)))
            values.append(item)


def _is_traversed(values: list[Any]) -> bool:
    return any(isinstance(v, (Tensor, Mapping)) or (isinstance(v, list) and _is_traversed(v)) for v in values)


def _frozen(value: Any) -> Any:
    copy = _plain_copy(value)
    if copy is not NotImplemented:
        return copy
    stream = io.BytesIO()
    torch.save(value, stream)
    return Pickled(stream.getvalue())


def _plain_copy(value: Any) -> Any:
    """Lists, tuples and dicts of values that can't change, copied; NotImplemented if there is anything else in them."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        items = [_plain_copy(item) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else kind(items)
    if kind is dict:
        keys, items = [_plain_copy(k) for k in value], [_plain_copy(v) for v in value.values()]
        return NotImplemented if any(i is NotImplemented for i in (*keys, *items)) else dict(zip(keys, items, strict=True))
    return NotImplemented
