"""The tensors of a load: which bytes of which records, and how they come into their targets."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index

from ... import _C
from ...common.tensors import (
    RECORD_DTYPES,
    check_storage,
    is_row_major_on_cpu,
    why_not_saved,
)
from ...errors import (
    CheckpointError,
    CheckpointOSError,
    CorruptCheckpointError,
    os_error,
)
from .objects import Trust, load_object
from .staged_reads import BATCH_BYTES, StagedPart, TensorRead, cut_into_parts, read_staged


@dataclasses.dataclass(frozen=True)
class PlannedReads:
    """Reads whose files are open and whose records are described. ``digest`` (16 bytes) and
    ``size`` (bytes) are equal on all ranks that read the same bytes in the same order, whatever
    their targets."""

    files: _C.CheckpointReader
    directory: str
    in_place: _C.ReadPlan  # straight into targets
    staged: list[StagedPart]
    torch_only: list[TensorRead]
    digest: bytes
    size: int


class StateUpdate(Protocol):
    """What is left to do for a load when its tensors have been read."""

    def apply(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class PlannedData:
    """What one rank reads, and what it does then. Two sets of tensors: those that are sharded, and
    those that every rank has for itself, which may differ between ranks where the sharded ones do
    not. Objects have been read and checked: one that is refused leaves the tensors as they were;
    ``update`` puts them in their place."""

    sharded: PlannedReads
    unsharded: PlannedReads
    update: StateUpdate


def read_threads() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))


def open_files(files: _C.CheckpointReader, records: Sequence[_C.RecordPlace]) -> None:
    """Opens the records' files. Raises OSError as the system has it, with the names of the tensors
    and objects that are in the file."""
    try:
        files.open([record.file for record in records], read_threads())
    except OSError as error:
        path = os.fsdecode(error.filename)
        names = [record.fqn for record in records if path.endswith(f"/{record.file}")]
        if not names:
            raise
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"{error.strerror}: the file of {names[0]}{more}"
        raise OSError(error.errno, message, error.filename) from error


def read_objects(files: _C.CheckpointReader, objects: Sequence[_C.RecordPlace]) -> Iterator[bytes]:
    """The bytes of objects, whose files are open: read a batch at a time, for callers that make
    something of them."""
    first, size = 0, 0
    for last, record in enumerate(objects):
        if first < last and size + record.length > BATCH_BYTES:
            yield from files.read_objects(objects[first:last], read_threads())
            first, size = last, 0
        size += record.length
    yield from files.read_objects(objects[first:], read_threads())


def plan_reads(
    files: _C.CheckpointReader, directory: str | os.PathLike[str], reads: Sequence[TensorRead]
) -> PlannedReads:
    """Decides what is read how; the files are open. Raises CorruptCheckpointError, CheckpointError,
    OSError; nothing is written."""
    directory = os.fspath(directory)
    resolved = files.resolve([_box_read(read, directory) for read in reads], read_threads())
    for index in resolved.torch_only:
        _check_writable(reads[index], directory)
    staged = _stage(resolved.staged, reads, directory)
    return PlannedReads(
        files=files,
        directory=directory,
        in_place=resolved.plan,
        staged=staged,
        torch_only=[reads[index] for index in resolved.torch_only],
        digest=_digest(resolved.plan, staged),
        size=resolved.plan.bytes + sum(part.size for part in staged),
    )


def _stage(
    boxes: Sequence[_C.StagedBox], reads: Sequence[TensorRead], directory: str
) -> list[StagedPart]:
    staged: list[StagedPart] = []
    for box in boxes:
        read = reads[box.index]
        _check_writable(read, directory)
        staged.extend(cut_into_parts(read, box, directory))
    return staged


def _digest(in_place: _C.ReadPlan, staged: Sequence[StagedPart]) -> bytes:
    digest = hashlib.sha256(in_place.digest)
    for part in staged:
        digest.update(part.identity())
    return digest.digest()[:16]


def run_reads(planned: PlannedReads, run: Callable[[_C.ReadPlan], None] | None = None) -> None:
    """Reads all tensors into their targets: straight into those that are contiguous in CPU memory
    and of the record's dtype, through at most a few times ``BATCH_BYTES`` of memory for the others.

    ``run`` executes a plan; by default this process reads all of it. Where the digests are equal it
    is called with the same plans in the same order.

    Raises: CorruptCheckpointError, CheckpointError, OSError: the targets may have been written in
        part by then.
    """
    execute = run or read_alone
    execute(planned.in_place)
    read_staged(planned.files, planned.staged, execute)
    for read in planned.torch_only:
        _read_with_torch(planned.files, read, planned.directory)


def read_alone(plan: _C.ReadPlan) -> None:
    """Reads all of a plan in this process."""
    plan.read_all(read_threads())


def written_in_part(error: CheckpointError | OSError) -> CheckpointError | OSError:
    """The error as one that says that targets may not be as they were, with its class, errno and
    filename."""
    warning = "tensors of the state dict may have been written in part"
    if isinstance(error, OSError):
        if error.errno is None:
            return CheckpointOSError(f"{error}; {warning}")
        return os_error(error.errno, f"{error.strerror}; {warning}", error.filename)
    is_corrupt = isinstance(error, CorruptCheckpointError)
    kind = CorruptCheckpointError if is_corrupt else CheckpointError
    return kind(f"{error}; {warning}")


def _box_read(read: TensorRead, directory: str) -> _C.BoxRead:
    target = read.target
    check_storage(target, read.record.fqn)
    if list(target.shape) != list(read.lengths):
        raise CheckpointError(
            f"{directory}/{read.record.file}: {read.record.fqn}: the target is "
            f"{list(target.shape)}, the plan reads {list(read.lengths)}"
        )
    is_strided = type(target) is Tensor and target.layout == torch.strided
    takes_bytes = is_strided and is_row_major_on_cpu(target)
    dtype = RECORD_DTYPES.get(target.dtype) if takes_bytes else None
    address = target.data_ptr() if takes_bytes else 0
    return _C.BoxRead(read.record, read.offsets, read.lengths, dtype, address)


def _check_writable(read: TensorRead, directory: str) -> None:
    """CheckpointError for a target that torch could not copy a dense record to."""
    reason = ""
    if read.target.layout != torch.strided:
        reason = f"of layout {read.target.layout}, and only dense ones are filled"
    elif torch._debug_has_internal_overlap(read.target) == 1:
        reason = "expanded, several of its elements share memory"
    if reason:
        record = read.record
        raise CheckpointError(f"{directory}/{record.file}: {record.fqn}: the target is {reason}")


def _read_with_torch(files: _C.CheckpointReader, read: TensorRead, directory: str) -> None:
    """A tensor of a kind that only torch can rebuild, from bytes that have passed their
    checksums."""
    what = f"{directory}/{read.record.file}: {read.record.fqn}"
    (data,) = files.read_objects([read.record], 1)
    tensor = _load_tensor(data, what, read.target)
    if reason := why_not_saved(tensor):
        raise CheckpointError(
            f"{what}: what stock torch has saved here can't be restored: {reason}"
        )
    shape, offsets, lengths = list(tensor.shape), list(read.offsets), list(read.lengths)
    if not _lies_within(offsets, lengths, shape):
        raise CorruptCheckpointError(
            f"{what}: expected a record that holds {lengths} from {offsets}, got one of shape "
            f"{shape}"
        )
    read.target.copy_(narrow_tensor_by_index(tensor, offsets, lengths))


def _load_tensor(data: bytes, what: str, target: Tensor) -> Tensor:
    tensor = load_object(data, what, Trust.for_tensor(target))
    if not isinstance(tensor, Tensor):
        raise CorruptCheckpointError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    return tensor


def _lies_within(offsets: list[int], lengths: list[int], shape: list[int]) -> bool:
    if len(offsets) != len(shape):
        return False
    dimensions = zip(offsets, lengths, shape, strict=True)
    return all(start >= 0 and n >= 0 and start + n <= size for start, n, size in dimensions)
