"""What a rank's files are written from, once training may go on: copies, and what had no place
among them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...common.devices import current_stream, has_streams
from ...common.gate import CHANGED
from ...common.tensors import RECORD_DTYPES, local_of, row_major_on_cpu, row_major_parts
from ...errors import CheckpointError
from ..storage.data_file import COPY_BLOCK, HostRecord
from ..storage.staging import Image, Layout, StagingPool
from .device_copy import CopyPair

Objects = list[tuple[str, memoryview]]  # names and records
Source = Tensor | HostRecord


@dataclasses.dataclass(frozen=True)
class StagedRecords:
    """A rank's records but for its objects, in the order of its files.

    ``in_place``: how many of them, the first ones, are read from the live tensors themselves; the
    others are in memory that is laid out as the files, ``images``, or will be; a
    :class:`~..storage.staging.StagingPool` keeps it. ``copies``: those that sum what they copy."""

    records: Sequence[Source]
    images: Sequence[_C.FileImage]
    in_place: int = 0
    copies: Sequence[_C.StagingCopy] = ()

    @property
    def copied_bytes(self) -> int:
        copied = self.records[self.in_place :]
        return sum(record.size for record in copied if isinstance(record, HostRecord))


@dataclasses.dataclass(frozen=True)
class WatchedSource:
    """What a record was made from, and can be compared with again."""

    name: str
    source: Source
    checksum: int  # of what is written


def watch_sources(
    names: Iterable[str], sources: Iterable[Source], records: Iterable[Source]
) -> tuple[WatchedSource, ...]:
    """The sources of the first records, for :func:`check_sources`."""
    watched = zip(names, sources, records, strict=False)
    return tuple(WatchedSource(name, source, checksum(record)) for name, source, record in watched)


def check_sources(sources: Iterable[WatchedSource]) -> None:
    """CheckpointError if one of them has changed. To be called before anybody may change it by
    right."""
    for watched in sources:
        if checksum(watched.source) != watched.checksum:
            raise CheckpointError(f"{watched.name}: {CHANGED}")


def checksum(source: Source) -> int:
    """The CRC-32 of a record's payload. A file's own checksums are of its blocks; here two readings
    of one source are compared."""
    if isinstance(source, HostRecord):
        return _C.crc32(source.address, source.size, 0)
    crc = 0
    for part in row_major_parts(source, COPY_BLOCK):
        memory = row_major_on_cpu(part)
        crc = _C.crc32(memory.data_ptr(), memory.nbytes, crc)
    return crc


def stage_tensors(
    tensors: Sequence[Tensor],
    files: Sequence[_C.PlannedFile],
    objects: int,
    pool: StagingPool,
    limit: int | None,
) -> StagedRecords:
    """Copies plain tensors of any layout and device, those that find room in ``limit`` bytes.

    Complete on return; on other devices than the CPU the rest is then what it is to be."""
    layout = Layout(files, objects, limit)
    image = pool.image(layout, any(has_streams(tensor.device) for tensor in tensors), limit)
    in_place = layout.first - objects
    with torch.no_grad():
        copies = [
            _copy_to(image, objects + i, tensor)
            for i, tensor in enumerate(tensors[in_place:], start=in_place)
        ]
    # Another thread will read those that are left, on a stream of its own.
    devices = {tensor.device for tensor in tensors[:in_place]}
    for device in filter(has_streams, devices):
        current_stream(device).synchronize()
    return StagedRecords([*tensors[:in_place], *copies], image.files, in_place)


def _copy_to(image: Image, record: int, tensor: Tensor) -> HostRecord:
    """Copies a tensor to a record's place. What is returned keeps no memory alive: the pool has to
    be able to free its block before it makes a larger one."""
    place = image.view(record, tensor)
    if has_streams(tensor.device):
        for piece in CopyPair(tensor.reshape(-1), place.view(-1)).pieces():
            piece.target.copy_(piece.source)
    else:
        place.copy_(tensor)
    dtype, shape = RECORD_DTYPES[tensor.dtype], tuple(tensor.shape)
    return HostRecord(dtype, shape, place.data_ptr(), place.nbytes)


def bytes_of_copy(value: Any) -> float:
    """Bytes that a copy of a tensor takes; infinitely many where only its class knows. Objects are
    not counted."""
    if not isinstance(value, Tensor):
        return float("inf") if hasattr(value, "__create_write_items__") else 0
    local = local_of(value)
    plain = type(local) in (Tensor, torch.nn.Parameter) and local.layout == torch.strided
    return local.untyped_storage().nbytes() if plain else float("inf")
