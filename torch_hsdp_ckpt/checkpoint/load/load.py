"""``load``: DCP's ``load`` with planning, reading and the exchange among replicas done here.

A load goes through ``open`` (what `.metadata` says), ``plan`` (which bytes go where), ``read``
(tensors are filled) and ``apply`` (everything else is in its place)."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, cast

import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.format_utils import BroadcastingTorchSaveReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict as _dcp_load_state_dict
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from ...common.default_device import without_default_device
from ...common.gate import wait_at_gate
from ...common.rank_failure import own_error_of, raise_of_dcp
from ...errors import CheckpointError
from ..positional import storage_by_position
from ..stateful import values_of
from ..storage.objects import Trust
from ..storage.reader import CheckedPlanner, FileSystemReader
from .apply import Applied, apply, hand_over
from .exchange import MODES, ExchangeMode
from .open import ATTEMPTS, open_checkpoint
from .plan import FilesRemovedError, check_saved_over, plan
from .ranks import LoadRanks, gather_ranks
from .read import read


@storage_by_position("storage_reader")
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    trust_objects: bool = False,
    allow: Iterable[type] = (),
    exchange: ExchangeMode = "auto",
) -> None:
    """Loads a checkpoint into ``state_dict``, in place, as
    :func:`torch.distributed.checkpoint.load` does: tensors into the tensors that are there,
    whatever mesh saved them, other values in their keys' place, ``Stateful`` objects through their
    methods. Ours and stock torch's checkpoints are read; every byte is checked.

    Ranks that need the same bytes, such as the replicas of HSDP, read each of them once and hand
    them on. ``.metadata`` is read once a host, and all ranks agree on what it says. A checkpoint
    that is saved over meanwhile gives the older one or the newer one, never parts of both.

    Args:
        state_dict: the tensors to fill, nested in dicts and lists as it was when it was saved. The
            same keys on every rank.
        checkpoint_id: the directory. Needed without ``storage_reader``.
        storage_reader: by default :class:`FileSystemReader`. Another class, and a subclass that
            overrides how it plans or reads, is used through torch's own code, with DCP's
            exceptions.
        planner: by default ``DefaultLoadPlanner()``, which is planned for natively with all of its
            options. Any other planner plans as under DCP, on its own and on the coordinator; what
            it reads is shared among replicas too, unless it overrides ``resolve_tensor``,
            ``lookup_tensor`` or ``transform_tensor``, and so may make targets of its own: those are
            asked for a few at a time (32 MiB), and every rank reads for itself.
        process_group: the ranks that load. The default group by default.
        no_dist: load in this process alone.
        trust_objects: True unpickles objects that are more than tensors and everyday kinds
            (``docs/supported.md``). Only for checkpoints of a source you trust: it can run
            anything.
        allow: classes that objects may be instances of, besides those of the values that
            ``state_dict`` has in their places. They are filled without any code of theirs.
        exchange: how replicas share what they read. "auto": through shared memory on one host, over
            Gloo between hosts, not at all from a file system in memory; "shared", "network" and
            "off" force it. The result is the same.

    Raises, on every rank, whichever failed:
        CorruptCheckpointError: bytes differ from their checksums or from the format; names the
            rank, file and tensor.
        CheckpointError: a key or a shape is not what the checkpoint has; an object is of a class
            that is not allowed; a rank is gone.
        OSError: the operating system refused, with ``errno`` and ``filename``.

    Keys, shapes and objects are checked before the first tensor is written. Behind any of these
    errors after that, tensors may have been written in part, and the message says so.
    """
    wait_at_gate()
    arguments = _Arguments.of(checkpoint_id, storage_reader, trust_objects, allow, exchange)
    reader, refused = arguments.reader, arguments.refused
    planner = planner or DefaultLoadPlanner()
    values, failure = _sorted_values(state_dict)
    failure = refused or failure
    if not _reads_natively(reader):
        if failure is not None:
            raise failure
        _check_broadcast(reader, values)
        checked = CheckedPlanner(planner, lambda item: item.storage_index.fqn, arguments.trust)
        with without_default_device():
            applied = _load_with_torch(
                values, reader, cast(LoadPlanner, checked), process_group, no_dist
            )
    else:
        with own_error_of(refused):
            ranks = gather_ranks(process_group, no_dist, failure)
        with _trusting(reader, trust_objects, arguments.allow), without_default_device():
            applied = _load(values, reader, planner, ranks, exchange, no_dist)
    hand_over(applied, state_dict)


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """What this rank is called with. ``refused``: what is wrong with it, for which the others would
    wait if it were raised before they hear of it; the rest is of no use then."""

    reader: StorageReader
    trust: Trust
    allow: tuple[type, ...]
    refused: Exception | None = None

    @staticmethod
    def of(
        checkpoint_id: str | os.PathLike[str] | None,
        storage_reader: StorageReader | None,
        trust_objects: bool,
        allow: Iterable[type],
        exchange: str,
    ) -> "_Arguments":
        try:
            if exchange not in MODES:
                raise ValueError(f"exchange={exchange!r}: one of {', '.join(MODES)}")
            classes = tuple(allow)  # which may be read only once
            trust = Trust.of(trust_objects, classes)
            return _Arguments(_reader(checkpoint_id, storage_reader), trust, classes)
        except Exception as error:
            reader = storage_reader or FileSystemReader(os.curdir)
            return _Arguments(reader, Trust.of(False, ()), (), error)


def _sorted_values(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Exception | None]:
    """As :func:`values_of`, in the one order of all ranks."""
    try:
        in_order = {key: state_dict[key] for key in sorted(state_dict, key=str)}
    except Exception as error:
        return {}, error
    return values_of(in_order)


def _check_broadcast(reader: StorageReader, values: dict[str, Any]) -> None:
    """CheckpointError for sharded tensors under torch's reader of ``torch.save`` files, whose ranks
    would broadcast a whole tensor and shards to each other, and wait for ever."""
    if not isinstance(reader, BroadcastingTorchSaveReader):
        return
    for key, value in flatten_state_dict(values)[0].items():
        if isinstance(value, (DTensor, ShardedTensor)):
            raise CheckpointError(
                f"{key} is sharded, and {type(reader).__name__} fills whole tensors: set "
                "StateDictType.FULL_STATE_DICT on the model before (set_state_dict_type), or "
                "convert the file first (torch_save_to_dcp) and load the checkpoint"
            )


def _reader(
    checkpoint_id: str | os.PathLike[str] | None, storage_reader: StorageReader | None
) -> StorageReader:
    if storage_reader is None:
        if checkpoint_id is None:
            raise ValueError("load needs a checkpoint_id or a storage_reader")
        return FileSystemReader(checkpoint_id)
    if checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    return storage_reader


def _reads_natively(reader: StorageReader) -> TypeGuard[FileSystemReader]:
    """A subclass that plans or reads in a way of its own is asked for it, by DCP's code."""
    stock = FileSystemReader
    names = (
        "read_metadata",
        "set_up_storage_reader",
        "prepare_local_plan",
        "prepare_global_plan",
        "read_data",
    )
    if not isinstance(reader, stock):
        return False
    return all(getattr(type(reader), name) is getattr(stock, name) for name in names)


