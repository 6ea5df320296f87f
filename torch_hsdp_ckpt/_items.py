"""The tensors of a load: which bytes of which records, and how they come into their targets."""

import collections
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index

from . import _C
from ._tensors import RECORD_DTYPES, check_storage
from .errors import CheckpointError, CorruptCheckpointError

# Bytes that pass through memory of ours at a time, where they can't be read straight into their target; twice this on the
# way to a device, while one batch is copied and the next one is read.
BATCH_BYTES = 16 << 20


@dataclasses.dataclass(slots=True)
class Item:
    """A box of one record and the tensor that takes it, of the box's shape, of any dtype and on any device."""

    fqn: str
    file: str  # relative to the checkpoint's directory
    offset: int  # the record's, bytes
    length: int
    box_offsets: Sequence[int]  # within the record's tensor
    box_lengths: Sequence[int]
    target: Tensor


@dataclasses.dataclass(slots=True)
class _Staged:
    item: Item
    target: Tensor  # the item's, or a part of it
    view: Tensor  # of memory of ours, which is filled from the record
    read: tuple[str, int, int, int, int, int, int]
    memory: Tensor


def read_threads() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))


def read_items(
    reader: _C.CheckpointReader,
    directory: str | os.PathLike[str],
    items: Sequence[Item],
    run: Callable[[_C.ReadPlan], None] | None = None,
) -> None:
    """Reads all ``items`` into their targets: straight into those that are contiguous in CPU memory and of the record's dtype,
    through at most a few times ``BATCH_BYTES`` of memory for the rest.

    ``run`` executes a plan; by default this process reads all of it. It is called with the same plans in the same order
    wherever the items and the targets' forms are the same.

    Raises:
        CorruptCheckpointError, CheckpointError, OSError: see ``FileSystemReader``. The targets may have been written by then.
    """
    execute = run or (lambda plan: plan.read_all(read_threads()))
    files = reader.open([item.file for item in items], read_threads())
    plan, answers = reader.resolve(
        [
            (i.fqn, file, i.offset, i.length, i.box_offsets, i.box_lengths, *_landing(i, directory))
            for i, file in zip(items, files, strict=True)
        ],
        read_threads(),
    )
    execute(plan)
    staged: list[tuple[Item, int, tuple[str, list[int], list[int], int]]] = []
    for item, file, answer in zip(items, files, answers, strict=True):
        if answer is None:
            _load_with_torch(reader, item, file, directory)
        elif not isinstance(answer, bool):
            staged.append((item, file, answer))
    _read_staged(reader, _parts(staged, directory), execute)


def _landing(item: Item, directory: str | os.PathLike[str]) -> tuple[str | None, int]:
    """The dtype and the address under which the target can take the record's bytes as they are; no dtype if it can't."""
    target = item.target
    check_storage(target, item.fqn)
    if list(target.shape) != list(item.box_lengths):
        raise CheckpointError(
            f"{directory}/{item.file}: {item.fqn}: the target is {list(target.shape)}, the plan reads {list(item.box_lengths)}"
        )
    if type(target) is not Tensor or target.layout != torch.strided or target.device.type != "cpu":
        return None, 0
    if not target.is_contiguous() or target.is_conj() or target.is_neg():
        return None, 0
    return RECORD_DTYPES.get(target.dtype), target.data_ptr()


def _parts(
    staged: Sequence[tuple[Item, int, tuple[str, list[int], list[int], int]]], directory: str | os.PathLike[str]
) -> Iterator[_Staged]:
    """The boxes, cut until the bytes from a part's first element to its last one fit into a batch."""
    for item, file, (name, _, stride, storage_offset) in staged:
        dtype: torch.dtype | None = getattr(torch, name, None)
        if dtype is None:
            raise CheckpointError(
                f"{directory}/{item.file}: {item.fqn}: dtype {name} is not known to torch {torch.__version__}; use a newer one"
            )
        pending = [(list(item.box_offsets), list(item.box_lengths), item.target)]
        while pending:
            offsets, lengths, target = pending.pop()
            if 0 in lengths:
                continue
            span = 1 + sum((n - 1) * s for n, s in zip(lengths, stride, strict=True))
            if span * dtype.itemsize > BATCH_BYTES and max(lengths) > 1:
                # Along the dimension that reaches farthest: halves of it lie apart, in a strided record too.
                reach = [(n - 1) * s for n, s in zip(lengths, stride, strict=True)]
                dim = reach.index(max(reach))
                if reach[dim] > 0:
                    half = lengths[dim] // 2
                    for start, size in ((half, lengths[dim] - half), (0, half)):
                        part_offsets, part_lengths = offsets.copy(), lengths.copy()
                        part_offsets[dim] += start
                        part_lengths[dim] = size
                        pending.append((part_offsets, part_lengths, target.narrow(dim, start, size)))
                    continue
            memory = torch.empty(span, dtype=dtype, pin_memory=target.is_cuda)
            first = storage_offset + sum(o * s for o, s in zip(offsets, stride, strict=True))
            read = (item.fqn, file, item.offset, item.length, first * dtype.itemsize, memory.nbytes, memory.data_ptr())
            yield _Staged(item, target, memory.as_strided(lengths, stride), read, memory)


def _read_staged(reader: _C.CheckpointReader, parts: Iterator[_Staged], execute: Callable[[_C.ReadPlan], None]) -> None:
    under_way: collections.deque[tuple[torch.cuda.Event, list[_Staged]]] = collections.deque()

    def finish(batch: list[_Staged]) -> None:
        execute(reader.plan([part.read for part in batch]))
        for part in batch:
            part.target.copy_(part.view, non_blocking=part.target.is_cuda)
        if any(part.target.is_cuda for part in batch):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()  # type: ignore[no-untyped-call]
            under_way.append((event, batch))
        while len(under_way) > 1:
            under_way.popleft()[0].synchronize()  # type: ignore[no-untyped-call]

    batch: list[_Staged] = []
    size = 0
    for part in parts:
        if batch and size + part.memory.nbytes > BATCH_BYTES:
            finish(batch)
            batch, size = [], 0
        batch.append(part)
        size += part.memory.nbytes
    if batch:
        finish(batch)
    while under_way:
        under_way.popleft()[0].synchronize()  # type: ignore[no-untyped-call]


def _load_with_torch(reader: _C.CheckpointReader, item: Item, file: int, directory: str | os.PathLike[str]) -> None:
    """A tensor of a kind that only torch can rebuild, from bytes that have passed their checksums."""
    what = f"{directory}/{item.file}: {item.fqn}"
    (data,) = reader.read_objects([(item.fqn, file, item.offset, item.length)], 1)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptCheckpointError(f"{what}: torch.load refuses the record: {error}") from error
    if not isinstance(tensor, Tensor):
        raise CorruptCheckpointError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    shape, offsets, lengths = list(tensor.shape), list(item.box_offsets), list(item.box_lengths)
    if len(offsets) != len(shape) or any(o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, lengths, shape, strict=True)):
        raise CorruptCheckpointError(f"{what}: expected a record that holds {lengths} from {offsets}, got one of shape {shape}")
    item.target.copy_(narrow_tensor_by_index(tensor, offsets, lengths))
