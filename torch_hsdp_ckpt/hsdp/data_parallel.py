"""The data-parallel part of a mesh: the dimensions along which units shard and replicate."""

from dataclasses import dataclass
from typing import Any

import torch.distributed.fsdp as fsdp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .arguments import at
from .meshes import check_holds_this_rank, check_mesh, unsharded


@dataclass
class _DataParallelMeshDims:
    """Which dimensions of the mesh that parameters are DTensors on units shard and replicate over,
    by name; several are flattened into one. As torch 2.15's, of which torch before has none."""

    shard: str | tuple[str, ...] | None = None
    replicate: str | tuple[str, ...] | None = None

    @property
    def shard_names(self) -> tuple[str, ...]:
        return _names(self.shard)

    @property
    def replicate_names(self) -> tuple[str, ...]:
        return _names(self.replicate)


def _names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


DataParallelMeshDims: Any = getattr(fsdp, "DataParallelMeshDims", _DataParallelMeshDims)


@dataclass(frozen=True)
class DataParallel:
    """``mesh``: of one dimension (shards) or two (replicas, shards), on whose groups units gather
    and reduce. ``whole``: the mesh that parameters are DTensors on already, which has these
    dimensions among others (``dp_mesh_dims``); None: what they are DTensors on are other dimensions
    of the same root mesh, or they are plain. ``shard_dims``, ``replica_dims``: of ``whole``."""

    mesh: DeviceMesh
    whole: DeviceMesh | None = None
    shard_dims: tuple[int, ...] = ()
    replica_dims: tuple[int, ...] = ()


def data_parallel_of(mesh: DeviceMesh, dims: Any, *modules: nn.Module) -> DataParallel:
    """What ``fully_shard(mesh=mesh, dp_mesh_dims=dims)`` shards and replicates over. ``dims``:
    torch's ``DataParallelMeshDims``, names of dimensions; None: all of the mesh. Collective where
    several are flattened into one. Raises ValueError for names that the mesh lacks, or that come
    twice, and where this rank is not in the mesh; TypeError for anything else."""
    if dims is None:
        check_mesh(mesh, *modules)
        return DataParallel(mesh)
    if not isinstance(dims, DataParallelMeshDims):
        raise TypeError(
            f"{at(*modules)}dp_mesh_dims is a DataParallelMeshDims(shard=..., replicate=...), not "
            f"a {type(dims).__name__}"
        )
    check_holds_this_rank(mesh, *modules)
    shards, replicas = tuple(dims.shard_names), tuple(dims.replicate_names)
    names = _checked_names(mesh, (*shards, *replicas), *modules)
    parts = [_flat(mesh, part) for part in (replicas, shards) if part]
    joined = parts[0] if len(parts) == 1 else DeviceMesh._concatenate(parts)
    return DataParallel(
        joined if shards else unsharded(joined, *modules),
        mesh,
        tuple(names.index(name) for name in shards),
        tuple(names.index(name) for name in replicas),
    )


def _checked_names(
    mesh: DeviceMesh, asked: tuple[str, ...], *modules: nn.Module
) -> tuple[str, ...]:
    """The mesh's names of its dimensions, among which those that are asked for are."""
    names = mesh.mesh_dim_names or ()
    is_right = asked and names and set(asked) <= set(names) and len(set(asked)) == len(asked)
    if not is_right:
        raise ValueError(
            f"{at(*modules)}dp_mesh_dims names {asked or 'nothing'}, and has to name dimensions of "
            f"the mesh, each once; {mesh}"
        )
    return names


def _flat(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("_".join(names))
