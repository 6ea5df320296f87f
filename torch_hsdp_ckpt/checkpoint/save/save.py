"""``save``: a checkpoint planned without talking, written by all replicas, committed by one
rename."""

import copy
import dataclasses
import io
import itertools
import logging
import os
import pickle
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.filesystem as _stock
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from ... import _C
from ...common.agreement import Agreement, agreement_of
from ...errors import CheckpointError
from ..snapshot.staged import Objects, Staged, held_by, stage_tensors, write_files
from ..stateful import values_of
from ..storage.metadata import decode_metadata, encode_metadata, read_metadata_bytes
from ..storage.staging import StagingPool
from ..storage.writer import FileSystemWriter, remove_quietly
from .capture import Captured, Pickled
from .plan import DIGEST_BYTES, LocalState, StaticPlan, make_static_plan, plan_rest
from .result import SavedMetadata, SaveResult

_logger = logging.getLogger(__name__)
_said: set[str] = set()

# What the ranks compare before the first byte: digests, whether DCP has to plan something, the
# save's id (the coordinator's counts), and which process writes, for the names of its files.
_OPENING = struct.Struct(f"<{2 * DIGEST_BYTES}s?QIIqQ")
# What they tell each other at the end: bytes written, seconds before the first byte and of writing.
_VOTE = struct.Struct("<Qdd")
_TRAILER_BYTES = 24  # the last bytes of `.metadata`, its checksum among them


