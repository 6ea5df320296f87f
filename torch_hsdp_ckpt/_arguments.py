"""What the wrapper's arguments mean, and clear words for those that can't be served."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy

_TWO_D = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ONE_D = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)


def check_arguments(
    module: nn.Module,
    cpu_offload: CPUOffload | None,
    mixed_precision: MixedPrecision | None,
    param_init_fn: Callable[[nn.Module], None] | None,
    use_orig_params: bool,
) -> None:
    """Raises ValueError for what this version doesn't serve, TypeError for what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"FullyShardedDataParallel wraps an nn.Module, not a {type(module).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("FullyShardedDataParallel needs a process group: call torch.distributed.init_process_group first")
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"a {type(module).__name__} has no forward to gather for: wrap its items, or the module around it")
    if cpu_offload is not None and cpu_offload.offload_params:
        raise ValueError("cpu_offload is not served: pass None, or build the mesh on 'cpu'")
    if mixed_precision is not None and mixed_precision != MixedPrecision():
        raise ValueError("mixed_precision is not served yet: pass None and use torch.autocast, or convert the module's dtype")
    if param_init_fn is not None:
        raise ValueError("param_init_fn is not served yet: materialise the module with module.to_empty and its own init first")
    if not use_orig_params:
        raise ValueError("parameters always are the module's own here: leave use_orig_params out, or pass True")


def ignored_parameters(module: nn.Module, items: list[Any]) -> set[nn.Parameter]:
    """All parameters that ``items``, the ``ignored_modules`` and ``ignored_states`` together, name."""
    ignored: set[nn.Parameter] = set()
    for item in items:
        if isinstance(item, nn.Parameter):
            ignored.add(item)
        elif isinstance(item, nn.Module):
            ignored.update(item.parameters())
        else:
            raise TypeError(f"ignored_modules and ignored_states hold modules or parameters, not a {type(item).__name__}")
    if module in items:
        raise ValueError("the module to be wrapped is itself named in ignored_modules: there would be nothing to shard")
    return ignored


def mesh_for(
    module: nn.Module,
    process_group: Any,
    strategy: ShardingStrategy | None,
    mesh: DeviceMesh | None,
    device_id: int | torch.device | None,
) -> tuple[DeviceMesh, ShardingStrategy]:
    """The mesh and the strategy that the arguments mean together."""
    if mesh is not None and process_group is not None:
        raise ValueError("pass device_mesh or process_group, not both")
    if strategy is ShardingStrategy.NO_SHARD:
        raise ValueError("NO_SHARD is not served: HYBRID_SHARD on a mesh of shape (world_size, 1) keeps whole parameters")
    if mesh is None:
        if strategy in _TWO_D:
            raise ValueError(
                f"{strategy.name} needs device_mesh=init_device_mesh(device_type, (replicas, shards), "
                "mesh_dim_names=('replicate', 'shard'))"
            )
        if isinstance(process_group, tuple):
            raise ValueError("process_group is one group; for replicas and shards pass a 2-D device_mesh")
        mesh = _mesh_of_group(module, process_group, device_id)
    if mesh.ndim not in (1, 2):
        raise ValueError(f"device_mesh has {mesh.ndim} dimensions: 1 (shards) or 2 (replicas, shards) are served; {mesh}")
    suggested = ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD
    strategy = strategy or suggested
    if strategy not in (_TWO_D if mesh.ndim == 2 else _ONE_D):
        raise ValueError(f"{strategy.name} does not fit a {mesh.ndim}-D device_mesh: use {suggested.name}, or another mesh")
    return mesh, strategy


def _mesh_of_group(module: nn.Module, group: Any, device_id: int | torch.device | None) -> DeviceMesh:
    parameter = next(module.parameters(), None)
    device_type = parameter.device.type if parameter is not None else "cpu"
    if device_id is not None:
        device_type = device_id.type if isinstance(device_id, torch.device) else "cuda"
    if group is None:
        return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("shard",))
