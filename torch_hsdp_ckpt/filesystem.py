"""DCP's file system storage with the bytes moved in C++: drop-ins for torch's ``FileSystemWriter`` and ``FileSystemReader``.

What the writer here writes, stock torch reads, and the reader here reads what stock torch wrote. ``docs/format.md`` has the
bytes and the order of steps that makes a save atomic.
"""

import dataclasses
import io
import logging
import math
import os
import posixpath
import threading
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as _stock
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from . import _C
from ._metadata import encode_metadata, read_metadata
from .errors import CheckpointError, CorruptCheckpointError

__all__ = ["FileSystemReader", "FileSystemWriter"]

_logger = logging.getLogger(__name__)
_RECORD_DTYPES: dict[torch.dtype, str] = {
    dtype: name for name in _C.record_dtypes() if (dtype := getattr(torch, name, None)) is not None
}
# Tensors that are not contiguous in CPU memory are copied there first, this many bytes at a time.
_STAGING_BYTES = 32 << 20
# One commit at a time in a process: the second sees what the first left, and its files are checked after that.
_commit_lock = threading.Lock()
_used_save_ids: set[int] = set()


@dataclasses.dataclass
class _SaveStorage:
    """What the coordinator hands each rank through the plan: which rank's files these are, and in which save."""

    rank: int
    save_id: int


@dataclasses.dataclass(frozen=True)
class _FileWriteResult(WriteResult):
    """A ``WriteResult`` that also carries the data file's size to the coordinator, which checks it before the commit."""

    file_size: int = 0
    exact: bool = True


def _is_plain(tensor: Tensor) -> bool:
    """Whether our own record holds all there is to a tensor: dense, of a dtype that has a record format, no subclass."""
    return type(tensor) is Tensor and tensor.layout == torch.strided and tensor.dtype in _RECORD_DTYPES


def _torch_saved(tensor: Tensor) -> memoryview:
    """What stock DCP writes for a tensor that is not plain (quantized, a subclass, sparse): torch.save's bytes."""
    tensor = tensor.cpu()
    if tensor.layout == torch.strided and tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getbuffer()


def _staged(tensor: Tensor) -> Tensor:
    """The tensor's elements, contiguous in CPU memory: itself if it is so already."""
    return tensor.cpu().resolve_conj().resolve_neg().contiguous()


def _check_storage(tensor: Tensor, name: str) -> None:
    """Refuses a tensor whose memory was freed under it, as FSDP frees full parameters: reading it would end the process."""
    if tensor.layout != torch.strided or type(tensor) is not Tensor or not tensor.numel():
        return
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    if tensor.device.type != "meta" and tensor.untyped_storage().size() < needed:
        raise CheckpointError(
            f"{name}: shape {list(tensor.shape)} needs {needed} bytes, its storage has {tensor.untyped_storage().size()}; "
            "was its memory freed, as that of a sharded module's full parameters is?"
        )


