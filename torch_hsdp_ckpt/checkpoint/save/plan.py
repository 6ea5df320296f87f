"""What each rank writes in a save, from the shapes, meshes and placements of its own state dict.

Ranks compare two digests: of the DTensors' specs, and of the keys, types and shapes of all the
rest. Where they are equal nobody has to be told anything; ``csrc/checkpoint/save_plan`` then has
every rank's records and all their places."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint.planner_helpers as _helpers
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ... import _C
from ...common.tensors import RECORD_DTYPES, check_storage, is_plain
from ...errors import CheckpointError

DIGEST_BYTES = 16
# torch 2.15's tensors that say themselves which chunks of a larger one they hold.
_is_checkpointable = getattr(_helpers, "_is_checkpointable_tensor", lambda value: False)

# Before torch 2.15 the metadata says nothing of strides.
_HAS_STRIDES = any(field.name == "strides" for field in dataclasses.fields(TensorProperties))

Piece = tuple[int, list[int], list[int]]  # tensor, offsets in the whole tensor, sizes


class LocalState:
    """A rank's flattened state dict, sorted by who can plan it.

    All are names. ``dtensors`` and ``tensors``: what the static plan takes; each plain tensor is
    written by one rank, whole. ``objects``: everything that is pickled. ``rest``: what only DCP's
    planning knows how to divide: ShardedTensors, tensor subclasses, placements other than Shard and
    Replicate, a dimension cut twice."""

    def __init__(self, planner: DefaultSavePlanner, sort: bool = True) -> None:
        self.state: Mapping[str, Any] = planner.state_dict
        self.paths: Mapping[str, Any] | None = (
            planner.mappings if planner.flatten_state_dict else None
        )
        self.dtensors: list[str] = []
        self.tensors: list[str] = []
        self.objects: list[str] = []
        self.rest: list[str] = []
        self._mesh_keys: dict[int, tuple[Any, ...]] = {}
        self.shardings: dict[
            tuple[int, tuple[Placement, ...]], tuple[DeviceMesh, tuple[int, ...] | None]
        ] = {}
        self._sorted = False
        if sort:
            self.sort()

    def sort(self) -> None:
        """Once; what an object made without ``sort`` holds are names and values only."""
        if not self._sorted:
            self._sorted = True
            for name, value in self.state.items():
                self._sort(name, value)

    def _sort(self, name: str, value: Any) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{name!r}: a name that has no UTF-8 can't be saved") from None
        if isinstance(value, DTensor):
            if (
                type(value) is DTensor
                and self.sharding_of(value)[1] is not None
                and is_plain(value._local_tensor)
            ):
                self.dtensors.append(name)
            else:
                self.rest.append(name)
        elif isinstance(value, Tensor):
            plain = value.data if type(value) is torch.nn.Parameter else value
            if is_plain(plain) and not _is_checkpointable(value):
                check_storage(plain, name)
                self.tensors.append(name)
            else:
                self.rest.append(name)
        elif isinstance(value, ShardedTensor) or hasattr(value, "__create_write_items__"):
            self.rest.append(name)
        else:
            self.objects.append(name)

    def sharding_of(self, tensor: DTensor) -> tuple[DeviceMesh, tuple[int, ...] | None]:
        """The mesh and, for each of its dimensions, the tensor dimension that it cuts, or -1; None
        if that is not all."""
        spec = tensor._spec
        key = (id(spec.mesh), spec.placements)
        if (known := self.shardings.get(key)) is None:
            dims: list[int] = []
            for placement in spec.placements:
                if type(placement) is Replicate:
                    dims.append(-1)
                elif type(placement) is Shard and placement.dim not in dims:
                    dims.append(placement.dim)
            known = (spec.mesh, tuple(dims) if len(dims) == len(spec.placements) else None)
            self.shardings[key] = known
        return known

    def digests(self) -> bytes:
        """Two digests: equal on two ranks if they hold the same DTensors, and if they hold the same
        other values."""
        return _digest(self._dtensor_keys()) + _digest(self._other_keys())

    def _dtensor_keys(self) -> Iterator[tuple[Any, ...]]:
        for name in self.dtensors:
            t = self.state[name]
            spec = (*self._mesh_key(t.device_mesh), self.sharding_of(t)[1])
            yield name, str(t.dtype), tuple(t.shape), *spec, self._path(name)

    def _other_keys(self) -> Iterator[tuple[Any, ...]]:
        for name in self.tensors:
            t = self.state[name]
            yield name, str(t.dtype), tuple(t.shape), self._path(name)
        for name in self.objects:
            yield name, type(self.state[name]).__qualname__, (), self._path(name)

    def _mesh_key(self, mesh: DeviceMesh) -> tuple[Any, ...]:
        if (key := self._mesh_keys.get(id(mesh))) is None:
            ranks = mesh.mesh
            digest = hashlib.blake2b(ranks.numpy().tobytes(), digest_size=DIGEST_BYTES).digest()
            key = self._mesh_keys[id(mesh)] = (tuple(ranks.shape), digest)
        return key

    def _path(self, name: str) -> Any:
        return None if self.paths is None else self.paths[name]

    def paths_of(self, names: Iterable[str]) -> dict[str, Any] | None:
        return None if self.paths is None else {name: self.paths[name] for name in names}

    def drop(self) -> None:
        """Lets go of all tensors, objects, names and paths."""
        self.state, self.paths, self.dtensors, self.tensors, self.shardings = {}, None, [], [], {}

    def items_of(self, names: Iterable[str]) -> list[WriteItem]:
        """What DCP's planner would have this rank write, before ranks that hold the same are told
        apart."""
        items: list[WriteItem] = []
        for name in names:
            value = self.state[name]
            # A DTensor of a mesh without this rank has nothing here.
            if not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None:
                items += _helpers._create_write_items(name, value)
        return items


def _digest(values: Iterable[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
    return digest.digest()


@dataclasses.dataclass
class StaticPlan:
    """The part of a save that needs no talk. ``plan`` knows all ranks' records, ``pieces`` are this
    rank's."""

    plan: _C.SavePlan
    pieces: _C.PieceList
    names: list[str]  # of the plan's tensors
    locals: list[Tensor]  # this rank's shard of each, which may need a gradient
    rank: int
    objects: list[str]  # pickled by the coordinator

    def shard_start(self, tensor: int) -> list[int]:
        """Where this rank's shard begins in the whole tensor."""
        return self.plan.shard_offsets(self.rank, tensor)

    def tensor_of(self, piece: Piece) -> Tensor:
        """The bytes of a piece: the local shard, or a part of it."""
        index, offsets, sizes = piece
        tensor = self.locals[index].detach()
        if list(tensor.shape) == list(sizes):
            return tensor
        for dim, (offset, size, start) in enumerate(
            zip(offsets, sizes, self.shard_start(index), strict=True)
        ):
            tensor = tensor.narrow(dim, offset - start, size)
        return tensor


