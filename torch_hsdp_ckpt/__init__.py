"""Hybrid-sharded data parallelism and durable sharded checkpoints for PyTorch, on a C++ core."""

import torch as _torch  # noqa: F401  (torch's libraries must be loaded before ours)
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FlatParameter,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalOptimStateDictConfig,
    LocalStateDictConfig,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    OptimStateDictConfig,
    OptimStateKeyType,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)

# First: it says what is wrong if the extension does not load.
from ._build import build_info  # isort: skip
from .checkpoint.load.load import load
from .checkpoint.save.async_save import AsyncSave, async_save
from .checkpoint.save.result import SaveResult
from .checkpoint.save.save import save
from .checkpoint.storage.verify import VerifyProblem, VerifyReport, verify
from .errors import CheckpointError, CorruptCheckpointError
from .filesystem import FileSystemReader, FileSystemWriter
from .hsdp.clip import clip_grad_norm_
from .hsdp.data_parallel import DataParallelMeshDims
from .hsdp.fsdp import FullyShardedDataParallel
from .hsdp.fully_shard import (
    FSDPModule,
    GradientReductionHandle,
    UnshardHandle,
    fully_shard,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from .optim.muon import Muon
from .optim.whole_tensors import map_whole_tensors
from .training.manager import CheckpointManager

__all__ = [
    "AsyncSave",
    "BackwardPrefetch",
    "CPUOffload",
    "CPUOffloadPolicy",
    "CheckpointError",
    "CheckpointManager",
    "CorruptCheckpointError",
    "DataParallelMeshDims",
    "FSDPModule",
    "FileSystemReader",
    "FileSystemWriter",
    "FlatParameter",
    "FullOptimStateDictConfig",
    "FullStateDictConfig",
    "FullyShardedDataParallel",
    "GradientReductionHandle",
    "LocalOptimStateDictConfig",
    "LocalStateDictConfig",
    "MixedPrecision",
    "MixedPrecisionPolicy",
    "Muon",
    "OffloadPolicy",
    "OptimStateDictConfig",
    "OptimStateKeyType",
    "SaveResult",
    "ShardedOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardingStrategy",
    "StateDictConfig",
    "StateDictSettings",
    "StateDictType",
    "UnshardHandle",
    "VerifyProblem",
    "VerifyReport",
    "async_save",
    "build_info",
    "clip_grad_norm_",
    "fully_shard",
    "load",
    "map_whole_tensors",
    "register_fsdp_forward_method",
    "save",
    "share_comm_ctx",
    "verify",
]