def _is_staged(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


class FileSystemWriter(_stock.FileSystemWriter):
    """Writes DCP checkpoints to a directory, for ``dcp.save`` and ``dcp.async_save``, in torch's own format.

    A drop-in for :class:`torch.distributed.checkpoint.FileSystemWriter` (torch 2.11 to 2.15), of which it is a subclass. Data
    files are written past the page cache where the file system allows it, carry checksums of every byte, and are never
    overwritten: a checkpoint saved over an older one uses new names, and the older files are removed only when the new
    ``.metadata`` is durable. If a save fails or the machine loses power, the older checkpoint loads as before.

    Args:
        path: directory of the checkpoint, made if it is missing. All ranks see the same one.
        single_file_per_rank: one data file per rank (default), else one per tensor or object.
        sync_files: fsync files and directories (default). Without it a power loss can lose the checkpoint.
        thread_count: threads per rank that write; at least two are used, one copying while the other writes. The number of
            files does not depend on it.
        per_thread_copy_ahead: bytes that are copied from a device ahead of writing them. 0: the writer's own choice.
        cache_staged_state_dict: keep the CPU copy that ``async_save`` makes for the next one, as torch does.
        overwrite: False refuses to save where there is a checkpoint, before a byte is written.
        _extensions, serialization_format: anything but the default is written by torch's own code, under names of ours and
            with our commit, but without our checksums; it is then single-file formats' own readers that read it.

    Raises (through DCP as ``CheckpointException`` with these as each rank's cause):
        OSError: the operating system refused, with ``errno`` and ``filename``.
        CheckpointError: there is a checkpoint already and ``overwrite`` is False; ranks do not share the directory.
    """

    def _uses_torch(self) -> bool:
        return bool(self.transforms.extensions) or self.serialization_format != _stock.SerializationFormat.TORCH_SAVE

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        _C.make_directories(str(self.path), self.sync_files)
        metadata = self._own_metadata_path()
        if not self.overwrite and os.path.lexists(metadata):
            raise CheckpointError(f"{metadata}: there is a checkpoint already and overwrite=False; nothing was written")
        if not self.use_collectives and self.rank is not None:
            plan = dataclasses.replace(plan, storage_data=_SaveStorage(self.rank, _C.new_save_id()))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        save_id = _C.new_save_id()
        return [
            plan if plan.storage_data is not None else dataclasses.replace(plan, storage_data=_SaveStorage(rank, save_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        storage: _SaveStorage = plan.storage_data
        save_id = storage.save_id
        # A planner that caches plans brings back the first save's: file names must be new all the same.
        if save_id in _used_save_ids:
            save_id = _C.new_save_id()
        _used_save_ids.add(save_id)
        if self._uses_torch():
            results = self._write_with_torch(plan, planner, _C.torch_file_prefix(storage.rank, save_id))
        else:
            results = []
            items = plan.items
            groups = ([items] if items else []) if self.single_file_per_rank else [[item] for item in items]
            written: list[str] = []
            try:
                for number, group in enumerate(groups):
                    name = _C.data_file_name(storage.rank, save_id, number)
                    results += self._write_file(name, group, planner)
                    written.append(name)
            except BaseException:
                _remove_quietly(self.path, written)
                raise
        if self.sync_files:
            _C.sync_directory(str(self.path))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """Objects first, then tensors: those that lie ready in memory in one call, others staged a batch at a time."""
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        writer = _C.ShardFileWriter(str(self.path), name, max(2, self.thread_count), self.sync_files, _reserve(tensors))
        try:
            return self._write_items(writer, name, items, planner)
        except BaseException as error:
            # The error's frames would keep the writer, its half-written file and the space it takes for as long as somebody
            # keeps the error.
            traceback.clear_frames(error.__traceback__)
            del writer
            raise

    def _write_items(
        self, writer: _C.ShardFileWriter, name: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        objects = [item for item in items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        places: list[tuple[WriteItem, tuple[int, int]]] = []

        def write_objects(batch: list[tuple[WriteItem, memoryview]]) -> None:
            records = [(item.index.fqn, data) for item, data in batch]
            places.extend(zip((item for item, _ in batch), writer.write_objects(records), strict=True))

        def write_tensors(batch: list[tuple[WriteItem, Tensor]]) -> None:
            records = [(item.index.fqn, _RECORD_DTYPES[t.dtype], tuple(t.shape), t.data_ptr()) for item, t in batch]
            places.extend(zip((item for item, _ in batch), writer.write_tensors(records), strict=True))

        pickled: list[tuple[WriteItem, memoryview]] = []
        for item in objects:
            stream = planner.resolve_data(item)
            if not isinstance(stream, io.BytesIO):
                raise CheckpointError(f"{item.index.fqn}: the planner gave {type(stream).__name__} for an object, not BytesIO")
            pickled.append((item, stream.getbuffer()))
        write_objects(pickled)
        ready: list[tuple[WriteItem, Tensor]] = []
        budget = 0  # bytes of `ready` that are copies of ours
        limit = self.per_thread_copy_ahead or _STAGING_BYTES
        for item in tensors:
            data = planner.resolve_data(item)
            if not isinstance(data, Tensor):
                raise CheckpointError(f"{item.index.fqn}: the planner gave {type(data).__name__} for a tensor")
            data = data.detach()
            if isinstance(data, torch.nn.Parameter):
                data = data.data
            _check_storage(data, item.index.fqn)
            if not _is_plain(data):
                write_objects([(item, _torch_saved(data))])
                continue
            if not _is_staged(data):
                budget += data.nbytes
                data = _staged(data)
            ready.append((item, data))
            if budget >= limit:
                write_tensors(ready)
                ready, budget = [], 0
        write_tensors(ready)
        size, direct = writer.finish()
        _logger.debug("%s/%s: %d bytes, %s", self.path, name, size, "direct" if direct else "through the page cache")
        return [
            _FileWriteResult(item.index, length, _stock._StorageInfo(name, offset, length), size)
            for item, (offset, length) in places
        ]

    def _write_with_torch(self, plan: SavePlan, planner: SavePlanner, prefix: str) -> list[WriteResult]:
        stock_plan = dataclasses.replace(plan, storage_data=_stock._StoragePrefix(prefix))
        results = super().write_data(stock_plan, planner).wait()
        out: list[WriteResult] = []
        for result in results:
            info = result.storage_data
            size = os.stat(os.path.join(self.path, info.relative_path)).st_size
            out.append(_FileWriteResult(result.index, result.size_in_bytes, info, size))
        return out

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, tuple[str, int, bool]] = {}
        storage_data = {}
        for result in (result for rank_results in results for result in rank_results):
            info = result.storage_data
            storage_data[result.index] = info
            size, exact = getattr(result, "file_size", None), True
            if size is None:  # a subclass that writes in its own way
                size, exact = max(info.offset + info.length, files.get(info.relative_path, ("", 0))[1]), False
            files[info.relative_path] = (info.relative_path, size, exact)
        metadata.version = _stock.CURRENT_DCP_VERSION
        metadata.storage_data = storage_data
        metadata.storage_meta = self.storage_meta()
        path = self._own_metadata_path()
        with _commit_lock:
            removed, left = _C.commit_checkpoint(
                str(self.path),
                path.name,
                encode_metadata(metadata),
                list(files.values()),
                _named_files(path),
                self.sync_files,
            )
        _logger.debug("%s: committed, %d older files removed", self.path, len(removed))
        for reason in left:
            _logger.warning("the checkpoint is saved; a file of an older one could not be removed: %s", reason)

    def _own_metadata_path(self) -> Path:
        return Path(self._get_metadata_path(None if self.use_collectives else self.rank))


def _reserve(tensors: Iterable[WriteItem]) -> int:
    """Bytes to reserve for a file: what its plain tensors will take at the least. A hint; the file's own length is exact."""
    total = 0
    for item in tensors:
        if item.tensor_data is not None and item.tensor_data.chunk is not None:
            name = _RECORD_DTYPES.get(item.tensor_data.properties.dtype)
            if name is not None:
                total += _C.record_bytes(name, list(item.tensor_data.chunk.sizes))
    return total


def _named_files(metadata_path: Path) -> list[str]:
    """The data files that the checkpoint in place names; none if there is none, or if it can't be read any more."""
    try:
        old = read_metadata(metadata_path)
    except FileNotFoundError:
        return []
    except (CheckpointError, OSError) as error:
        _logger.warning("the checkpoint that is replaced can't be read, its files are left: %s", error)
        return []
    return sorted({info.relative_path for info in (old.storage_data or {}).values()})


def _remove_quietly(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Removes this rank's own files after its own failure, whose error is the one to be seen."""
    for name in names:
        try:
            os.unlink(os.path.join(directory, name))
        except OSError as error:
            _logger.warning("%s/%s could not be removed after a failed save: %s", directory, name, error)


@dataclasses.dataclass
class _Read:
    """One tensor item of a load plan on its way: where the bytes go, and what is left to do with them."""

    item: ReadItem
    target: Tensor
    arguments: tuple[str, int, int, int, int, int]
    staging: Tensor | None  # None: read straight into the target
    view: Tensor | None  # of the staging tensor: what is copied to the target


class FileSystemReader(_stock.FileSystemReader):
    """Reads DCP checkpoints from a directory, for ``dcp.load``: this package's and stock torch's.

    A drop-in for :class:`torch.distributed.checkpoint.FileSystemReader`, of which it is a subclass. Every byte that is read is
    checked against a checksum, ``.metadata`` is decoded by a reader that can run nothing, and tensors go straight into
    contiguous CPU targets; of this package's files only the rows asked for are read.

    Args:
        path: the checkpoint's directory.
        _extension_registry: as in torch; data files written with extensions are read by torch's own code, unchecked.

    Raises (through DCP as ``CheckpointException`` with these as each rank's cause):
        CorruptCheckpointError: bytes differ from their checksums or from the format; names the file and the tensor.
        CheckpointError: ``.metadata`` names a file outside the directory, or a shape that the target has not.
        OSError: the operating system refused, with ``errno`` and ``filename``.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            metadata = read_metadata(path)
        except CheckpointError as error:
            # dcp.load goes on to look for a rank's own metadata and then only says that there is none.
            _logger.error("%s", error)
            raise
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        by_file: dict[str, list[ReadItem]] = {}
        delegated: list[ReadItem] = []
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            if getattr(info, "transform_descriptors", None):
                delegated.append(item)
            else:
                by_file.setdefault(info.relative_path, []).append(item)
        for name, items in by_file.items():
            self._read_file(name, items, planner)
        if delegated:
            super().read_data(dataclasses.replace(plan, items=delegated), planner).wait()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        normal = posixpath.normpath(name)
        if posixpath.isabs(name) or normal == ".." or normal.startswith("../"):
            raise CheckpointError(f"{self.path}/.metadata names a file outside the checkpoint's directory: {name}")
        reader = _C.ShardFileReader(str(self.path), name)
        pending: list[_Read] = []
        staged = 0
        for item in sorted(items, key=lambda item: int(self.storage_data[item.storage_index].offset)):
            info = self.storage_data[item.storage_index]
            fqn = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(reader.read_object(fqn, info.offset, info.length)))
                continue
            record = reader.describe(fqn, info.offset, info.length)
            if record is None:
                self._load_with_torch(item, reader.read_object(fqn, info.offset, info.length), name, planner)
                continue
            read = self._prepare(item, info, record, planner, f"{self.path}/{name}: {fqn}")
            pending.append(read)
            staged += 0 if read.staging is None else read.staging.nbytes
            if staged >= _STAGING_BYTES:
                _run(reader, pending, planner)
                pending, staged = [], 0
        _run(reader, pending, planner)

    def _prepare(
        self,
        item: ReadItem,
        info: Any,
        record: tuple[str, list[int], list[int], int, int],
        planner: LoadPlanner,
        what: str,
    ) -> _Read:
        """Decides what is read of a record, and whether it can land in the target itself."""
        name, shape, stride, storage_offset, storage_bytes = record
        dtype: torch.dtype | None = getattr(torch, name, None)
        if dtype is None:
            raise CheckpointError(f"{what}: dtype {name} is not known to torch {torch.__version__}")
        _check_within(item, shape, what)
        target = _target(item, planner, what)
        contiguous = torch.empty(shape, device="meta").is_contiguous() if shape == [] else None
        contiguous = stride == list(torch.empty(shape, device="meta").stride()) if contiguous is None else contiguous
        offsets, lengths = list(item.storage_offsets), list(item.lengths)
        if contiguous and shape:
            # Rows of dimension 0 are one range of bytes; a narrower cut in other dimensions is made from them.
            row = math.prod(shape[1:]) * dtype.itemsize
            first, rows = storage_offset * dtype.itemsize + offsets[0] * row, lengths[0]
            size = rows * row
            if lengths[1:] == shape[1:] and _is_landing(target, dtype):
                address = target.data_ptr() if size else 0
                return _Read(item, target, (item.storage_index.fqn, info.offset, info.length, first, size, address), None, None)
            staging = torch.empty([rows, *shape[1:]], dtype=dtype)
            view = narrow_tensor_by_index(staging, [0, *offsets[1:]], lengths)
        elif contiguous:
            first, size = storage_offset * dtype.itemsize, dtype.itemsize
            if _is_landing(target, dtype):
                arguments = (item.storage_index.fqn, info.offset, info.length, first, size, target.data_ptr())
                return _Read(item, target, arguments, None, None)
            staging = view = torch.empty([], dtype=dtype)
        else:
            # Stock torch keeps strides: the storage is read as it is.
            first, size = 0, storage_bytes
            staging = torch.empty(storage_bytes // dtype.itemsize, dtype=dtype)
            whole = torch.as_strided(staging, shape, stride, storage_offset)
            view = narrow_tensor_by_index(whole, offsets, lengths)
        address = staging.data_ptr() if size else 0
        return _Read(item, target, (item.storage_index.fqn, info.offset, info.length, first, size, address), staging, view)

    def _load_with_torch(self, item: ReadItem, data: bytes, name: str, planner: LoadPlanner) -> None:
        """A tensor of a kind that only torch can rebuild, from bytes that have passed their checksums."""
        what = f"{self.path}/{name}: {item.storage_index.fqn}"
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CorruptCheckpointError(f"{what}: torch.load refuses the record: {error}") from error
        if not isinstance(tensor, Tensor):
            raise CorruptCheckpointError(f"{what}: expected a tensor, got {type(tensor).__name__}")
        _check_within(item, list(tensor.shape), what)
        target = _target(item, planner, what)
        target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


def _check_within(item: ReadItem, shape: list[int], what: str) -> None:
    offsets, lengths = item.storage_offsets, item.lengths
    if len(offsets) != len(shape) or any(o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, lengths, shape, strict=True)):
        raise CorruptCheckpointError(
            f"{what}: expected a record that holds {list(lengths)} from {list(offsets)}, got one of shape {shape}"
        )


def _target(item: ReadItem, planner: LoadPlanner, what: str) -> Tensor:
    target = planner.resolve_tensor(item).detach()
    _check_storage(target, what)
    if target.size() != item.lengths:
        raise CheckpointError(f"{what}: the target is {list(target.size())}, the plan reads {list(item.lengths)}")
    return target


def _is_landing(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of `dtype` can be read straight into the target's memory."""
    return _is_plain(target) and target.dtype == dtype and _is_staged(target)


def _run(reader: _C.ShardFileReader, reads: Sequence[_Read], planner: LoadPlanner) -> None:
    reader.read_tensors([read.arguments for read in reads], _read_threads())
    for read in reads:
        if read.view is not None:
            read.target.copy_(read.view)
        planner.commit_tensor(read.item, read.target)


def _read_threads() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))
