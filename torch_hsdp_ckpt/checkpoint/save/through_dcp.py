"""Which saves torch.distributed.checkpoint (DCP) plans itself, and why."""

import dataclasses
import logging
import os

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from ..storage.writer import FileSystemWriter

_logger = logging.getLogger(__name__)
# A process says each reason once: a training job saves the same way thousands of times.
_said: set[str] = set()


@dataclasses.dataclass(frozen=True)
class ChosenWriter:
    """The writer of a save: None where DCP has to find one. ``refused``: what is wrong with the
    address, for which the other ranks would wait if it were raised before they hear of it; the
    writer is of no use then."""

    writer: StorageWriter | None
    refused: Exception | None = None


def choose_writer(
    storage_writer: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None
) -> ChosenWriter:
    """The caller's own writer, or a :class:`FileSystemWriter` for a local directory, set to
    ``checkpoint_id``; a writer of another class is left for DCP to set."""
    try:
        if storage_writer is None:
            # Not by validate_checkpoint_id, which also refuses what this process may not write to,
            # without an errno or a path.
            found = None if checkpoint_id is None else FileSystemWriter(checkpoint_id)
            return ChosenWriter(found)
        if checkpoint_id is not None and type(storage_writer) is FileSystemWriter:
            storage_writer.reset(checkpoint_id)
        return ChosenWriter(storage_writer)
    except Exception as error:
        return ChosenWriter(storage_writer or FileSystemWriter(os.curdir), error)


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
