"""``FileSystemReader``: DCP's storage reader with the bytes moved, and checked, in C++."""

import dataclasses
import io
import logging
import math
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as _stock
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from . import _C
from ._metadata import read_metadata
from ._tensors import STAGING_BYTES, check_storage, is_plain, is_staged
from .errors import CheckpointError, CorruptCheckpointError

_logger = logging.getLogger(__name__)


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
            if staged >= STAGING_BYTES:
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
    check_storage(target, what)
    if target.size() != item.lengths:
        raise CheckpointError(f"{what}: the target is {list(target.size())}, the plan reads {list(item.lengths)}")
    return target


def _is_landing(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of `dtype` can be read straight into the target's memory."""
    return is_plain(target) and target.dtype == dtype and is_staged(target)


def _run(reader: _C.ShardFileReader, reads: Sequence[_Read], planner: LoadPlanner) -> None:
    reader.read_tensors([read.arguments for read in reads], _read_threads())
    for read in reads:
        if read.view is not None:
            read.target.copy_(read.view)
        planner.commit_tensor(read.item, read.target)


def _read_threads() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))
