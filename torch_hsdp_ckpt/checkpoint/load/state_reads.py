"""Which records a state dict needs: what DCP's default planner plans, natively."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner_helpers import _init_state_dict
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.cuts import box_at, cuts_of
from ...common.tensors import is_plain_subclass, without_subclass
from ...errors import CheckpointError
from ..storage.nested_keys import NestedKeys, set_object
from ..storage.staged_reads import TensorRead

_SHOWN = 50  # missing keys in one error message


class PlannerNeededError(Exception):
    """There is something in the state dict or in the checkpoint that is left to DCP's planner."""


@dataclasses.dataclass(frozen=True)
class StateReads:
    """``sharded``: for DTensors; ``unsharded``: for other tensors."""

    sharded: list[TensorRead]
    unsharded: list[TensorRead]
    objects: list[_C.RecordPlace]

    @property
    def records(self) -> list[_C.RecordPlace]:
        tensors = [read.record for read in self.sharded + self.unsharded]
        return tensors + self.objects


def reads_of_state(
    state_dict: dict[str, Any],
    planner: DefaultLoadPlanner,
    native: _C.LoadPlanner,
    is_coordinator: bool,
) -> StateReads:
    """Raises CheckpointError for keys and shapes that the checkpoint has not,
    CorruptCheckpointError for chunks that do not cover a tensor once, PlannerNeededError for
    tensors of kinds that are left to the planner."""
    _set_up(planner, state_dict, is_coordinator)
    if planner.flatten_state_dict:
        _fit_old_names(planner, native)
    state = planner.state_dict
    entries = native.describe(list(state))
    objects: list[str] = []
    boxes: list[_LocalBox] = []
    layouts = _ShardBoxes()
    if not planner.allow_partial_load:
        found = zip(state, entries, strict=True)
        _check_none_is_missing([name for name, entry in found if entry is None])
    for (name, value), entry in zip(state.items(), entries, strict=True):
        if entry is None:
            continue
        if not entry.is_tensor:
            objects.append(name)
        else:
            _check_tensor(name, value, entry.size)
            boxes.extend(_local_boxes(name, value, entry.size, layouts))
    return _reads_of_boxes(boxes, objects, native)


def _set_up(planner: DefaultLoadPlanner, state_dict: dict[str, Any], is_coordinator: bool) -> None:
    """What the planner's ``set_up_planner`` does, but for values that are neither tensors nor
    plain: torch (2.11 to 2.15) puts None in their place, in the caller's own dicts, and so forgets
    what an object may be an instance of, and loses the value if the load then fails."""
    planner.original_state_dict = state_dict
    planner.metadata, planner.is_coordinator = None, is_coordinator
    state = state_dict
    if planner.flatten_sharded_tensors:
        state = _flatten_sharded_tensors(state)
    if planner.flatten_state_dict:
        state, planner.mappings = flatten_state_dict(state)
    planner.state_dict = state
    keys = NestedKeys(state_dict)
    for name, value in state.items():
        # A ShardedTensor of which this rank has nothing can't say what it is.
        if isinstance(value, Tensor) and not isinstance(value, ShardedTensor) and value.is_meta:
            replaced = {name: value}
            _init_state_dict(replaced)
            state[name] = replaced[name]
            set_object(planner, keys, name, replaced[name])


def _reads_of_boxes(
    boxes: "list[_LocalBox]", objects: list[str], native: _C.LoadPlanner
) -> StateReads:
    sharded: list[TensorRead] = []
    unsharded: list[TensorRead] = []
    chunks_of_boxes = native.plan([(box.name, box.offsets, box.sizes) for box in boxes])
    for box, chunks in zip(boxes, chunks_of_boxes, strict=True):
        reads = sharded if box.is_sharded else unsharded
        reads.extend(_read_of_chunk(box, chunk) for chunk in chunks)
    return StateReads(sharded, unsharded, native.objects(objects))


class _LocalBox(NamedTuple):
    """The part of a tensor that this rank has, in elements of the whole tensor, and its memory."""

    name: str
    offsets: list[int]
    sizes: list[int]
    target: Tensor
    is_sharded: bool


class _ShardBoxes:
    """Offsets and sizes of this rank's shards, found once for each shape and sharding."""

    def __init__(self) -> None:
        self._boxes: dict[Any, tuple[list[int], list[int]]] = {}

    def of(self, tensor: DTensor) -> tuple[list[int], list[int]]:
        key = (tensor.shape, tensor.placements, id(tensor.device_mesh))
        if key not in self._boxes:
            self._boxes[key] = _box_of(tensor)
        return self._boxes[key]


def _box_of(tensor: DTensor) -> tuple[list[int], list[int]]:
    mesh_shape = tuple(tensor.device_mesh.shape)
    cuts = cuts_of(tensor.placements, mesh_shape)
    if cuts is not None:
        place = tensor.device_mesh.get_coordinate() or ()
        offsets, sizes = box_at(tensor.shape, cuts, mesh_shape, place)
        if sizes == list(tensor._local_tensor.shape):
            return offsets, sizes
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if len(chunks) != 1:
        raise PlannerNeededError
    return list(chunks[0].offsets), list(chunks[0].sizes)


def _check_none_is_missing(missing: list[str]) -> None:
    if not missing:
        return
    shown = ", ".join(missing[:_SHOWN])
    more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise CheckpointError(f"Missing key in checkpoint state_dict: {shown}{more}.")


def _check_tensor(name: str, value: Any, size: list[int]) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise CheckpointError(f"{name}: the checkpoint has a tensor, the state dict {kind}")
    is_common = type(value) in (Tensor, torch.nn.Parameter, DTensor)
    if not is_common and not is_plain_subclass(value):
        raise PlannerNeededError
    if list(value.shape) != size:
        raise CheckpointError(
            f"Size mismatch between saved {size} and current: {list(value.shape)} for {name}"
        )


def _local_boxes(
    name: str, value: Tensor, size: list[int], layouts: _ShardBoxes
) -> Iterator[_LocalBox]:
    """One box; none for a DTensor on a mesh that this rank is not in."""
    if not isinstance(value, DTensor):
        is_common = type(value) in (Tensor, torch.nn.Parameter)
        target = value.detach() if is_common else without_subclass(value)
        yield _LocalBox(name, [0] * len(size), size, target, is_sharded=False)
    elif value.device_mesh.get_coordinate() is not None:
        if type(value._local_tensor) is not Tensor:
            raise PlannerNeededError
        offsets, sizes = layouts.of(value)
        yield _LocalBox(name, offsets, sizes, value._local_tensor.detach(), is_sharded=True)


def _read_of_chunk(box: _LocalBox, chunk: _C.ChunkToRead) -> TensorRead:
    target, sizes = box.target, chunk.sizes
    if sizes != box.sizes:
        for dim, (start, count) in enumerate(zip(chunk.in_box, sizes, strict=True)):
            target = target.narrow(dim, start, count)
    return TensorRead(chunk.record, chunk.in_record, sizes, target)


def _fit_old_names(planner: DefaultLoadPlanner, native: _C.LoadPlanner) -> None:
    """torch up to 2.3 flattened less, so that its checkpoints have other names. This finds them as
    DCP's planner does."""
    missing = set(native.names()) - planner.state_dict.keys()
    if not missing:
        return
    _version._derived_version = "2_3"
    try:
        state_dict, mappings = flatten_state_dict(planner.original_state_dict)
    finally:
        _version._derived_version = None
    if state_dict.keys() & missing:
        planner.state_dict, planner.mappings = state_dict, mappings
