"""Which mesh a unit's parameters are sharded on: it is given, or made from torch FSDP1's arguments.

A mesh of ours has one dimension (shards) or two (replicas, shards)."""

import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import ShardingStrategy

from .arguments import NotSupportedError, at
from .own_groups import group_of_ranks

_TWO_D = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ONE_D = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
_NAMES = ("replicate", "shard")

# The names of the groups of meshes that are made here, by device and shape, for every default
# group's life. Each mesh that torch makes has groups of its own, which stay when models go. No mesh
# is kept, as it would keep the default group.
_groups_made: "WeakKeyDictionary[Any, dict[tuple[str, tuple[int, ...]], list[str]]]"
_groups_made = WeakKeyDictionary()


def mesh_for(
    module: nn.Module,
    process_group: Any,
    strategy: ShardingStrategy | None,
    mesh: DeviceMesh | None,
    device_id: int | torch.device | None,
) -> tuple[DeviceMesh, ShardingStrategy]:
    """The mesh and the strategy that the arguments mean together. Collective where groups have to
    be made for them. Raises ValueError for arguments that contradict each other."""
    _check_process_group(module, process_group, mesh)
    if mesh is None:
        if strategy is None and isinstance(process_group, tuple):
            strategy = ShardingStrategy.HYBRID_SHARD
        device_type = _device_type(module, device_id)
        mesh = _mesh_of_groups(module, process_group, strategy, device_type)
    check_mesh(mesh, module)
    if strategy is ShardingStrategy.NO_SHARD:
        return unsharded(mesh, module), strategy
    return mesh, _strategy_on(mesh, strategy, module)


def _strategy_on(
    mesh: DeviceMesh, strategy: ShardingStrategy | None, module: nn.Module
) -> ShardingStrategy:
    """``strategy`` if it fits the mesh; None stands for what the mesh suggests."""
    suggested = ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD
    strategy = strategy or suggested
    if strategy not in (_TWO_D if mesh.ndim == 2 else _ONE_D):
        raise ValueError(
            f"{at(module)}{strategy.name} does not fit a {mesh.ndim}-D device_mesh: use "
            f"{suggested.name}, or another mesh"
        )
    return strategy


def check_mesh(mesh: DeviceMesh, *modules: nn.Module) -> None:
    """One or two dimensions, and this rank in it."""
    if mesh.ndim not in (1, 2):
        raise NotSupportedError(
            f"{at(*modules)}device_mesh has {mesh.ndim} dimensions, and units shard over 1 "
            "(shards) or 2 (replicas, shards): pass that part of it, mesh['replicate', 'shard'], "
            f"or fully_shard's dp_mesh_dims, which names them; {mesh}"
        )
    check_holds_this_rank(mesh, *modules)


def check_holds_this_rank(mesh: DeviceMesh, *modules: nn.Module) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{at(*modules)}this rank is not in device_mesh, and only its ranks can wrap modules "
            f"on it; {mesh}"
        )


def mesh_of_all_ranks() -> DeviceMesh:
    """The 1-D mesh that ``fully_shard`` takes where none is given."""
    return _mesh_of_shape(_device_type_of_backend(), (dist.get_world_size(),))


