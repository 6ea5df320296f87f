"""The constructors' arguments: what they mean, and clear words for those that can't be served."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffload, ShardingStrategy

_TWO_D = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ONE_D = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
_NAMES = ("replicate", "shard")


def at(*modules: nn.Module) -> str:
    """How an error about wrapping ``modules``, which become one unit, begins."""
    return (
        f"rank {dist.get_rank()}: module {', '.join(type(module).__name__ for module in modules)}: "
    )


def check_module(module: nn.Module, face: str) -> None:
    """Raises TypeError for what is no module, ValueError where there is nothing to run or nobody to
    talk to."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{face} wraps an nn.Module, not a {type(module).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{face} needs a process group: call torch.distributed.init_process_group first"
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"{at(module)}it has no forward to gather for: wrap its items, or the module around it"
        )


def check_offload(offload: bool, mesh: DeviceMesh, *modules: nn.Module) -> None:
    """On a CPU mesh parameters and gradients are where offloading would put them; elsewhere it is
    refused."""
    if offload and mesh.device_type != "cpu":
        raise ValueError(
            f"{at(*modules)}offloading parameters to the CPU is not served on a {mesh.device_type} "
            "mesh: leave it out, or "
            "build the mesh on 'cpu'"
        )


def offloads(cpu_offload: CPUOffload | bool | None) -> bool:
    return cpu_offload is True or (
        isinstance(cpu_offload, CPUOffload) and cpu_offload.offload_params
    )


def ignored_parameters(module: nn.Module, items: list[Any]) -> set[nn.Parameter]:
    """All parameters that ``items``, the ``ignored_modules`` and ``ignored_states`` together,
    name."""
    ignored: set[nn.Parameter] = set()
    for item in items:
        if isinstance(item, nn.Parameter):
            ignored.add(item)
        elif isinstance(item, nn.Module):
            ignored.update(item.parameters())
        else:
            raise TypeError(
                "ignored_modules and ignored_states hold modules or parameters, not a "
                f"{type(item).__name__}"
            )
    if module in items:
        raise ValueError(
            "the module to be wrapped is itself named in ignored_modules: there would be nothing "
            "to shard"
        )
    return ignored


def mesh_for(
    module: nn.Module,
    process_group: Any,
    strategy: ShardingStrategy | None,
    mesh: DeviceMesh | None,
    device_id: int | torch.device | None,
) -> tuple[DeviceMesh, ShardingStrategy]:
    """The mesh and the strategy that the arguments mean together. Collective where groups have to
    be made for them."""
    if mesh is not None and process_group is not None:
        raise ValueError(f"{at(module)}pass device_mesh or process_group, not both")
    if dist.GroupMember.NON_GROUP_MEMBER in (
        process_group if isinstance(process_group, (tuple, list)) else (process_group,)
    ):
        raise ValueError(
            f"{at(module)}this rank is not in process_group, and only its ranks can wrap modules "
            "on it"
        )
    if mesh is None:
        device_type = _device_type(module, device_id)
        if strategy is None and isinstance(process_group, tuple):
            strategy = ShardingStrategy.HYBRID_SHARD
        if strategy in _TWO_D:
            mesh = _mesh_of_two(module, process_group, device_type, strategy)
        elif isinstance(process_group, tuple):
            raise ValueError(
                f"{at(module)}{strategy.name if strategy else 'this strategy'} takes one process "
                "group; a pair (shard group, "
                "replica group) goes with HYBRID_SHARD"
            )
        else:
            mesh = _mesh_of_one(process_group, device_type)
    check_mesh(mesh, module)
    if strategy is ShardingStrategy.NO_SHARD:
        return _unsharded(module, mesh), strategy
    suggested = ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD
    strategy = strategy or suggested
    if strategy not in (_TWO_D if mesh.ndim == 2 else _ONE_D):
        raise ValueError(
            f"{at(module)}{strategy.name} does not fit a {mesh.ndim}-D device_mesh: use "
            f"{suggested.name}, or another mesh"
        )
    return mesh, strategy


