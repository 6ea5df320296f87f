"""Tensors whose targets can't take a record's bytes as they are: of another dtype, on a device, or
not contiguous. Their bytes pass through a bounded amount of memory."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...common.devices import current_stream, has_streams
from ...common.tensors import scratch
from ...errors import CheckpointError
from .pinned import pinned_or_pageable

# Bytes that pass through memory of ours at a time; twice this on the way to a device, while one
# batch is copied and the next one is read.
BATCH_BYTES = 16 << 20


class TensorRead(NamedTuple):
    """A box of one record's tensor, in elements, and the tensor that takes it, of the box's shape,
    of any dtype and on any device."""

    record: _C.RecordPlace
    offsets: Sequence[int]
    lengths: Sequence[int]
    target: Tensor


@dataclasses.dataclass(frozen=True)
class StagedPart:
    """A part of a box: it lies, with that shape and those strides, in elements [first, first +
    span) of the storage of a record's tensor."""

    record: _C.RecordPlace
    first: int
    span: int
    dtype: torch.dtype
    lengths: list[int]
    stride: list[int]
    target: Tensor

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return self.span * self.dtype.itemsize

    @property
    def staged_size(self) -> int:
        """Bytes that the part takes of a block: 64-byte aligned, whatever comes next."""
        return -(-self.size // 64) * 64

    def range_into(self, memory: Tensor) -> _C.RangeRead:
        start = self.first * self.dtype.itemsize
        return _C.RangeRead(self.record, start, memory.nbytes, memory.data_ptr())

    def identity(self) -> bytes:
        """Which bytes these are: equal on all ranks that read the same ones."""
        record = self.record
        place = (record.fqn, record.file, record.offset, record.length)
        return repr((place, self.first, self.span, self.dtype)).encode()


class _Box(NamedTuple):
    offsets: list[int]
    lengths: list[int]
    target: Tensor

    def first(self, stride: list[int]) -> int:
        """Elements of storage before the box's first one."""
        return sum(o * s for o, s in zip(self.offsets, stride, strict=True))

    def reach(self, stride: list[int]) -> list[int]:
        """By dimension, the elements of storage between the box's first row and its last one."""
        return [(n - 1) * s for n, s in zip(self.lengths, stride, strict=True)]

    def halves(self, dim: int) -> tuple["_Box", "_Box"]:
        half = self.lengths[dim] // 2
        return self._range(dim, 0, half), self._range(dim, half, self.lengths[dim] - half)

    def _range(self, dim: int, start: int, size: int) -> "_Box":
        offsets, lengths = self.offsets.copy(), self.lengths.copy()
        offsets[dim] += start
        lengths[dim] = size
        return _Box(offsets, lengths, self.target.narrow(dim, start, size))


def cut_into_parts(read: TensorRead, box: _C.StagedBox, directory: str) -> Iterator[StagedPart]:
    """The read's box, cut until the bytes from a part's first element to its last one fit into a
    batch. Raises CheckpointError for a record of a dtype that this torch does not know."""
    dtype = _torch_dtype(read, box, directory)
    pending = [_Box(list(read.offsets), list(read.lengths), read.target)]
    while pending:
        part = pending.pop()
        if 0 in part.lengths:
            continue
        reach = part.reach(box.stride)
        span = 1 + sum(reach)
        farthest = max(reach, default=0)
        if span * dtype.itemsize <= BATCH_BYTES or farthest == 0:
            first = box.storage_offset + part.first(box.stride)
            yield StagedPart(
                record=read.record,
                first=first,
                span=span,
                dtype=dtype,
                lengths=part.lengths,
                stride=box.stride,
                target=part.target,
            )
        else:
            # Along the dimension that reaches farthest: halves of it lie apart, in a strided record
            # too.
            first_half, second_half = part.halves(reach.index(farthest))
            pending += [second_half, first_half]


def _torch_dtype(read: TensorRead, box: _C.StagedBox, directory: str) -> torch.dtype:
    dtype: torch.dtype | None = getattr(torch, box.dtype, None)
    if dtype is None:
        raise CheckpointError(
            f"{directory}/{read.record.file}: {read.record.fqn}: dtype {box.dtype} is not known to "
            f"torch {torch.__version__}; use a newer one"
        )
    return dtype


@dataclasses.dataclass
class _Block:
    """Memory that batches are read into, and the copies from it that may still be running."""

    memory: Tensor
    copies: list[torch.Event] = dataclasses.field(default_factory=list)

    def wait(self) -> None:
        for event in self.copies:
            event.synchronize()

    def divide(self, batch: Sequence[StagedPart]) -> list[Tensor]:
        """The memory of each part."""
        memory: list[Tensor] = []
        start = 0
        for part in batch:
            memory.append(self.memory[start : start + part.size].view(part.dtype))
            start += part.staged_size
        return memory

    def start_copies(self, batch: Sequence[StagedPart], memory: list[Tensor]) -> None:
        """Copies the parts, whose memory has been filled, to their targets."""
        for part, filled in zip(batch, memory, strict=True):
            source = filled.as_strided(part.lengths, part.stride, filled.storage_offset())
            part.target.copy_(source, non_blocking=has_streams(part.target.device))
        # On the targets' devices: the current one may be another, as device 0 is in every new
        # thread.
        devices = filter(has_streams, {part.target.device for part in batch})
        self.copies = [current_stream(device).record_event() for device in devices]


def read_staged(
    files: _C.CheckpointReader,
    parts: Sequence[StagedPart],
    execute: Callable[[_C.ReadPlan], None],
) -> None:
    """Reads all parts into their targets, a batch at a time. ``execute`` runs a plan."""
    if not parts:
        return
    blocks = _make_blocks(parts)
    for batch, block in zip(_batches(parts), itertools.cycle(blocks), strict=False):
        block.wait()
        memory = block.divide(batch)
        ranges = [part.range_into(each) for part, each in zip(batch, memory, strict=True)]
        execute(files.plan(ranges))
        block.start_copies(batch, memory)
    for block in blocks:
        block.wait()


def _make_blocks(parts: Sequence[StagedPart]) -> list[_Block]:
    """One block, or, on the way to a device, two: one is filled while the other one is copied
    from."""
    size = min(BATCH_BYTES, sum(part.staged_size for part in parts))
    if not any(has_streams(part.target.device) for part in parts):
        return [_Block(scratch(size))]
    return [_Block(pinned_or_pageable(size)) for _ in range(2)]


def _batches(parts: Sequence[StagedPart]) -> Iterator[list[StagedPart]]:
    batch: list[StagedPart] = []
    size = 0
    for part in parts:
        if batch and size + part.staged_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.staged_size
    if batch:
        yield batch
