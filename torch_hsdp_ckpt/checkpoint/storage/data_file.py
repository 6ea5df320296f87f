"""One data file on its way to disk: tensors from any device and of any layout, in bounded
memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...common.devices import current_stream, has_streams, on_stream
from ...common.tensors import RECORD_DTYPES, is_row_major_on_cpu, row_major_parts, scratch
from ...errors import CheckpointError
from .directory import encoded
from .pinned import pinned_or_pageable

# Bytes that are copied at a time where a tensor can't be written from where it is. Devices'
# tensors take two such blocks, the writer (threads + 1) of a huge page, 2 MiB: together they stay
# below 64 MiB.
COPY_BLOCK = 16 << 20
# Records that are given to the writer at a time: each has some 2 KiB of framing and names there.
_RECORDS = 1024
_ALIGNMENT = 64  # of the parts in a pinned block: every dtype's, and a cache line


@dataclasses.dataclass(slots=True)
class HostRecord:
    """A record's payload in host memory: its dtype as records call it, its shape, where it is,
    its bytes."""

    kind: str
    shape: Sequence[int]
    address: int
    size: int


@dataclasses.dataclass
class _Batch:
    """Records, or parts of some, whose bytes are in CPU memory or on their way there."""

    parts: list[_C.RecordPart] = dataclasses.field(default_factory=list)
    # What the parts' addresses point to.
    kept: list[Tensor] = dataclasses.field(default_factory=list)
    copied: int = 0  # bytes of block memory in use
    # Of each device, once all copies are started.
    copies_done: list[torch.Event] = dataclasses.field(default_factory=list)


class DataFile:
    """Writes records in the order they are added; end it with :meth:`finish`, or with
    :meth:`discard` after an error.

    What lies contiguous in CPU memory is written from where it is. Everything else is copied a
    block at a time: strided CPU tensors to one block of pageable memory; devices' tensors to two
    pinned blocks in turn, one of which is filled on a side stream while the other is written. No
    tensor may change before :meth:`finish` returns.

    Args:
        directory, name: where; ``name`` as ``_C.data_file_name`` gives it. There is no such file
            yet.
        threads: that checksum and write; at least two are used, one copying while the other writes.
        sync: the bytes are durable when :meth:`finish` returns.
        reserve: bytes to reserve at the start; 0 for none.
        block: bytes that are copied at a time; 0 for ``COPY_BLOCK``.
        image: memory laid out as the file. What is added from its place there is written from
            there, with the rest of the file put around it.
        copies: what brought payloads there, which know their checksums. They are over when such a
            payload is added.
        planned: where the first records have to come to lie. They are not among ``places``.
        owners: whose the records are, see ``_C.record_owner``; those that come behind them do not
            say it.

    Raises CheckpointError for a record in another place than planned, and OSError (errno, filename)
    from any method; after that only :meth:`discard` is left."""

    def __init__(
        self,
        directory: str,
        name: str,
        threads: int = 2,
        sync: bool = True,
        reserve: int = 0,
        block: int = 0,
        image: _C.FileImage = _C.FileImage(),  # noqa: B008 (immutable)
        copies: Sequence[_C.StagingCopy] = (),
        planned: _C.PlannedFile | None = None,
        owners: Sequence[int] = (),
    ) -> None:
        self._writer = _C.ShardFileWriter(
            encoded(directory), name, max(2, threads), sync, reserve, image, copies, owners
        )
        self._block = _aligned(block or COPY_BLOCK)
        self._batch = _Batch()
        # The batch before, with tensors of devices: its copies run, nothing of it is written yet.
        self._started: _Batch | None = None
        self._streams: dict[torch.device, torch.Stream] = {}
        self._pinned: list[Tensor] = []
        self._pageable: Tensor | None = None
        self._name, self._planned = f"{directory}/{name}", planned
        self.written = 0  # records
        self.places: list[tuple[int, int]] = []  # offset and length in bytes, a record each

    def add_objects(self, objects: Sequence[tuple[str, Any]]) -> None:
        """Names and bytes, or buffers."""
        self._write_all()
        self._take(self._writer.write_objects(objects))

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """A plain tensor (see ``common.tensors.is_plain``) on any device."""
        self._make_room()
        if is_row_major_on_cpu(tensor):
            self._batch.kept.append(tensor)
            self._add_part(name, tensor, tensor, 0)
            return
        first = 0
        for part in row_major_parts(tensor, self._block):
            copy = self._copy_to_block(part)
            self._add_part(name, tensor, copy, first)
            first += copy.nbytes

    def _add_part(self, name: str, tensor: Tensor, memory: Tensor, first: int) -> None:
        """Adds a part of a record, whose bytes from ``first`` on are in ``memory``."""
        dtype, shape = RECORD_DTYPES[tensor.dtype], tuple(tensor.shape)
        self._batch.parts.append(
            _C.RecordPart(name, dtype, shape, memory.data_ptr(), first, memory.nbytes)
        )

    def add_host_record(self, name: str, record: HostRecord) -> None:
        """A tensor whose bytes are in host memory already, and stay there."""
        self._make_room()
        self._batch.parts.append(
            _C.RecordPart(name, record.kind, record.shape, record.address, 0, record.size)
        )

    def flush(self) -> None:
        """Nothing that was added is read any more when it returns."""
        self._write_all()

    def finish(self) -> int:
        """Writes what is left and the index, makes the file durable, closes it. Its length in
        bytes."""
        self._write_all()
        return self._writer.finish().size

    def discard(self) -> None:
        """Closes and removes the file: an error's frames would keep it, and the space it takes, as
        long as the error lives. Nothing that was added is read any more when it returns: copies may
        still be on their way from devices."""
        try:
            for stream in self._streams.values():
                stream.synchronize()
        finally:
            del self._writer

    def _make_room(self) -> None:
        if len(self._batch.parts) >= _RECORDS:
            self._next_batch()

    def _next_batch(self) -> None:
        """Writes this batch; with devices' tensors the one before, while this one's copies run."""
        batch, self._batch = self._batch, _Batch()
        if not self._streams:
            self._write(batch)
            return
        batch.copies_done = [stream.record_event() for stream in self._streams.values()]
        before, self._started = self._started, batch
        # The next batch is copied to the block of the one before, which is written by then.
        self._pinned.reverse()
        if before is not None:
            self._write(before)

    def _write_all(self) -> None:
        self._next_batch()
        if self._started is not None:
            batch, self._started = self._started, None
            self._write(batch)

    def _write(self, batch: _Batch) -> None:
        for event in batch.copies_done:
            event.synchronize()
        if batch.parts:
            self._take(self._writer.write_tensors(batch.parts))

    def _take(self, places: list[tuple[int, int]]) -> None:
        """Checks where planned records have come to lie, and keeps the places of the others."""
        planned: list[tuple[int, int]] = []
        if self._planned is not None:
            planned = self._planned.places(self.written, len(places))
        if places[: len(planned)] != planned:
            raise CheckpointError(f"{self._name}: its records are not where the plan has them")
        self.written += len(places)
        self.places += places[len(planned) :]

    def _copy_to_block(self, part: Tensor) -> Tensor:
        """A part's elements in this batch's block, contiguous; a device's are on their way."""
        size = _aligned(part.nbytes)
        if self._batch.copied and self._batch.copied + size > self._block:
            self._next_batch()
        copy = self._pin(part) if has_streams(part.device) else self._copy(part)
        self._batch.kept += [part, copy]
        self._batch.copied += size
        return copy

    def _copy(self, part: Tensor) -> Tensor:
        """Copies a CPU tensor to the pageable block; what was there before has been written."""
        if self._pageable is None:
            self._pageable = scratch(self._block + _ALIGNMENT)
        return self._place_in(self._pageable, part).copy_(part)

    def _pin(self, part: Tensor) -> Tensor:
        """Starts the copy of a device's tensor to this batch's pinned block."""
        if not self._pinned:
            self._pinned = [pinned_or_pageable(self._block + _ALIGNMENT) for _ in range(2)]
        if part.device not in self._streams:  # a stream orders its own device's work only
            self._streams[part.device] = torch.Stream(part.device)
        stream = self._streams[part.device]
        stream.wait_stream(current_stream(part.device))  # what computes the tensor
        with on_stream(stream):
            source = part.resolve_conj().resolve_neg()
            copy = self._place_in(self._pinned[0], part)
            copy.copy_(source, non_blocking=True)
        return copy

    def _place_in(self, block: Tensor, part: Tensor) -> Tensor:
        """The memory behind what this batch has in a block, as a tensor like ``part``."""
        memory = block[self._batch.copied : self._batch.copied + part.nbytes]
        return memory.view(part.dtype).view(part.shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
