"""How a tensor is cut over a mesh.

A shard is ``ceil(d0 / S)`` rows of dimension 0, the last ones fewer or none, as DTensor cuts it.
The shard dimension is the mesh's last one; all others hold replicas."""

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from ... import _C


def shards_rows_only(spec: DTensorSpec) -> bool:
    """Whether dimension 0 is cut over the mesh's last dimension and nothing else is."""
    return spec.placements[-1] == Shard(0) and all(p == Replicate() for p in spec.placements[:-1])


def coordinate_of(mesh: DeviceMesh) -> list[int]:
    """Where this rank is in ``mesh``; a rank outside counts as the first."""
    return list(mesh.get_coordinate() or [0])


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this is the rank that ``rank0_only`` means: the mesh's first, rank 0 if the mesh
    holds all ranks."""
    return not any(coordinate_of(mesh))


def is_in_first_replica(mesh: DeviceMesh) -> bool:
    """Whether this rank is in the shard group of the mesh's first rank."""
    return not any(coordinate_of(mesh)[:-1])


def shards_of(mesh: DeviceMesh) -> int:
    return mesh.size(mesh.ndim - 1)


def chunk_rows(shape: Sequence[int], mesh: DeviceMesh) -> int:
    """Rows of the largest shard, which is the first one."""
    return _C.shard_rows(shape[0], shards_of(mesh), 0).count
