"""First phase of a save: ranks compare what they hold, the coordinator claims the directory.

Everything that ranks tell each other before the first byte is told here: one small all-gather, and
where their states differ the plans of those parts, which DCP makes."""

import dataclasses
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ... import _C
from ...common.agreement import Agreement, agreement_of
from ..storage.directory import encoded
from ..storage.saved_objects import check_saved_object, check_trusted_object
from ..storage.writer import FileSystemWriter
from .gathered_plan import GatheredPlan, gather_plan
from .local_state import DIGEST_BYTES, LocalState, SortedNames
from .through_dcp import say_once
from .unfinished import Unfinished

# What a rank tells the others: two digests, whether DCP has to plan something, the save's id (the
# coordinator's counts), and which process writes, for the names of its files.
_OPENING = struct.Struct(f"<{2 * DIGEST_BYTES}s?QIIqQ")


@dataclasses.dataclass(frozen=True)
class SaveRequest:
    """What a call asks for: who writes, among which ranks. ``started``: by ``perf_counter``.
    ``trust_objects``: objects that take trust to be loaded are saved too."""

    writer: FileSystemWriter
    agreement: Agreement
    global_ranks: Sequence[int]  # of the saving process group, in its order
    started: float
    trust_objects: bool

    def check_object(self, name: str, data: memoryview) -> None:
        """Raises CheckpointError for an object that may not be saved."""
        check = check_trusted_object if self.trust_objects else check_saved_object
        check(name, data)


def _nothing() -> None: ...


@dataclasses.dataclass(frozen=True)
class PreparedState:
    """A rank's state, ready to be compared with the other ranks' ones.

    ``needs_gathering``: it holds tensors that only DCP knows how to divide. ``keep_for_planning``:
    to be called before the state is planned anew, since ranks have not planned the same."""

    local: LocalState
    digests: bytes
    needs_gathering: bool
    keep_for_planning: Callable[[], None] = _nothing


@dataclasses.dataclass(frozen=True)
class Opened:
    """A save that all ranks have begun.

    ``gathered``: what DCP has planned; each rank plans the rest of the state alone. ``writers``:
    the process of each rank. ``unfinished`` has to be abandoned by whoever holds this value when
    the save fails."""

    request: SaveRequest
    local: LocalState
    comparison: "Comparison"
    gathered: GatheredPlan
    save_id: int
    writers: Sequence[_C.ProcessIdentity]
    unfinished: Unfinished


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the ranks' digests say."""

    dtensors_agree: bool
    others_agree: bool  # plain tensors and objects
    any_needs_gathering: bool

    @property
    def agreed(self) -> bool:
        """Whether every rank has planned the same, and nothing has to be gathered."""
        return self.dtensors_agree and self.others_agree and not self.any_needs_gathering

    def divide(self, names: SortedNames) -> SortedNames:
        """The names by who plans them: those that ranks disagree on are ``gathered`` too."""
        gathered = list(names.gathered)
        if not self.dtensors_agree:
            gathered += names.dtensors
        if not self.others_agree:
            gathered += names.tensors + names.objects
        return SortedNames(
            dtensors=names.dtensors if self.dtensors_agree else [],
            tensors=names.tensors if self.others_agree else [],
            objects=names.objects if self.others_agree else [],
            gathered=gathered,
        )

    def describe(self) -> str:
        """Why something has to be gathered, for the log."""
        reasons = []
        if not self.dtensors_agree:
            reasons.append("all DTensors, since meshes or shapes differ from rank to rank")
        if not self.others_agree:
            reasons.append("all other values, since some differ from rank to rank")
        if self.any_needs_gathering:
            reasons.append("tensors of types or placements that only DCP knows")
        return "planned through DCP, by the coordinator: " + ", ".join(reasons)


def request_of(
    writer: FileSystemWriter,
    process_group: dist.ProcessGroup | None,
    purpose: str,
    no_dist: bool,
    trust_objects: bool,
) -> SaveRequest:
    """The request of a call, made by all ranks of the group. ``purpose``: see ``agreement_of``."""
    agreement = agreement_of(process_group, purpose, no_dist)
    global_ranks = _global_ranks(process_group, no_dist)
    return SaveRequest(writer, agreement, global_ranks, time.perf_counter(), trust_objects)


