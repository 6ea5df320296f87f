"""The tensors of a load: which bytes of which records, and how they come into their targets."""

import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index

from ... import _C
from ...common.tensors import RECORD_DTYPES, check_storage, scratch
from ...errors import CheckpointError, CorruptCheckpointError
from .objects import check_explained

# Bytes that pass through memory of ours at a time, where they can't be read straight into their
# target; twice this on the way to a device, while one batch is copied and the next one is read.
BATCH_BYTES = 16 << 20


@dataclasses.dataclass(slots=True)
class Item:
    """A box of one record and the tensor that takes it, of the box's shape, of any dtype and on any
    device."""

    fqn: str
    file: str  # relative to the checkpoint's directory
    offset: int  # the record's, bytes
    length: int
    box_offsets: Sequence[int]  # within the record's tensor
    box_lengths: Sequence[int]
    target: Tensor


@dataclasses.dataclass(slots=True)
class _Staged:
    """A part of a box that can't land: elements [first, first + span) of a record's storage, and
    how the part lies in them."""

    fqn: str
    file: int
    name: str
    record: tuple[int, int]
    first: int
    span: int
    dtype: torch.dtype
    lengths: list[int]
    stride: list[int]
    target: Tensor


def read_threads() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))


def open_files(reader: _C.CheckpointReader, wanted: Sequence[tuple[str, str]]) -> list[int]:
    """The files' numbers; ``wanted``: names of tensors and objects, and the files that have them.
    Raises OSError as the system has it, with those names."""
    try:
        return reader.open([file for _, file in wanted], read_threads())
    except OSError as error:
        names = [name for name, file in wanted if str(error.filename).endswith(f"/{file}")]
        if not names:
            raise
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise OSError(
            error.errno, f"{error.strerror}: the file of {names[0]}{more}", error.filename
        ) from error


def read_objects(
    reader: _C.CheckpointReader, objects: Sequence[tuple[str, int, int, int]]
) -> Iterator[bytes]:
    """The bytes of objects, given by name, file, offset and length: a batch at a time, for those
    who make something of them."""
    first, size = 0, 0
    for last, (_, _, _, length) in enumerate(objects):
        if first < last and size + length > BATCH_BYTES:
            yield from reader.read_objects(objects[first:last], read_threads())
            first, size = last, 0
        size += length
    yield from reader.read_objects(objects[first:], read_threads())


@dataclasses.dataclass
class Prepared:
    """Items whose files are open and whose records are described. ``digest`` (16 bytes) and
    ``bytes`` are equal in all ranks that read the same bytes in the same order, whatever their
    targets."""

    plan: _C.ReadPlan  # of what lands in its target
    staged: list["_Staged"]
    torch_only: list[tuple[Item, int]]
    reader: _C.CheckpointReader
    directory: str
    digest: bytes
    bytes: int


@dataclasses.dataclass
class Work:
    """What a rank is to read: tensors in two sets, those that are sharded and those that every rank
    has for itself (which may differ between ranks, where the sharded ones do not), and ``rest``:
    what is done when these are there. Objects are read and checked before: one that is refused
    leaves the tensors as they were; ``rest`` puts them in their place."""

    sharded: Prepared
    others: Prepared
    rest: Callable[[], None]

    @property
    def digests(self) -> bytes:
        return self.sharded.digest + self.others.digest


def prepare_items(
    reader: _C.CheckpointReader, directory: str | os.PathLike[str], items: Sequence[Item]
) -> Prepared:
    """Opens files and decides what is read how. Raises CorruptCheckpointError, CheckpointError,
    OSError; nothing is written."""
    directory = os.fspath(directory)
    files = open_files(reader, [(item.fqn, item.file) for item in items])
    plan, answers = reader.resolve(
        [
            (i.fqn, file, i.offset, i.length, i.box_offsets, i.box_lengths, *_landing(i, directory))
            for i, file in zip(items, files, strict=True)
        ],
        read_threads(),
    )
    torch_only: list[tuple[Item, int]] = []
    strided: list[tuple[Item, int, tuple[str, list[int], list[int], int]]] = []
    for item, file, answer in zip(items, files, answers, strict=True):
        if answer is None:
            torch_only.append((item, file))
        elif not isinstance(answer, bool):
            _check_writable(item, directory)
            strided.append((item, file, answer))
    staged = list(_parts(strided, directory))
    whole = hashlib.sha256(plan.digest)
    for part in staged:
        whole.update(
            repr((part.fqn, part.name, part.record, part.first, part.span, part.dtype)).encode()
        )
    size = plan.bytes + sum(part.span * part.dtype.itemsize for part in staged)
    return Prepared(plan, staged, torch_only, reader, directory, whole.digest()[:16], size)


