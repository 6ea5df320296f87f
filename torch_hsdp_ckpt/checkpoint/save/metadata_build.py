"""The coordinator's metadata, built on a thread, off the path of the bytes."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

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
    build = _builder(opened, static, [(name, len(data)) for name, data in objects])
    built: Future[BuiltMetadata] = Future()

    def run() -> None:
        try:
            built.set_result(build())
        except BaseException as error:
            built.set_exception(error)

    # Not an executor: these take nothing on once the interpreter has begun to end, which waits for
    # asynchronous saves.
    thread = threading.Thread(target=run, name="torch_hsdp_ckpt_metadata")
    thread.start()
    opened.unfinished.add_thread(thread)
    return built


def _builder(
    opened: Opened, static: StaticPlan, objects: list[tuple[str, int]]
) -> Callable[[], BuiltMetadata]:
    """What the thread does. It holds no tensor and no value of the state."""
    plan, paths, writer = static.plan, opened.local.paths, opened.request.writer
    agreed = opened.comparison.agreed
    names = [*static.names, *static.objects]
    planned_paths = None
    if agreed and paths is not None:
        planned_paths = plan.paths(static.objects, map(paths.__getitem__, names))
    # What DCP has planned a part of has to be put together, and other paths than DCP makes are
    # pickle's to write.
    is_complete = agreed and (planned_paths is not None or paths is None)
    planner_data = None if is_complete else opened.local.paths_of(names)
    skeleton = Metadata({}, version=_stock.CURRENT_DCP_VERSION, storage_meta=writer.storage_meta())
    writers = [
        _C.SaveWriter(process, objects if rank == 0 else [])
        for rank, process in enumerate(opened.writers)
    ]
    gathered_data = opened.gathered.metadata.planner_data

    def build() -> BuiltMetadata:
        built = plan.complete_metadata(
            skeleton, planned_paths, writers, opened.save_id, writer.single_file_per_rank
        )
        if is_complete:
            return BuiltMetadata(built.encoded, None, built.files)
        metadata = decode_metadata(built.encoded, writer.path)
        if planner_data is not None:
            metadata.planner_data = {**(gathered_data or {}), **planner_data}
        return BuiltMetadata(None, metadata, built.files)

    return build


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
