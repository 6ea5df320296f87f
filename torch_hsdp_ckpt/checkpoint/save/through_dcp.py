"""Which saves torch.distributed.checkpoint (DCP) plans itself, and why."""

import logging
import os

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from ..storage.writer import FileSystemWriter

_logger = logging.getLogger(__name__)
# A process says each reason once: a training job saves the same way thousands of times.
_said: set[str] = set()


def writer_for(
    storage_writer: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None
) -> StorageWriter | None:
    """The writer of a save: the caller's own, or a :class:`FileSystemWriter` for a local directory.

    None where DCP has to find one. Raises CheckpointError for an address other than ``file://``."""
    if storage_writer is not None:
        return storage_writer
    # Not by validate_checkpoint_id, which also refuses what this process may not write to, without
    # an errno or a path.
    return None if checkpoint_id is None else FileSystemWriter(checkpoint_id)


def why_dcp_plans(
    writer: StorageWriter | None, planner: SavePlanner | None, use_collectives: bool
) -> str:
    """Why DCP has to plan this save; "" if this package can."""
    if writer is None:
        return "there is neither a checkpoint_id nor a storage writer"
    if type(writer) is not FileSystemWriter or writer._uses_torch():
        kind = type(writer).__qualname__
        return f"the storage writer is a {kind} or writes through torch's own code"
    if planner is not None:
        is_default = type(planner) is DefaultSavePlanner
        if not is_default or planner.dedup_save_to_lowest_rank:  # type: ignore[attr-defined]
            kind = type(planner).__qualname__
            return f"the planner is a {kind} or keeps replicas on the lowest rank"
    return "" if use_collectives else "use_collectives is False"


def default_planner(planner: SavePlanner | None) -> DefaultSavePlanner:
    """The caller's planner, which is DCP's default one (see ``why_dcp_plans``), or a new one."""
    return planner if isinstance(planner, DefaultSavePlanner) else DefaultSavePlanner()


def say_once(message: str) -> None:
    """Logs a message at the first time that this process has it to say."""
    if message not in _said:
        _said.add(message)
        _logger.info("%s", message)