def _mesh_of_shape(device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    """A mesh of all ranks. Collective when the first of its shape is made."""
    names = _NAMES[-len(shape) :]
    made = _groups_made.setdefault(dist.distributed_c10d._get_default_group(), {})
    if (device_type, shape) not in made:
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        made[device_type, shape] = [group.group_name for group in mesh.get_all_groups()]
        return mesh
    group_of: Any = dist.distributed_c10d._resolve_process_group
    return DeviceMesh.from_group(
        [group_of(name) for name in made[device_type, shape]],
        device_type,
        mesh=torch.arange(dist.get_world_size(), device="cpu").view(shape),
        mesh_dim_names=names,
    )


def device_of(mesh: DeviceMesh, device_id: int | torch.device | None) -> torch.device:
    """The device of a unit on ``mesh``: ``device_id``, or the current one of the mesh's type.
    ValueError if ``device_id`` is of another type than the mesh."""
    if isinstance(device_id, torch.device) and device_id.type != mesh.device_type:
        raise ValueError(
            f"device_id is {device_id} and device_mesh is on {mesh.device_type}: pass devices of "
            "one type"
        )
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    if isinstance(device_id, torch.device) and device_id.index is not None:
        return device_id
    if isinstance(device_id, int):
        return torch.device(mesh.device_type, device_id)
    return torch.device(
        mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
    )


def _check_process_group(module: nn.Module, process_group: Any, mesh: DeviceMesh | None) -> None:
    if mesh is not None and process_group is not None:
        raise ValueError(f"{at(module)}pass device_mesh or process_group, not both")
    groups = process_group if isinstance(process_group, (tuple, list)) else (process_group,)
    if dist.GroupMember.NON_GROUP_MEMBER in groups:
        raise ValueError(
            f"{at(module)}this rank is not in process_group, and only its ranks can wrap modules "
            "on it"
        )


def _device_type(module: nn.Module, device_id: int | torch.device | None) -> str:
    if device_id is not None:
        return device_id.type if isinstance(device_id, torch.device) else _accelerator(module)
    types = {parameter.device.type for parameter in module.parameters()} - {"meta"}
    return min(types) if types else _device_type_of_backend()


def _accelerator(module: nn.Module) -> str:
    """What a device that is named by a number is of."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise ValueError(
            f"{at(module)}device_id is a number, and this torch {torch.__version__} knows no "
            "accelerator: pass a torch.device, or leave it out"
        )
    return accelerator.type


# Backends that go through the host: that a device has one says nothing of where modules are to be.
_OF_THE_HOST = ("gloo", "mpi", "fake")


def _device_type_of_backend() -> str:
    """The accelerator, if there is one here and the default group has a backend that is made for
    it, as NCCL is for CUDA; else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    pairs = (pair.split(":") for pair in str(dist.get_backend_config()).split(","))
    backends = {device: backend for device, backend in pairs}
    is_made_for_it = backends.get(accelerator.type, "gloo") not in _OF_THE_HOST
    return accelerator.type if is_made_for_it else "cpu"


def _mesh_of_groups(
    module: nn.Module, process_group: Any, strategy: ShardingStrategy | None, device_type: str
) -> DeviceMesh:
    if strategy in _TWO_D:
        if process_group is None:
            return _mesh_of_hosts(module, device_type, strategy)
        return _mesh_of_two_groups(module, process_group, device_type, strategy)
    if isinstance(process_group, tuple):
        raise ValueError(
            f"{at(module)}{strategy.name if strategy else 'this strategy'} takes one process "
            "group; a pair (shard group, replica group) goes with HYBRID_SHARD"
        )
    if process_group is None:
        return _mesh_of_shape(device_type, (dist.get_world_size(),))
    return DeviceMesh.from_group(process_group, device_type, mesh_dim_names=_NAMES[1:])


def _mesh_of_hosts(module: nn.Module, device_type: str, strategy: ShardingStrategy) -> DeviceMesh:
    """The ranks of a host shard, and hosts are replicas."""
    world = dist.get_world_size()
    devices = torch.accelerator.device_count() if device_type != "cpu" else 0
    shards = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or devices
    if shards < 1 or world % shards:
        raise NotSupportedError(
            f"{at(module)}{strategy.name} without device_mesh and process_group shards over the "
            "ranks of a host, whose number is not known here or does not divide "
            f"{world} ranks (LOCAL_WORLD_SIZE={os.environ.get('LOCAL_WORLD_SIZE')}): pass "
            "device_mesh=init_device_mesh(device_type, (replicas, shards), "
            "mesh_dim_names=('replicate', 'shard'))"
        )
    return _mesh_of_shape(device_type, (world // shards, shards))


def _mesh_of_two_groups(
    module: nn.Module, groups: Any, device_type: str, strategy: ShardingStrategy
) -> DeviceMesh:
    """``groups``: (this rank's shard group, its replica group), as torch's FSDP takes them."""
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise ValueError(
            f"{at(module)}{strategy.name} needs two process groups, process_group=(shard group, "
            "replica group), or a 2-D device_mesh"
        )
    shard_group, replica_group = groups
    shard_ranks = dist.get_process_group_ranks(shard_group)
    replica_ranks = dist.get_process_group_ranks(replica_group)
    ranks = _all_gather_ranks(shard_ranks, replica_group, device_type)
    rank = dist.get_rank()
    if rank not in ranks or ranks[:, shard_ranks.index(rank)].tolist() != replica_ranks:
        raise ValueError(
            f"{at(module)}the pair of process groups makes no mesh: this rank has shard group "
            f"{shard_ranks} and replica group {replica_ranks}, whose members' shard groups are "
            f"{ranks.tolist()}. Ranks at the same place of their shard groups must be replicas"
        )
    return DeviceMesh.from_group(
        [replica_group, shard_group], device_type, mesh=ranks, mesh_dim_names=_NAMES
    )


def _all_gather_ranks(
    shard_ranks: list[int], replica_group: dist.ProcessGroup, device_type: str
) -> torch.Tensor:
    """The shard groups of all replicas, of shape (replicas, shards), on the CPU."""
    device = torch.device("cpu")
    if device_type != "cpu":
        device = torch.device(device_type, torch.accelerator.current_device_index())
    sent = torch.tensor(shard_ranks, device=device)
    replicas = dist.get_world_size(replica_group)
    rows = [torch.empty_like(sent) for _ in range(replicas)]
    dist.all_gather(rows, sent, group=replica_group)
    return torch.stack(rows).cpu()


def unsharded(mesh: DeviceMesh, *modules: nn.Module) -> DeviceMesh:
    """NO_SHARD: every rank of ``mesh`` is a replica with a shard group of its own."""
    if mesh.ndim == 2:
        if mesh.size(1) == 1:
            return mesh
        raise ValueError(
            f"{at(*modules)}NO_SHARD replicates over a 1-D device_mesh, or a 2-D one of shape "
            f"(ranks, 1); this is {mesh}"
        )
    if mesh.size() == dist.get_world_size():
        return _mesh_of_shape(mesh.device_type, (mesh.size(), 1))
    return DeviceMesh.from_group(
        [mesh.get_group(), group_of_ranks([dist.get_rank()], mesh.get_group())],
        mesh.device_type,
        mesh=mesh.mesh.reshape(-1, 1),
        mesh_dim_names=_NAMES,
    )