def in_part(error: CheckpointError | OSError) -> CheckpointError | OSError:
    """The error as one that says that targets may not be as they were, with its class, errno and
    filename."""
    said = "tensors of the state dict may have been written in part"
    if isinstance(error, OSError):
        if error.errno is None:
            return OSError(f"{error}; {said}")
        return OSError(error.errno, f"{error.strerror}; {said}", error.filename)
    kind = CorruptCheckpointError if isinstance(error, CorruptCheckpointError) else CheckpointError
    return kind(f"{error}; {said}")


def run_items(prepared: Prepared, run: Callable[[_C.ReadPlan], None] | None = None) -> None:
    """Reads all items into their targets: straight into those that are contiguous in CPU memory and
    of the record's dtype, through at most a few times ``BATCH_BYTES`` of memory for the rest.

    ``run`` executes a plan; by default this process reads all of it. Where the digests are equal it
    is called with the same plans in the same order.

    Raises: CorruptCheckpointError, CheckpointError, OSError: the targets may have been written in
        part by then.
    """
    execute = run or (lambda plan: plan.read_all(read_threads()))
    execute(prepared.plan)
    _read_staged(prepared.reader, prepared.staged, execute)
    for item, file in prepared.torch_only:
        _load_with_torch(prepared.reader, item, file, prepared.directory)


def _landing(item: Item, directory: str | os.PathLike[str]) -> tuple[str | None, int]:
    """The dtype and the address under which the target can take the record's bytes as they are; no
    dtype if it can't."""
    target = item.target
    check_storage(target, item.fqn)
    if list(target.shape) != list(item.box_lengths):
        raise CheckpointError(
            f"{directory}/{item.file}: {item.fqn}: the target is {list(target.shape)}, the plan "
            f"reads {list(item.box_lengths)}"
        )
    if type(target) is not Tensor or target.layout != torch.strided or target.device.type != "cpu":
        return None, 0
    if not target.is_contiguous() or target.is_conj() or target.is_neg():
        return None, 0
    return RECORD_DTYPES.get(target.dtype), target.data_ptr()


def _check_writable(item: Item, directory: str) -> None:
    """CheckpointError for a target that torch could not copy a dense record to."""
    problem = ""
    if item.target.layout != torch.strided:
        problem = f"of layout {item.target.layout}, the record is dense"
    elif torch._debug_has_internal_overlap(item.target) == 1:
        problem = "expanded, several of its elements share memory"
    if problem:
        raise CheckpointError(f"{directory}/{item.file}: {item.fqn}: the target is {problem}")


def _parts(
    staged: Sequence[tuple[Item, int, tuple[str, list[int], list[int], int]]],
    directory: str | os.PathLike[str],
) -> Iterator[_Staged]:
    """The boxes, cut until the bytes from a part's first element to its last one fit into a
    batch."""
    for item, file, (name, _, stride, storage_offset) in staged:
        dtype: torch.dtype | None = getattr(torch, name, None)
        if dtype is None:
            raise CheckpointError(
                f"{directory}/{item.file}: {item.fqn}: dtype {name} is not known to torch "
                f"{torch.__version__}; use a newer one"
            )
        pending = [(list(item.box_offsets), list(item.box_lengths), item.target)]
        while pending:
            offsets, lengths, target = pending.pop()
            if 0 in lengths:
                continue
            span = 1 + sum((n - 1) * s for n, s in zip(lengths, stride, strict=True))
            if span * dtype.itemsize > BATCH_BYTES and max(lengths) > 1:
                # Along the dimension that reaches farthest: halves of it lie apart, in a strided
                # record too.
                reach = [(n - 1) * s for n, s in zip(lengths, stride, strict=True)]
                dim = reach.index(max(reach))
                if reach[dim] > 0:
                    half = lengths[dim] // 2
                    for start, size in ((half, lengths[dim] - half), (0, half)):
                        part_offsets, part_lengths = offsets.copy(), lengths.copy()
                        part_offsets[dim] += start
                        part_lengths[dim] = size
                        pending.append(
                            (part_offsets, part_lengths, target.narrow(dim, start, size))
                        )
                    continue
            first = storage_offset + sum(o * s for o, s in zip(offsets, stride, strict=True))
            record = (item.offset, item.length)
            yield _Staged(
                item.fqn, file, item.file, record, first, span, dtype, lengths, stride, target
            )


