"""What a rank writes in a save, from the shapes, meshes and placements of its own state dict.

Ranks that hold the same need not be told anything: ``csrc/checkpoint/save`` then has every rank's
records and all their places. Where they do not, a plan has the records of what this rank holds, and
merged_plan.py puts the plans together."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.cuts import Cuts
from ...common.tensors import RECORD_DTYPES, check_storage
from ...errors import CheckpointError
from .division import Division
from .local_state import LocalState, Sharding

# Before torch 2.15 the metadata says nothing of strides.
_HAS_STRIDES = any(field.name == "strides" for field in dataclasses.fields(TensorProperties))

_SHOWN = 16  # ranks of a mesh in an error message

# Bytes that a plain tensor has at the most to be small. Random states are, some 5 KiB.
_SMALL = 16 << 10


def is_one_ranks(nbytes: int) -> bool:
    """Whether the rank that writes the objects writes a plain tensor of this size as well: what
    belongs together, such as the parts of a random state, may differ by rank, and has to come from
    one. Larger ones are worth it to be dealt out to all ranks."""
    return nbytes <= _SMALL


@dataclasses.dataclass(frozen=True)
class StaticPlan:
    """The part of a save that needs no talk. ``plan`` knows the records of all ranks that hold what
    this one does, ``chunks`` are its own ones.

    ``source``: what the plan was made from, unless all ranks hold the same. ``locals``: this rank's
    shard of each of its tensors, which may need a gradient. ``objects``: what this rank pickles;
    ``objects_held``: other ranks' too."""

    plan: _C.SavePlan
    chunks: _C.ChunkList
    source: "PlanSource | None"
    names: Sequence[str]  # of the plan's tensors
    locals: Sequence[Tensor]
    rank: int
    objects: Sequence[str]
    objects_held: Sequence[str]

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


class PlannedSharding(NamedTuple):
    """How tensors lie over the ranks of a saving group; as ``_C.Sharding`` has it."""

    whole: bool
    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    dims: tuple[int, ...]

    def argument(self) -> _C.Sharding:
        return _C.Sharding(self.mesh_shape, self.ranks, self.dims, self.whole)

    def describe(self, tensor: "TensorSource") -> str:
        """For an error message: the tensor, and for a sharded one how it is cut."""
        what = f"tensor {list(tensor.shape)} of {tensor.dtype}"
        if self.whole:
            return f"a {what}"
        ranks = list(self.ranks) if len(self.ranks) <= _SHOWN else f"{len(self.ranks)} ranks"
        return f"a sharded {what}, cut by mesh {list(self.mesh_shape)} of {ranks}"


