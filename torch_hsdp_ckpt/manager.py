"""When to save, which checkpoints to keep, which to go on from: ``CheckpointManager``."""

from .training.manager import CheckpointManager

__all__ = ["CheckpointManager"]