def check_mesh(mesh: DeviceMesh, *modules: nn.Module) -> None:
    """One or two dimensions, and this rank in it."""
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"{at(*modules)}device_mesh has {mesh.ndim} dimensions: 1 (shards) or 2 (replicas, "
            f"shards) are served; {mesh}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{at(*modules)}this rank is not in device_mesh, and only its ranks can wrap modules "
            f"on it; {mesh}"
        )


def _device_type(module: nn.Module, device_id: int | torch.device | None) -> str:
    if device_id is not None:
        return device_id.type if isinstance(device_id, torch.device) else "cuda"
    kinds = {parameter.device.type for parameter in module.parameters()} - {"meta"}
    if kinds:
        return sorted(kinds)[0]
    return (
        "cuda" if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config()) else "cpu"
    )


def _mesh_of_one(group: Any, device_type: str) -> DeviceMesh:
    if group is None:
        return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=_NAMES[1:])
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=_NAMES[1:])


def _mesh_of_two(
    module: nn.Module, groups: Any, device_type: str, strategy: ShardingStrategy
) -> DeviceMesh:
    """``groups``: (this rank's shard group, its replica group), as torch's FSDP takes them; None: a
    host's ranks shard."""
    if groups is None:
        world = dist.get_world_size()
        shards = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (
            torch.cuda.device_count() if device_type == "cuda" else 0
        )
        if shards < 1 or world % shards:
            raise ValueError(
                f"{at(module)}{strategy.name} without device_mesh and process_group shards over "
                "the ranks of a host, whose "
                f"number is not known here or does not divide {world} ranks "
                f"(LOCAL_WORLD_SIZE={os.environ.get('LOCAL_WORLD_SIZE')}): pass "
                "device_mesh=init_device_mesh(device_type, (replicas, shards), "
                "mesh_dim_names=('replicate', 'shard'))"
            )
        return init_device_mesh(device_type, (world // shards, shards), mesh_dim_names=_NAMES)
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise ValueError(
            f"{at(module)}{strategy.name} needs two process groups, process_group=(shard group, "
            "replica group), or a 2-D "
            "device_mesh"
        )
    shard_group, replica_group = groups
    own = dist.get_process_group_ranks(shard_group)
    device = (
        torch.device(device_type, torch.cuda.current_device())
        if device_type == "cuda"
        else torch.device("cpu")
    )
    rows = [
        torch.empty(len(own), dtype=torch.int64, device=device)
        for _ in range(dist.get_world_size(replica_group))
    ]
    dist.all_gather(rows, torch.tensor(own, device=device), group=replica_group)
    ranks = torch.stack(rows).cpu()
    column = dist.get_process_group_ranks(replica_group)
    if dist.get_rank() not in ranks or ranks[:, own.index(dist.get_rank())].tolist() != column:
        raise ValueError(
            f"{at(module)}the pair of process groups makes no mesh: this rank has shard group "
            f"{own} and replica group "
            f"{column}, whose members' shard groups are {ranks.tolist()}. Ranks at the same place "
            "of their shard groups "
            "must be replicas"
        )
    return DeviceMesh.from_group(
        [replica_group, shard_group], device_type, mesh=ranks, mesh_dim_names=_NAMES
    )


def _unsharded(module: nn.Module, mesh: DeviceMesh) -> DeviceMesh:
    """NO_SHARD: every rank of ``mesh`` is a replica with a shard group of its own."""
    if mesh.ndim == 2:
        if mesh.size(1) == 1:
            return mesh
        raise ValueError(
            f"{at(module)}NO_SHARD replicates over a 1-D device_mesh, or a 2-D one of shape "
            f"(ranks, 1); this is {mesh}"
        )
    if mesh.size() == dist.get_world_size():
        return init_device_mesh(mesh.device_type, (mesh.size(), 1), mesh_dim_names=_NAMES)
    alone: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(
        [mesh.get_group(), alone],
        mesh.device_type,
        mesh=mesh.mesh.reshape(-1, 1),
        mesh_dim_names=_NAMES,
    )
