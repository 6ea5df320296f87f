"""``FileSystemWriter``: DCP's storage writer with the bytes moved in C++."""

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as _stock
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ... import _C
from ...common.tensors import (
    RECORD_DTYPES,
    check_storage,
    is_plain,
    is_plain_subclass,
    why_not_saved,
    without_subclass,
)
from ...errors import CheckpointError
from .data_file import COPY_BLOCK, DataFile
from .directory import directory_of, encoded
from .leftovers import make_room, remove_quietly
from .metadata import encode_metadata, read_metadata_bytes
from .saved_objects import (
    CheckObject,
    check_trusted_object,
    warn_of_object,
)

_logger = logging.getLogger(__name__)
# One commit at a time in a process: the second sees what the first left, and its files are checked
# after that.
_commit_lock = threading.Lock()
# A process's own: a planner that caches plans brings back the first save's id, and no two saves of
# a process may write files of the same names.
_used_save_ids: set[int] = set()


def _forget_in_child() -> None:
    """A forked process has none of the threads that would give the lock back."""
    global _commit_lock
    _commit_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)


@dataclasses.dataclass
class _SaveStorage(_stock._StoragePrefix):
    """What the coordinator hands each rank through the plan: which rank's files these are, and in
    which save.

    A planner that caches plans gives the next save those of the last one, whichever writer made
    them. torch's writer then takes the prefix, which is the one that it would have made."""

    rank: int
    save_id: int

    @staticmethod
    def of(rank: int, save_id: int) -> "_SaveStorage":
        return _SaveStorage(f"__{rank}_", rank, save_id)


@dataclasses.dataclass(frozen=True)
class FileWriteResult(WriteResult):
    """A ``WriteResult`` that also carries the data file's size to the coordinator, which checks it
    before the commit."""

    file_size: int = 0


def _file_of(result: WriteResult) -> _C.ExpectedFile:
    """The data file that holds a written record, as the commit expects it."""
    place = result.storage_data
    if isinstance(result, FileWriteResult):
        return _C.ExpectedFile(place.relative_path, result.file_size, exact=True)
    # A subclass writes in its own way: a file is as long as its records, or more.
    return _C.ExpectedFile(place.relative_path, place.offset + place.length, exact=False)


def _torch_saved(tensor: Tensor) -> memoryview:
    """What stock DCP writes for a tensor that is not plain (quantized, a subclass, sparse):
    torch.save's bytes."""
    tensor = tensor.cpu()
    if tensor.layout == torch.strided and tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getbuffer()


