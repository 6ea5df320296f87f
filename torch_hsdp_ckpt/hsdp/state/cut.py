"""Shards from whole tensors: cut where every rank has the whole, sent where only the first has."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from ... import _C
from ...common.tensors import dtensor_around, local_of
from ..layout import own_box, spec_with_dtype
from .placement import (
    chunk_rows,
    coordinate_of,
    is_first,
    is_in_first_replica,
    shards_of,
    shards_rows_only,
)


def shard_of(whole: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """This rank's part of ``whole`` as a DTensor with ``spec``'s mesh and placements: a view,
    nothing is sent or copied."""
    local = whole.detach()
    if shards_rows_only(spec):  # quicker where there are many
        rows = _own_rows(whole.shape[0], spec.mesh)
        local = local.narrow(0, rows.first, rows.count)
    else:
        local = own_box(local, spec)
    return dtensor_around(local, spec)


def own_part(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of ``whole``, a copy with its dtype, placed as ``like`` is."""
    part = shard_of(whole.detach(), spec_with_dtype(like._spec, whole.dtype))
    local = local_of(part).to(local_of(like).device).clone()
    return dtensor_around(local, part._spec)


def _own_rows(rows: int, mesh: DeviceMesh) -> _C.ShardRows:
    """Which of a tensor's rows this rank holds."""
    return _C.shard_rows(rows, shards_of(mesh), mesh.get_local_rank(mesh.ndim - 1))


def scatter(whole: torch.Tensor | None, spec: DTensorSpec) -> DTensor:
    """The DTensor with ``spec`` whose whole tensor the mesh's first rank passes in ``whole``; other
    ranks pass None. ``spec`` cuts rows only (``shards_rows_only``). Collective.

    The first rank sends each rank of its shard group that rank's rows, and these go on to their
    replicas."""
    meta = spec.tensor_meta
    assert meta is not None and shards_rows_only(spec)
    chunk_shape = (chunk_rows(meta.shape, spec.mesh), *meta.shape[1:])
    chunk = torch.zeros(chunk_shape, dtype=meta.dtype, device=spec.mesh.device_type)
    _scatter_chunks(whole, chunk, spec.mesh)
    rows = _own_rows(meta.shape[0], spec.mesh)
    # A whole chunk is kept as it is. Of another one only the rows that count are, so that files do
    # not get the padding.
    local = chunk if rows.count == len(chunk) else chunk[: rows.count].clone()
    return dtensor_around(local, spec)


def _scatter_chunks(whole: torch.Tensor | None, chunk: torch.Tensor, mesh: DeviceMesh) -> None:
    """Fills ``chunk`` on every rank with its chunk of the first rank's ``whole``."""
    shard_dim = mesh.ndim - 1
    if is_in_first_replica(mesh):
        chunks = None
        if whole is not None and is_first(mesh):
            chunks = _padded_chunks(whole, chunk, shards_of(mesh))
        dist.scatter(chunk, chunks, group=mesh.get_group(shard_dim), group_src=0)
    for replica_dim in range(shard_dim):
        dist.broadcast(chunk, group=mesh.get_group(replica_dim), group_src=0)


def _padded_chunks(whole: torch.Tensor, like: torch.Tensor, count: int) -> list[torch.Tensor]:
    """``whole`` in ``count`` chunks of the shape, dtype and device of ``like``, as a scatter takes
    them: the rows that the last ones lack are zeros."""
    chunks = []
    for i in range(count):
        rows = whole.detach()[i * len(like) : (i + 1) * len(like)].to(like).contiguous()
        lacking = len(like) - len(rows)
        if lacking:
            padding = like.new_zeros(lacking, *like.shape[1:])
            rows = torch.cat([rows, padding])
        chunks.append(rows)
    return chunks


def _first_ranks_dimensions(mesh: DeviceMesh) -> list[int]:
    """The mesh dimensions along which this rank takes part, in order, when the first rank's data
    goes to all."""
    coordinate = coordinate_of(mesh)
    return [dim for dim in reversed(range(mesh.ndim)) if not any(coordinate[:dim])]


def broadcast(
    tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh
) -> torch.Tensor:
    """The first rank's ``tensor`` on every rank of ``mesh``. Collective."""
    if tensor is None or not is_first(mesh):
        tensor = torch.empty(tuple(shape), dtype=dtype, device=mesh.device_type)
    tensor = tensor.detach().to(mesh.device_type).contiguous()
    for dim in _first_ranks_dimensions(mesh):
        dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)
    return tensor


def broadcast_object(value: Any, mesh: DeviceMesh) -> Any:
    """The first rank's ``value``, pickled, on every rank of ``mesh``. Collective."""
    box = [value]
    device = torch.device(mesh.device_type)
    for dim in _first_ranks_dimensions(mesh):
        dist.broadcast_object_list(box, group=mesh.get_group(dim), group_src=0, device=device)
    return box[0]
