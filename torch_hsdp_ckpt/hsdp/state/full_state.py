"""Whole tensors from shards, and shards from whole tensors.

A shard is ``ceil(d0 / S)`` rows of dimension 0, the last ones fewer or none, as DTensor cuts it.
The shard dimension is the mesh's last one; all others hold replicas. DTensors that are placed in
another way (some optimizers make such states) go through DTensor's own, slower functions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ... import _C
from ...common.tensors import local_of

_LARGE = 1 << 20  # bytes of a shard from which on a gather of its own pays
_BUCKET = 16 << 20  # bytes of shards in one gather of many small ones


def rows_alone(spec: DTensorSpec) -> bool:
    """Whether dimension 0 is cut over the mesh's last dimension and nothing else is."""
    return spec.placements[-1] == Shard(0) and all(p == Replicate() for p in spec.placements[:-1])


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this is the rank that ``rank0_only`` means: the mesh's first, rank 0 if the mesh
    holds all ranks."""
    return not any(mesh.get_coordinate() or [0])


def chunk_rows(shape: Sequence[int], mesh: DeviceMesh) -> int:
    return _C.shard_rows(shape[0], mesh.size(mesh.ndim - 1), 0).count


def spec_like(tensor: DTensor, dtype: torch.dtype) -> DTensorSpec:
    """``tensor``'s spec, of another dtype."""
    spec = tensor._spec
    meta = TensorMeta(tensor.shape, tensor.stride(), dtype)
    return (
        spec if tensor.dtype == dtype else DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    )


def own_rows(full: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """This rank's part of ``full`` as a DTensor with ``spec``'s mesh and placements: a view,
    nothing is sent or copied."""
    if not rows_alone(spec):
        return distribute_tensor(full, spec.mesh, spec.placements, src_data_rank=None)
    shards, shard = spec.mesh.size(spec.mesh.ndim - 1), spec.mesh.get_local_rank(spec.mesh.ndim - 1)
    rows = _C.shard_rows(full.shape[0], shards, shard)
    return DTensor(full.detach().narrow(0, rows.first, rows.count), spec, requires_grad=False)  # type: ignore[no-untyped-call]


def gather(
    values: Sequence[DTensor], first_only: bool, finish: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """The whole tensors, each passed through ``finish`` as soon as it is there (to go to the CPU,
    say). Collective.

    ``first_only``: None everywhere but on the mesh's first rank, and only the ranks of its shard
    group send anything. Beside the results at most one tensor, or one bucket of small ones, is held
    at a time."""
    out: list[torch.Tensor | None] = [None] * len(values)
    buckets: dict[tuple[DeviceMesh, torch.device], list[int]] = {}
    for i, value in enumerate(values):
        mesh = value.device_mesh
        if not rows_alone(value._spec):
            full = value.full_tensor()
            if not first_only or is_first(mesh):
                out[i] = finish(
                    full.clone() if full.data_ptr() == local_of(value).data_ptr() else full
                )
            continue
        if first_only and any((mesh.get_coordinate() or [0])[:-1]):
            continue
        shards = mesh.size(mesh.ndim - 1)
        local = local_of(value).detach()
        if (
            local.device.type != mesh.device_type
        ):  # else where it is: the current device may be another one's, in a new thread
            local = local.to(mesh.device_type)
        if shards == 1:
            out[i] = finish(local.clone())
        elif local.nbytes >= _LARGE and value.shape[0] % shards == 0:
            whole = _gather_large(value, local.contiguous(), first_only)
            out[i] = None if whole is None else finish(whole)
        else:
            bucket = buckets.setdefault((mesh, local.device), [])
            bucket.append(i)
            if sum(_chunk_bytes(values[j]) for j in bucket) >= _BUCKET:
                _gather_bucket(
                    values, buckets.pop((mesh, local.device)), local.device, first_only, finish, out
                )
    for (_, device), bucket in buckets.items():
        _gather_bucket(values, bucket, device, first_only, finish, out)
    return out


def _gather_large(value: DTensor, local: torch.Tensor, first_only: bool) -> torch.Tensor | None:
    """One tensor whose rows divide evenly. With ``first_only`` the others send their shards and
    receive nothing: an all-gather would need memory for the whole tensor on each of them, twice
    with Gloo, whose threads let go of it in their own time."""
    mesh, group = value.device_mesh, value.device_mesh.get_group(value.device_mesh.ndim - 1)
    sends = first_only
    if first_only and local.is_cuda:
        backend: Any = group._get_backend(local.device)
        sends = backend.name() != "gloo"  # it gathers from devices, but sends from host memory only
    if sends and not is_first(mesh):
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, local, group=group, group_peer=0)]
        ):
            work.wait()
        return None
    full = torch.empty(value.shape, dtype=value.dtype, device=local.device)
    if not sends:
        dist.all_gather_into_tensor(full, local, group=group)
        return None if first_only and not is_first(mesh) else full
    own, *others = full.chunk(dist.get_world_size(group))
    receives = [
        dist.P2POp(dist.irecv, part, group=group, group_peer=peer)
        for peer, part in enumerate(others, 1)
    ]
    works = dist.batch_isend_irecv(receives)
    own.copy_(local)
    for work in works:
        work.wait()
    return full