def _global_ranks(process_group: dist.ProcessGroup | None, no_dist: bool) -> Sequence[int]:
    if not dist.is_available() or not dist.is_initialized():
        return [0]
    if no_dist:
        return [dist.get_rank()]
    group = dist.group.WORLD if process_group is None else process_group
    return dist.get_process_group_ranks(group)


def prepare_state(
    request: SaveRequest, values: dict[str, Any], planner: DefaultSavePlanner
) -> PreparedState:
    """Flattens a state dict, sorts it, and sums up what other ranks have to know of it."""
    planner.set_up_planner(
        values,
        storage_meta=request.writer.storage_meta(),
        is_coordinator=request.agreement.is_coordinator,
    )
    local = LocalState(planner)
    return PreparedState(local, local.digests(), bool(local.names.gathered))


def open_save(request: SaveRequest, prepare: Callable[[], PreparedState]) -> Opened:
    """Begins a save on all ranks.

    ``prepare`` makes this rank's state ready; what it raises, every rank raises. Nothing is left of
    a save that does not open."""
    unfinished = Unfinished(request.writer, request.agreement)
    try:
        return _open(request, prepare, unfinished)
    except BaseException:
        unfinished.abandon()
        raise


def _open(
    request: SaveRequest, prepare: Callable[[], PreparedState], unfinished: Unfinished
) -> Opened:
    agreement = request.agreement
    begun, told = agreement.run_and_tell(
        "plan", lambda: _begin(request, prepare, unfinished), _packed_opening
    )
    slots = [_unpacked_opening(slot) for slot in told]
    local, comparison = begun.state.local, _compare(slots)
    gathered = GatheredPlan()
    if not comparison.agreed:
        say_once(comparison.describe())
        gathered = gather_plan(agreement, local, lambda: _names_to_gather(begun.state, comparison))
    return Opened(
        request=request,
        local=local,
        comparison=comparison,
        gathered=gathered,
        save_id=slots[0].save_id,
        writers=[slot.writer for slot in slots],
        unfinished=unfinished,
    )


def _names_to_gather(state: PreparedState, comparison: Comparison) -> Sequence[str]:
    state.keep_for_planning()
    return comparison.divide(state.local.names).gathered


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What a rank has to tell the others of. ``save_id``: the coordinator's counts."""

    state: PreparedState
    save_id: int


def _begin(
    request: SaveRequest, prepare: Callable[[], PreparedState], unfinished: Unfinished
) -> _Begun:
    agreement, writer = request.agreement, request.writer
    writer.set_up_storage_writer(
        agreement.is_coordinator, rank=agreement.rank, use_collectives=True
    )
    state = prepare()
    _C.make_directories(encoded(writer.path), writer.sync_files)
    save_id = unfinished.claim_directory() if agreement.is_coordinator else 0
    return _Begun(state, save_id)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """What one rank has told."""

    dtensor_digest: bytes
    other_digest: bytes
    needs_gathering: bool
    save_id: int
    writer: _C.ProcessIdentity


def _packed_opening(begun: _Begun) -> bytes:
    state, process = begun.state, _C.process_identity()
    return _OPENING.pack(
        state.digests,
        state.needs_gathering,
        begun.save_id,
        process.host,
        process.boot,
        process.pid,
        process.start,
    )


def _unpacked_opening(slot: bytes) -> _Slot:
    digests, needs_gathering, save_id, *process = _OPENING.unpack(slot)
    return _Slot(
        dtensor_digest=digests[:DIGEST_BYTES],
        other_digest=digests[DIGEST_BYTES:],
        needs_gathering=needs_gathering,
        save_id=save_id,
        writer=_C.ProcessIdentity(*process),
    )


def _compare(slots: Sequence[_Slot]) -> Comparison:
    return Comparison(
        dtensors_agree=len({slot.dtensor_digest for slot in slots}) == 1,
        others_agree=len({slot.other_digest for slot in slots}) == 1,
        any_needs_gathering=any(slot.needs_gathering for slot in slots),
    )