class TensorSource(NamedTuple):
    """What a plan and the metadata say of a tensor; as ``_C.TensorToPlan`` has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sharding: int
    strides: tuple[int, ...] | None
    pinned: bool


class PlanSource(NamedTuple):
    """What a plan is made from. Where two have the same of a sharding, sorted by name, their plans
    have its chunks in the same order, and shardings are sorted too."""

    shardings: Sequence[PlannedSharding]
    tensors: Iterable[TensorSource]

    def plan(self) -> _C.SavePlan:
        arguments = [sharding.argument() for sharding in self.shardings]
        return _C.SavePlan(arguments, (_C.TensorToPlan(*tensor) for tensor in self.tensors))


def make_static_plan(
    state: LocalState, division: Division, global_ranks: Sequence[int]
) -> StaticPlan:
    """Plans all that DCP need not. ``global_ranks``: the saving process group's.

    Raises CheckpointError, naming the tensor, for a shard that no rank of the group holds and for a
    local shard of another shape than mesh and placements give it."""
    names, shardings = state.names, _Shardings(division, global_ranks)
    tensors = [_planned_dtensor(state, name, shardings) for name in names.dtensors]
    tensors += [_planned_tensor(state, name, shardings) for name in names.tensors]
    source = _source_of(tensors, shardings.made, division)
    plan, rank = source.plan(), division.rank
    _check_local_shards(plan.local_shards(rank), tensors, rank)
    return StaticPlan(
        plan=plan,
        chunks=plan.chunks(rank),
        source=None if division.is_alike else source,
        names=[tensor.name for tensor in tensors],
        locals=[tensor.local for tensor in tensors],
        rank=rank,
        objects=[name for name in names.objects if division.ranks_with(name)[0] == rank],
        objects_held=names.objects,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _PlannedTensor:
    name: str
    whole: Tensor  # a DTensor, or the same as ``local``
    local: Tensor
    sharding: int  # as they are made


# A mesh's digest, how it cuts, who holds the tensor; or the ranks that hold a plain tensor.
_ShardingKey = tuple[bytes, Cuts, tuple[int, ...] | None] | Sequence[int]


class _Shardings:
    """The shardings of a plan's tensors, each made once."""

    def __init__(self, division: Division, global_ranks: Sequence[int]) -> None:
        self._division = division
        self._rank_in_group = {rank: i for i, rank in enumerate(global_ranks)}
        self._numbers: dict[_ShardingKey, int] = {}
        self.made: list[PlannedSharding] = []

    def of_dtensor(self, name: str, sharding: Sharding) -> int:
        division, holders = self._division, None
        if sharding.digest in division.torn:
            holders = division.holders[name]
        key = (sharding.digest, sharding.cuts, holders)
        if key not in self._numbers:
            self._add(key, self._sharding_of(sharding, holders))
        return self._numbers[key]

    def _sharding_of(self, sharding: Sharding, holders: Collection[int] | None) -> PlannedSharding:
        mesh = sharding.mesh.mesh
        ranks = [self._rank_in_group.get(rank, -1) for rank in mesh.flatten().tolist()]
        if holders is not None:
            ranks = [rank if rank in holders else -1 for rank in ranks]
        # Meshes that hold the same replicate; a plan cuts over one dimension after the other.
        alike = torch.tensor(self._division.replicas.get(sharding.digest, ranks))
        dims, order = sharding.cuts
        ordered = alike.view(-1, *mesh.shape).permute(0, *(dim + 1 for dim in order))
        return PlannedSharding(
            whole=False,
            ranks=tuple(ordered.flatten().tolist()),
            mesh_shape=tuple(ordered.shape),
            dims=(-1, *(dims[mesh_dim] for mesh_dim in order)),
        )

    def of_plain_tensor(self, name: str, is_one_ranks: bool) -> int:
        """Unlike a DTensor's replicas these may differ (each rank's own average, say): a tensor is
        one rank's, as in DCP."""
        holders = self._division.ranks_with(name)
        ranks = holders[:1] if is_one_ranks else holders
        if ranks not in self._numbers:
            self._add(ranks, PlannedSharding(True, tuple(ranks), (len(ranks),), (-1,)))
        return self._numbers[ranks]

    def _add(self, key: _ShardingKey, sharding: PlannedSharding) -> None:
        if sharding not in self.made:
            self.made.append(sharding)
        self._numbers[key] = self.made.index(sharding)


def _planned_dtensor(state: LocalState, name: str, shardings: _Shardings) -> _PlannedTensor:
    value: DTensor = state.values[name]
    sharding = state.sharding_of(value)
    assert sharding is not None
    local = value._local_tensor
    check_storage(local.detach(), name)
    return _PlannedTensor(name, value, local, shardings.of_dtensor(name, sharding))


def _planned_tensor(state: LocalState, name: str, shardings: _Shardings) -> _PlannedTensor:
    value: Tensor = state.values[name]
    sharding = shardings.of_plain_tensor(name, is_one_ranks(value.nbytes))
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


def _source_of(
    tensors: Sequence[_PlannedTensor], shardings: Sequence[PlannedSharding], division: Division
) -> PlanSource:
    order = sorted(range(len(shardings)), key=shardings.__getitem__)
    place = {number: i for i, number in enumerate(order)}
    sources = (_source(tensor, place[tensor.sharding], division.speaks) for tensor in tensors)
    kept = sources if division.is_alike else list(sources)
    return PlanSource([shardings[number] for number in order], kept)


def _source(tensor: _PlannedTensor, sharding: int, with_details: bool) -> TensorSource:
    local, shape = tensor.local, tensor.whole.shape
    strides = local.stride() if with_details and _HAS_STRIDES else None
    pinned = with_details and local.is_pinned()
    return TensorSource(tensor.name, RECORD_DTYPES[local.dtype], shape, sharding, strides, pinned)
