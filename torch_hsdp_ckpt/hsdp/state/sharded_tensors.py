"""torch's older ``ShardedTensor``: what ``load_sharded_optimizer_state_dict`` gives, which cuts
over all ranks whatever the model's mesh is. Each is made a DTensor that is placed as its
parameter."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...common.agreement import is_same_on_all_ranks
from .cut import own_part
from .optimizer_names import ParameterNames


def convert_sharded_tensors(
    state: dict[Any, Any], names: ParameterNames, mesh: DeviceMesh
) -> dict[Any, Any]:
    """``state``, by parameters' names, with DTensors in place of ShardedTensors; whole tensors
    where no sharded parameter has the shape. Each is gathered on its own group, one at a time.

    Collective over ``mesh``: RuntimeError on all ranks if they have different ones."""
    found = list(_sharded_tensors(state))
    _check_same_on_all_ranks(found, mesh)
    converted = {name: dict(entry) for name, entry in state.items() if isinstance(entry, dict)}
    for name, key, value in found:
        whole = _gathered(value, torch.device(mesh.device_type))
        index = names.index.get(name)
        parameter = None if index is None else names.parameters[index]
        if isinstance(parameter, DTensor) and whole.shape == parameter.shape:
            converted[name][key] = own_part(whole, parameter)
        else:
            converted[name][key] = whole
    return {**state, **converted}


def _sharded_tensors(state: dict[Any, Any]) -> Iterator[tuple[Any, Any, ShardedTensor]]:
    """Names, keys and values, in an order that all ranks share."""
    for name in sorted(state, key=str):
        entry = state[name]
        if not isinstance(entry, dict):
            continue
        for key in sorted(entry, key=str):
            if isinstance(entry[key], ShardedTensor):
                yield name, key, entry[key]


def _check_same_on_all_ranks(found: list[tuple[Any, Any, ShardedTensor]], mesh: DeviceMesh) -> None:
    """Gathers of different tensors would wait for each other."""
    lines = [f"{name} {key} {tuple(value.metadata().size)}" for name, key, value in found]
    digest = zlib.crc32("\n".join(lines).encode())
    if not is_same_on_all_ranks(mesh, digest):
        raise RuntimeError(
            f"the ranks give optimizer states with different ShardedTensors (rank "
            f"{dist.get_rank()} has {len(lines)}): nothing was loaded; read them by "
            "load_sharded_optimizer_state_dict on every rank"
        )


def _gathered(value: ShardedTensor, device: torch.device) -> torch.Tensor:
    """The whole tensor on every rank of its group. Each rank sends its shards one after the other,
    padded to the largest rank's."""
    metadata, group = value.metadata(), value._process_group
    ranks = dist.get_process_group_ranks(group)
    shards_of_rank: dict[int, list[ShardMetadata]] = {rank: [] for rank in ranks}
    for shard in metadata.shards_metadata:
        placement: Any = shard.placement
        shards_of_rank[placement.rank()].append(shard)
    longest = max(sum(map(_elements, shards)) for shards in shards_of_rank.values())
    sent = torch.zeros(longest, dtype=metadata.tensor_properties.dtype, device=device)
    local = {tuple(each.metadata.shard_offsets): each.tensor for each in value.local_shards()}
    position = 0
    for shard in shards_of_rank[dist.get_rank()]:
        part = local[tuple(shard.shard_offsets)].detach().reshape(-1)
        sent[position : position + len(part)] = part
        position += len(part)
    received = sent.new_empty(len(ranks), longest)
    dist.all_gather_into_tensor(received.view(-1), sent, group=group)
    whole = sent.new_empty(tuple(metadata.size))
    for rank, row in zip(ranks, received, strict=True):
        _unpack(row, shards_of_rank[rank], whole)
    return whole


def _elements(shard: ShardMetadata) -> int:
    return int(torch.Size(shard.shard_sizes).numel())


def _unpack(packed: torch.Tensor, shards: list[ShardMetadata], whole: torch.Tensor) -> None:
    position = 0
    for shard in shards:
        target = whole
        for dim, (offset, size) in enumerate(
            zip(shard.shard_offsets, shard.shard_sizes, strict=True)
        ):
            target = target.narrow(dim, offset, size)
        count = _elements(shard)
        target.copy_(packed[position : position + count].view(target.shape))
        position += count
