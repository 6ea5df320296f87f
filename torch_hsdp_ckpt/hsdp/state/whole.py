"""Whole tensors from shards: large ones are gathered one by one, small ones in buckets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...common.tensors import local_of
from .placement import chunk_rows, is_first, is_in_first_replica, shards_of, shards_rows_only

_LARGE = 1 << 20  # bytes of a shard from which on a gather of its own pays
_BUCKET = 16 << 20  # bytes of shards in one gather of many small ones

# A function that gathers DTensors and gives the whole of each, or None where this rank does not get
# it. Its second argument is ``first_only``.
_Gather = Callable[[list[DTensor], bool], Iterable[torch.Tensor | None]]


def offload(value: Any) -> Any:
    """A tensor on the CPU, itself if it is there; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return value.cpu()
    return value


def keep(value: Any) -> Any:
    """What stands in for ``offload`` where values stay on their device."""
    return value


def gather(
    values: Sequence[DTensor], first_only: bool, finish: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """The whole tensors, each passed through ``finish`` as soon as it is there (to go to the CPU,
    say). Collective.

    ``first_only``: None everywhere but on the mesh's first rank, and only the ranks of its shard
    group send anything. Beside the results at most one tensor, or one bucket of small ones, is held
    at a time."""
    results: list[torch.Tensor | None] = [None] * len(values)

    # It is a function, so that nothing of a step is held when the next one gathers.
    def run(step: _Step) -> None:
        gathered = step.gather([values[i] for i in step.members], first_only)
        for i, whole in zip(step.members, gathered, strict=True):
            if whole is not None:
                results[i] = finish(whole)

    for step in _plan(values, first_only):
        run(step)
    return results


@dataclass(frozen=True)
class _Step:
    """The DTensors, by number, that one call of ``gather`` makes whole."""

    gather: _Gather
    members: list[int]


def _plan(values: Sequence[DTensor], first_only: bool) -> list[_Step]:
    """What is gathered how, in the order that all ranks keep to. A bucket is gathered when it is
    full; at the end those that are not."""
    steps: list[_Step] = []
    buckets = _Buckets()
    for i, value in enumerate(values):
        way = _way_of(value)
        if first_only and not _takes_part(value, way):
            continue
        members = buckets.add(i, value) if way is _gather_bucket else [i]
        if members:
            steps.append(_Step(way, members))
    return [*steps, *(_Step(_gather_bucket, members) for members in buckets.members.values())]


class _Buckets:
    """The buckets that are being filled, one for each mesh and device: what is in them, by number,
    and the bytes of that."""

    def __init__(self) -> None:
        self.members: dict[tuple[DeviceMesh, torch.device], list[int]] = {}
        self.sizes: dict[tuple[DeviceMesh, torch.device], int] = {}

    def add(self, number: int, value: DTensor) -> list[int]:
        """Takes ``value`` in. Returns the bucket's members, and starts another one, when it is
        full; nothing until then."""
        place = value.device_mesh, _device_of(value)
        self.members.setdefault(place, []).append(number)
        self.sizes[place] = self.sizes.get(place, 0) + _chunk_bytes(value)
        if self.sizes[place] < _BUCKET:
            return []
        del self.sizes[place]
        return self.members.pop(place)


def _takes_part(value: DTensor, way: _Gather) -> bool:
    """Whether this rank is needed to make ``value`` whole on the first rank."""
    return way is _gather_by_dtensor or is_in_first_replica(value.device_mesh)


def _way_of(value: DTensor) -> _Gather:
    if not shards_rows_only(value._spec):
        return _gather_by_dtensor
    shards = shards_of(value.device_mesh)
    if shards == 1:
        return _copy_unsharded
    divides_evenly = value.shape[0] % shards == 0
    if local_of(value).nbytes >= _LARGE and divides_evenly:
        return _gather_large
    return _gather_bucket


def _device_of(value: DTensor) -> torch.device:
    """Where a gather of ``value`` takes place. That is where it is, if it can be: the current
    device may be another one's, in a new thread."""
    device = local_of(value).device
    mesh_type = value.device_mesh.device_type
    return device if device.type == mesh_type else torch.device(mesh_type)


def _local(value: DTensor) -> torch.Tensor:
    return local_of(value).detach().to(_device_of(value))


def _gather_by_dtensor(values: list[DTensor], first_only: bool) -> Iterator[torch.Tensor | None]:
    """For tensors that are cut in another way than by rows: DTensor's own, slower function."""
    (value,) = values
    whole = value.full_tensor()
    if first_only and not is_first(value.device_mesh):
        yield None
    elif whole.data_ptr() == local_of(value).data_ptr():
        yield whole.clone()
    else:
        yield whole


def _copy_unsharded(values: list[DTensor], first_only: bool) -> Iterator[torch.Tensor | None]:
    """For a mesh whose ranks all hold whole tensors: nothing is sent."""
    (value,) = values
    yield _local(value).clone()


def _gather_large(values: list[DTensor], first_only: bool) -> Iterator[torch.Tensor | None]:
    """For one tensor whose rows divide evenly."""
    (value,) = values
    mesh = value.device_mesh
    if not first_only:
        yield _all_gather(value)
    elif not _can_send(value):
        whole = _all_gather(value)
        yield whole if is_first(mesh) else None
    elif is_first(mesh):
        yield _receive_all(value)
    else:
        _send(value)
        yield None


def _can_send(value: DTensor) -> bool:
    """Whether the shard group sends from the device: Gloo gathers from there, but sends from host
    memory only."""
    device = _device_of(value)
    if device.type == "cpu":
        return True
    backend: Any = _shard_group(value)._get_backend(device)
    return bool(backend.name() != "gloo")


def _shard_group(value: DTensor) -> dist.ProcessGroup:
    mesh = value.device_mesh
    return mesh.get_group(mesh.ndim - 1)


def _empty_whole(value: DTensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=_device_of(value))


def _all_gather(value: DTensor) -> torch.Tensor:
    whole = _empty_whole(value)
    dist.all_gather_into_tensor(whole, _local(value).contiguous(), group=_shard_group(value))
    return whole


def _send(value: DTensor) -> None:
    """Sends this rank's shard to the first rank, and receives nothing: an all-gather would need
    memory for the whole tensor on each rank, twice with Gloo, whose threads let go of it in their
    own time."""
    local = _local(value).contiguous()
    send = dist.P2POp(dist.isend, local, group=_shard_group(value), group_peer=0)
    for work in dist.batch_isend_irecv([send]):
        work.wait()


def _receive_all(value: DTensor) -> torch.Tensor:
    """The whole tensor on the first rank, to which all others send."""
    group = _shard_group(value)
    whole = _empty_whole(value)
    first_part, *other_parts = whole.chunk(dist.get_world_size(group))
    receives = [
        dist.P2POp(dist.irecv, part, group=group, group_peer=peer)
        for peer, part in enumerate(other_parts, 1)
    ]
    works = dist.batch_isend_irecv(receives)
    first_part.copy_(_local(value))
    for work in works:
        work.wait()
    return whole


def _chunk_bytes(value: DTensor) -> int:
    """Bytes of a whole chunk, which the last ranks hold only in part."""
    row_elements = value.numel() // value.shape[0] if value.shape[0] else 0
    rows = chunk_rows(value.shape, value.device_mesh)
    return rows * row_elements * value.element_size()


def _as_bytes(contiguous: torch.Tensor) -> torch.Tensor:
    return contiguous.reshape(-1).view(torch.uint8)


def _gather_bucket(values: list[DTensor], first_only: bool) -> Iterator[torch.Tensor | None]:
    """For tensors of one mesh and device: one gather of all, padded to whole chunks."""
    mesh = values[0].device_mesh
    chunk_sizes = [_chunk_bytes(value) for value in values]
    packed = _packed(values, chunk_sizes)
    by_rank = packed.new_empty(shards_of(mesh), packed.numel())
    dist.all_gather_into_tensor(by_rank.view(-1), packed, group=_shard_group(values[0]))
    shown = is_first(mesh) or not first_only
    for value, pieces in zip(values, torch.split(by_rank, chunk_sizes, dim=1), strict=True):
        yield _unpadded(value, pieces) if shown else None


def _packed(values: list[DTensor], chunk_sizes: list[int]) -> torch.Tensor:
    """This rank's shards as bytes one after the other, each padded to its chunk's size."""
    packed = torch.zeros(sum(chunk_sizes), dtype=torch.uint8, device=_device_of(values[0]))
    for value, chunk in zip(values, torch.split(packed, chunk_sizes), strict=True):
        local = _as_bytes(_local(value).contiguous())
        chunk[: local.numel()].copy_(local)
    return packed


def _unpadded(value: DTensor, pieces: torch.Tensor) -> torch.Tensor:
    """The whole of ``value`` from all ranks' chunks of it, ``pieces``, of which only the end is
    padding."""
    whole = _empty_whole(value)
    target = _as_bytes(whole)
    target.copy_(pieces.reshape(-1)[: target.numel()])
    return whole