def _read_staged(
    reader: _C.CheckpointReader, parts: Sequence[_Staged], execute: Callable[[_C.ReadPlan], None]
) -> None:
    """Through memory that all batches share: one block, or on the way to a device two, one being
    filled while the other one is copied from."""
    if not parts:
        return
    device = any(part.target.is_cuda for part in parts)
    size = min(BATCH_BYTES, sum(map(_staged_bytes, parts)))
    blocks = (
        [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        if device
        else [scratch(size)]
    )
    copied: list[list[torch.cuda.Event]] = [[] for _ in blocks]
    for number, batch in enumerate(_batches(parts)):
        turn = number % len(blocks)
        for event in copied[turn]:
            event.synchronize()  # type: ignore[no-untyped-call]
        memory, start = [], 0
        for part in batch:
            memory.append(
                blocks[turn][start : start + part.span * part.dtype.itemsize].view(part.dtype)
            )
            start += _staged_bytes(part)
        execute(
            reader.plan(
                [
                    (p.fqn, p.file, *p.record, p.first * p.dtype.itemsize, m.nbytes, m.data_ptr())
                    for p, m in zip(batch, memory, strict=True)
                ]
            )
        )
        for part, filled in zip(batch, memory, strict=True):
            source = filled.as_strided(part.lengths, part.stride, filled.storage_offset())
            part.target.copy_(source, non_blocking=part.target.is_cuda)
        # Of the targets' devices: the current one may be another, as device 0 is in every new
        # thread.
        devices = {part.target.device for part in batch if part.target.is_cuda}
        copied[turn] = [torch.cuda.current_stream(device).record_event() for device in devices]  # type: ignore[no-untyped-call]
    for event in itertools.chain(*copied):
        event.synchronize()  # type: ignore[no-untyped-call]


def _staged_bytes(part: _Staged) -> int:
    """What a part takes of a block: 64-byte aligned, whatever comes next."""
    return -(-part.span * part.dtype.itemsize // 64) * 64


def _batches(parts: Sequence[_Staged]) -> Iterator[list[_Staged]]:
    batch: list[_Staged] = []
    size = 0
    for part in parts:
        part_bytes = _staged_bytes(part)
        if batch and size + part_bytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part_bytes
    if batch:
        yield batch


def _load_with_torch(
    reader: _C.CheckpointReader, item: Item, file: int, directory: str | os.PathLike[str]
) -> None:
    """A tensor of a kind that only torch can rebuild, from bytes that have passed their
    checksums."""
    what = f"{directory}/{item.file}: {item.fqn}"
    (data,) = reader.read_objects([(item.fqn, file, item.offset, item.length)], 1)
    try:
        check_explained(data, what)
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CorruptCheckpointError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(f"{what}: torch.load refuses the record: {error}") from error
    if not isinstance(tensor, Tensor):
        raise CorruptCheckpointError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    shape, offsets, lengths = list(tensor.shape), list(item.box_offsets), list(item.box_lengths)
    if len(offsets) != len(shape) or any(
        o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, lengths, shape, strict=True)
    ):
        raise CorruptCheckpointError(
            f"{what}: expected a record that holds {lengths} from {offsets}, got one of shape "
            f"{shape}"
        )
    item.target.copy_(narrow_tensor_by_index(tensor, offsets, lengths))
