"""``load``: DCP's ``load`` with planning, reading and the exchange among replicas done here."""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict as _dcp_load_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from ... import _C
from ...common.agreement import Agreement, agreement_of
from ...common.gate import wait_at_gate
from ...errors import CheckpointError
from ..stateful import values_of
from ..storage.objects import load_object
from ..storage.reader import CheckedPlanner, FileSystemReader
from ..storage.tensor_reads import (
    Item,
    Prepared,
    Work,
    in_part,
    open_files,
    prepare_items,
    read_objects,
    run_items,
)
from .exchange import MODES, Exchange, Mode, host_identity, make_exchange, name_load, subgroup
from .planner import plan_with_planner

# A directory that is saved over faster than that is nothing that can be loaded.
_ATTEMPTS = 5


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    trust_objects: bool = False,
    exchange: Mode = "auto",
) -> None:
    """Loads a checkpoint into ``state_dict``, in place, as
    :func:`torch.distributed.checkpoint.load` does: tensors into the tensors that are there,
    whatever mesh saved them, other values in their keys' place, ``Stateful`` objects through their
    methods. Ours and stock torch's checkpoints are read; every byte is checked.

    Ranks that need the same bytes, such as the replicas of HSDP, read each of them once and hand
    them on. ``.metadata`` is read once a host, and all ranks agree on what it says. A checkpoint
    that is saved over meanwhile gives the older one or the newer one, never parts of both.

    Args: state_dict: the tensors to fill, nested in dicts and lists as it was when it was saved.
        The same keys on every rank. checkpoint_id: the directory. Needed without
        ``storage_reader``. storage_reader: by default :class:`FileSystemReader`. Another class, and
        a subclass that overrides how it
            plans or reads, is used through torch's own code, with DCP's exceptions. planner: by
        default ``DefaultLoadPlanner()``, which is planned for natively with all of its options. Any
        other planner
            plans as under DCP, on its own and on the coordinator; what it reads is shared among
            replicas too, unless it overrides ``resolve_tensor``, ``lookup_tensor`` or
            ``transform_tensor``, and so may make targets of its own: those are asked for a few at a
            time (32 MiB), and every rank reads for itself.
        process_group: the ranks that load. The default group by default. no_dist: load in this
        process alone. trust_objects: True unpickles objects that are more than tensors and plain
        data. Only for checkpoints of a source you
            trust: it can run anything. exchange: how replicas share what they read. "auto": through
        shared memory on one host, over Gloo between hosts, not at
            all from a file system in memory; "shared", "network" and "off" force it. The result is
            the same.

    Raises, on every rank, whichever failed: CorruptCheckpointError: bytes differ from their
        checksums or from the format; names the rank, file and tensor. CheckpointError: a key or a
        shape is not what the checkpoint has; an object is not plain data; a rank is gone. OSError:
        the operating system refused, with ``errno`` and ``filename``. Keys, shapes and objects are
        checked before the first tensor is written. Behind any of these errors after that, tensors
        may have been written in part, and the message says so.
    """
    wait_at_gate()
    if exchange not in MODES:
        raise ValueError(f"exchange={exchange!r}: one of {', '.join(MODES)}")
    reader = _reader(checkpoint_id, storage_reader)
    values, failure = values_of({key: state_dict[key] for key in sorted(state_dict)})
    if _reads_natively(reader):
        # The reader's own word holds too.
        trust = trust_objects or reader.trust_objects
        before, reader.trust_objects = reader.trust_objects, trust
        try:
            _load(
                values,
                reader,
                planner or DefaultLoadPlanner(),
                process_group,
                no_dist,
                exchange,
                failure,
            )
        finally:
            reader.trust_objects = before
    else:
        if failure is not None:
            raise failure
        checked = CheckedPlanner(
            planner or DefaultLoadPlanner(), lambda item: item.storage_index.fqn, trust_objects
        )
        _dcp_load_state_dict(
            values,
            reader,
            process_group,
            no_dist=_alone(no_dist),
            planner=cast(LoadPlanner, checked),
        )
    for key, loaded in values.items():  # more keys than before, with a planner that adds them
        value = state_dict.get(key)
        if isinstance(value, Stateful):
            value.load_state_dict(loaded)
        else:
            state_dict[key] = loaded


def _reads_natively(reader: StorageReader) -> TypeGuard[FileSystemReader]:
    """A subclass that plans or reads in a way of its own is asked for it, by DCP's code."""
    own = FileSystemReader
    names = (
        "read_metadata",
        "set_up_storage_reader",
        "prepare_local_plan",
        "prepare_global_plan",
        "read_data",
    )
    return isinstance(reader, own) and all(
        getattr(type(reader), name) is getattr(own, name) for name in names
    )


def _alone(no_dist: bool) -> bool:
    return no_dist or not dist.is_available() or not dist.is_initialized()


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