@contextlib.contextmanager
def _trusting(
    reader: FileSystemReader, trust_objects: bool, allow: tuple[type, ...]
) -> Iterator[None]:
    """The reader's own word holds too."""
    before = reader.trust_objects, reader.allow
    reader.trust_objects = trust_objects or reader.trust_objects
    reader.allow = (*reader.allow, *allow)
    try:
        yield
    finally:
        reader.trust_objects, reader.allow = before


def _load(
    values: dict[str, Any],
    reader: FileSystemReader,
    planner: LoadPlanner,
    ranks: LoadRanks,
    mode: ExchangeMode,
    no_dist: bool,
) -> Applied:
    direct = mode != "off" and ranks.agreement.size > 1
    for _ in range(ATTEMPTS):
        opened = open_checkpoint(reader, ranks)
        if opened is None:  # each rank has metadata of its own
            return _load_with_torch(values, reader, planner, ranks.process_group, no_dist)
        # A planner may add keys of this generation of the checkpoint.
        loaded = dict(values)
        try:
            planned = plan(loaded, opened, planner, direct)
        except FilesRemovedError as removed:
            check_saved_over(opened, removed.error)
            continue
        return apply(read(planned, mode), loaded)
    raise CheckpointError(
        f"{reader.path}: saved over again and again while it was loaded; load from a directory of "
        "its own"
    )


def _load_with_torch(
    values: dict[str, Any],
    reader: StorageReader,
    planner: LoadPlanner,
    process_group: Any,
    no_dist: bool,
) -> Applied:
    alone = no_dist or not dist.is_available() or not dist.is_initialized()
    try:
        _dcp_load_state_dict(values, reader, process_group, no_dist=alone, planner=planner)
    except CheckpointException as error:
        raise_of_dcp("load", error)
    return Applied(values)