def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Saves a distributed state dict, as ``torch.distributed.checkpoint.save`` does, in its format.

    Called by all ranks of ``process_group``. Returns when the checkpoint is complete and durable,
    or raises on every rank and leaves an older checkpoint as it was. The R replicas of a shard that
    are in the group write 1/R of it each.

    Every rank plans its own part from meshes, placements and shapes. The ranks compare two digests
    and vote once; nothing is gathered or scattered, except the plans of values that differ from
    rank to rank, and of tensor types that only DCP knows. DCP plans everything where the planner is
    not exactly ``DefaultSavePlanner`` or has ``dedup_save_to_lowest_rank``, where the writer is not
    exactly :class:`FileSystemWriter` or writes through torch (extensions, other serialization
    formats), and without ``use_collectives``. A directory is written by :class:`FileSystemWriter`
    all the same.

    Args:
        state_dict: nested dicts and lists of tensors, DTensors, ``Stateful`` objects, plain values.
            Tensors are on the CPU or on CUDA devices. A plain tensor or value under the same name
            on all ranks is saved once.
        checkpoint_id: the directory.
        storage_writer: a :class:`FileSystemWriter` with other options than the default ones, or
            another storage.
        planner: None for the default one.
        process_group: None for the default one. It must hold every shard; one shard group does.
        no_dist: save this process's state alone.
        use_collectives: False saves without coordination, as in DCP: every rank has a metadata of
            its own.

    Returns:
        The ``Metadata``, decoded when it is looked at; its ``result`` is a :class:`SaveResult`.

    Raises (on all ranks, naming the rank):
        OSError: a system call failed; ``errno`` and ``filename`` are set.
        CheckpointError: anything else: ``overwrite=False`` and there is a checkpoint, another save
            has taken the directory over, a shard that no rank of the group holds, a rank that died
            or did not answer within the group's timeout, an exception of any other class on one of
            the ranks.
    """
    reason, writer = _who_plans(storage_writer, checkpoint_id, planner, use_collectives)
    if reason:
        _say_once(f"DCP plans this save: {reason}")
        metadata: Metadata = dcp.save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
        return metadata
    assert isinstance(writer, FileSystemWriter)
    if checkpoint_id is not None:
        writer.reset(checkpoint_id)
    values, failure = values_of(state_dict)
    agreement = agreement_of(process_group, "save", no_dist)
    planner = planner if isinstance(planner, DefaultSavePlanner) else DefaultSavePlanner()
    save = Save(values, writer, planner, agreement, _global_ranks(process_group, no_dist))
    del values
    save.failed_before = failure
    return save.run()


def _who_plans(
    storage_writer: StorageWriter | None,
    checkpoint_id: str | os.PathLike[str] | None,
    planner: SavePlanner | None,
    use_collectives: bool,
) -> tuple[str, StorageWriter | None]:
    """Why DCP has to plan, or "" if it need not; and who writes: for a directory a
    :class:`FileSystemWriter`, whoever plans. None where DCP has to find a writer."""
    if storage_writer is None:
        # Not by validate_checkpoint_id, which also refuses what this process may not write to,
        # without an errno or a path.
        if checkpoint_id is None or "://" in str(checkpoint_id):
            return "the checkpoint is in no local file system", None
        storage_writer = FileSystemWriter(checkpoint_id)
    if type(storage_writer) is not FileSystemWriter or storage_writer._uses_torch():
        reason = f"the storage writer is a {type(storage_writer).__qualname__} or writes through torch's own code"
    elif planner is not None and (
        type(planner) is not DefaultSavePlanner or planner.dedup_save_to_lowest_rank
    ):
        reason = (
            f"the planner is a {type(planner).__qualname__} or keeps replicas on the lowest rank"
        )
    else:
        reason = "" if use_collectives else "use_collectives is False"
    return reason, storage_writer


def _global_ranks(process_group: dist.ProcessGroup | None, no_dist: bool) -> Sequence[int]:
    if not dist.is_available() or not dist.is_initialized():
        return [0]
    if no_dist:
        return [dist.get_rank()]
    return dist.get_process_group_ranks(
        process_group if process_group is not None else dist.group.WORLD
    )


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.info("%s", message)


@dataclasses.dataclass
class _Opening:
    """What is known when the ranks have compared their digests."""

    save_id: int
    dtensors_agree: bool
    others_agree: bool
    rest_anywhere: bool
    owners: list[tuple[int, int, int, int]]  # the process of each rank


class Save:
    """One save of one rank: :meth:`open`, :meth:`plan`, :meth:`write`, :meth:`commit`, in this
    order; :meth:`run` does all.

    ``open``, ``plan`` and ``commit`` talk to the other ranks and are called by all of them;
    ``write`` does not and may run on another thread. After an exception of any of them
    :meth:`abandon` removes what can be removed."""

    def __init__(
        self,
        state_dict: dict[str, Any],
        writer: FileSystemWriter,
        planner: DefaultSavePlanner,
        agreement: Agreement,
        global_ranks: Sequence[int],
        captured: Captured | None = None,
    ) -> None:
        self._captured = captured
        self.failed_before: BaseException | None = (
            None  # makes the save fail in its first step, on all ranks
        )
        self._state_dict, self._writer, self._planner = state_dict, writer, planner
        self._agreement, self._global_ranks = agreement, global_ranks
        self._claim: str | None = None
        self._names: list[str] = []  # of this rank's files, as they are begun
        self._metadata: Future[tuple[Any, list[tuple[str, int]]]] | None = None
        self._thread: threading.Thread | None = None
        self._rest, self._rest_metadata = SavePlan([]), Metadata({})
        self._prepared: tuple[StaticPlan, Objects] | None = None
        self._staged: Staged | None = None  # what is written, if not the state itself
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def run(self) -> SavedMetadata:
        try:
            self.open()
            self.plan()
            error = None
            votes: bytes = b""
            try:
                votes = self.write()
            except BaseException as caught:
                error = caught
            return self.commit(votes, error)
        except BaseException:
            self.abandon()
            raise

    def open(self) -> None:
        """Sorts the state dict, claims the directory (the coordinator), and compares digests: one
        small all-gather."""

        def work() -> bytes:
            if self.failed_before is not None:
                raise self.failed_before
            self._writer.set_up_storage_writer(
                self._agreement.is_coordinator, rank=self._agreement.rank, use_collectives=True
            )
            if self._captured is not None and self._captured.structure is not None:
                self._captured.hand_to_planner()
                self._planner = self._captured.planner
                self._local = LocalState(self._planner, sort=False)
                digests = self._captured.structure.digests
            else:
                self._planner.set_up_planner(
                    self._state_dict,
                    storage_meta=self._writer.storage_meta(),
                    is_coordinator=self._agreement.is_coordinator,
                )
                self._state_dict = {}  # it is flat now
                self._local = LocalState(self._planner)
                digests = self._local.digests()
            _C.make_directories(str(self._writer.path), self._writer.sync_files)
            save_id = 0
            if self._agreement.is_coordinator:
                save_id = self._writer._claim_directory()
                self._claim, self._writer._claim = self._writer._claim, None
            return _OPENING.pack(digests, bool(self._local.rest), save_id, *_C.process_identity())

        slots = [_OPENING.unpack(slot) for slot in self._agreement.run("plan", work)]
        digests = [slot[0] for slot in slots]
        self._opening = _Opening(
            slots[0][2],
            len({digest[:DIGEST_BYTES] for digest in digests}) == 1,
            len({digest[DIGEST_BYTES:] for digest in digests}) == 1,
            any(slot[1] for slot in slots),
            [slot[3:] for slot in slots],
        )

    @property
    def agreed(self) -> bool:
        """After :meth:`open`: whether every rank has planned the same, and nothing has to be
        gathered."""
        opening = self._opening
        return opening.dtensors_agree and opening.others_agree and not opening.rest_anywhere

    def plan(self) -> None:
        """Plans this rank's part; what the digests don't cover is gathered, planned by DCP on the
        coordinator, scattered."""
        opening, local = self._opening, self._local
        if not self.agreed:
            local.sort()
        if not self.agreed:
            names = list(local.rest)
            if not opening.dtensors_agree:
                names += local.dtensors
            if not opening.others_agree:
                names += local.tensors + local.objects
            _say_once(
                "planned through DCP, by the coordinator: "
                + ", ".join(
                    (
                        []
                        if opening.dtensors_agree
                        else ["all DTensors, since meshes or shapes differ from rank to rank"]
                    )
                    + (
                        []
                        if opening.others_agree
                        else ["all other values, since some differ from rank to rank"]
                    )
                    + (
                        ["tensors of types or placements that only DCP knows"]
                        if opening.rest_anywhere
                        else []
                    )
                )
            )
            self._plan_rest(names)
        self._seconds["plan"] = time.perf_counter() - self._start

    def _plan_rest(self, names: list[str]) -> None:
        agreement, step = self._agreement, "plan"

        def pickled_items() -> bytes:
            self._items = pickle.dumps(
                SavePlan(self._local.items_of(names), planner_data=self._local.paths_of(names))
            )
            return b""

        agreement.run(step, pickled_items)
        gathered = agreement.gather(step, self._items)
        final: list[bytes] = []

        def plan_all() -> bytes:
            plans, self._rest_metadata = plan_rest(
                [pickle.loads(each) for each in gathered], self._local.paths is not None
            )
            final.extend(pickle.dumps(plan) for plan in plans)
            return b""

        agreement.verdict(step, plan_all)
        self._rest = pickle.loads(agreement.scatter(step, final))

    def _prepare(self, objects: Objects | None = None) -> tuple[StaticPlan, Objects]:
        opening, rank = self._opening, self._agreement.rank
        coordinator = self._agreement.is_coordinator
        if self.agreed and self._captured is not None and self._captured.structure is not None:
            static = self._captured.structure.static
        else:
            self._local.sort()
            static = make_static_plan(
                self._local,
                rank,
                self._global_ranks,
                opening.dtensors_agree,
                opening.others_agree,
                coordinator,
            )
        if objects is None:
            objects = pickled(static.objects, self._local.state) if coordinator else []
        if coordinator:
            self._start_metadata(static, [(name, len(data)) for name, data in objects])
        # Its tensors and names are in the plan. The live state goes when the caller lets it go, not
        # when the save is done.
        rest = {item.index.fqn for item in self._rest.items}
        state = self._planner.state_dict
        self._planner.state_dict, self._planner.mappings = (
            {name: state[name] for name in rest if name in state},
            {},
        )
        self._state_dict = {}
        self._local.drop()
        return static, objects

    def stage(self, pool: StagingPool, limit: int | None = None, verify: bool = False) -> Staged:
        """After :meth:`plan`: copies what this rank will write, so that the state dict may change
        before :meth:`write`.

        With ``limit`` what takes no more bytes than that; the others :meth:`write` reads.
        ``verify``: see ``Staged.watch``."""
        static, objects = self._prepare()
        rest = self._planner.state_dict
        held = 0.0 if limit is None else sum(held_by(value) for value in rest.values())
        rest_in_place = limit is not None and held > limit
        if limit is not None:
            limit = 0 if rest_in_place else limit - int(held)
        tensors = [static.tensor_of(piece) for piece in static.pieces]
        self._staged = stage_tensors(
            tensors, self._files(static, objects), len(objects), pool, limit
        )
        self._staged.rest_in_place = rest_in_place
        if verify:
            self._staged.watch((static.names[piece[0]] for piece in static.pieces), tensors)
        self._planner.state_dict = (
            rest if rest_in_place else {name: _copied(value) for name, value in rest.items()}
        )
        self._prepared = dataclasses.replace(static, locals=[]), objects
        return self._staged

    def stage_captured(self, staged: Staged, objects: Objects, verify: bool) -> None:
        """After :meth:`plan`, with ``agreed``: what this rank will write; what is copied may still
        be on its way."""
        static, _ = self._prepared = self._prepare(objects)
        self._staged = staged
        if verify:
            self._staged.watch(
                (static.names[piece[0]] for piece in static.pieces),
                staged.records[: staged.in_place],
            )

    def check_sources(self) -> None:
        """See ``Staged.check_sources``."""
        if self._staged is not None:
            self._staged.check_sources()

    def write(self, on_read: Callable[[], None] = lambda: None) -> bytes:
        """Writes this rank's files and makes them durable. What to vote with.

        ``on_read`` is called once, when nothing more is read from the state.
        """
        if self._prepared is None:
            self._prepared = self._prepare()
            self._seconds["plan"] = time.perf_counter() - self._start
        begin = time.perf_counter()
        static, objects = self._prepared
        assert self._staged is None or len(self._staged.records) == len(static.pieces)
        tensors: Iterable[tuple[str, Any]] = (
            ((static.names[piece[0]], static.tensor_of(piece)) for piece in static.pieces)
            if self._staged is None
            else zip(
                (static.names[piece[0]] for piece in static.pieces),
                self._staged.records,
                strict=True,
            )
        )
        results, size = write_files(
            self._writer,
            lambda number: _C.data_file_name(self._agreement.rank, self._opening.save_id, number),
            self._files(static, objects),
            itertools.chain(objects, tensors),
            self._staged,
            self._rest.items,
            self._planner,
            self._names,
            on_read,
        )
        self._staged = self._prepared = None  # the next save has the memory
        if self._writer.sync_files and self._names:
            _C.sync_directory(str(self._writer.path))
        self._seconds["write"] = time.perf_counter() - begin
        vote = _VOTE.pack(size, self._seconds["plan"], self._seconds["write"])
        return vote + (pickle.dumps(results) if results else b"")

    def _files(self, static: StaticPlan, objects: Objects) -> list[_C.PlannedFile]:
        return static.plan.layout(
            static.pieces, [len(data) for _, data in objects], self._writer.single_file_per_rank
        )

    def _start_metadata(self, static: StaticPlan, objects: list[tuple[str, int]]) -> None:
        """Begins to build the whole metadata on a thread, off the path of the bytes."""
        opening, paths, plan = (
            self._opening,
            self._local.paths,
            static.plan,
        )  # and not the tensors that are in `static`
        skeleton = Metadata(
            {}, version=_stock.CURRENT_DCP_VERSION, storage_meta=self._writer.storage_meta()
        )
        writers = [
            (owner, objects if rank == 0 else []) for rank, owner in enumerate(opening.owners)
        ]
        save_id, single = opening.save_id, self._writer.single_file_per_rank
        planned = None
        if self.agreed and paths is not None:
            planned = plan.paths(
                static.objects,
                map(paths.__getitem__, itertools.chain(static.names, static.objects)),
            )
        # What DCP has planned a part of has to be put together, and other paths than DCP makes are
        # pickle's to write.
        apart = not self.agreed or (planned is None and paths is not None)
        planner_data = self._local.paths_of([*static.names, *static.objects]) if apart else None

        def build() -> tuple[Any, list[tuple[str, int]]]:
            built = plan.complete_metadata(skeleton, planned, writers, save_id, single)
            assert built is not None
            if not apart:
                return built
            metadata = decode_metadata(built[0], self._writer.path)
            if planner_data is not None:
                metadata.planner_data = {**(self._rest_metadata.planner_data or {}), **planner_data}
            return metadata, built[1]

        metadata = self._metadata = Future()

        def run() -> None:
            try:
                metadata.set_result(build())
            except BaseException as error:
                metadata.set_exception(error)

        # Not an executor: these take nothing on once the interpreter has begun to end, which waits
        # for asynchronous saves.
        thread = threading.Thread(target=run, name="torch_hsdp_ckpt_metadata")
        thread.start()
        self._thread = thread

    def commit(self, vote: bytes, error: BaseException | None = None) -> SavedMetadata:
        """One vote of all ranks, the coordinator's commit, its verdict to all ranks."""
        begin = time.perf_counter()
        votes = self._agreement.exchange("write", vote, error)
        heads = [_VOTE.unpack(each[: _VOTE.size]) for each in votes]
        self._names = []  # from here on they may be committed
        encoded: list[bytes | memoryview] = []

        def commit() -> bytes:
            assert self._metadata is not None
            assert self._claim is not None
            metadata, planned = self._metadata.result()
            files = {name: (name, size, True) for name, size in planned}
            results = [
                result
                for each in votes
                for result in (pickle.loads(each[_VOTE.size :]) if each[_VOTE.size :] else [])
            ]
            if isinstance(metadata, Metadata):
                metadata.state_dict_metadata.update(self._rest_metadata.state_dict_metadata)
                metadata.storage_data.update(
                    (result.index, result.storage_data) for result in results
                )
                for result in results:
                    name = result.storage_data.relative_path
                    files[name] = (name, result.file_size, True)
                metadata = encode_metadata(metadata)
            claim, self._claim = self._claim, None  # from here on it is for the commit to clean up
            self._writer._commit(claim, metadata, list(files.values()))
            encoded.append(metadata)
            return bytes(metadata[-_TRAILER_BYTES:])

        trailer = self._agreement.verdict("commit", commit)
        self._end_thread()
        now = time.perf_counter()
        self._seconds |= {"commit": now - begin, "total": now - self._start}
        path = str(self._writer.path)
        result = SaveResult(
            path,
            self._agreement.rank,
            tuple(head[0] for head in heads),
            tuple(head[2] for head in heads),
            self._seconds,
        )
        _logger.log(
            logging.INFO if self._agreement.is_coordinator else logging.DEBUG,
            "saved %s: %s",
            path,
            result,
        )
        return SavedMetadata.lazy(lambda: _read_back(path, trailer, encoded), result)

    def abandon(self) -> None:
        """After an exception: gives up the claim and removes this rank's files, unless they may
        still be committed."""
        self._end_thread()
        if self._claim is not None:
            _C.release_claim(str(self._writer.path), self._claim)
        # Without an answer from the peers nobody knows but the coordinator, who alone commits.
        if not self._agreement.broken or self._agreement.is_coordinator:
            remove_quietly(self._writer.path, self._names)
        self._claim, self._names = None, []
        # The caller may keep what this save belongs to, and has dropped the model.
        self._state_dict, self._staged, self._prepared, self._planner.state_dict = (
            {},
            None,
            None,
            {},
        )
        if hasattr(self, "_local"):
            self._local.drop()

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _copied(value: Any) -> Any:
    return copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)


def pickled(names: Sequence[str], state: Mapping[str, Any]) -> Objects:
    return [(name, _pickled(state[name])) for name in names]


def _pickled(value: Any) -> memoryview:
    """An object's record, as DCP's planner makes it."""
    if isinstance(value, Pickled):
        return memoryview(value.data)
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getbuffer()


def _read_back(path: str, trailer: bytes, encoded: list[bytes | memoryview]) -> Metadata:
    if encoded:
        return decode_metadata(encoded[0], path)
    data = read_metadata_bytes(os.path.join(path, ".metadata"))
    if data[-_TRAILER_BYTES:] != trailer:
        raise CheckpointError(
            f"{path}/.metadata: a later save has replaced the checkpoint whose metadata this was"
        )
    return decode_metadata(data, path)
