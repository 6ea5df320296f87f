"""The package's exceptions. A failed system call is Python's own ``OSError`` with ``errno`` and
``filename``."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be saved or loaded as asked; the message names file, tensor and rank, and
    what to do."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not what its format or its checksums say. Nothing of that tensor can
    be trusted."""
