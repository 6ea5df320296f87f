"""What each rank writes in a save, from the shapes, meshes and placements of its own state dict.

Ranks compare two digests: of the DTensors' specs, and of the keys, types and shapes of all the
other values. Where they are equal nobody has to be told anything; ``csrc/checkpoint/save`` then has
every rank's records and all their places."""

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.cuts import Cuts
from ...common.tensors import RECORD_DTYPES, check_storage
from ...errors import CheckpointError
from .local_state import LocalState, Sharding, SortedNames

# Before torch 2.15 the metadata says nothing of strides.
_HAS_STRIDES = any(field.name == "strides" for field in dataclasses.fields(TensorProperties))

# Bytes that a plain tensor has at the most to be small. Random states are, some 5 KiB.
_SMALL = 16 << 10


def is_one_ranks(nbytes: int) -> bool:
    """Whether the rank that writes the objects writes a plain tensor of this size as well: what
    belongs together, such as the parts of a random state, may differ by rank, and has to come from
    one. Larger ones are worth it to be dealt out to all ranks."""
    return nbytes <= _SMALL


@dataclasses.dataclass(frozen=True)
class StaticPlan:
    """The part of a save that needs no talk. ``plan`` knows all ranks' records, ``chunks`` are this
    rank's."""

    plan: _C.SavePlan
    chunks: _C.ChunkList
    names: Sequence[str]  # of the plan's tensors
    locals: Sequence[Tensor]  # this rank's shard of each, which may need a gradient
    rank: int
    objects: Sequence[str]  # pickled by the coordinator

    def shard_start(self, tensor: int) -> list[int]:
        """Where this rank's shard begins in the whole tensor."""
        return self.plan.shard_offsets(self.rank, tensor)

    def tensor_of(self, chunk: _C.PlannedChunk) -> Tensor:
        """The bytes of a chunk: the local shard, or a part of it."""
        tensor = self.locals[chunk.tensor].detach()
        sizes = chunk.sizes
        if list(tensor.shape) == sizes:
            return tensor
        bounds = zip(chunk.offsets, sizes, self.shard_start(chunk.tensor), strict=True)
        for dim, (offset, size, start) in enumerate(bounds):
            tensor = tensor.narrow(dim, offset - start, size)
        return tensor

    def chunk_names(self) -> Iterator[str]:
        """The name of the tensor of each chunk that this rank writes."""
        return (self.names[chunk.tensor] for chunk in self.chunks)

    def without_tensors(self) -> "StaticPlan":
        """The plan alone, which keeps no tensor alive."""
        return dataclasses.replace(self, locals=())


class ChunkTensors(Sequence[Tensor]):
    """The live tensors of a plan's chunks, each made when it is asked for."""

    def __init__(self, static: StaticPlan) -> None:
        self._static = static

    def __len__(self) -> int:
        return len(self._static.chunks)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices are taken
        return self._static.tensor_of(self._static.chunks[index])


def make_static_plan(
    state: LocalState, names: SortedNames, rank: int, global_ranks: Sequence[int]
) -> StaticPlan:
    """Plans the DTensors, tensors and objects of these names, on which all ranks agree.

    ``rank``: this one's in the saving process group, whose ranks ``global_ranks`` are. Raises
    CheckpointError, naming the tensor, for a shard that no rank of the group holds and for a local
    shard of another shape than mesh and placements give it."""
    shardings = _Shardings(global_ranks)
    tensors = [_planned_dtensor(state, name, shardings) for name in names.dtensors]
    tensors += [_planned_tensor(state, name, shardings) for name in names.tensors]
    with_details = rank == 0  # what DCP's metadata says of a tensor, by the coordinator's
    plan = _C.SavePlan(shardings.arguments, (_argument(it, with_details) for it in tensors))
    _check_local_shards(plan.local_shards(rank), tensors, rank)
    return StaticPlan(
        plan=plan,
        chunks=plan.chunks(rank),
        names=[tensor.name for tensor in tensors],
        locals=[tensor.local for tensor in tensors],
        rank=rank,
        objects=list(names.objects),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedTensor:
    name: str
    whole: Tensor  # a DTensor, or the same as ``local``
    local: Tensor
    sharding: int


_ShardingKey = tuple[int, Cuts]  # the id of a mesh, and how it cuts


class _Shardings:
    """The distinct shardings of a plan's tensors, numbered as they come."""

    def __init__(self, global_ranks: Sequence[int]) -> None:
        self._size = len(global_ranks)
        self._rank_in_group = {rank: i for i, rank in enumerate(global_ranks)}
        self._numbers: dict[_ShardingKey | bool, int] = {}  # a bool: plain tensors' ones
        self.arguments: list[_C.Sharding] = []

    def of_dtensor(self, sharding: Sharding) -> int:
        key = (id(sharding.mesh), sharding.cuts)
        if key not in self._numbers:
            # A plan cuts over one mesh dimension after the other.
            dims, order = sharding.cuts
            mesh = sharding.mesh.mesh.permute(order)
            ranks = [self._rank_in_group.get(rank, -1) for rank in mesh.flatten().tolist()]
            ordered = [dims[mesh_dim] for mesh_dim in order]
            self._add(key, _C.Sharding(list(mesh.shape), ranks, ordered, whole=False))
        return self._numbers[key]

    def of_plain_tensor(self, is_coordinators: bool) -> int:
        """Unlike a DTensor's replicas these may differ (each rank's own average, say): a tensor is
        one rank's, as in DCP."""
        if is_coordinators not in self._numbers:
            ranks = range(1 if is_coordinators else self._size)
            self._add(is_coordinators, _C.Sharding([len(ranks)], ranks, (-1,), whole=True))
        return self._numbers[is_coordinators]

    def _add(self, key: _ShardingKey | bool, sharding: _C.Sharding) -> None:
        self._numbers[key] = len(self.arguments)
        self.arguments.append(sharding)


def _planned_dtensor(state: LocalState, name: str, shardings: _Shardings) -> _PlannedTensor:
    value: DTensor = state.values[name]
    sharding = state.sharding_of(value)
    assert sharding is not None
    local = value._local_tensor
    check_storage(local.detach(), name)
    return _PlannedTensor(name, value, local, shardings.of_dtensor(sharding))


def _planned_tensor(state: LocalState, name: str, shardings: _Shardings) -> _PlannedTensor:
    value: Tensor = state.values[name]
    sharding = shardings.of_plain_tensor(is_one_ranks(value.nbytes))
    return _PlannedTensor(name, value, value, sharding)


def _check_local_shards(shards: _C.ChunkList, tensors: Sequence[_PlannedTensor], rank: int) -> None:
    for shard in shards:
        tensor = tensors[shard.tensor]
        shape = list(tensor.local.shape)
        if shape != shard.sizes:
            raise CheckpointError(
                f"{tensor.name}: rank {rank} holds a shard of shape {shape}; its mesh and "
                f"placements make it {shard.sizes} of {list(tensor.whole.shape)}"
            )


def _argument(tensor: _PlannedTensor, with_details: bool) -> _C.TensorToPlan:
    local = tensor.local
    strides = local.stride() if with_details and _HAS_STRIDES else None
    pinned = with_details and local.is_pinned()
    dtype = RECORD_DTYPES[local.dtype]
    return _C.TensorToPlan(tensor.name, dtype, tensor.whole.shape, tensor.sharding, strides, pinned)
