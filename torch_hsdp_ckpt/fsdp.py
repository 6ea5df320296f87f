"""torch FSDP1's interface: ``from torch_hsdp_ckpt.fsdp import FullyShardedDataParallel``."""

from .hsdp.fsdp import FullyShardedDataParallel

__all__ = ["FullyShardedDataParallel"]
