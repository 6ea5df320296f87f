"""The coordinator's metadata, built on a thread, off the path of the bytes."""

import dataclasses
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch.distributed.checkpoint.filesystem as _stock
from torch.distributed.checkpoint.metadata import Metadata

from ... import _C
from ..snapshot.staged import Objects
from ..storage.metadata import decode_metadata, encode_metadata
from ..storage.writer import FileWriteResult
from .open import Opened
from .static_plan import StaticPlan


@dataclasses.dataclass(frozen=True)
class BuiltMetadata:
    """The metadata of all ranks' planned records, and the files that these lie in.

    ``encoded``: the file's bytes, unless DCP's entries or paths have to be put in first; then
    ``decoded``."""

    encoded: memoryview | None
    decoded: Metadata | None
    files: Sequence[tuple[str, int]]  # names and sizes in bytes


def start_metadata(opened: Opened, static: StaticPlan, objects: Objects) -> Future[BuiltMetadata]:
    """Begins to build the metadata of everything that is planned without DCP. ``objects``: the
    coordinator's."""
    build = _build_of(opened, static, objects)
    built: Future[BuiltMetadata] = Future()

    def run() -> None:
        try:
            built.set_result(build.run())
        except BaseException as error:
            built.set_exception(error)

    # Not an executor: these take nothing on once the interpreter has begun to end, which waits for
    # asynchronous saves.
    thread = threading.Thread(target=run, name="torch_hsdp_ckpt_metadata")
    thread.start()
    opened.unfinished.add_thread(thread)
    return built


@dataclasses.dataclass(frozen=True)
class _Build:
    """What the thread needs; no tensor, and no value of the state.

    ``paths``: of all planned values, if they are such as DCP makes. ``planner_data``: the paths
    again, where ``is_complete`` is not true and the metadata has to be put together in Python."""

    plan: _C.SavePlan
    skeleton: Metadata
    paths: _C.PlannedPaths | None
    writers: Sequence[_C.SaveWriter]
    save_id: int
    single_file: bool
    directory: str | os.PathLike[str]
    is_complete: bool
    planner_data: dict[str, Any] | None

    def run(self) -> BuiltMetadata:
        built = self.plan.complete_metadata(
            self.skeleton, self.paths, self.writers, self.save_id, self.single_file
        )
        if self.is_complete:
            return BuiltMetadata(built.encoded, None, built.files)
        metadata = decode_metadata(built.encoded, self.directory)
        if self.planner_data is not None:
            metadata.planner_data = self.planner_data
        return BuiltMetadata(None, metadata, built.files)


def _build_of(opened: Opened, static: StaticPlan, objects: Objects) -> _Build:
    writer = opened.request.writer
    agreed = opened.comparison.agreed
    names = [*static.names, *static.objects]
    own_paths = opened.local.paths
    paths = None
    if agreed and own_paths is not None:
        paths = static.plan.paths(static.objects, (own_paths[name] for name in names))
    # What DCP has planned a part of has to be put together, and other paths than DCP makes are
    # pickle's to write.
    is_complete = agreed and (paths is not None or own_paths is None)
    planner_data = None
    if not is_complete and own_paths is not None:
        planner_data = dict(opened.gathered.metadata.planner_data or {})
        planner_data.update((name, own_paths[name]) for name in names)
    return _Build(
        plan=static.plan,
        skeleton=Metadata(
            {}, version=_stock.CURRENT_DCP_VERSION, storage_meta=writer.storage_meta()
        ),
        paths=paths,
        writers=_writers(opened, objects),
        save_id=opened.save_id,
        single_file=writer.single_file_per_rank,
        directory=writer.path,
        is_complete=is_complete,
        planner_data=planner_data,
    )


def _writers(opened: Opened, objects: Objects) -> list[_C.SaveWriter]:
    """Each rank's process, and the objects that it writes: the coordinator writes them all."""
    sizes = [(name, len(data)) for name, data in objects]
    coordinator, *others = opened.writers
    return [
        _C.SaveWriter(coordinator, sizes),
        *(_C.SaveWriter(process, []) for process in others),
    ]


def complete_metadata(
    built: BuiltMetadata, gathered: Metadata, results: Sequence[FileWriteResult]
) -> bytes | memoryview:
    """The bytes of `.metadata`: with what DCP has planned, ``gathered``, and where it was
    written."""
    if built.decoded is None:
        assert built.encoded is not None
        return built.encoded
    metadata = built.decoded
    metadata.state_dict_metadata.update(gathered.state_dict_metadata)
    metadata.storage_data.update((result.index, result.storage_data) for result in results)
    return encode_metadata(metadata)