def _load(
    state_dict: dict[str, Any],
    reader: FileSystemReader,
    planner: LoadPlanner,
    process_group: Any,
    no_dist: bool,
    mode: Mode,
    failed_before: Exception | None,
) -> None:
    agreement = agreement_of(process_group, "load", no_dist)
    hosts = agreement.exchange("hosts", host_identity(), failed_before)
    name_load(agreement)
    given = dict(state_dict)
    direct = mode != "off" and agreement.size > 1
    for _ in range(_ATTEMPTS):
        file = _read_metadata(reader, agreement, hosts, process_group)
        if file is None:  # saved without collectives: each rank has metadata of its own
            _dcp_load_state_dict(
                state_dict, reader, process_group, no_dist=_alone(no_dist), planner=planner
            )
            return
        work: Work | None = None
        missing: FileNotFoundError | None = None

        def vote(plan: Callable[[], Work | None]) -> bytes:
            nonlocal work, missing
            try:
                work = plan()
            except FileNotFoundError as error:
                missing = error
                return b"gone"
            return b"generic" if work is None else work.digests

        plan = functools.partial(
            _plan, state_dict, reader, planner, file, agreement.is_coordinator, direct
        )
        votes = agreement.run("plan", functools.partial(vote, plan))
        if b"generic" in votes and b"gone" not in votes:
            ours = plan_with_planner(state_dict, reader, planner, agreement, file)

            def prepare(ours: LoadPlan = ours) -> Work:
                return reader.prepare_data(planner.finish_plan(ours), planner, direct)

            votes = agreement.run("plan", functools.partial(vote, prepare))
        if b"gone" not in votes:
            assert work is not None
            _read(work, reader, agreement, process_group, mode, hosts, votes)
            return
        # Was it a save over this one, which has removed its files? Then there is another generation
        # by now.
        again = _read_metadata(reader, agreement, hosts, process_group)
        agreement.exchange("open", error=missing if again == file else None)
        if again == file:
            raise CheckpointError(f"{reader.path}: files that .metadata names are missing")
        state_dict.clear()  # a planner may have added keys of the one that is gone
        state_dict.update(given)
    raise CheckpointError(
        f"{reader.path}: saved over again and again while it was loaded; load from a directory of "
        "its own"
    )


def _read_metadata(
    reader: FileSystemReader, agreement: Agreement, hosts: Sequence[bytes], process_group: Any
) -> bytes | None:
    """The bytes of `.metadata`, read once a host and the same on all; None where each rank has a
    file of its own instead."""
    host = subgroup(
        agreement,
        [r for r, name in enumerate(hosts) if name == hosts[agreement.rank]],
        process_group,
    )

    def read() -> bytes:
        try:
            return reader.read_metadata_file()
        except FileNotFoundError:
            return b""

    for _ in range(_ATTEMPTS):
        file = b""

        def hand_on() -> bytes:
            nonlocal file
            file = host.verdict("metadata", read)
            own = not file and os.path.exists(reader._get_metadata_path(agreement.rank))
            return b"own" if own else hashlib.sha256(file).digest()

        digests = agreement.run("metadata", hand_on)
        if len(set(digests)) == 1:
            if digests[0] == b"own":
                return None
            if not file:
                raise FileNotFoundError(
                    2,
                    "there is no checkpoint here (rank 0, step 'metadata')",
                    str(reader._get_metadata_path()),
                )
            return file
    raise CheckpointError(
        f"{reader.path}/.metadata: hosts read different files; is it one directory on all of them?"
    )


# ---- planning ------------------------------------------------------------------------------------------------------------
def _plan(
    state_dict: dict[str, Any],
    reader: FileSystemReader,
    planner: LoadPlanner,
    metadata: bytes,
    is_coordinator: bool,
    direct: bool,
) -> Work | None:
    """All files are open when this returns, so that a save can't take them away any more, and all
    objects are read. None: another way has to be gone, for the planner is another than DCP's
    default one, or see items_of."""
    native = _C.LoadPlanner(metadata, str(reader._get_metadata_path()))
    if not state_dict:  # a planner that fills it makes what the metadata says
        native.check_explained(str(reader.path), lenient=False)
    if type(planner) is not DefaultLoadPlanner or native.has_transforms:
        return None
    planned = items_of(state_dict, planner, native, is_coordinator)
    if planned is None:
        return None
    sharded, others, names = planned
    files = _C.CheckpointReader(str(reader.path), direct)
    objects = list(zip(names, native.objects(names), strict=True))
    open_files(
        files,
        [(i.fqn, i.file) for i in sharded + others] + [(name, place[0]) for name, place in objects],
    )
    first, second = (prepare_items(files, reader.path, items) for items in (sharded, others))
    return Work(
        first,
        second,
        functools.partial(_put_objects, _read_objects(objects, files, reader), planner),
    )


