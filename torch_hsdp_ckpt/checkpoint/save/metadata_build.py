"""The coordinator's metadata: where all ranks hold the same, built on a thread, off the path of the
bytes."""

import dataclasses
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch.distributed.checkpoint.filesystem as _stock
from torch.distributed.checkpoint.metadata import Metadata

from ... import _C
from ..storage.metadata import decode_metadata, encode_metadata
from ..storage.writer import FileWriteResult
from .open import Opened
from .whole_plan import WholePlan


@dataclasses.dataclass(frozen=True)
class BuiltMetadata:
    """The metadata of all ranks' planned records, and the files that these lie in.

    ``encoded``: the file's bytes, unless DCP's entries or paths have to be put in first; then
    ``decoded``."""

    encoded: memoryview | None
    decoded: Metadata | None
    files: Sequence[tuple[str, int]]  # names and sizes in bytes


def start_metadata(opened: Opened, whole: WholePlan) -> Future[BuiltMetadata]:
    """Begins to build the metadata of everything that is planned without DCP."""
    build = _build_of(opened, whole)
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


def build_metadata(opened: Opened, whole: WholePlan) -> BuiltMetadata:
    """The same, at once."""
    return _build_of(opened, whole).run()


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


def _build_of(opened: Opened, whole: WholePlan) -> _Build:
    writer, gathered = opened.request.writer, opened.gathered.metadata
    names = whole.all_names()
    paths = None
    if whole.paths is not None:
        objects = names[len(whole.names) :]
        paths = whole.plan.paths(objects, (whole.paths[name] for name in names))
    # What DCP has planned a part of has to be put together, and other paths than DCP makes are
    # pickle's to write.
    is_complete = not gathered.state_dict_metadata and (paths is not None or whole.paths is None)
    planner_data = None
    if not is_complete and whole.paths is not None:
        planner_data = dict(gathered.planner_data or {})
        planner_data.update((name, whole.paths[name]) for name in names)
    return _Build(
        plan=whole.plan,
        skeleton=Metadata(
            {}, version=_stock.CURRENT_DCP_VERSION, storage_meta=writer.storage_meta()
        ),
        paths=paths,
        writers=[
            _C.SaveWriter(process, whole.objects.get(rank, ()))
            for rank, process in enumerate(opened.writers)
        ],
        save_id=opened.save_id,
        single_file=writer.single_file_per_rank,
        directory=writer.path,
        is_complete=is_complete,
        planner_data=planner_data,
    )


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