def _chunk_bytes(value: DTensor) -> int:
    """Bytes of a whole chunk, which the last ranks hold only in part."""
    rest = value.numel() // value.shape[0] if value.shape[0] else 0
    return chunk_rows(value.shape, value.device_mesh) * rest * value.element_size()


def _gather_bucket(
    values: Sequence[DTensor],
    bucket: list[int],
    device: torch.device,
    first_only: bool,
    finish: Callable[[torch.Tensor], torch.Tensor],
    out: list[torch.Tensor | None],
) -> None:
    mesh = values[bucket[0]].device_mesh
    sizes = [_chunk_bytes(values[i]) for i in bucket]
    packed = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    for i, piece in zip(bucket, torch.split(packed, sizes), strict=True):
        local = (
            local_of(values[i])
            .detach()
            .to(packed.device)
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
        )
        piece[: local.numel()].copy_(local)
    everyone = packed.new_empty(mesh.size(mesh.ndim - 1) * packed.numel())
    dist.all_gather_into_tensor(everyone, packed, group=mesh.get_group(mesh.ndim - 1))
    if first_only and not is_first(mesh):
        return
    for i, piece in zip(
        bucket, torch.split(everyone.view(-1, packed.numel()), sizes, dim=1), strict=True
    ):
        full = torch.empty(values[i].shape, dtype=values[i].dtype, device=packed.device)
        target = full.reshape(-1).view(torch.uint8)
        target.copy_(piece.reshape(-1)[: target.numel()])
        out[i] = finish(full)


def scatter(full: torch.Tensor | None, spec: DTensorSpec) -> DTensor:
    """The DTensor with ``spec`` whose whole tensor the mesh's first rank has in ``full``; other
    ranks pass None. Collective.

    The first rank sends each rank of its shard group that rank's rows, and these go on to their
    replicas. ``rows_alone(spec)``."""
    mesh, meta = spec.mesh, spec.tensor_meta
    assert meta is not None and rows_alone(spec)
    rows, dim = chunk_rows(meta.shape, mesh), mesh.ndim - 1
    coordinate = mesh.get_coordinate() or [0]
    chunk = torch.zeros((rows, *meta.shape[1:]), dtype=meta.dtype, device=mesh.device_type)
    if not any(coordinate[:-1]):
        chunks = None
        if full is not None and is_first(mesh):
            chunks = [
                full.detach()[i * rows : (i + 1) * rows].to(chunk).contiguous()
                for i in range(mesh.size(dim))
            ]
            chunks = [
                c
                if len(c) == rows
                else torch.cat([c, chunk.new_zeros(rows - len(c), *c.shape[1:])])
                for c in chunks
            ]
        dist.scatter(chunk, chunks, group=mesh.get_group(dim), group_src=0)
    for replicas in range(dim):
        dist.broadcast(chunk, group=mesh.get_group(replicas), group_src=0)
    held = max(0, min(rows, meta.shape[0] - rows * coordinate[dim]))
    # Whole chunks are kept as they are; of the others only the rows that count, so that files do
    # not get the padding.
    return DTensor(chunk if held == rows else chunk[:held].clone(), spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _from_first(mesh: DeviceMesh) -> list[int]:
    """The mesh dimensions along which this rank takes part, in order, when the first rank's data
    goes to all."""
    coordinate = mesh.get_coordinate() or [0]
    return [dim for dim in reversed(range(mesh.ndim)) if not any(coordinate[:dim])]


def broadcast(
    tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh
) -> torch.Tensor:
    """The first rank's ``tensor`` on every rank of ``mesh``. Collective."""
    if tensor is None or not is_first(mesh):
        tensor = torch.empty(tuple(shape), dtype=dtype, device=mesh.device_type)
    tensor = tensor.detach().to(mesh.device_type).contiguous()
    for dim in _from_first(mesh):
        dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)
    return tensor


def broadcast_object(value: Any, mesh: DeviceMesh) -> Any:
    """The first rank's ``value``, pickled, on every rank of ``mesh``. Collective."""
    box = [value]
    for dim in _from_first(mesh):
        dist.broadcast_object_list(
            box, group=mesh.get_group(dim), group_src=0, device=torch.device(mesh.device_type)
        )
    return box[0]
