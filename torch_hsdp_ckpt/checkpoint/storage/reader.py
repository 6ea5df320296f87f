"""``FileSystemReader``: DCP's storage reader with the bytes moved, and checked, in C++."""

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as _stock
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ... import _C
from ...common.gate import wait_at_gate
from ...errors import CheckpointError, CorruptCheckpointError
from .metadata import read_metadata_bytes
from .objects import checked_stream
from .tensor_reads import Item, Work, in_part, open_files, prepare_items, read_objects, run_items

_logger = logging.getLogger(__name__)
# Bytes of targets that a planner which makes targets of its own may have to hold at a time.
_PLANNER_BATCH_BYTES = 32 << 20


class FileSystemReader(_stock.FileSystemReader):
    """Reads DCP checkpoints from a directory, for ``dcp.load``: this package's and stock torch's.

    A drop-in for :class:`torch.distributed.checkpoint.FileSystemReader`, of which it is a subclass.
    Every byte that is read is checked against a checksum, ``.metadata`` is decoded by a reader that
    can run nothing, and tensors go straight into contiguous CPU targets; of this package's files
    only the rows asked for are read.

    Args: path: the checkpoint's directory. _extension_registry: as in torch; data files written
        with extensions are read by torch's own code, unchecked. trust_objects: False (default)
        refuses objects that are more than tensors and plain data, which DCP's planner would
            unpickle and so run. True hands them on as they are.

    Raises (through DCP as ``CheckpointException`` with these as each rank's cause):
        CorruptCheckpointError: bytes differ from their checksums or from the format; names the file
        and the tensor. CheckpointError: a name or a link leads outside the directory, an object is
        not plain data, or a shape differs from the
            target's. OSError: the operating system refused, with ``errno`` and ``filename``.
        Objects are checked before the first tensor is written. Behind any of these errors after
        that, targets may have been written in part and with bytes that are wrong, and the message
        says so.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Any = None,
        *,
        trust_objects: bool = False,
    ) -> None:
        super().__init__(path, _extension_registry)
        self.trust_objects = trust_objects
        self._metadata_error: Exception | None = None
        self._load_planner: _C.LoadPlanner | None = None

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
        path = os.fspath(self._get_metadata_path(rank))
        inside = os.path.dirname(os.path.realpath(path)) == os.path.realpath(self.path)
        if os.path.islink(path) and not inside:
            raise CheckpointError(
                f"{path}: a link that leads out of the checkpoint's directory is not followed"
            )
        return read_metadata_bytes(path)

    def use_metadata_file(self, file: bytes, rank: int | None = None) -> Metadata:
        """The metadata in a file's bytes, which is the one that later reads are checked against."""
        planner = _C.LoadPlanner(file, os.fspath(self._get_metadata_path(rank)))
        # A planner may make what it loads of what the metadata says. One rank asks for all files'
        # sizes, not a thousand: under dcp.load its error is every rank's.
        if rank is None and (_alone() or dist.get_rank() == 0):
            planner.check_explained(str(self.path), lenient=True)
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
        work = self.prepare_data(plan, planner, direct=False)
        try:
            run_items(work.sharded)
            run_items(work.others)
            work.rest()
        except (CheckpointError, OSError) as error:
            raise in_part(error) from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def prepare_data(self, plan: LoadPlan, planner: LoadPlanner, direct: bool) -> Work:
        """What ``read_data`` does, up to the first byte that is written: all files are open when
        this returns, so that a save can't take them away any more. ``direct``: see
        CheckpointReader. Raises as that and :func:`prepare_items`."""
        reader = _C.CheckpointReader(str(self.path), direct)
        kinds: dict[str, list[ReadItem]] = {
            kind: [] for kind in ("sharded", "others", "batched", "objects", "delegated")
        }
        if self._load_planner is not None:
            # Also of what the plan has nothing for: a tensor without chunks would be left as it is.
            asked = {item.storage_index.fqn for item in plan.items}.union(
                getattr(planner, "state_dict", ())
            )
            self._load_planner.check_covered(list(asked))
            self._load_planner = None
        open_files(
            reader,
            [(item.storage_index.fqn, self._place(item).relative_path) for item in plan.items],
        )
        at_once = _fills_the_state_dict(planner)
        for item in plan.items:
            if getattr(self._place(item), "transform_descriptors", None):
                kinds["delegated"].append(item)
            elif item.type == LoadItemType.BYTE_IO:
                kinds["objects"].append(item)
            elif not at_once:
                kinds["batched"].append(item)
            else:
                value = getattr(planner, "state_dict", {}).get(item.dest_index.fqn)
                kinds["sharded" if isinstance(value, DTensor) else "others"].append(item)
        sharded, others = (
            [self._tensor_item(item, planner) for item in kinds[kind]]
            for kind in ("sharded", "others")
        )

        def rest() -> None:
            for item, read in zip(
                kinds["sharded"] + kinds["others"], sharded + others, strict=True
            ):
                planner.commit_tensor(item, read.target)
            for batch in _batches(kinds["batched"]):
                items = [self._tensor_item(item, planner) for item in batch]
                run_items(prepare_items(reader, self.path, items))
                for item, read in zip(batch, items, strict=True):
                    planner.commit_tensor(item, read.target)
            for item, stream in zip(kinds["objects"], streams, strict=True):
                planner.load_bytes(item, stream)
            if kinds["delegated"]:
                # torch's own code reads these, but only from files inside the directory and with
                # objects checked as well.
                checked = cast(LoadPlanner, CheckedPlanner(planner, self._what, self.trust_objects))
                ours = dataclasses.replace(plan, items=kinds["delegated"])
                super(FileSystemReader, self).read_data(ours, checked).wait()

        first, second = (prepare_items(reader, self.path, items) for items in (sharded, others))
        objects = zip(kinds["objects"], self._read_objects(reader, kinds["objects"]), strict=True)
        streams = [
            checked_stream(data, self._what(item), self.trust_objects) for item, data in objects
        ]
        return Work(first, second, rest)

    def _place(self, item: ReadItem) -> Any:
        place = self.storage_data.get(item.storage_index)
        if place is None:
            index = item.storage_index
            raise CorruptCheckpointError(
                f"{self.path}/.metadata: {index.fqn}: expected a record for the chunk at "
                f"{index.offset}, got none"
            )
        return place

    def _what(self, item: ReadItem) -> str:
        return f"{self.path}/{self._place(item).relative_path}: {item.storage_index.fqn}"

    def _tensor_item(self, item: ReadItem, planner: LoadPlanner) -> Item:
        place = self._place(item)
        target = planner.resolve_tensor(item).detach()
        fqn = item.storage_index.fqn
        return Item(
            fqn,
            place.relative_path,
            place.offset,
            place.length,
            item.storage_offsets,
            item.lengths,
            target,
        )

    def _read_objects(
        self, reader: _C.CheckpointReader, items: Sequence[ReadItem]
    ) -> Iterator[bytes]:
        places = [self._place(item) for item in items]
        files = open_files(
            reader,
            [(i.storage_index.fqn, p.relative_path) for i, p in zip(items, places, strict=True)],
        )
        return read_objects(
            reader,
            [
                (i.storage_index.fqn, f, p.offset, p.length)
                for i, f, p in zip(items, files, places, strict=True)
            ],
        )


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def _fills_the_state_dict(planner: LoadPlanner) -> bool:
    """Whether a planner's targets are the state dict's own tensors; if not, it may make them, and
    drop them when they are committed: then they are asked for a few at a time."""
    names = ("resolve_tensor", "lookup_tensor", "transform_tensor")
    return all(
        getattr(type(planner), name, None) is getattr(DefaultLoadPlanner, name) for name in names
    )


class CheckedPlanner:
    """A planner for torch's own reading code, which checks objects before the planner gets them.
    ``what``: names an item."""

    def __init__(
        self, planner: LoadPlanner, what: Callable[[ReadItem], str], trust_objects: bool
    ) -> None:
        self._planner, self._what, self._trust = planner, what, trust_objects

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self._planner.load_bytes(
            item, checked_stream(value.getvalue(), self._what(item), self._trust)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


def _batches(items: Iterable[ReadItem]) -> Iterator[list[ReadItem]]:
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
