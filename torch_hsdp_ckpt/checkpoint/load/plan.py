"""Planned: all files are open, all objects are read and checked, and it is known which bytes of
which records go into which tensors. Nothing has been written to the state dict's tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from ... import _C
from ...errors import CheckpointError
from ..storage.directory import encoded
from ..storage.metadata import LazyMetadata, decode_metadata
from ..storage.nested_keys import NestedKeys, set_object
from ..storage.objects import load_object
from ..storage.reader import FileSystemReader
from ..storage.tensor_reads import PlannedData, plan_reads, read_objects
from .open import Opened, open_checkpoint
from .planner import plan_with_planner
from .state_reads import PlannerNeededError, reads_of_state

# What a rank tells of its plan, if it is not the plan's digests.
_NEEDS_PLANNER = b"planner"
_FILES_REMOVED = b"removed"


@dataclasses.dataclass(frozen=True)
class Planned:
    """``sharded_digests`` and ``unsharded_digests``, by rank: ranks that have the same one read the
    same bytes in the same order."""

    opened: Opened
    data: PlannedData
    sharded_digests: list[bytes]
    unsharded_digests: list[bytes]


class FilesRemovedError(Exception):
    """Files that `.metadata` names are missing on some rank. ``error`` is this rank's own, if it is
    one of those that miss any."""

    def __init__(self, error: FileNotFoundError | None) -> None:
        super().__init__()
        self.error = error


def plan(state_dict: dict[str, Any], opened: Opened, planner: LoadPlanner, direct: bool) -> Planned:
    """``direct``: see CheckpointReader. Raises FilesRemovedError on all ranks; otherwise, as
    ``load`` does."""
    attempt = _attempt(opened, lambda: plan_natively(state_dict, opened, planner, direct))
    if attempt.needs_planner:
        local_plan = plan_with_planner(state_dict, opened, planner)
        attempt = _attempt(
            opened,
            lambda: opened.reader.plan_data(planner.finish_plan(local_plan), planner, direct),
        )
    return attempt.planned()


def check_saved_over(opened: Opened, missing: FileNotFoundError | None) -> None:
    """Files have gone. If a save over this checkpoint has removed them, there is another generation
    by now, and this returns; if not, it raises ``missing`` on all ranks. Called by all ranks."""
    again = open_checkpoint(opened.reader, opened.ranks)
    is_same = again is not None and again.metadata == opened.metadata
    opened.ranks.agreement.exchange("open", error=missing if is_same else None)
    if is_same:
        raise CheckpointError(f"{opened.reader.path}: files that .metadata names are missing")


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of planning on this rank. Without ``data`` it takes DCP's planner, or files are
    ``missing``."""

    data: PlannedData | None
    missing: FileNotFoundError | None = None

    def tell(self) -> bytes:
        if self.data is not None:
            return self.data.sharded.digest + self.data.unsharded.digest
        return _NEEDS_PLANNER if self.missing is None else _FILES_REMOVED


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """This rank's outcome, and what all ranks have told of theirs."""

    opened: Opened
    outcome: _Outcome
    told: list[bytes]

    @property
    def needs_planner(self) -> bool:
        return _NEEDS_PLANNER in self.told and _FILES_REMOVED not in self.told

    def planned(self) -> Planned:
        if self.outcome.data is None or _FILES_REMOVED in self.told:
            raise FilesRemovedError(self.outcome.missing)
        return Planned(
            self.opened,
            self.outcome.data,
            sharded_digests=[digests[:16] for digests in self.told],
            unsharded_digests=[digests[16:] for digests in self.told],
        )


def _attempt(opened: Opened, make_plan: Callable[[], PlannedData]) -> _Attempt:
    """Called by all ranks."""

    def run() -> _Outcome:
        try:
            return _Outcome(make_plan())
        except PlannerNeededError:
            return _Outcome(None)
        except FileNotFoundError as error:
            return _Outcome(None, error)

    outcome, told = opened.ranks.agreement.run_and_tell("plan", run, _Outcome.tell)
    return _Attempt(opened, outcome, told)


def plan_natively(
    state_dict: dict[str, Any], opened: Opened, planner: LoadPlanner, direct: bool
) -> PlannedData:
    """This rank's part, without DCP's planning. Raises PlannerNeededError where only DCP's planner
    can say what is read."""
    reader = opened.reader
    native = _native_planner(state_dict, opened)
    if type(planner) is not DefaultLoadPlanner or native.has_transforms:
        raise PlannerNeededError
    is_coordinator = opened.ranks.agreement.is_coordinator
    reads = reads_of_state(state_dict, planner, native, is_coordinator)
    path = reader._get_metadata_path()
    planner.metadata = LazyMetadata.lazy(lambda: decode_metadata(opened.metadata, path))
    files = reader.open_files(reads.records, direct)
    sharded = plan_reads(files, reader.path, reads.sharded)
    unsharded = plan_reads(files, reader.path, reads.unsharded)
    objects = _load_objects(files, reads.objects, reader, planner.state_dict)
    return PlannedData(sharded, unsharded, ObjectsUpdate(planner, objects))


def _native_planner(state_dict: dict[str, Any], opened: Opened) -> _C.LoadPlanner:
    reader = opened.reader
    native = _C.LoadPlanner(opened.metadata, encoded(reader._get_metadata_path()))
    if not state_dict:  # a planner that fills it makes what the metadata says
        native.check_sizes(encoded(reader.path))
    return native


def _load_objects(
    files: _C.CheckpointReader,
    objects: list[_C.RecordPlace],
    reader: FileSystemReader,
    targets: dict[str, Any],
) -> "list[_LoadedObject]":
    loaded = []
    trust = reader.trust()
    for record, data in zip(objects, read_objects(files, objects), strict=True):
        what = f"{reader.path}/{record.file}: {record.fqn}"
        value = load_object(data, what, trust.for_target(targets[record.fqn]))
        loaded.append(_LoadedObject(record.fqn, value))
    return loaded


class _LoadedObject(NamedTuple):
    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class ObjectsUpdate:
    """Puts objects into the state dict that the planner has been set up with."""

    planner: DefaultLoadPlanner
    objects: list[_LoadedObject]

    def apply(self) -> None:
        keys = NestedKeys(self.planner.original_state_dict)
        for name, value in self.objects:
            set_object(self.planner, keys, name, value)
