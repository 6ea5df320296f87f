"""Stand-ins until the package's own arrive."""

from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.fsdp import ShardingStrategy, fully_shard

__all__ = ["FileSystemReader", "FileSystemWriter", "FullyShardedDataParallel", "ShardingStrategy"]


def FullyShardedDataParallel(module: Any, device_mesh: Any, sharding_strategy: Any, auto_wrap_policy: Any) -> Any:
    for m in list(module.modules()):
        if type(m) in auto_wrap_policy._module_classes:
            fully_shard(m, mesh=device_mesh)
    return fully_shard(module, mesh=device_mesh)