class FileSystemWriter(_stock.FileSystemWriter):
    """Writes DCP checkpoints to a directory, for ``dcp.save`` and ``dcp.async_save``, in torch's
    own format.

    A drop-in for :class:`torch.distributed.checkpoint.FileSystemWriter` (torch 2.11 to 2.15), of
    which it is a subclass. Data files are written past the page cache where the file system allows
    it, carry checksums of every byte, and are never overwritten: a checkpoint saved over an older
    one uses new names, and the older files are removed only when the new ``.metadata`` is durable.
    If a save fails or the machine loses power, the older checkpoint loads as before.

    Args:
        path: directory of the checkpoint, made if it is missing, also as a ``file://`` address. All
            ranks see the same one. A relative path is made absolute here.
        single_file_per_rank: one data file per rank (default), else one per tensor or object.
        sync_files: fsync files and directories (default). Without it a power loss can lose the
            checkpoint.
        thread_count: threads per rank that write; at least two are used, one copying while the
            other writes. The number of files does not depend on it.
        per_thread_copy_ahead: bytes that are copied at a time from a device, or from a strided
            tensor, ahead of writing them; 16 MiB at most, and if it is 0.
        cache_staged_state_dict: keep the CPU copy that ``dcp.async_save`` makes for the next one;
            the staging is torch's own code. ``torch_hsdp_ckpt.async_save`` always keeps its memory.
        overwrite: False refuses to save where there is a checkpoint, before a byte is written.
        _extensions: extensions are written by torch's own code (``thread_count`` and
            ``per_thread_copy_ahead`` are torch's then), under names of ours and with our commit,
            but without our checksums.
        serialization_format: anything but the default is written as ``_extensions`` are. Other
            formats than ``torch.save``'s are read by their own readers.

    Raises (through DCP as ``CheckpointException`` with these as each rank's cause):
        OSError: the operating system refused, with ``errno`` and ``filename``.
        CheckpointError: there is a checkpoint already and ``overwrite`` is False; ranks do not
            share the directory.
    """

    _claim: str | None = None  # on the coordinator, from the plan to the commit
    # The training run that the checkpoint is of, and its number there; see csrc/format/trailer.h.
    _run_mark: tuple[int, int] | None = None

    def __init__(self, path: str | os.PathLike[str], *args: Any, **named: Any) -> None:
        super().__init__(directory_of(path), *args, **named)

    # Who asks for the arguments sees those of the torch release that is here.
    functools.update_wrapper(__init__, _stock.FileSystemWriter.__init__)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(directory_of(checkpoint_id) if checkpoint_id else None)

    def _uses_torch(self) -> bool:
        return (
            bool(self.transforms.extensions)
            or self.serialization_format != _stock.SerializationFormat.TORCH_SAVE
        )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        _C.make_directories(encoded(self.path), self.sync_files)
        metadata = self._own_metadata_path()
        if not self.overwrite and os.path.lexists(metadata):
            raise CheckpointError(
                f"{metadata}: there is a checkpoint already and overwrite=False; nothing was "
                "written"
            )
        if not self.use_collectives and self.rank is not None:
            plan = dataclasses.replace(
                plan, storage_data=_SaveStorage.of(self.rank, self._claim_directory())
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if plans and all(plan.storage_data is not None for plan in plans):
            return plans  # without coordination: claimed above, rank by rank
        save_id = self._claim_directory()
        return [
            plan
            if plan.storage_data is not None
            else dataclasses.replace(plan, storage_data=_SaveStorage.of(rank, save_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        storage = self._storage_of(plan)
        try:
            if self._uses_torch():
                results = self._write_with_torch(
                    plan, planner, _C.torch_file_prefix(storage.rank, storage.save_id)
                )
            else:
                results = self._write_files(plan.items, planner, storage.rank, storage.save_id)
        except BaseException:
            if self._claim is not None:
                _C.release_claim(encoded(self.path), self._claim)
            raise
        if self.sync_files:
            _C.sync_directory(encoded(self.path))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _storage_of(self, plan: SavePlan) -> _SaveStorage:
        """Where ``plan`` is written to. One that was cached is an earlier save's, perhaps of a
        writer of torch's: then this rank's files get names of their own."""
        storage = plan.storage_data
        if not isinstance(storage, _SaveStorage) or storage.save_id in _used_save_ids:
            storage = _SaveStorage.of(self._own_rank(), _C.new_save_id(claimed=False))
        _used_save_ids.add(storage.save_id)
        return storage

    def _own_rank(self) -> int:
        """This rank in the process group that saves."""
        if self.rank is not None:
            return self.rank
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def _write_files(
        self, items: list[WriteItem], planner: SavePlanner, rank: int, save_id: int
    ) -> list[WriteResult]:
        groups = [[item] for item in items]
        if self.single_file_per_rank:
            groups = [items] if items else []
        results: list[WriteResult] = []
        written: list[str] = []
        try:
            for number, group in enumerate(groups):
                name = _C.data_file_name(rank, save_id, number)
                results += self._write_file(name, group, planner)
                written.append(name)
        except BaseException:
            remove_quietly(self.path, written)
            raise
        return results

    def _data_file(
        self,
        name: str,
        reserve: int,
        owners: Sequence[int] = (),
        image: _C.FileImage = _C.FileImage(),  # noqa: B008 (immutable)
        copies: Sequence[_C.StagingCopy] = (),
        planned: _C.PlannedFile | None = None,
    ) -> DataFile:
        block = min(self.per_thread_copy_ahead, COPY_BLOCK)
        return DataFile(
            str(self.path),
            name,
            self.thread_count,
            self.sync_files,
            reserve,
            block,
            image,
            copies,
            planned,
            owners,
        )

    def _write_file(
        self, name: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        file = self._data_file(name, _reserve(_tensors_among(items)), owners_of(items))
        try:
            is_dcps = type(planner) is DefaultSavePlanner
            check = check_trusted_object if is_dcps else warn_of_object
            written = add_items(file, items, planner, check)
            size = file.finish()
        except BaseException:
            file.discard()
            raise
        places = zip(written, file.places, strict=True)
        return [write_result(item, name, place, size) for item, place in places]

    def _write_with_torch(
        self, plan: SavePlan, planner: SavePlanner, prefix: str
    ) -> list[WriteResult]:
        stock_plan = dataclasses.replace(plan, storage_data=_stock._StoragePrefix(prefix))
        try:
            results = super().write_data(stock_plan, planner).wait()
            self._check_all_written(plan, results)
        except BaseException:
            with contextlib.suppress(OSError):  # the error to be seen is the one before
                begun = [name for name in os.listdir(self.path) if name.startswith(prefix)]
                remove_quietly(self.path, begun)
            raise
        return [self._with_file_size(result) for result in results]

    def _check_all_written(self, plan: SavePlan, results: Sequence[WriteResult]) -> None:
        """What one of torch's threads raises ends that thread, and nobody is told (torch 2.11 to
        2.15)."""
        lost = {item.index for item in plan.items} - {result.index for result in results}
        if lost:
            first = min(index.fqn for index in lost)
            raise CheckpointError(
                f"{self.path}: torch's own code has not written {first}, and "
                f"{len(lost) - 1} more of {len(plan.items)}; "
                "what its thread raised stands in this process's error output"
            )

    def _with_file_size(self, result: WriteResult) -> FileWriteResult:
        place = result.storage_data
        size = os.stat(os.path.join(self.path, place.relative_path)).st_size
        return FileWriteResult(result.index, result.size_in_bytes, place, size)

    def _claim_directory(self) -> int:
        """Makes this the save that may commit here; the id of the save."""
        save_id, self._claim = self._claim_for_save()
        return save_id

    def _claim_for_save(self) -> tuple[int, str]:
        """Makes a new save the one that may commit here: its id, and the claim."""
        save_id = _C.new_save_id(claimed=True)
        name = self._own_metadata_path().name
        claim = _C.claim_directory(encoded(self.path), name, save_id, self.overwrite)
        make_room(self.path, name, claim, self.sync_files)
        return save_id, claim

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, _C.ExpectedFile] = {}
        storage_data = {}
        for result in itertools.chain.from_iterable(results):
            storage_data[result.index] = result.storage_data
            name, file = result.storage_data.relative_path, _file_of(result)
            if name not in files or files[name].size < file.size:
                files[name] = file
        metadata.version = _stock.CURRENT_DCP_VERSION
        metadata.storage_data = storage_data
        metadata.storage_meta = self.storage_meta()
        if self._claim is None:  # a subclass that plans in its own way
            self._claim_directory()
        claim, self._claim = self._claim, None
        assert claim is not None
        self._commit(claim, encode_metadata(metadata), list(files.values()))

    def storage_meta(self) -> StorageMeta | None:
        """As DCP's; a checkpoint's directory as a string if it is of a class that readers may not
        have."""
        meta = super().storage_meta()
        if meta is None or meta.checkpoint_id is None:
            return meta
        if type(meta.checkpoint_id) not in (str, PosixPath):
            meta.checkpoint_id = str(os.fspath(meta.checkpoint_id))
        if not _is_utf8(str(meta.checkpoint_id)):
            meta.checkpoint_id = None
        return meta

    def _commit(
        self, claim: str, metadata: bytes | memoryview, files: Sequence[_C.ExpectedFile]
    ) -> bytes | memoryview:
        """Makes a checkpoint of data files that are durable; the bytes of its metadata."""
        path = self._own_metadata_path()
        if self._run_mark is not None:
            metadata = _C.mark_metadata(metadata, *self._run_mark)
        with _commit_lock:
            request = _C.CommitRequest(
                directory=encoded(self.path),
                metadata_name=path.name,
                claim=claim,
                metadata=metadata,
                files=files,
                superseded=_named_files(path),
                sync=self.sync_files,
            )
            result = _C.commit_checkpoint(request)
        _logger.debug("%s: committed, %d older files removed", self.path, len(result.removed))
        for reason in result.left:
            _logger.warning(
                "the checkpoint is saved; a file of an older one could not be removed: %s", reason
            )
        return metadata

    def _own_metadata_path(self) -> Path:
        return Path(self._get_metadata_path(None if self.use_collectives else self.rank))


def add_items(
    file: DataFile, items: Sequence[WriteItem], planner: SavePlanner, check: CheckObject
) -> list[WriteItem]:
    """Adds a plan's items, objects first; the items in the order of their records. ``check``: looks
    at what is saved as an object: tensors of somebody's own classes are too."""
    objects = [item for item in items if item.type == WriteItemType.BYTE_IO]
    tensors = _tensors_among(items)
    if objects:
        records = [(item.index.fqn, _object_of(item, planner)) for item in objects]
        for name, data in records:
            check(name, data)
        file.add_objects(records)
    for item in tensors:
        _add_tensor(file, item.index.fqn, _tensor_of(item, planner), check)
    return objects + tensors


def owners_of(items: Sequence[WriteItem]) -> list[int]:
    """Whose a plan's items are, for the file's index, in the order in which :func:`add_items` adds
    them."""
    objects = [item for item in items if item.type == WriteItemType.BYTE_IO]
    return [
        _C.record_owner(item.index.fqn, item.index.offset or ())
        for item in objects + _tensors_among(items)
    ]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensors_among(items: Sequence[WriteItem]) -> list[WriteItem]:
    return [item for item in items if item.type != WriteItemType.BYTE_IO]


def _object_of(item: WriteItem, planner: SavePlanner) -> memoryview:
    stream = planner.resolve_data(item)
    if not isinstance(stream, io.BytesIO):
        raise CheckpointError(
            f"{item.index.fqn}: the planner gave {type(stream).__name__} for an object, not BytesIO"
        )
    return stream.getbuffer()


def _tensor_of(item: WriteItem, planner: SavePlanner) -> Tensor:
    data = planner.resolve_data(item)
    if not isinstance(data, Tensor):
        raise CheckpointError(
            f"{item.index.fqn}: the planner gave {type(data).__name__} for a tensor"
        )
    data = data.detach()
    return data.data if isinstance(data, torch.nn.Parameter) else data


def _add_tensor(file: DataFile, name: str, tensor: Tensor, check: CheckObject) -> None:
    if reason := why_not_saved(tensor):
        raise CheckpointError(f"{name}: {reason}")
    if type(tensor) is not Tensor and is_plain_subclass(tensor):
        tensor = without_subclass(tensor)
    check_storage(tensor, name)
    if is_plain(tensor):
        file.add_tensor(name, tensor)
        return
    data = _torch_saved(tensor)
    check(name, data)
    file.add_objects([(name, data)])


def write_result(
    item: WriteItem, name: str, place: tuple[int, int], file_size: int
) -> FileWriteResult:
    offset, length = place
    return FileWriteResult(item.index, length, _stock._StorageInfo(name, offset, length), file_size)


def _reserve(tensors: Iterable[WriteItem]) -> int:
    """Bytes to reserve for a file: what its plain tensors will take at the least. A hint; the
    file's own length is exact."""
    total = 0
    for item in tensors:
        data = item.tensor_data
        if data is None or data.chunk is None:
            continue
        dtype = RECORD_DTYPES.get(data.properties.dtype)
        if dtype is not None:
            total += _C.record_bytes(dtype, list(data.chunk.sizes))
    return total


def _named_files(metadata_path: Path) -> list[bytes]:
    """The data files that the checkpoint in place names; none if there is none, or if it can't be
    read any more."""
    try:
        return _C.metadata_files(read_metadata_bytes(metadata_path), encoded(metadata_path))
    except FileNotFoundError:
        return []
    except (CheckpointError, OSError) as error:
        _logger.warning(
            "the checkpoint that is replaced can't be read, its files are left: %s", error
        )
        return []
