"""Hybrid-sharded data parallelism and durable sharded checkpoints for PyTorch, on a C++ core."""

import torch as _torch  # noqa: F401  (torch's libraries must be loaded before ours)

from ._build import build_info
from .errors import CheckpointError, CorruptCheckpointError

__all__ = ["CheckpointError", "CorruptCheckpointError", "build_info"]
