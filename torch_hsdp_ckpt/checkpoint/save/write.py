"""Fourth phase of a save: this rank's data files, written and made durable."""

import dataclasses
import enum
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.planner import WriteItem

from ... import _C
from ...errors import CheckpointError
from ..storage.data_file import DataFile, HostRecord
from ..storage.directory import encoded
from ..storage.writer import FileWriteResult, add_items, owners_of, write_result
from .metadata_build import BuiltMetadata
from .stage import Staged

Record = tuple[str, Any]  # a name; an object's bytes, a tensor, or a HostRecord


@dataclasses.dataclass(frozen=True)
class Written:
    """What this rank votes with: its files are durable. It keeps nothing of the state alive.

    ``done``: when, by ``perf_counter``. ``results``: of what DCP has planned. ``metadata`` and
    ``role_plan``: see ``Planned``."""

    bytes_written: int
    plan_seconds: float
    write_seconds: float
    done: float
    results: Sequence[FileWriteResult]
    metadata: Future[BuiltMetadata] | None
    role_plan: bytes


class LiveEnd(enum.Enum):
    """Where in a file the last byte is read from the live state."""

    ELSEWHERE = enum.auto()
    BEFORE_COPIED = enum.auto()
    AT_END = enum.auto()


@dataclasses.dataclass(frozen=True)
class FileToWrite:
    """One data file: the planned records, and what DCP has planned, behind them.

    ``live``: records that are read from the live state; ``copied``: those behind them.
    The iterables are of one stream: they are to be used up, in their order, before the next
    file's."""

    name: str
    planned: _C.PlannedFile | None
    image: _C.FileImage
    live: Iterable[Record]
    live_end: LiveEnd
    copied: Iterable[Record]
    items: Sequence[WriteItem]


def _nothing() -> None: ...


def write(staged: Staged, on_read: Callable[[], None] = _nothing) -> Written:
    """Writes this rank's files and makes them durable.

    ``on_read`` is called once, when nothing more is read from the live state."""
    begin = time.perf_counter()
    planned = staged.planned
    opened = planned.opened
    writer = opened.request.writer
    results: list[FileWriteResult] = []
    size = 0
    files = _files_to_write(staged)
    if not staged.reads_state or not files:
        on_read()
    for file in files:
        file_results, file_size = _write_file(file, staged, on_read)
        results += file_results
        size += file_size
    if writer.sync_files and files:
        _C.sync_directory(encoded(writer.path))
    done = time.perf_counter()
    return Written(
        bytes_written=size,
        plan_seconds=planned.plan_seconds,
        write_seconds=done - begin,
        done=done,
        results=results,
        metadata=planned.metadata,
        role_plan=planned.role_plan,
    )


def _files_to_write(staged: Staged) -> list[FileToWrite]:
    """The files in their order: those with planned records first."""
    planned, opened = staged.planned, staged.planned.opened
    request = opened.request
    names = planned.static.chunk_names()
    records = itertools.chain(planned.objects, zip(names, staged.records, strict=True))
    items = _items_by_file(staged)
    count = max(len(planned.files), len(items))
    # Objects come first, and are no live state.
    live_end, first_copied = _live_end(staged, count), len(planned.objects) + staged.live
    files, begin = [], 0
    for number in range(count):
        in_plan = planned.files[number] if number < len(planned.files) else None
        length = 0 if in_plan is None else len(in_plan)
        live = min(max(first_copied - begin, 0), length)
        files.append(
            FileToWrite(
                name=_C.data_file_name(request.agreement.rank, opened.save_id, number),
                planned=in_plan,
                image=staged.images[number] if number < len(staged.images) else _C.FileImage(),
                live=itertools.islice(records, live),
                live_end=live_end.get(number, LiveEnd.ELSEWHERE),
                copied=itertools.islice(records, length - live),
                items=items[number] if number < len(items) else [],
            )
        )
        begin += length
    return files


def _items_by_file(staged: Staged) -> list[Sequence[WriteItem]]:
    """What DCP has planned of each file: behind the planned records of the only one, or in files
    of their own."""
    items = staged.planned.opened.gathered.items
    if staged.planned.opened.request.writer.single_file_per_rank:
        return [items] if items else []
    return [[] for _ in staged.planned.files] + [[item] for item in items]


def _live_end(staged: Staged, count: int) -> Mapping[int, LiveEnd]:
    """The number of the file in which the live state ends, and where in it."""
    if not staged.reads_state:
        return {}
    first_copied = len(staged.planned.objects) + staged.live
    if not staged.gathered_is_live:
        end = 0
        for number, file in enumerate(staged.planned.files):
            end += len(file)
            if first_copied < end:
                return {number: LiveEnd.BEFORE_COPIED}
    return {count - 1: LiveEnd.AT_END}


def _write_file(
    file: FileToWrite, staged: Staged, on_read: Callable[[], None]
) -> tuple[list[FileWriteResult], int]:
    """Results of what DCP has planned, and the file's bytes."""
    opened = staged.planned.opened
    writer = opened.request.writer
    reserve = 0 if file.planned is None else file.planned.size
    planned_owners = [] if file.planned is None else file.planned.owners
    owners = [*planned_owners, *owners_of(file.items)]
    data_file = writer._data_file(
        file.name, reserve, owners, file.image, staged.copies, file.planned
    )
    try:
        _add_records(data_file, file.live)
        if file.live_end is LiveEnd.BEFORE_COPIED:
            data_file.flush()
            on_read()
        _add_records(data_file, file.copied)
        written = add_items(data_file, file.items, staged.planner, opened.request.check_object)
        if file.live_end is LiveEnd.AT_END:
            data_file.flush()
            on_read()
        size = data_file.finish()
    except BaseException:
        data_file.discard()
        raise
    opened.unfinished.add_file(file.name)
    _check_planned(file, data_file, size, f"{writer.path}/{file.name}")
    places = zip(written, data_file.places, strict=True)
    return [write_result(item, file.name, place, size) for item, place in places], size


def _add_records(data_file: DataFile, records: Iterable[Record]) -> None:
    for name, value in records:
        if isinstance(value, HostRecord):
            data_file.add_host_record(name, value)
        elif isinstance(value, memoryview):
            data_file.add_objects([(name, value)])
        else:
            data_file.add_tensor(name, value)


def _check_planned(file: FileToWrite, data_file: DataFile, size: int, path: str) -> None:
    """The metadata is made from the plan: the file must be what that says."""
    if file.planned is None:
        return
    is_short = data_file.written < len(file.planned)
    if is_short or (not file.items and size != file.planned.size):
        raise CheckpointError(f"{path}: its records are not those of the plan")