def make_static_plan(
    state: LocalState,
    rank: int,
    group_ranks: Sequence[int],
    dtensors: bool,
    others: bool,
    coordinator: bool,
) -> StaticPlan:
    """Plans the DTensors and the other values, each if its digests agree.

    ``group_ranks``: the saving process group's ranks, as global ones. Raises CheckpointError,
    naming the tensor, for a shard that no rank of the group holds and for a local shard of another
    shape than mesh and placements give it."""
    rank_in_group = {global_rank: i for i, global_rank in enumerate(group_ranks)}
    shardings: list[tuple[Sequence[int], Sequence[int], Sequence[int], bool]] = []
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    for name in state.dtensors if dtensors else ():
        mesh, dims = state.sharding_of(state.state[name])
        assert dims is not None
        if (id(mesh), dims) not in numbers:
            numbers[id(mesh), dims] = len(shardings)
            ranks = [rank_in_group.get(r, -1) for r in mesh.mesh.flatten().tolist()]
            shardings.append((list(mesh.mesh.shape), ranks, dims, False))
    if others and state.tensors:
        # Unlike a DTensor's replicas these may differ (each rank's own average, say): a tensor is
        # one rank's, as in DCP.
        shardings.append(([len(group_ranks)], range(len(group_ranks)), (-1,), True))
    names: list[str] = []
    local: list[Tensor] = []

    def planned() -> Iterator[tuple[str, str, Sequence[int], int, Sequence[int] | None, bool]]:
        """One by one into the plan, which then holds all of it."""
        for name in (*(state.dtensors if dtensors else ()), *(state.tensors if others else ())):
            value = state.state[name]
            tensor, number = value, len(shardings) - 1
            if isinstance(value, DTensor):
                mesh, dims = state.sharding_of(value)
                assert dims is not None
                tensor, number = value._local_tensor, numbers[id(mesh), dims]
                check_storage(tensor.detach(), name)
            names.append(name)
            local.append(tensor)
            # What DCP's metadata says of a tensor, by the coordinator's.
            strides, pinned = (
                (tensor.stride() if _HAS_STRIDES else None, tensor.is_pinned())
                if coordinator
                else (None, False)
            )
            yield name, RECORD_DTYPES[tensor.dtype], value.shape, number, strides, pinned

    plan = _C.SavePlan(shardings, planned())
    for index, _, sizes in plan.local_shards(rank):
        if sizes != list(local[index].shape):
            raise CheckpointError(
                f"{names[index]}: rank {rank} holds a shard of shape {list(local[index].shape)}; "
                "its mesh and placements "
                f"make it {sizes} of {list(state.state[names[index]].shape)}"
            )
    objects = list(state.objects) if others else []
    return StaticPlan(plan, plan.pieces(rank), names, local, rank, objects)


def plan_rest(plans: Sequence[SavePlan], flatten: bool) -> tuple[list[SavePlan], Metadata]:
    """DCP's own planning, for what the static plan leaves: every rank's final plan, and its entries
    of the metadata."""
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    planner.set_up_planner({}, is_coordinator=True)
    final, metadata = planner.create_global_plan(list(plans))
    return final, metadata
