"""What ``async_save`` looks at before it returns: which tensors there are, what this rank writes of
them, which can wait.

Planning costs tens of microseconds a tensor, and a training job saves the same structure again and
again: what follows from it is kept, and found again by the fingerprint of ``_C.LiveState``, which
looks at everything in one pass."""

import dataclasses
import io
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.devices import has_streams
from ...common.gate import CHANGED
from ...common.tensors import RECORD_DTYPES, dtensor_around, local_of
from ...errors import CheckpointError
from .division import Division, Holdings
from .local_state import LocalState
from .open import PreparedState, SaveRequest
from .plan import Pickled
from .static_plan import StaticPlan, make_static_plan

_KEPT = 4  # structures; a job has one or two
_PLAIN = frozenset(
    (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.Size, torch.device)
)


class FrozenPlanner(DefaultSavePlanner):
    """DCP's planner, for a state dict whose objects are ``Pickled`` where they may change."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if isinstance(object, Pickled):
            return io.BytesIO(object.data)
        return super().transform_object(write_item, object)


@dataclasses.dataclass(frozen=True, slots=True)
class LocalChunk:
    """A record of this rank: bytes [first, first + size) of a tensor's, contiguous in its local
    memory."""

    tensor: int  # among the tensors of the state
    first: int
    size: int
    kind: str  # dtype, as records call it
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a save that repeats while keys, types, shapes, devices and meshes stay.

    ``key`` and ``fingerprint`` say what it fits. ``kept``: types and specs, so that their
    addresses, which are in the fingerprint, mean the same objects. ``places``: of the tensors among
    the values. ``objects``: values that may change and are no tensors. ``devices``: but the CPU.
    ``chunk_parts``: the chunks again, as C++ takes them. ``shapes``: of what this rank holds of the
    planned tensors, by name, whichever rank writes them. ``division``: the one by which it is
    planned, which is to be found true."""

    fingerprint: bytes
    key: Any
    kept: Sequence[Any]
    names: Sequence[str]
    paths: dict[str, Any]
    places: Sequence[int]
    shapes: dict[str, torch.Size]
    objects: Sequence[int]
    devices: frozenset[torch.device]
    holdings: Holdings
    division: Division
    static: StaticPlan
    chunks: Sequence[LocalChunk]
    chunk_parts: _C.StagingParts


# A process has one list: what is kept fits every save of the same state, whoever makes it.
_structures: list[Structure] = []


class Captured:
    """A rank's state dict, flat, and the plan that is kept for it; it holds the live values until
    :meth:`drop`.

    Values that may change are replaced by copies, "frozen", one by one."""

    def __init__(self, live: _C.LiveState, structure: Structure, planner: FrozenPlanner) -> None:
        self.live, self.structure, self.planner = live, structure, planner
        self._values = live.values

    def freeze_objects(self) -> None:
        """Values that are no tensors no longer change."""
        for i in self.structure.objects:
            self._values[i] = _frozen(self._values[i])

    def freeze_tensors(self, which: Sequence[int]) -> None:
        """Copies some of the tensors, in whose places the copies then are."""
        for i in which:
            copy = _copy_of(self.live.tensor(i))
            self.live.replace(i, copy)
            self._values[self.structure.places[i]] = copy

    def prepare(self) -> PreparedState:
        """The state for ``open_save``, with what is frozen by now."""
        self.hand_to_planner()
        return PreparedState(
            LocalState(self.planner),
            self.structure.holdings,
            needs_gathering=False,
            kept=self,
        )

    @property
    def division(self) -> Division:
        return self.structure.division

    def prepare_anew(self) -> None:
        """The planner's tensors, and so those of the state that was prepared, are what they were at
        the call, whatever has been made of the live ones since (``tensor.data = ...``)."""
        shapes = self.structure.shapes
        for i in range(len(self.structure.places)):
            name = self.name(i)
            if self.live.address(i) and name in shapes:
                local = self.memory(i).view(shapes[name])
                self.planner.state_dict[name] = _like(self.live.tensor(i), local)

    def replace(self, division: Division, static: StaticPlan) -> None:
        before = self.structure
        chunks = list(_local_chunks(static, _numbers_of(before.names, before.places)))
        found = dataclasses.replace(
            before,
            division=division,
            static=static.without_tensors(),
            chunks=chunks,
            chunk_parts=_parts_of(chunks),
        )
        _structures[:] = [found if known is before else known for known in _structures]

    def memory(self, tensor: int) -> Tensor:
        """A tensor's elements, in one dimension, where they were at the call. Raises
        CheckpointError, naming the tensor, if that memory is gone."""
        memory = self.live.memory(tensor)
        if memory is None:
            raise CheckpointError(f"{self.name(tensor)}: {CHANGED}")
        return memory

    def hand_to_planner(self) -> None:
        """The planner's state dict by name, with what is frozen. Not in the call: 4,000 values take
        half a millisecond."""
        self.planner.state_dict = dict(zip(self.structure.names, self._values, strict=True))

    def drop(self) -> None:
        """Lets go of the state; what is planned stays."""
        del self.live
        self._values = []

    def name(self, tensor: int) -> str:
        return self.structure.names[self.structure.places[tensor]]


