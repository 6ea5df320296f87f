"""First phase of a save: ranks compare what they hold, the coordinator claims the directory.

Everything that ranks tell each other before the first byte is told here: one small all-gather;
where their states differ a second one of what they hold; and DCP's plans of what only it knows how
to divide."""

import dataclasses
import pickle
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ... import _C
from ...common.agreement import Agreement, agreement_of
from ..storage.directory import encoded
from ..storage.saved_objects import check_saved_object, check_trusted_object
from ..storage.writer import FileSystemWriter
from .division import DIGEST_BYTES, Division, Holdings, Role, divide, packed_holdings, roles_of
from .gathered_plan import GatheredPlan, gather_plan
from .local_state import LocalState
from .static_plan import StaticPlan
from .through_dcp import say_once
from .unfinished import Unfinished

# What a rank tells the others: two digests, whether DCP has to plan something, the save's id (the
# coordinator's counts), and which process writes, for the names of its files.
_OPENING = struct.Struct(f"<{DIGEST_BYTES}s{DIGEST_BYTES}s?QIIqQ")

_THROUGH_DCP = (
    "planned through DCP, by the coordinator: tensors of types or placements that only DCP knows"
)


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


class KeptPlan(Protocol):
    """A plan that was there before the save was opened, and the state that it is of."""

    @property
    def division(self) -> Division:
        """The one that it assumes."""

    def prepare_anew(self) -> None:
        """To be called before the state is planned by another division. Raises CheckpointError for
        what is gone of it."""

    def replace(self, division: Division, static: StaticPlan) -> None:
        """The next save of the same structure assumes this division."""


@dataclasses.dataclass(frozen=True)
class PreparedState:
    """A rank's state, ready to be compared with the other ranks' ones.

    ``needs_gathering``: it holds tensors that only DCP knows how to divide. ``kept``: the plan that
    there is of it."""

    local: LocalState
    holdings: Holdings
    needs_gathering: bool
    kept: KeptPlan | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """A save that all ranks have begun.

    ``gathered``: what DCP has planned, if it ``is_gathered``; each rank plans the rest of the state
    alone. ``writers``: the process of each rank. ``unfinished`` has to be abandoned by whoever
    holds this value when the save fails."""

    request: SaveRequest
    state: PreparedState
    division: Division
    is_gathered: bool
    gathered: GatheredPlan
    save_id: int
    writers: Sequence[_C.ProcessIdentity]
    unfinished: Unfinished

    @property
    def as_assumed(self) -> bool:
        """Whether the state's plan is the one that there was before."""
        kept = self.state.kept
        return kept is not None and kept.division == self.division and not self.is_gathered


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
    holdings = local.holdings(request.global_ranks)
    return PreparedState(local, holdings, bool(local.names.gathered))


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
    state, roles = begun.state, [slot.role for slot in slots]
    division = _divide(agreement, state, roles)
    is_gathered = any(slot.needs_gathering for slot in slots)
    gathered = GatheredPlan()
    if is_gathered:
        say_once(_THROUGH_DCP)
        gathered = gather_plan(agreement, state.local, lambda: _names_to_gather(state))
    return Opened(
        request=request,
        state=state,
        division=division,
        is_gathered=is_gathered,
        gathered=gathered,
        save_id=slots[0].save_id,
        writers=[slot.writer for slot in slots],
        unfinished=unfinished,
    )


def _divide(agreement: Agreement, state: PreparedState, roles: Sequence[Role]) -> Division:
    rank, size = agreement.rank, agreement.size
    if len(set(roles)) == 1:
        return Division.alike(rank, size)
    speaks = roles_of(roles)[rank] == rank
    told = agreement.run("plan", lambda: packed_holdings(state.holdings, speaks))
    division = divide(rank, roles, told)
    if not division.torn:
        return division
    told = agreement.run("plan", lambda: pickle.dumps(state.local.dtensors_on(division.torn)))
    return division.with_torn(told)


def _names_to_gather(state: PreparedState) -> Sequence[str]:
    if state.kept is not None:
        state.kept.prepare_anew()
    return state.local.names.gathered


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

    role: Role
    needs_gathering: bool
    save_id: int
    writer: _C.ProcessIdentity


def _packed_opening(begun: _Begun) -> bytes:
    state, process = begun.state, _C.process_identity()
    return _OPENING.pack(
        state.holdings.dtensors,
        state.holdings.others,
        state.needs_gathering,
        begun.save_id,
        process.host,
        process.boot,
        process.pid,
        process.start,
    )


def _unpacked_opening(slot: bytes) -> _Slot:
    dtensors, others, needs_gathering, save_id, *process = _OPENING.unpack(slot)
    return _Slot(Role(dtensors, others), needs_gathering, save_id, _C.ProcessIdentity(*process))
