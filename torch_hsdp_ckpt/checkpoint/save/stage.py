"""Third phase of a save: what its files are written from, the live state or copies of it."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from ... import _C
from ..snapshot.staged import (
    Source,
    StagedRecords,
    WatchedSource,
    bytes_of_copy,
    stage_tensors,
    watch_sources,
)
from ..storage.staging import StagingPool
from .plan import Planned
from .static_plan import ChunkTensors


@dataclasses.dataclass(frozen=True)
class Staged:
    """A planned save with what is written of each record.

    ``live``: how many records of tensors, the first ones, are read from the live state.
    ``gathered_is_live``: so are the tensors that DCP planned, which ``planner`` gives. ``images``:
    memory laid out as the first files are; ``copies``: what brings payloads there.
    ``sources``: what ``check_sources`` compares with the records."""

    planned: Planned
    records: Sequence[Source]
    live: int
    gathered_is_live: bool
    planner: SavePlanner
    images: Sequence[_C.FileImage] = ()
    copies: Sequence[_C.StagingCopy] = ()
    sources: Sequence[WatchedSource] = ()

    @property
    def reads_state(self) -> bool:
        return self.live > 0 or self.gathered_is_live


def stage_nothing(planned: Planned) -> Staged:
    """Everything is written from where it is: the state must not change until then."""
    records = ChunkTensors(planned.static)
    return Staged(
        planned=planned,
        records=records,
        live=len(records),
        gathered_is_live=True,
        planner=planned.opened.state.local.planner,
    )


@dataclasses.dataclass(frozen=True)
class StagingLimits:
    """``pool``: the memory that copies are put in. ``limit``: bytes that they may take, None for
    all."""

    pool: StagingPool
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class CopiedState:
    """A save whose state has been copied, as far as there was room; ``copied_bytes`` of it."""

    staged: Staged
    copied_bytes: int


def stage_copies(planned: Planned, limits: StagingLimits, watch: bool = False) -> CopiedState:
    """Copies what this rank will write, so that the state may change; what takes more than the
    limit is left to be read in its place. ``watch``: it can be compared again."""
    planner = planned.opened.state.local.planner
    room = _share_out(limits.limit, planner.state_dict)
    tensors = list(ChunkTensors(planned.static))
    copies = stage_tensors(
        tensors, planned.files, len(planned.objects), limits.pool, room.for_records
    )
    sources: Sequence[WatchedSource] = ()
    if watch:
        sources = watch_sources(planned.static.chunk_names(), tensors, copies.records)
    if not room.gathered_is_live:
        gathered = planner.state_dict
        planner.state_dict = {name: _copied(value) for name, value in gathered.items()}
    staged = _stage_records(planned, copies, sources, room.gathered_is_live)
    return CopiedState(staged, copies.copied_bytes)


@dataclasses.dataclass(frozen=True)
class _Room:
    """Who gets the memory for copies. ``for_records``: bytes for the planned records, None for as
    many as they take."""

    gathered_is_live: bool
    for_records: int | None


def _share_out(limit: int | None, gathered: Mapping[str, Any]) -> _Room:
    """What DCP has planned is copied first, and as a whole; where it does not fit, nothing is."""
    if limit is None:
        return _Room(gathered_is_live=False, for_records=None)
    size = sum(bytes_of_copy(value) for value in gathered.values())
    if size > limit:
        return _Room(gathered_is_live=True, for_records=0)
    return _Room(gathered_is_live=False, for_records=limit - int(size))


def stage_image(planned: Planned, records: StagedRecords, watch: bool = False) -> Staged:
    """The records are in an image, or still on their way there. ``watch``: what is read from the
    live state can be compared again."""
    sources: Sequence[WatchedSource] = ()
    if watch:
        live = records.records[: records.in_place]
        sources = watch_sources(planned.static.chunk_names(), live, live)
    return _stage_records(planned, records, sources, gathered_is_live=False)


def _stage_records(
    planned: Planned,
    records: StagedRecords,
    sources: Sequence[WatchedSource],
    gathered_is_live: bool,
) -> Staged:
    return Staged(
        planned=dataclasses.replace(planned, static=planned.static.without_tensors()),
        records=records.records,
        live=records.in_place,
        gathered_is_live=gathered_is_live,
        planner=planned.opened.state.local.planner,
        images=records.images,
        copies=records.copies,
        sources=sources,
    )


def _copied(value: Any) -> Any:
    return copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)