def capture(
    request: SaveRequest, state_dict: dict[str, Any], planner: DefaultSavePlanner
) -> Captured | None:
    """Looks at a state dict; None where DCP has to plan a part of it."""
    try:
        live = _C.LiveState(state_dict)
    except Exception:
        _refuse_kinds(request, state_dict)  # which the error knows no names of
        raise
    frozen_planner = FrozenPlanner(planner.flatten_state_dict, planner.flatten_sharded_tensors)
    if not planner.flatten_state_dict:
        return None
    agreement = request.agreement
    key = (tuple(request.global_ranks), agreement.rank, agreement.is_coordinator)
    structure = _kept_structure(key, live)
    if structure is not None:
        frozen_planner.mappings = structure.paths
        frozen_planner.is_coordinator = agreement.is_coordinator
        return Captured(live, structure, frozen_planner)
    frozen_planner.set_up_planner(state_dict, is_coordinator=agreement.is_coordinator)
    local = LocalState(frozen_planner)
    if local.names.gathered or not _same_values(local.values.values(), live.values):
        return None
    structure = _structure_of(request, local, live, key)
    _structures.insert(0, structure)
    del _structures[_KEPT:]
    return Captured(live, structure, frozen_planner)


def _refuse_kinds(request: SaveRequest, state_dict: dict[str, Any]) -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state_dict, is_coordinator=request.agreement.is_coordinator)
    assert LocalState(planner).names


def _kept_structure(key: Any, live: _C.LiveState) -> Structure | None:
    for known in _structures:
        if known.key == key and live.has_fingerprint(known.fingerprint):
            return known
    return None


def _same_values(walked: Iterable[Any], values: Sequence[Any]) -> bool:
    """Whether DCP's flattening finds the same objects in the same order."""
    flat = list(walked)
    if len(flat) != len(values):
        return False
    return all(a is b for a, b in zip(flat, values, strict=True))


def _structure_of(
    request: SaveRequest, local: LocalState, live: _C.LiveState, key: Any
) -> Structure:
    # What other ranks hold is not known yet; mostly it is the same.
    division = Division.alike(request.agreement.rank, request.agreement.size)
    static = make_static_plan(local, division, request.global_ranks)
    names, places = list(local.values), live.places
    chunks = list(_local_chunks(static, _numbers_of(names, places)))
    assert local.paths is not None
    return Structure(
        fingerprint=live.fingerprint,
        key=key,
        kept=[(type(value), getattr(value, "_spec", None)) for value in local.values.values()],
        names=names,
        paths=dict(local.paths),
        places=places,
        shapes={
            name: tensor.shape for name, tensor in zip(static.names, static.locals, strict=True)
        },
        objects=_changeable_objects(local),
        devices=_devices_of(live, len(places)),
        holdings=local.holdings(request.global_ranks),
        division=division,
        static=static.without_tensors(),
        chunks=chunks,
        chunk_parts=_parts_of(chunks),
    )


def _numbers_of(names: Sequence[str], places: Sequence[int]) -> dict[str, int]:
    """Of the tensors among the values, by name."""
    return {names[place]: number for number, place in enumerate(places)}


def _parts_of(chunks: Sequence[LocalChunk]) -> _C.StagingParts:
    return _C.StagingParts([(chunk.tensor, chunk.first, chunk.size) for chunk in chunks])


def _devices_of(live: _C.LiveState, tensors: int) -> frozenset[torch.device]:
    """The devices other than the CPU of so many tensors."""
    devices = (live.tensor(i).device for i in range(tensors))
    return frozenset(filter(has_streams, devices))


def _changeable_objects(local: LocalState) -> list[int]:
    """Which values are no tensors, and may change."""
    objects = set(local.names.objects)
    return [
        i
        for i, (name, value) in enumerate(local.values.items())
        if name in objects and type(value) not in _PLAIN
    ]


def _local_chunks(static: StaticPlan, tensor_numbers: dict[str, int]) -> Iterator[LocalChunk]:
    """Where this rank's chunks lie in the memory of its shards."""
    for chunk in static.chunks:
        shard, sizes = static.locals[chunk.tensor], chunk.sizes
        starts = static.shard_start(chunk.tensor)
        first = 0  # elements of the shard before the chunk, in row-major order
        for offset, start, extent in zip(chunk.offsets, starts, shard.shape, strict=True):
            first = first * extent + offset - start
        yield LocalChunk(
            tensor=tensor_numbers[static.names[chunk.tensor]],
            first=first * shard.itemsize,
            size=math.prod(sizes) * shard.itemsize,
            kind=RECORD_DTYPES[shard.dtype],
            shape=tuple(sizes),
        )


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy that lies contiguous, with the tensor's own placement."""
    with torch.no_grad():
        local = local_of(tensor).detach().resolve_conj().resolve_neg()
        copy = local.clone(memory_format=torch.contiguous_format)
    return _like(tensor, copy)


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """A local tensor, with the placement of another one."""
    if isinstance(tensor, DTensor):
        return dtensor_around(local, tensor._spec)
    return local


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
        items = _plain_copies(value)
        return NotImplemented if items is None else kind(items)
    if kind is dict:
        keys, items = _plain_copies(value), _plain_copies(value.values())
        if keys is None or items is None:
            return NotImplemented
        return dict(zip(keys, items, strict=True))
    return NotImplemented


def _plain_copies(values: Collection[Any]) -> list[Any] | None:
    if _PLAIN.issuperset(map(type, values)):  # the names of all parameters, say
        return list(values)
    copies = [_plain_copy(value) for value in values]
    return None if any(copy is NotImplemented for copy in copies) else copies