def items_of(
    state_dict: dict[str, Any],
    planner: DefaultLoadPlanner,
    native: _C.LoadPlanner,
    is_coordinator: bool,
) -> tuple[list[Item], list[Item], list[str]] | None:
    """What DCP's default planner plans, without its objects: the records for DTensors, for other
    tensors, and the names of objects; None where there are tensors of kinds that are left to that
    planner. Raises CheckpointError for keys and shapes that the checkpoint has not,
    CorruptCheckpointError for chunks that do not cover a tensor once."""
    planner.set_up_planner(state_dict, None, is_coordinator)
    if planner.flatten_state_dict:
        _fit_old_names(planner, native)
    flat = planner.state_dict
    boxes: list[tuple[str, list[int], list[int]]] = []
    targets: list[Tensor] = []
    is_sharded: list[bool] = []
    names: list[str] = []
    offsets_of: dict[Any, tuple[list[int], list[int]]] = {}
    for (name, value), size in zip(flat.items(), native.describe(list(flat)), strict=True):
        if size is None:
            if not planner.allow_partial_load:
                raise CheckpointError(f"Missing key in checkpoint state_dict: {name}.")
            continue
        if isinstance(size, bool):
            names.append(name)
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: the checkpoint has a tensor, the state dict {type(value).__name__}"
            )
        if type(value) not in (Tensor, torch.nn.Parameter, DTensor):
            return None
        if list(value.shape) != size:
            raise CheckpointError(
                f"Size mismatch between saved {size} and current: {list(value.shape)} for {name}"
            )
        if not isinstance(value, DTensor):
            target, offsets, sizes = value.detach(), [0] * len(size), size
        elif value.device_mesh.get_coordinate() is None:
            continue
        else:
            if type(value._local_tensor) is not Tensor:
                return None
            key = (value.shape, value.placements, id(value.device_mesh))
            if key not in offsets_of:
                chunks = value.__create_chunk_list__()  # type: ignore[no-untyped-call]
                if len(chunks) != 1:
                    return None
                offsets_of[key] = list(chunks[0].offsets), list(chunks[0].sizes)
            target, (offsets, sizes) = value._local_tensor.detach(), offsets_of[key]
        boxes.append((name, offsets, sizes))
        targets.append(target)
        is_sharded.append(isinstance(value, DTensor))
    sets: tuple[list[Item], list[Item]] = [], []
    for (name, _, sizes), target, sharded, parts in zip(
        boxes, targets, is_sharded, native.plan(boxes), strict=True
    ):
        for path, offset, length, in_record, in_box, part in parts:
            piece = target
            if part != sizes:
                for dim, (start, count) in enumerate(zip(in_box, part, strict=True)):
                    piece = piece.narrow(dim, start, count)
            sets[not sharded].append(Item(name, path, offset, length, in_record, part, piece))
    return *sets, names


def _fit_old_names(planner: DefaultLoadPlanner, native: _C.LoadPlanner) -> None:
    """torch up to 2.3 flattened less; its checkpoints have other names. As DCP's planner finds
    out."""
    missing = set(native.names()) - planner.state_dict.keys()
    if not missing:
        return
    _version._derived_version = "2_3"
    try:
        state_dict, mappings = flatten_state_dict(planner.original_state_dict)
    finally:
        _version._derived_version = None
    if state_dict.keys() & missing:
        planner.state_dict, planner.mappings = state_dict, mappings


# ---- reading -------------------------------------------------------------------------------------------------------------
def _read(
    work: Work,
    reader: FileSystemReader,
    agreement: Agreement,
    process_group: Any,
    mode: Mode,
    hosts: Sequence[bytes],
    votes: Sequence[bytes],
) -> None:
    def read(prepared: Prepared, digests: Sequence[bytes], then: Callable[[], None]) -> None:
        one: Exchange | None = None
        error: BaseException | None = None
        try:
            one = make_exchange(
                agreement, process_group, mode, hosts, digests, prepared.bytes, reader.path
            )
            run_items(prepared, one.run)
            then()
        except BaseException as caught:  # Ctrl-C too: the peers wait for what this rank reads
            error = caught
            if one is not None:
                one.abort()
        # Whose error is only that a peer failed leaves the word to the peer, unless nobody takes
        # it.
        by_peer = isinstance(error, Exception) and one is not None and one.peer_failed
        try:
            answers = agreement.exchange(
                "read", b"peer" if by_peer else b"", None if by_peer else error
            )
            if b"peer" in answers:
                raise CheckpointError("step 'read' failed: a rank stopped answering") from error
        except (CheckpointError, OSError) as failure:
            raise in_part(failure) from failure

    # With a vote between: the second exchange may have other members, who would wait there for a
    # rank that failed in the first one. By then the first one's memory is given back.
    read(work.sharded, [vote[:16] for vote in votes], lambda: None)
    read(work.others, [vote[16:] for vote in votes], work.rest)


def _read_objects(
    objects: Sequence[tuple[str, tuple[str, int, int]]],  # name, and file, offset, length
    reader: _C.CheckpointReader,
    storage: FileSystemReader,
) -> list[tuple[str, Any]]:
    files = open_files(reader, [(name, place[0]) for name, place in objects])
    read = read_objects(
        reader, [(name, f, *place[1:]) for (name, place), f in zip(objects, files, strict=True)]
    )
    return [
        (name, load_object(data, f"{storage.path}/{place[0]}: {name}", storage.trust_objects))
        for (name, place), data in zip(objects, read, strict=True)
    ]


def _put_objects(objects: Sequence[tuple[str, Any]], planner: DefaultLoadPlanner) -> None:
    for name, value in objects:
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], value)
        else:
            planner.state_dict[name] = value
