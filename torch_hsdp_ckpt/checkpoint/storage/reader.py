"""``FileSystemReader``: DCP's storage reader with the bytes moved, and checked, in C++."""

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as _stock
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ... import _C
from ...common.gate import wait_at_gate
from ...errors import CheckpointError, CorruptCheckpointError
from .directory import directory_of, encoded
from .metadata import read_metadata_bytes
from .nested_keys import NestedKeys, set_object
from .objects import Trust, checked_stream, load_object
from .staged_reads import TensorRead
from .tensor_reads import (
    PlannedData,
    PlannedReads,
    open_files,
    plan_reads,
    read_objects,
    run_reads,
    written_in_part,
)

_logger = logging.getLogger(__name__)
# Bytes of targets that a planner which makes targets of its own may have to hold at a time.
_PLANNER_BATCH_BYTES = 32 << 20


class FileSystemReader(_stock.FileSystemReader):
    """Reads DCP checkpoints from a directory, for ``dcp.load``: this package's and stock torch's.

    A drop-in for :class:`torch.distributed.checkpoint.FileSystemReader`, of which it is a subclass.
    Every byte that is read is checked against a checksum, ``.metadata`` is decoded by a reader that
    can run nothing, and tensors go straight into contiguous CPU targets; of this package's files
    only the rows asked for are read.

    Args:
        path: the checkpoint's directory, also as a ``file://`` address. A relative path is made
            absolute here.
        _extension_registry: as in torch; data files written with extensions are read by torch's own
            code, unchecked.
        trust_objects: False (default) refuses objects that are made of more than the everyday kinds
            (``docs/supported.md``), which DCP's planner would unpickle and so run. True hands them
            on as they are.
        allow: classes that objects may be instances of besides, and those of the state dict's own
            values. They are filled without any code of theirs.

    Raises (through DCP as ``CheckpointException`` with these as each rank's cause):
        CorruptCheckpointError: bytes differ from their checksums or from the format; names the file
            and the tensor.
        CheckpointError: a name or a link leads outside the directory, an object is not plain data,
            or a shape differs from the target's.
        OSError: the operating system refused, with ``errno`` and ``filename``.

    Objects are checked before the first tensor is written. Behind any of these errors after that,
    targets may have been written in part and with bytes that are wrong, and the message says so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Any = None,
        *,
        trust_objects: bool = False,
        allow: Iterable[type] = (),
    ) -> None:
        super().__init__(directory_of(path), _extension_registry)
        self.trust_objects = trust_objects
        self.allow = tuple(allow)
        self._metadata_error: Exception | None = None
        # DCP's protocol hands the metadata to its planner, and comes back to the reader with that
        # planner's plan: what the plan is checked against has to wait here.
        self._load_planner: _C.LoadPlanner | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(directory_of(checkpoint_id) if checkpoint_id else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_load_planner": None, "_metadata_error": None}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        try:
            metadata = self.use_metadata_file(self.read_metadata_file(rank), rank)
        except (CheckpointError, OSError) as error:
            # After any error dcp.load goes on to look for a rank's own metadata. Where there is
            # none either, what it reports is that; the first error says what is wrong.
            first, self._metadata_error = self._metadata_error, error if rank is None else None
            if rank is not None and isinstance(error, FileNotFoundError) and first is not None:
                _logger.error("%s", first)
                raise first from None
            raise
        self._metadata_error = None
        return metadata

    def read_metadata_file(self, rank: int | None = None) -> bytes:
        """The bytes of the checkpoint's `.metadata`, or of a rank's own."""
        return read_metadata_bytes(self._get_metadata_path(rank))

    def use_metadata_file(self, file: bytes, rank: int | None = None) -> Metadata:
        """The metadata in a file's bytes, which is the one that later reads are checked against."""
        planner = _C.LoadPlanner(file, encoded(self._get_metadata_path(rank)))
        # A planner may make what it loads of what the metadata says. One rank asks for all files'
        # sizes, not a thousand: under dcp.load its error is every rank's.
        if rank is None and _is_coordinator():
            planner.check_sizes_leniently(encoded(self.path))
        # A rank's own metadata has that rank's chunks only, and nobody knows what the others should
        # have.
        self._load_planner = planner if rank is None else None
        metadata = planner.metadata()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        wait_at_gate()
        planned = self.plan_data(plan, planner, direct=False)
        try:
            run_reads(planned.sharded)
            run_reads(planned.unsharded)
            planned.update.apply()
        except (CheckpointError, OSError) as error:
            raise written_in_part(error) from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def plan_data(self, plan: LoadPlan, planner: LoadPlanner, direct: bool) -> PlannedData:
        """What ``read_data`` does, up to the first byte that is written: all files are open when
        this returns, so that a save can't take them away any more. ``direct``: see
        CheckpointReader. Raises as that and :func:`plan_reads`."""
        self._check_covered(plan, planner)
        files = self.open_files([self._record(item) for item in plan.items], direct)
        items = self._sort(plan, planner)
        sharded = self._plan_tensors(files, items.sharded, planner)
        unsharded = self._plan_tensors(files, items.unsharded, planner)
        objects = self._read_objects(files, items.objects, planner)
        update = PlannerUpdate(self, planner, files, items, [sharded, unsharded], objects)
        return PlannedData(sharded.reads, unsharded.reads, update)

    def open_files(self, records: Sequence[_C.RecordPlace], direct: bool) -> _C.CheckpointReader:
        """The records' files, open. ``direct``: see CheckpointReader."""
        files = _C.CheckpointReader(encoded(self.path), direct)
        open_files(files, records)
        return files

    def read_encoded(self, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Reads what extensions wrote, by torch's own code, but only from files inside the
        directory and with objects checked as well."""
        checked = CheckedPlanner(planner, self._what, self.trust())
        super().read_data(LoadPlan(items), cast(LoadPlanner, checked)).wait()

    def trust(self) -> Trust:
        """What objects may be made of."""
        return Trust.of(self.trust_objects, self.allow)

    def read_batch(
        self, files: _C.CheckpointReader, items: Sequence[ReadItem], planner: LoadPlanner
    ) -> None:
        """Reads tensors whose targets the planner makes, and gives them back to it."""
        batch = self._plan_tensors(files, items, planner)
        run_reads(batch.reads)
        batch.commit(planner)

    def _check_covered(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Also for what the plan has nothing for: a tensor without chunks would be left as it
        is."""
        if self._load_planner is None:
            return
        names = {item.storage_index.fqn for item in plan.items}
        names.update(getattr(planner, "state_dict", ()))
        self._load_planner.check_covered(list(names))
        self._load_planner = None

    def _sort(self, plan: LoadPlan, planner: LoadPlanner) -> "_SortedItems":
        items = _SortedItems()
        state_dict = getattr(planner, "state_dict", {})
        fills_state_dict = _fills_the_state_dict(planner)
        for item in plan.items:
            if getattr(self._place(item), "transform_descriptors", None):
                items.encoded.append(item)
            elif item.type == LoadItemType.BYTE_IO:
                items.objects.append(item)
            elif not fills_state_dict:
                items.batched.append(item)
            elif isinstance(state_dict.get(item.dest_index.fqn), DTensor):
                items.sharded.append(item)
            else:
                items.unsharded.append(item)
        return items

    def _place(self, item: ReadItem) -> Any:
        place = self.storage_data.get(item.storage_index)
        if place is None:
            index = item.storage_index
            raise CorruptCheckpointError(
                f"{self.path}/.metadata: {index.fqn}: expected a record for the chunk at "
                f"{index.offset}, got none"
            )
        return place

    def _record(self, item: ReadItem) -> _C.RecordPlace:
        place = self._place(item)
        index = item.storage_index
        return _C.RecordPlace(
            index.fqn, place.relative_path, place.offset, place.length, index.offset or ()
        )

    def _what(self, item: ReadItem) -> str:
        record = self._record(item)
        return f"{self.path}/{record.file}: {record.fqn}"

    def _plan_tensors(
        self, files: _C.CheckpointReader, items: Sequence[ReadItem], planner: LoadPlanner
    ) -> "_PlannedTensors":
        targets = [planner.resolve_tensor(item).detach() for item in items]
        reads = [
            TensorRead(self._record(item), item.storage_offsets, item.lengths, target)
            for item, target in zip(items, targets, strict=True)
        ]
        return _PlannedTensors(items, targets, plan_reads(files, self.path, reads))

    def _read_objects(
        self, files: _C.CheckpointReader, items: Sequence[ReadItem], planner: LoadPlanner
    ) -> list[tuple[ReadItem, Any]]:
        """With each item its object, or its bytes for a planner that unpickles them itself."""
        records = [self._record(item) for item in items]
        read = read_objects(files, records)
        trust = self.trust()
        load: Callable[[bytes, str, Trust], Any]
        load = checked_stream if _unpickles(planner) else load_object
        return [
            (item, load(data, self._what(item), trust.for_target(_target(item, planner))))
            for item, data in zip(items, read, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _SortedItems:
    """A plan's items by how they are read."""

    sharded: list[ReadItem] = dataclasses.field(default_factory=list)
    unsharded: list[ReadItem] = dataclasses.field(default_factory=list)
    # Tensors whose targets the planner may make, and drop when they are committed.
    batched: list[ReadItem] = dataclasses.field(default_factory=list)
    objects: list[ReadItem] = dataclasses.field(default_factory=list)
    encoded: list[ReadItem] = dataclasses.field(default_factory=list)  # by an extension


@dataclasses.dataclass(frozen=True)
class _PlannedTensors:
    """Items of a plan, the planner's targets for them, and how these are filled."""

    items: Sequence[ReadItem]
    targets: list[Tensor]
    reads: PlannedReads

    def commit(self, planner: LoadPlanner) -> None:
        for item, target in zip(self.items, self.targets, strict=True):
            planner.commit_tensor(item, target)


@dataclasses.dataclass(frozen=True)
class PlannerUpdate:
    """What DCP's planner is told of a load whose tensors have been read, and the reading of what it
    has to be asked for a little at a time."""

    reader: FileSystemReader
    planner: LoadPlanner
    files: _C.CheckpointReader
    items: _SortedItems
    tensors: list[_PlannedTensors]  # have been read
    objects: list[tuple[ReadItem, Any]]  # likewise

    def apply(self) -> None:
        for tensors in self.tensors:
            tensors.commit(self.planner)
        for batch in _batches(self.items.batched):
            self.reader.read_batch(self.files, batch, self.planner)
        self._load_objects()
        if self.items.encoded:
            self.reader.read_encoded(self.items.encoded, self.planner)

    def _load_objects(self) -> None:
        planner = self.planner
        if _unpickles(planner):
            for item, stream in self.objects:
                planner.load_bytes(item, stream)
            return
        assert isinstance(planner, DefaultLoadPlanner)
        keys = NestedKeys(planner.original_state_dict)
        for item, value in self.objects:
            set_object(planner, keys, item.dest_index.fqn, value)


def _unpickles(planner: LoadPlanner) -> bool:
    """Whether a planner takes an object's bytes in a way of its own; if not, the object is put
    where DCP would, without a pickle in between, which would run code of its class."""
    own = getattr(type(planner), "load_bytes", None)
    return own is not DefaultLoadPlanner.load_bytes


def _target(item: ReadItem, planner: LoadPlanner) -> Any:
    """What is now where an object goes; None if the planner does not say."""
    return getattr(planner, "state_dict", {}).get(item.dest_index.fqn)


def _is_coordinator() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def _fills_the_state_dict(planner: LoadPlanner) -> bool:
    """Whether a planner's targets are the state dict's own tensors; if not, it may make them, and
    drop them when they are committed: then they are asked for a few at a time."""
    names = ("resolve_tensor", "lookup_tensor", "transform_tensor")
    stock = DefaultLoadPlanner
    return all(getattr(type(planner), name, None) is getattr(stock, name) for name in names)


class CheckedPlanner:
    """A planner for torch's own reading code, which checks objects before the planner gets them.
    ``what`` names an item in messages."""

    def __init__(self, planner: LoadPlanner, what: Callable[[ReadItem], str], trust: Trust) -> None:
        self._planner, self._what, self._trust = planner, what, trust
        self._keys: NestedKeys | None = None  # made when the planner knows its state dict

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        planner, what = self._planner, self._what(item)
        trust = self._trust.for_target(_target(item, planner))
        if _unpickles(planner):
            planner.load_bytes(item, checked_stream(value.getvalue(), what, trust))
            return
        assert isinstance(planner, DefaultLoadPlanner)
        if self._keys is None:
            self._keys = NestedKeys(planner.original_state_dict)
        loaded = load_object(value.getvalue(), what, trust)
        set_object(planner, self._keys, item.dest_index.fqn, loaded)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


def _batches(items: Sequence[ReadItem]) -> Iterator[list[ReadItem]]:
    batch: list[ReadItem] = []
    size = 0
    for item in items:
        batch.append(item)
        size += 8 * item.lengths.numel()
        if size >= _PLANNER_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
