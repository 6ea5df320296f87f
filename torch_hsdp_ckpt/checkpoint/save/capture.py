"""What ``async_save`` looks at before it returns: which tensors there are, what this rank writes of
them, which can wait.

Planning costs tens of microseconds a tensor, and a training job saves the same structure again and
again: what follows from it is kept, and found again by the fingerprint of ``_C.LiveState``, which
looks at everything in one pass."""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.tensors import RECORD_DTYPES, local_of
from .plan import LocalState, StaticPlan, make_static_plan

_KEPT = 4  # structures; a job has one or two
_PLAIN = frozenset(
    (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.Size, torch.device)
)


class Pickled(NamedTuple):
    """An object that may change, as the record that it will be."""

    data: bytes


class FrozenPlanner(DefaultSavePlanner):
    """DCP's planner, for a state dict whose objects are :class:`Pickled` where they may change."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return (
            io.BytesIO(object.data)
            if isinstance(object, Pickled)
            else super().transform_object(write_item, object)
        )


class Part(NamedTuple):
    """A record of this rank: bytes [first, first + size) of a tensor's, contiguous in its local
    memory."""

    tensor: int  # among the tensors of the state
    first: int
    size: int
    kind: str  # dtype, as records call it
    shape: tuple[int, ...]


@dataclasses.dataclass
class Structure:
    """All of a save that repeats while keys, types, shapes, devices and meshes stay."""

    fingerprint: bytes
    key: Any
    kept: list[
        Any
        # types and specs, so that their addresses, which are in the fingerprint, mean the same objects
    ]
    names: list[str]
    paths: dict[str, Any]
    places: list[int]  # of the tensors among the values
    objects: list[int]  # values that may change and are no tensors
    devices: set[torch.device]  # CUDA's
    digests: bytes
    static: StaticPlan
    parts: list[Part]
    copied: _C.StagingParts  # the parts again


_structures: list[Structure] = []


class Captured:
    """A rank's state dict, flat. ``structure`` is None where DCP has to plan a part of it."""

    def __init__(
        self,
        state_dict: dict[str, Any],
        planner: DefaultSavePlanner,
        rank: int,
        group_ranks: Sequence[int],
        coordinator: bool,
    ) -> None:
        self.planner = FrozenPlanner(planner.flatten_state_dict, planner.flatten_sharded_tensors)
        self.live = _C.LiveState(state_dict)
        self.structure: Structure | None = None
        key = (tuple(group_ranks), rank, coordinator)
        if planner.flatten_state_dict:
            for known in _structures:
                if known.key == key and self.live.has_fingerprint(known.fingerprint):
                    self.structure = known
        self._values = self.live.values
        if self.structure is not None:
            self.planner.mappings = self.structure.paths
            self.planner.is_coordinator = coordinator
        else:
            self.planner.set_up_planner(state_dict, is_coordinator=coordinator)
            local = LocalState(self.planner)
            walked = list(self.planner.state_dict.values())
            same = len(walked) == len(self._values) and all(
                a is b for a, b in zip(walked, self._values, strict=True)
            )
            if planner.flatten_state_dict and same and not local.rest:
                self.structure = _structure_of(
                    local, self.live, key, rank, group_ranks, coordinator
                )
                _structures.insert(0, self.structure)
                del _structures[_KEPT:]

    def freeze_objects(self) -> None:
        """Values that are no tensors no longer change."""
        assert self.structure is not None
        for i in self.structure.objects:
            self._values[i] = _frozen(self._values[i])

    def freeze_tensors(self, which: Sequence[int]) -> None:
        """Copies some of the tensors, in whose places the copies then are."""
        assert self.structure is not None
        for i in which:
            tensor = self.live.tensor(i)
            with torch.no_grad():
                copy = (
                    local_of(tensor)
                    .detach()
                    .resolve_conj()
                    .resolve_neg()
                    .clone(memory_format=torch.contiguous_format)
                )
            if isinstance(tensor, DTensor):
                copy = DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
            self.live.replace(i, copy)
            self._values[self.structure.places[i]] = copy

    def hand_to_planner(self) -> None:
        """The planner's state dict by name, with what is frozen. Not in the call: 4,000 values take
        half a millisecond."""
        assert self.structure is not None
        self.planner.state_dict = dict(zip(self.structure.names, self._values, strict=True))

    def drop(self) -> None:
        """Lets go of the state; what is planned stays."""
        del self.live
        self._values = []

    def name(self, tensor: int) -> str:
        assert self.structure is not None
        return self.structure.names[self.structure.places[tensor]]


def _structure_of(
    local: LocalState,
    live: _C.LiveState,
    key: Any,
    rank: int,
    group_ranks: Sequence[int],
    coordinator: bool,
) -> Structure:
    static = make_static_plan(local, rank, group_ranks, True, True, coordinator)
    state, places = local.state, live.places
    names, objects = list(state), set(local.objects)
    number = {names[place]: i for i, place in enumerate(places)}
    parts = []
    for index, offsets, sizes in static.pieces:
        whole = static.locals[index]
        first = 0
        for offset, start, extent in zip(
            offsets, static.shard_start(index), whole.shape, strict=True
        ):
            first = first * extent + offset - start
        size = math.prod(sizes) * whole.itemsize
        kind = RECORD_DTYPES[whole.dtype]
        parts.append(
            Part(number[static.names[index]], first * whole.itemsize, size, kind, tuple(sizes))
        )
    static.locals = []
    assert local.paths is not None
    return Structure(
        fingerprint=live.fingerprint,
        key=key,
        kept=[(type(value), getattr(value, "_spec", None)) for value in state.values()],
        names=names,
        paths=dict(local.paths),
        places=places,
        objects=[
            i
            for i, (name, value) in enumerate(state.items())
            if name in objects and type(value) not in _PLAIN
        ],
        devices={
            tensor.device
            for tensor in state.values()
            if isinstance(tensor, Tensor) and tensor.is_cuda
        },
        digests=local.digests(),
        static=static,
        parts=parts,
        copied=_C.StagingParts([part[:3] for part in parts]),
    )


def _frozen(value: Any) -> Any:
    copy = _plain_copy(value)
    if copy is not NotImplemented:
        return copy
    stream = io.BytesIO()
    torch.save(value, stream)
    return Pickled(stream.getvalue())


def _plain_copy(value: Any) -> Any:
    """Lists, tuples and dicts of values that can't change, copied; NotImplemented if there is
    anything else in them."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        if _PLAIN.issuperset(map(type, value)):  # the names of all parameters, say
            return kind(value)
        items = [_plain_copy(item) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else kind(items)
    if kind is dict:
        keys, items = [_plain_copy(k) for k in value], [_plain_copy(v) for v in value.values()]
        return (
            NotImplemented
            if any(i is NotImplemented for i in (*keys, *items))
            else dict(zip(keys, items, strict=True))
        )
    return NotImplemented
